"""Result of a check."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from guix_tasks.errors import GuixTasksError


class State(Enum):
    """Severity of a finding."""

    OK = "ok"
    NOTE = "note"
    """Worth knowing, but needs no fix."""
    FAILED = "failed"


@dataclass(frozen=True)
class Finding:
    """Result of a check, with a command or setting that fixes it."""

    state: State
    message: str
    fix: str = ""


ok = partial(Finding, State.OK)
note = partial(Finding, State.NOTE)
failed = partial(Finding, State.FAILED)


def from_error(error: GuixTasksError, state: State = State.FAILED) -> Finding:
    """Convert an error, whose text is a cause and a hint, to a finding."""
    message, _, fix = str(error).partition("; ")
    return Finding(state, message, fix)
