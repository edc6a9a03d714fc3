"""Declarations of the custom stages and tests in a project's ``tasks.py``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from guix_tasks.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

_NAME = re.compile(r"[a-z][a-z0-9]{0,31}", re.ASCII)
"""Names that are valid in a tag, a container name, a directory name and a task name."""

_RESERVED = frozenset({"previous", "linux"})
"""Names that would collide with tags of ``images.Ledger``."""


@dataclass(frozen=True)
class CustomStage:
    """A stage of ``add_stage``: a command that turns one image into another."""

    name: str
    command: tuple[str, ...]
    """An argument list, run in a work container."""
    parent: str
    """Name of the stage whose image the command runs in."""
    inputs: tuple[str, ...] = ()
    """Files and directories of the project, copied into the command's working directory."""


@dataclass(frozen=True)
class CustomTest:
    """A test of ``add_test``: a command that runs the packed files in a container without Guix."""

    name: str
    command: tuple[str, ...]
    """An argument list."""
    image: str = ""
    """Image of the container; by default an empty image."""
    inputs: tuple[str, ...] = ()
    """Files and directories of the project, copied below ``/test``."""


def declared(
    name: str,
    command: str | Sequence[str],
    parent: str,
    inputs: str | Sequence[str],
    *,
    parents: Collection[str],
    taken: Collection[str],
) -> CustomStage:
    """Return a custom stage.

    As in a Dockerfile, a command that is a string runs in a shell, and a list runs as it is.

    Raise ``UsageError`` if the name is invalid or ``taken``, if the parent is not one of
    ``parents``, or if the command or an input is invalid.
    """
    owner = f"stage {name}"
    _check_name("stage", name, taken)
    if parent not in parents:
        raise UsageError(
            f"{owner}: no earlier stage is named {parent!r}; choose one of {', '.join(parents)}"
        )
    return CustomStage(name, _argv(owner, command), parent, _inputs(owner, inputs))


def declared_test(
    name: str,
    command: str | Sequence[str],
    image: str,
    inputs: str | Sequence[str],
    *,
    taken: Collection[str],
) -> CustomTest:
    """Return a custom test.  Commands and errors are those of ``declared``."""
    owner = f"test {name}"
    _check_name("test", name, taken)
    if not isinstance(image, str):
        raise UsageError(f"{owner}: the image must be a name, for example debian:stable-slim")
    return CustomTest(name, _argv(owner, command), image, _inputs(owner, inputs))


def _check_name(kind: str, name: str, taken: Collection[str]) -> None:
    if not _NAME.fullmatch(name) or name in _RESERVED:
        raise UsageError(
            f"{name!r} cannot name a {kind}; use lowercase letters and digits, for example deps"
        )
    if name in taken:
        raise UsageError(f"{name} is already a task; choose another name for the {kind}")


def _argv(owner: str, command: str | Sequence[str]) -> tuple[str, ...]:
    argv = ("sh", "-euc", command) if isinstance(command, str) else tuple(command)
    if not all(isinstance(word, str) for word in argv) or not "".join(argv[-1:]).strip():
        raise UsageError(
            f"{owner}: the command must be a string for the shell or a list of strings"
        )
    return argv


def _inputs(owner: str, inputs: str | Sequence[str]) -> tuple[str, ...]:
    paths = [PurePosixPath(path) for path in ([inputs] if isinstance(inputs, str) else inputs)]
    for path in paths:
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise UsageError(
                f"{owner}: the input {str(path)!r} is not below the directory of tasks.py; "
                "mount files from elsewhere with MOUNTS"
            )
    return tuple(map(str, paths))
