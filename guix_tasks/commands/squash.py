"""Squash: everything above the base stage as one layer."""

from __future__ import annotations

import json
import tarfile
import tempfile
import time
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import IO, TYPE_CHECKING

from guix_tasks.errors import UsageError
from guix_tasks.stages.container import FOLDER, Work, archive, work_container
from guix_tasks.stages.images import KEY_LABEL, SQUASH, STAGE_LABEL, is_above, squash_key
from guix_tasks.stages.runner import commit_image, perform, say_done
from guix_tasks.stages.volumes import check_volumes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from guix_tasks.engine.api import Image
    from guix_tasks.stages.project import Project

WHITEOUT = ".wh."
OPAQUE = ".wh..wh..opq"
"""How a layer says that a file, or all of a folder, of a lower layer is gone (OCI image spec)."""

DOCKERS = ("etc/hostname", "etc/hosts", "etc/resolv.conf")
"""What Docker puts over an image's own in each container, where it cannot be replaced then."""


def squash(project: Project) -> None:
    """Make of the last stage an image with one layer above the base, its configuration kept.

    The engine itself unpacks the layers one over the other, in a container of the base, which is
    then committed.  Raises ``UsageError`` where there is nothing above a base.
    """
    started = time.monotonic()
    ledger, console = project.ledger, project.console
    ledger.drop_unnamed()
    last, base = ledger.last_stage(), ledger.find("base")
    if last is None or base is None or not is_above(last, base) or last.id == base.id:
        raise UsageError("nothing to squash: there is no stage on the base; run `inv install`")
    check_volumes(project.settings, base)
    before = ledger.find(SQUASH)
    if ledger.newest() != last:
        console.say("squash: up to date")
    else:
        with console.step(SQUASH):
            _squash(project, base, last)
        say_done(project, SQUASH, started)
    ledger.point_image(console)
    if before:
        project.engine.drop(before.id)


def _squash(project: Project, base: Image, last: Image) -> None:
    engine = project.engine
    # Each start removes what the next layer says is gone, which a folder cannot say of itself.
    remove = f"xargs -0 rm -rf -- <{FOLDER}/gone && rm -rf {FOLDER}"
    work = Work(SQUASH, ("-c", remove), {"gone": b""}, entry_point=("sh",), bare=True, plain=True)
    with (
        _saved(project, last) as saved,
        work_container(engine, project.settings, base.id, work) as container,
    ):
        for layer in _layers(saved)[len(base.layers) :]:
            gone, there = _read(saved, layer)
            with there:
                engine.copy_in(container, archive({"gone": "\0".join(gone).encode()}))
                perform(project, container, SQUASH)
                engine.copy_in(container, there)
        labels = {STAGE_LABEL: SQUASH, KEY_LABEL: squash_key(last)}
        commit_image(project, container, base, project.ledger.tag(SQUASH), labels, like=last)


@contextmanager
def _saved(project: Project, image: Image) -> Iterator[tarfile.TarFile]:
    """An image as ``docker save`` gives it, on disk while it is read."""
    with tempfile.TemporaryFile(prefix="guix-tasks-") as file:
        for chunk in project.engine.save(image.id):
            file.write(chunk)
        file.seek(0)
        with tarfile.open(fileobj=file) as saved:
            yield saved


def _layers(saved: tarfile.TarFile) -> list[str]:
    """The names of the layers in a saved image, lowest first."""
    manifest = saved.extractfile("manifest.json")
    return list(json.load(manifest)[0]["Layers"]) if manifest else []


def _read(saved: tarfile.TarFile, name: str) -> tuple[list[str], IO[bytes]]:
    """What a layer says is gone, and the layer without those words, as a file of its own."""
    gone = []
    there = tempfile.TemporaryFile(prefix="guix-tasks-")  # noqa: SIM115 -- the caller closes it
    with (
        tarfile.open(fileobj=saved.extractfile(name)) as layer,
        tarfile.open(fileobj=there, mode="w", format=tarfile.PAX_FORMAT) as copy,
    ):
        for member in layer:
            path = PurePosixPath("/", member.name)
            if member.name in DOCKERS:
                continue
            if path.name == OPAQUE:
                gone.append(str(path.parent))
            elif path.name.startswith(WHITEOUT):
                gone.append(str(path.with_name(path.name.removeprefix(WHITEOUT))))
            else:
                copy.addfile(member, layer.extractfile(member) if member.isreg() else None)
    there.seek(0)
    return gone, there
