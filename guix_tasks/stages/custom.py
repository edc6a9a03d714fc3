"""Custom stages: the declarations of a project's ``tasks.py`` with the content of their inputs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from guix_tasks import guix
from guix_tasks.errors import UsageError
from guix_tasks.files import raise_error
from guix_tasks.stages.container import INPUTS, WORK_DIRECTORY
from guix_tasks.stages.images import PACKAGES_LABEL
from guix_tasks.stages.stage import Stage

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from guix_tasks.settings import Settings
    from guix_tasks.stages.declarations import CustomStage


def custom_stage(settings: Settings, declaration: CustomStage) -> Stage:
    """Return the stage of a declaration.  Raise ``UsageError`` if an input cannot be read."""
    inputs = input_files(settings, f"stage {declaration.name}", declaration.inputs)
    files = {f"{INPUTS}/{name}": content for name, content in inputs.items()}
    return Stage(
        name=declaration.name,
        commands=[declaration.command],
        report=guix.LIST_INSTALLED,
        labels=lambda report: {PACKAGES_LABEL: " ".join(guix.installed(report))},
        files=files,
        as_root=True,
        directory=f"{WORK_DIRECTORY}/{INPUTS}" if files else None,
    )


def input_files(settings: Settings, owner: str, inputs: Sequence[str]) -> dict[str, bytes]:
    """Return the content of input files and directories, by path relative to the project.

    Raise ``UsageError`` if an input cannot be read or is an empty directory.  Its message begins
    with ``owner``, for example ``stage deps``.
    """
    return dict(file for name in inputs for file in _files(settings, owner, name))


def _files(settings: Settings, owner: str, name: str) -> Iterator[tuple[str, bytes]]:
    path = settings.directory / name
    try:
        files = sorted(_walk(path)) if path.is_dir() else [path]
        if not files:
            raise UsageError(
                f"{owner}: the input {path} is an empty directory; choose another input"
            )
        for file in files:
            yield str(file.relative_to(settings.directory)), file.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{owner}: cannot read the input {error.filename}: {error.strerror}; "
            "choose a readable file"
        ) from None


def _walk(root: Path) -> Iterator[Path]:
    for directory, subdirectories, names in os.walk(root, onerror=raise_error):
        # os.walk does not follow links to directories.  Reading one fails, which reports it.
        links = [name for name in subdirectories if Path(directory, name).is_symlink()]
        yield from (Path(directory, name) for name in [*names, *links])
