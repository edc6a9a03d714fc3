"""Trial: what was packed is tried in a container that has no Guix."""

from __future__ import annotations

import io
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
from guix_tasks.stages.container import PROJECT_LABEL, archive, container_name, sweep
from guix_tasks.stages.container import project as project_name
from guix_tasks.stages.custom import input_files
from guix_tasks.stages.transfer import pull

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from guix_tasks.settings import Settings
    from guix_tasks.stages.declarations import OwnTest
    from guix_tasks.stages.project import Project

FOLDER = "/test"
"""Where the command finds its inputs."""

_STORE = "/gnu"
"""What a container has none of before the tarball is unpacked."""


def try_each(project: Project, test: OwnTest, image: str) -> None:
    """Run a test for each platform.  Raises ``CheckError`` for the first that fails."""
    for each in project.each_platform():
        try_pack(each, test, image)


def try_pack(project: Project, test: OwnTest, image: str = "") -> None:
    """Unpack the last tarball at the root of a container without network, and run a command there.

    The container is one of ``image``, or of the test's.  Raises ``UsageError`` where nothing is
    packed or that image has a store itself, and ``CheckError`` where the command fails.
    """
    engine, settings, console = project.engine, project.settings, project.console
    path = _tarball(settings, Platform.parse(str(settings.platform or engine.info().platform)))
    files = input_files(settings, f"test {test.name}", test.inputs)
    place = image or test.image
    where = f"a container of {place}" if place else "a container with nothing else"
    console.say(f"{test.name}: {path.name} in {where}")
    console.command(test.command)
    sweep(engine, settings)

    def prepare(container: str) -> None:
        # Of a folder that is there the first piece is enough.
        if not engine.is_dry and next(engine.copy_out(container, _STORE), b""):
            raise UsageError(
                f"{test.name}: {place} has a {_STORE} itself, so it proves nothing; name an image "
                "without Guix"
            )
        with path.open("rb") as tarball:
            engine.copy_in(container, tarball)
        if files:
            engine.copy_in(container, archive(files, folder=FOLDER, mode=0o644))

    def failed(status: int) -> CheckError:
        return CheckError(
            f"{test.name}: {shlex.join(test.command)} ended with status {status} in {where}; the "
            "output above says why"
        )

    with _image(project, place) as found:
        spec = ContainerSpec(
            name=container_name("test"),
            image=found,
            command=test.command,
            labels={PROJECT_LABEL: project_name(settings)},
            network="none",
            platform=str(settings.platform) if settings.platform else None,
        )
        for is_error, data in run_to_end(engine, spec, failed, prepare):
            console.stream(data, error=is_error)
    console.end_streams()
    if not engine.is_dry:
        console.say(f"{test.name}: passed")


def _tarball(settings: Settings, platform: Platform) -> Path:
    system = platform.guix_system
    for packed in load(settings):
        if (packed.system, packed.format) != (system, TARBALL):
            continue
        path = settings.output_folder / packed.file
        if path.exists() and content_digest(path) == packed.sha256:
            return path
        raise UsageError(f"{path} is not what was packed; run `inv pack` again")
    raise UsageError(
        f"no tarball for {system} is in {settings.output_folder}; run `inv pack` first"
    )


@contextmanager
def _image(project: Project, name: str) -> Iterator[str]:
    """The image of this name, pulled if need be; without a name, an empty one for a while."""
    engine = project.engine
    if not name:
        tag = f"guix-tasks/nothing:{secrets.token_hex(6)}"
        try:
            yield engine.import_rootfs(_nothing(), tag)
        finally:
            engine.untag(tag)
        return
    try:
        reference = str(ImageReference.parse(name))
    except ValueError as error:
        raise UsageError(f"the image {name!r}: {error}") from None
    if engine.image(reference) is None:
        pull(project, reference)
    yield reference


def _nothing() -> Iterator[bytes]:
    buffer = io.BytesIO()
    tarfile.open(fileobj=buffer, mode="w").close()
    yield buffer.getvalue()
