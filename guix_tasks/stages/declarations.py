"""Stages and tests of a project's own, as its ``tasks.py`` declares them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from guix_tasks.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

_NAME = re.compile(r"[a-z][a-z0-9]{0,31}", re.ASCII)
"""What can be a part of a tag, of a container's name and of a folder's, and a task's name."""

_TAKEN = frozenset({"previous", "linux"})
"""What tags of the ledger end in otherwise."""


@dataclass(frozen=True)
class OwnStage:
    """A command that makes one image of another, in the words of whoever wants it run."""

    name: str
    command: tuple[str, ...]
    """An argument list, run in a work container."""
    parent: str
    """The stage that it is made from."""
    inputs: tuple[str, ...] = ()
    """Files and folders of the project that the command finds in the folder it starts in."""


@dataclass(frozen=True)
class OwnTest:
    """A command that tries what was packed, in a container without Guix."""

    name: str
    command: tuple[str, ...]
    """An argument list."""
    image: str = ""
    """The image of that container; empty: one that has nothing at all."""
    inputs: tuple[str, ...] = ()
    """Files and folders of the project that the command finds below ``/test``."""


def declared(
    name: str,
    command: str | Sequence[str],
    parent: str,
    inputs: str | Sequence[str],
    *,
    parents: Collection[str],
    taken: Collection[str],
) -> OwnStage:
    """A stage whose parent is one of ``parents``, under a name that is not ``taken``.

    As in a Dockerfile, a command that is a text is for the shell, and a list is run as it is.
    Raises ``UsageError`` where it can be no stage.
    """
    _refuse_name("stage", name, taken)
    if parent not in parents:
        raise UsageError(
            f"stage {name}: no stage {parent!r} is there before it; name one of "
            f"{', '.join(parents)}"
        )
    what = f"stage {name}"
    return OwnStage(name, _argv(what, command), parent, _inputs(what, inputs))


def declared_test(
    name: str,
    command: str | Sequence[str],
    image: str,
    inputs: str | Sequence[str],
    *,
    taken: Collection[str],
) -> OwnTest:
    """A test, its command taken as that of a stage is.  Raises ``UsageError`` as well."""
    _refuse_name("test", name, taken)
    what = f"test {name}"
    if not isinstance(image, str):
        raise UsageError(f"{what}: its image is a name, as debian:stable-slim")
    return OwnTest(name, _argv(what, command), image, _inputs(what, inputs))


def _refuse_name(kind: str, name: str, taken: Collection[str]) -> None:
    if not _NAME.fullmatch(name) or name in _TAKEN:
        raise UsageError(
            f"{name!r} can be no {kind}'s name; take small letters and digits, as deps"
        )
    if name in taken:
        raise UsageError(f"{name} is a task already; take another name for the {kind}")


def _argv(what: str, command: str | Sequence[str]) -> tuple[str, ...]:
    argv = ("sh", "-euc", command) if isinstance(command, str) else tuple(command)
    if not all(isinstance(word, str) for word in argv) or not "".join(argv[-1:]).strip():
        raise UsageError(f"{what}: its command is a text for the shell, or a list of words")
    return argv


def _inputs(what: str, inputs: str | Sequence[str]) -> tuple[str, ...]:
    paths = [PurePosixPath(each) for each in ([inputs] if isinstance(inputs, str) else inputs)]
    for path in paths:
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise UsageError(
                f"{what}: the input {str(path)!r} does not lie below the folder of tasks.py; "
                "MOUNTS lends stages what lies elsewhere"
            )
    return tuple(map(str, paths))
