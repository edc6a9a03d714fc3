"""A stage of a project's own, as its ``tasks.py`` declares it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from guix_tasks.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

_NAME = re.compile(r"[a-z][a-z0-9]{0,31}", re.ASCII)
"""What can be a part of a tag, of a container's name and of a folder's, and a task's name."""

_TAKEN = frozenset({"previous", "linux"})
"""What tags of the ledger end in otherwise."""


@dataclass(frozen=True)
class OwnStage:
    """Commands that make one image of another, in the words of whoever wants them run."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    """Argument lists, run in order in one work container."""
    parent: str
    """The stage that it is made from."""
    inputs: tuple[str, ...] = ()
    """Files and folders of the project that the commands find in the folder they start in."""


def declared(
    name: str,
    commands: str | Sequence[str | Sequence[str]],
    parent: str,
    inputs: str | Sequence[str],
    *,
    parents: Collection[str],
    taken: Collection[str],
) -> OwnStage:
    """A stage whose parent is one of ``parents``, under a name that is not ``taken``.

    As in a Dockerfile, a command that is one text is for the shell, and a list is run as it is.
    Raises ``UsageError`` where it can be no stage.
    """
    if not _NAME.fullmatch(name) or name in _TAKEN:
        raise UsageError(f"{name!r} can be no stage's name; take small letters and digits, as deps")
    if name in taken:
        raise UsageError(f"{name} is a task already; take another name for the stage")
    if parent not in parents:
        raise UsageError(
            f"stage {name}: there is no stage {parent!r} before it; name one of "
            f"{', '.join(parents)}"
        )
    argument_lists = tuple(map(_argv, _several(commands)))
    if not argument_lists or not all(argument_lists):
        raise UsageError(f"stage {name}: a command is missing; give it at least one")
    if not all(isinstance(word, str) for argv in argument_lists for word in argv):
        raise UsageError(f"stage {name}: a command is a text or a list of texts")
    for each in _several(inputs):
        path = PurePosixPath(each)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise UsageError(
                f"stage {name}: the input {str(each)!r} is not below the folder of tasks.py; "
                "MOUNTS lends stages what lies elsewhere"
            )
    files = tuple(str(PurePosixPath(each)) for each in _several(inputs))
    return OwnStage(name, argument_lists, parent, files)


def _several(one_or_more: str | Sequence[str | Sequence[str]]) -> Iterable[str | Sequence[str]]:
    return (one_or_more,) if isinstance(one_or_more, str) else one_or_more


def _argv(command: str | Sequence[str]) -> tuple[str, ...]:
    return ("sh", "-euc", command) if isinstance(command, str) else tuple(command)
