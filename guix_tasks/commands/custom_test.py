"""Run custom tests of a packed tarball in a container without Guix."""

from __future__ import annotations

import secrets
import shlex
import tarfile
from contextlib import contextmanager
from typing import TYPE_CHECKING

from guix_tasks.commands.pack_records import load
from guix_tasks.engine.api import ContainerSpec, run_to_end
from guix_tasks.errors import CheckError, UsageError
from guix_tasks.files import content_digest
from guix_tasks.guix import TARBALL
from guix_tasks.oci.platform import Platform
from guix_tasks.oci.reference import ImageReference
from guix_tasks.stages.container import (
    archive,
    container_name,
    image_platform,
    project_labels,
    sweep,
)
from guix_tasks.stages.custom import input_files
from guix_tasks.stages.transfer import pull

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from guix_tasks.settings import Settings
    from guix_tasks.stages.declarations import CustomTest
    from guix_tasks.stages.project import Project

INPUTS_DIRECTORY = "/test"
"""Directory of the test's inputs in the container."""

_EMPTY_ARCHIVE = bytes(tarfile.RECORDSIZE)

_STORE = "/gnu"
"""Directory that must not exist before the tarball is unpacked."""


def run_pack_test(project: Project, test: CustomTest, image: str = "") -> None:
    """Unpack the latest tarball in a container without network and run the test's command.

    The container is created from ``image``, else from the image of the test, else from an empty
    image.

    Raise ``UsageError`` if there is no tarball or if the image contains a store, and ``CheckError``
    if the command fails.
    """
    engine, settings, console = project.engine, project.settings, project.console
    path = _tarball(settings, Platform.parse(image_platform(engine, settings)))
    files = input_files(settings, f"test {test.name}", test.inputs)
    image = image or test.image
    location = f"a container of {image}" if image else "an empty container"
    console.print(f"{test.name}: {path.name} in {location}")
    console.command(test.command)
    sweep(engine, settings)

    def prepare(container: str) -> None:
        # One chunk proves that the directory exists.
        if not engine.is_dry and next(engine.copy_out(container, _STORE), b""):
            raise UsageError(
                f"{test.name}: {image} contains {_STORE}, so the test would prove nothing; use "
                "an image without Guix"
            )
        with path.open("rb") as tarball:
            engine.copy_in(container, tarball)
        if files:
            engine.copy_in(container, archive(files, directory=INPUTS_DIRECTORY, mode=0o644))

    def failed(status: int) -> CheckError:
        return CheckError(
            f"{test.name}: {shlex.join(test.command)} ended with status {status} in {location}; "
            "the output above shows the reason"
        )

    with _test_image(project, image) as reference:
        spec = ContainerSpec(
            name=container_name("test"),
            image=reference,
            command=test.command,
            labels=project_labels(settings),
            network="none",
            platform=str(settings.platform) if settings.platform else None,
        )
        for is_error, data in run_to_end(engine, spec, failed, prepare):
            console.stream(data, error=is_error)
    console.end_streams()
    if not engine.is_dry:
        console.print(f"{test.name}: passed")


def _tarball(settings: Settings, platform: Platform) -> Path:
    system = platform.guix_system
    for packed in load(settings):
        if (packed.system, packed.format) != (system, TARBALL):
            continue
        path = settings.output_directory / packed.file
        if path.exists() and content_digest(path) == packed.sha256:
            return path
        raise UsageError(f"{path} differs from the packed file; run `inv pack` again")
    raise UsageError(
        f"{settings.output_directory} contains no tarball for {system}; run `inv pack` first"
    )


@contextmanager
def _test_image(project: Project, name: str) -> Iterator[str]:
    """Provide an image, pulled if it is missing; without a name, a temporary empty image."""
    engine = project.engine
    if not name:
        tag = f"guix-tasks/nothing:{secrets.token_hex(6)}"
        try:
            yield engine.import_rootfs(iter([_EMPTY_ARCHIVE]), tag)
        finally:
            engine.untag(tag)
        return
    try:
        reference = str(ImageReference.parse(name))
    except ValueError as error:
        raise UsageError(f"invalid image {name!r}: {error}") from None
    if engine.image(reference) is None:
        pull(project, reference)
    yield reference
