"""Inputs of a BuildKit build: the files of its steps, its mounts, secrets and base image."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import tarfile
import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from guix_tasks.buildkit.bakefile import ENVIRONMENT, WORK
from guix_tasks.engine.accounts import remote_digest
from guix_tasks.errors import BuilderError, UsageError
from guix_tasks.files import read_file
from guix_tasks.oci.reference import quoted
from guix_tasks.oci.tar import as_file
from guix_tasks.settings.values import Sandbox
from guix_tasks.stages.channel_access import access_files
from guix_tasks.stages.container import EXTRA_CA, common_files

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from guix_tasks.engine.api import Engine, Image
    from guix_tasks.oci.reference import ImageReference
    from guix_tasks.settings import Settings


_KEPT_SECONDS = 7 * 24 * 3600
"""Time for which a saved base image stays after its last use."""


def write_environment(settings: Settings, directory: Path) -> None:
    """Write the environment of the steps, which is a secret because it may contain a token."""
    if settings.guix_sandbox is not Sandbox.NOCHROOT:
        # An insecure step has the rights of a privileged container.
        settings = replace(settings, guix_sandbox=Sandbox.PRIVILEGED)
    (directory / ENVIRONMENT).write_bytes(common_files(settings)[ENVIRONMENT])


def write_secrets(settings: Settings, directory: Path, channels: str | None) -> dict[str, Path]:
    """Write the files that steps get as secrets, which are in no cache key; return them by name.

    ``channels`` is the content of the channels file to fetch, or None if nothing is fetched.

    Raise ``UsageError`` if a file cannot be read.
    """
    files = {} if channels is None else access_files(settings, channels)
    if settings.extra_ca_file:
        files[EXTRA_CA] = read_file(settings.extra_ca_file)
    paths = {name: directory / "secrets" / str(number) for number, name in enumerate(files)}
    (directory / "secrets").mkdir(exist_ok=True)
    for name, content in files.items():
        paths[name].write_bytes(content)
    return paths


def write_step(
    settings: Settings, directory: Path, name: str, files: Mapping[str, bytes], *, force: bool
) -> None:
    """Write the files that a step sees in ``/var/guix/guix-tasks``.

    ``force`` adds a random file, so that the step equals no step in the builder's cache.
    """
    # The empty file is the mount point of the secret.
    contents = {**common_files(settings), **files, ENVIRONMENT: b""}
    contents.pop(EXTRA_CA, None)
    if force:
        contents["again"] = secrets.token_bytes(16)
    for file, content in contents.items():
        path = directory / WORK / name / file
        _make_parent(path, directory)
        path.write_bytes(content)
        path.chmod(0o755 if content.startswith(b"#!") else 0o644)


def write_mounts(settings: Settings, directory: Path) -> tuple[dict[str, str], dict[str, Path]]:
    """Return ``MOUNTS`` as ``Definition.binds`` and the named contexts that contain them.

    A directory is a context. A file is copied into the context ``WORK``.

    Raise ``UsageError`` if a build step cannot have a mount.
    """
    binds, contexts = {}, {}
    for number, mount in enumerate(settings.mounts):
        # In a Dockerfile, blanks and commas end a target, and BuildKit garbles other characters.
        if not re.fullmatch(r"[\w./+:@%~=-]+", mount.target, re.ASCII):
            raise UsageError(
                f"MOUNTS: {quoted(mount.target)} has a character that a build step's mount cannot "
                "have; use letters, digits, '.', '_' and '-'"
            )
        name, path = f"mount-{number}", ""
        if mount.source.is_dir():
            contexts[name] = mount.source
        elif mount.source.is_file():
            name, path = WORK, f",source=mounts/{number}"
            copy = directory / name / "mounts" / str(number)
            _make_parent(copy, directory)
            shutil.copy(mount.source, copy)
        else:
            raise UsageError(
                f"MOUNTS: {mount.source} is neither a file nor a directory, and a build step can "
                "mount nothing else; remove it"
            )
        access = "" if mount.read_only else ",rw"
        binds[mount.target] = f"type=bind,from={name},target={mount.target}{path}{access}"
    return binds, contexts


def _make_parent(path: Path, root: Path) -> None:
    """Create the directory of a file with the mode that it has in a work container."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for parent in list(path.relative_to(root).parents)[:-1]:
        (root / parent).chmod(0o755)


def local_base_image(engine: Engine, settings: Settings) -> Image | None:
    """Return the engine's base image if its registry has no image or another one of this name.

    A digest of the registry's name proves nothing: the containerd image store gives one to every
    image.
    """
    reference = settings.base_image
    image = engine.image(str(reference))
    if image is None:
        return None
    remote = f"{reference.name}@{remote_digest(engine, settings, str(reference))}"
    return None if remote in image.digests else image


def save_as_layout(engine: Engine, image: Image, reference: ImageReference, kept: Path) -> str:
    """Save an image of the engine as an OCI layout and return it as the value of a named context.

    The layout stays in the directory ``kept`` for later builds, and is removed after a week without
    one.

    Raise ``BuilderError`` if the engine cannot save an OCI layout.
    """
    kept.mkdir(parents=True, exist_ok=True)
    layout = kept / image.id.replace(":", "-")
    for path in kept.iterdir():
        with suppress(FileNotFoundError):  # another build has removed it
            if path != layout and time.time() - path.stat().st_mtime > _KEPT_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
    try:
        if not layout.exists():
            _save(engine, image, layout)
        os.utime(layout)
        index = json.loads((layout / "index.json").read_bytes())
        digest = index["manifests"][0]["digest"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError, tarfile.TarError) as error:
        shutil.rmtree(layout, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise BuilderError(
            f"this engine cannot save {reference} as an OCI layout (Docker 25 and newer can); push "
            "it to a registry that the builder reaches, and set BASE_IMAGE to that reference"
        ) from None
    return f"oci-layout://{layout}@{digest}"


def _save(engine: Engine, image: Image, layout: Path) -> None:
    """Save an image of the engine in a new directory, which is complete if it exists."""
    unfinished = layout.with_name(f"{layout.name}.{secrets.token_hex(4)}")
    try:
        with tarfile.open(fileobj=as_file(engine.save(image.id)), mode="r|") as tar:
            tar.extractall(unfinished, filter="data")
        try:
            unfinished.rename(layout)
        except OSError:
            if not layout.exists():  # another build has saved it
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
