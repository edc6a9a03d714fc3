"""Squash all layers above the base stage into one layer."""

from __future__ import annotations

import json
import tarfile
import tempfile
import time
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import IO, TYPE_CHECKING, cast

from guix_tasks.errors import UsageError
from guix_tasks.oci.tar import new_archive
from guix_tasks.stages import images
from guix_tasks.stages.commit import commit_image
from guix_tasks.stages.container import WORK_DIRECTORY, archive, shell_work, work_container
from guix_tasks.stages.images import SQUASH, shared_layers
from guix_tasks.stages.lifecycle import Lifecycle
from guix_tasks.stages.runner import print_result, run_container
from guix_tasks.stages.volumes import check_volumes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from guix_tasks.engine.api import Image
    from guix_tasks.stages.project import Project

WHITEOUT = ".wh."
OPAQUE = ".wh..wh..opq"
"""Names that mark a deleted file, or a replaced directory, of a lower layer (OCI image spec)."""

DOCKER_MOUNTS = ("etc/hostname", "etc/hosts", "etc/resolv.conf")
"""Files that Docker mounts over those of the image in each container; they cannot be replaced."""


def squash(project: Project) -> None:
    """Squash the last stage into an image with one layer above the base and the same configuration.

    The engine unpacks the layers into a container of the base stage, which is then committed.

    Raise ``UsageError`` if there is no stage above the base.
    """
    started = time.monotonic()
    ledger, console = project.ledger, project.console
    ledger.drop_unnamed()
    last, base = ledger.last_stage(), ledger.find("base")
    if last is None or base is None or last.id == base.id:
        raise UsageError("nothing to squash: there is no stage above the base; run `inv install`")
    if not _is_on(project, last, base):
        raise UsageError(
            f"cannot squash: {images.proven_stage(last)} is on another base image than "
            f"{ledger.tag('base')}; run `inv base pull install`, then squash"
        )
    check_volumes(project.settings, base)
    images.check_layers(project.engine, base)
    replaced_image = ledger.find(SQUASH)
    if ledger.newest() != last:
        console.print("squash: up to date")
    else:
        with console.step(SQUASH):
            _squash(project, base, last)
        print_result(project, SQUASH, started)
    ledger.point_image(console)
    if replaced_image:
        project.engine.drop(replaced_image.id)


def _is_on(project: Project, image: Image, base: Image) -> bool:
    """Whether a stage's image has all layers of the base, or was made from its current stages."""
    if shared_layers(image, base) == len(base.layers):
        return True
    lifecycle, stage = Lifecycle(project), images.proven_stage(image)
    while stage and (parent := lifecycle.parent_of(stage)):
        below = project.ledger.find(parent)
        if below is None or not images.is_child(image, below):
            return False
        image, stage = below, parent
    return image.id == base.id


def _squash(project: Project, base: Image, last: Image) -> None:
    engine = project.engine
    # Unpacking deletes nothing, so each start removes the files that the next layer deletes.
    remove = f"xargs -0 rm -rf -- <{WORK_DIRECTORY}/deleted && rm -rf {WORK_DIRECTORY}"
    work = shell_work(SQUASH, ("-c", remove), {"deleted": b""})
    with (
        _saved_image(project, last) as saved,
        work_container(engine, project.settings, base.id, work) as container,
    ):
        # All files that differ from the base image's are in these layers.
        manifest = json.load(cast("IO[bytes]", saved.extractfile("manifest.json")))
        for layer in manifest[0]["Layers"][shared_layers(last, base) :]:
            deleted, files = _split_layer(saved, layer)
            with files:
                engine.copy_in(container, archive({"deleted": "\0".join(deleted).encode()}))
                run_container(project, container, SQUASH)
                engine.copy_in(container, files)
        labels = {images.STAGE_LABEL: SQUASH, images.KEY_LABEL: images.squash_key(last)}
        commit_image(project, container, base, project.ledger.tag(SQUASH), labels, like=last)


@contextmanager
def _saved_image(project: Project, image: Image) -> Iterator[tarfile.TarFile]:
    """Save an image to a temporary file, as ``docker save`` does, and open the archive."""
    with tempfile.TemporaryFile(prefix="guix-tasks-") as file:
        for chunk in project.engine.save(image.id):
            file.write(chunk)
        file.seek(0)
        with tarfile.open(fileobj=file) as saved:
            yield saved


def _split_layer(saved: tarfile.TarFile, name: str) -> tuple[list[str], IO[bytes]]:
    """Split a layer into the paths that it deletes and an archive of the files that it adds."""
    deleted = []
    files = tempfile.TemporaryFile(prefix="guix-tasks-")  # noqa: SIM115 -- the caller closes it
    with (
        tarfile.open(fileobj=saved.extractfile(name)) as layer,
        new_archive(files, tarfile.PAX_FORMAT) as copy,
    ):
        for member in layer:
            path = PurePosixPath("/", member.name)
            if member.name in DOCKER_MOUNTS:
                continue
            if path.name == OPAQUE:
                deleted.append(str(path.parent))
            elif path.name.startswith(WHITEOUT):
                deleted.append(str(path.with_name(path.name.removeprefix(WHITEOUT))))
            else:
                copy.addfile(member, layer.extractfile(member) if member.isreg() else None)
    files.seek(0)
    return deleted, files
