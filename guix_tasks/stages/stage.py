"""A stage as data, and the key of what it is made from."""

from __future__ import annotations

import hashlib
import shlex
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from guix_tasks import guix
from guix_tasks.files import file_digest, text_digest
from guix_tasks.stages.container import FOLDER, IMAGE_FOLDER

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


COLLECT = IMAGE_FOLDER / "collect.scm"


@dataclass(frozen=True)
class Stage:
    """Commands that make one image of another, as data."""

    name: str
    commands: Sequence[Sequence[str]]
    """Argument lists, run in order in one work container."""
    report: Sequence[str]
    """The argument list whose standard output describes what was made."""
    labels: Callable[[str], Mapping[str, str]]
    """The labels that a report gives the image."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """What the commands find below ``container.FOLDER``."""
    given: Mapping[str, str] = field(default_factory=dict)
    """More of what it is made from, by name, with the digest of each content."""
    folder: str | None = None
    """Where the commands start, if that is not where the image's do."""
    fetches: str | None = None
    """The channels file of the channels that it fetches, where it fetches any."""
    as_root: bool = False
    """Whether its commands change more than the store, Guix's state and root's profiles."""
    keep: str | None = None
    """A profile such as the next stage is to build: what that takes is not collected."""
    settled: Callable[[str], Stage] | None = None
    """The stage that would make the same again, by a report, where that is another one."""
    check: Callable[[str], None] | None = None
    """Raises ``StageError`` where what was made, by a report, must not be had."""

    def inputs(self, common: Mapping[str, str]) -> dict[str, str]:
        """What the stage is made from, by name, with the digest of each content."""
        words = [shlex.join(command) for command in (*self.commands, self.report)]
        words += [self.keep or "", file_digest(COLLECT)]
        files = {name: hashlib.sha256(content).hexdigest() for name, content in self.files.items()}
        return {"command": text_digest(*words), **files, **self.given, **common}


def stage_files(stage: Stage) -> dict[str, bytes]:
    """What a stage's commands need below ``container.FOLDER``; ``stage`` is the script to run."""
    script = guix.script(stage.commands, stage.report, FOLDER, keep=stage.keep, start=stage.folder)
    return {**stage.files, "stage": script.encode(), "collect.scm": COLLECT.read_bytes()}
