"""What can go wrong, by kind; each kind has its exit code.

A message is one line: the cause first, then what mends it.  ``cli.errors`` is the one
place that catches these, prints the line and ends with the code.
"""

from __future__ import annotations

import re


class GuixTasksError(Exception):
    """The root of all errors that a user can cause; never raised itself."""

    exit_code: int = 1

    passes: bool = False
    """Whether the same may go well a little later; see ``engine.retry``."""


class CheckError(GuixTasksError):
    """A test or a check of an image failed."""

    exit_code = 1


class UsageError(GuixTasksError):
    """A setting or an argument is wrong, or what was asked for makes no sense now."""

    exit_code = 2


class SettingsError(UsageError):
    """All the bad settings of one load, a line each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


FULL_DISK = (
    "the disk is full: `inv status --size` shows where it went, `inv clean` removes this "
    "project's containers, stage images and cache volumes"
)

_FULL = "no space left on device|disk quota exceeded|database or disk is full|disk I/O error"
"""As the kernel and SQLite, in which Guix keeps what is in the store, say it.

SQLite says the last where it cannot write its journal; a disk that is broken is rarer.
"""


def full_disk(text: str) -> str:
    """What mends a full disk, as the end of a message, where a text tells of one; else nothing."""
    full = re.search(_FULL, text, re.IGNORECASE)
    return f"; {FULL_DISK}" if full else ""


REFUSED = "the engine could not"
"""How the message begins where an engine answers, and does not do what it is asked."""


class EngineError(GuixTasksError):
    """The Docker Engine cannot be reached, or refused a call."""

    exit_code = 3


class NoEngineError(EngineError):
    """No Docker Engine is configured on this machine."""


class StageError(GuixTasksError):
    """A Guix command failed in a work container."""

    exit_code = 4


class RegistryError(GuixTasksError):
    """A registry cannot be reached, or refused a push or a pull."""

    exit_code = 5


class BuilderError(GuixTasksError):
    """An image build failed, or the builder cannot do what is asked of it."""

    exit_code = 6


class StoppedError(KeyboardInterrupt):
    """Ctrl-C or SIGTERM interrupted it; what was under way has been undone.

    Nothing that handles errors may take it for one of them.
    """

    exit_code = 130
