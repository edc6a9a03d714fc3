"""Stages of a project's own: what its ``tasks.py`` says, with the files that are named there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from guix_tasks import guix
from guix_tasks.errors import UsageError
from guix_tasks.stages.container import FOLDER, INPUTS
from guix_tasks.stages.images import PACKAGES_LABEL
from guix_tasks.stages.stage import Stage

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from guix_tasks.settings import Settings
    from guix_tasks.stages.declarations import OwnStage


def own_stage(settings: Settings, own: OwnStage) -> Stage:
    """The stage as data.  Raises ``UsageError`` where an input cannot be read."""
    found = input_files(settings, f"stage {own.name}", own.inputs)
    files = {f"{INPUTS}/{name}": content for name, content in found.items()}
    return Stage(
        name=own.name,
        commands=[own.command],
        report=guix.list_installed_argv(),
        labels=lambda report: {PACKAGES_LABEL: " ".join(guix.installed(report))},
        files=files,
        as_root=True,
        folder=f"{FOLDER}/{INPUTS}" if files else None,
    )


def input_files(settings: Settings, what: str, inputs: Sequence[str]) -> dict[str, bytes]:
    """The files, and those of the folders, by their names relative to the project.

    Raises ``UsageError`` in the name of ``what`` they are for, where one cannot be read.
    """
    return dict(file for name in inputs for file in _files(settings, what, name))


def _files(settings: Settings, what: str, name: str) -> Iterator[tuple[str, bytes]]:
    path = settings.folder / name
    found = sorted(_walk(path)) if path.is_dir() else [path]
    if not found:
        raise UsageError(f"{what}: the input {path} is an empty folder; name another")
    try:
        for each in found:
            yield str(each.relative_to(settings.folder)), each.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{what}: the input {error.filename}: {error.strerror}; name what can be read"
        ) from None


def _walk(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        # A link to a folder is not followed, and so cannot be read: better told than left out.
        links = [name for name in folders if Path(place, name).is_symlink()]
        yield from (Path(place, name) for name in [*names, *links])
