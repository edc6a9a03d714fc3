"""A stage as data: its commands, their files, and the inputs that its key is made of."""

from __future__ import annotations

import hashlib
import shlex
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from guix_tasks import guix
from guix_tasks.files import file_digest, text_digest
from guix_tasks.stages.container import RESOURCES, WORK_DIRECTORY

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


COLLECT = RESOURCES / "collect.scm"
"""Script that deletes what a stage added to the store and does not need, before the commit."""


@dataclass(frozen=True)
class Stage:
    """Commands that turn one image into another."""

    name: str
    commands: Sequence[Sequence[str]]
    """Argument lists, run in order in one work container."""
    report: Sequence[str]
    """Argument list of a command that describes the result on its standard output."""
    labels: Callable[[str], Mapping[str, str]]
    """Return the image's additional labels for a report."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Files of the commands, by path below ``container.WORK_DIRECTORY``."""
    extra_inputs: Mapping[str, str] = field(default_factory=dict)
    """Additional inputs: digests by name."""
    directory: str | None = None
    """Working directory of the commands, by default that of the image."""
    fetches: str | None = None
    """Channels file of the channels that the stage fetches, or None if it fetches none."""
    as_root: bool = False
    """Whether the commands write outside the store, Guix's state and root's profiles."""
    keep: str | None = None
    """Profile whose build dependencies survive garbage collection, for the next stage."""
    pinned: Callable[[str], Stage] | None = None
    """Return the pinned stage that reproduces a report's result; its inputs become the key."""
    check: Callable[[str], None] | None = None
    """Raise ``StageError`` if a report's result must not be committed."""

    def inputs(self, common: Mapping[str, str]) -> dict[str, str]:
        """Return the digests of everything that determines the result, by name.

        ``common`` are the inputs that all stages share.
        """
        words = [shlex.join(command) for command in (*self.commands, self.report)]
        words += [self.keep or "", file_digest(COLLECT)]
        files = {name: hashlib.sha256(content).hexdigest() for name, content in self.files.items()}
        return {"command": text_digest(*words), **files, **self.extra_inputs, **common}


def stage_files(stage: Stage) -> dict[str, bytes]:
    """Return the files of a stage below ``container.WORK_DIRECTORY``; ``stage`` is its script."""
    script = guix.script(
        stage.commands, stage.report, WORK_DIRECTORY, keep=stage.keep, start=stage.directory
    )
    return {**stage.files, "stage": script.encode(), "collect.scm": COLLECT.read_bytes()}
