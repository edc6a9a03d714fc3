"""The folder that a BuildKit build is made from: what its steps see, and what is handed to it."""

from __future__ import annotations

import json
import re
import secrets
import shutil
import tarfile
from dataclasses import replace
from typing import TYPE_CHECKING

from guix_tasks.buildkit.bakefile import ENVIRONMENT, WORK, Bind
from guix_tasks.engine.credentials import remote_digest
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
    from guix_tasks.settings import Mount, Settings


def write_environment(settings: Settings, folder: Path) -> None:
    """The environment of the steps, which is mounted as a secret: it may hold a token."""
    if settings.guix_sandbox is not Sandbox.NOCHROOT:
        settings = replace(settings, guix_sandbox=Sandbox.PRIVILEGED)  # what a step is
    (folder / ENVIRONMENT).write_bytes(common_files(settings)[ENVIRONMENT])


def write_secrets(settings: Settings, folder: Path, channels: str | None) -> dict[str, Path]:
    """What is mounted as secrets besides, since a step is the same without it; by its names.

    ``channels`` is the channels file of what is fetched, where anything is.  Raises ``UsageError``.
    """
    files = {} if channels is None else access_files(settings, channels)
    if settings.extra_ca_file:
        files[EXTRA_CA] = read_file(settings.extra_ca_file)
    paths = {name: folder / "secrets" / str(number) for number, name in enumerate(files)}
    (folder / "secrets").mkdir(exist_ok=True)
    for name, content in files.items():
        paths[name].write_bytes(content)
    return paths


def write_step(
    settings: Settings, folder: Path, name: str, files: Mapping[str, bytes], *, again: bool
) -> None:
    """What a step sees at ``container.FOLDER``; ``again`` lets it be like no step in the cache."""
    # The secret is mounted over an empty file.
    everything = {**common_files(settings), **files, ENVIRONMENT: b""}
    everything.pop(EXTRA_CA, None)
    if again:
        everything["again"] = secrets.token_bytes(16)
    for file, content in everything.items():
        path = folder / WORK / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.chmod(0o755 if content.startswith(b"#!") else 0o644)


def write_mounts(settings: Settings, folder: Path) -> tuple[list[Bind], dict[str, Path]]:
    """``MOUNTS``, and the named contexts that they are in; a file is copied into one of ours."""
    binds, contexts = [], {}
    for number, mount in enumerate(settings.mounts):
        name, source = f"mount-{number}", ""
        _refuse_mount(mount)
        if mount.source.is_dir():
            contexts[name] = mount.source
        else:
            name, source = WORK, f"mounts/{number}"
            copy = folder / name / source
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(mount.source, copy)
        binds.append(Bind(name, source, mount.target, mount.read_only))
    return binds, contexts


def _refuse_mount(mount: Mount) -> None:
    if not mount.source.is_dir() and not mount.source.is_file():
        raise UsageError(
            f"MOUNTS: {mount.source} is neither a file nor a folder, and a build is handed nothing "
            "else; leave it out"
        )
    # In a Dockerfile a blank ends a target, a comma too, and what is not ASCII is garbled.
    if not re.fullmatch(r"[\w./+:@%~=-]+", mount.target, re.ASCII):
        raise UsageError(
            f"MOUNTS: {quoted(mount.target)} has a character that a build step's mount cannot "
            "have; write letters, digits, and '.', '_' or '-' between them"
        )


def only_here(engine: Engine, settings: Settings) -> Image | None:
    """The base image, where the engine has it and the registry has not, or has another of its name.

    That an image has a registry's digest proves nothing: the containerd image store gives one to
    every image.
    """
    reference = settings.base_image
    image = engine.image(str(reference))
    if image is None:
        return None
    held = f"{reference.name}@{remote_digest(engine, settings, str(reference))}"
    return None if held in image.digests else image


def hand_over(engine: Engine, image: Image, reference: ImageReference, folder: Path) -> str:
    """An image of the engine as a context that any builder can read."""
    layout = folder / "base-image"
    stream = as_file(engine.save(image.id))
    try:
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            tar.extractall(layout, filter="data")
        index = json.loads((layout / "index.json").read_text())
        digest = index["manifests"][0]["digest"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError, tarfile.TarError):
        raise BuilderError(
            f"this engine cannot save {reference} as an OCI layout (Docker 25 and newer can); push "
            "it to a registry that the builder reaches, and name that in BASE_IMAGE"
        ) from None
    return f"oci-layout://{layout}@{digest}"
