"""Result of a check."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from guix_tasks.errors import GuixTasksError


@dataclass(frozen=True)
class Finding:
    """Result of a check, with a command or setting that fixes it."""

    state: Literal["ok", "note", "failed"]
    """``note``: worth knowing, but needs no fix."""
    message: str
    fix: str = ""


ok = partial(Finding, "ok")
note = partial(Finding, "note")
failed = partial(Finding, "failed")


def from_error(error: GuixTasksError | str) -> Finding:
    """Convert an error, or its text, to a failure: the text is a cause and a hint."""
    message, _, fix = str(error).partition("; ")
    return failed(message, fix)
