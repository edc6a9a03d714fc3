"""Exceptions, each with its exit code.

A message is one line: the cause, then a hint. Only ``cli.errors`` catches all of these exceptions,
prints their message and exits with their code.
"""

from __future__ import annotations

import re


class GuixTasksError(Exception):
    """Base class of all errors that a user can cause; never raised itself."""

    exit_code: int = 1

    is_transient: bool = False
    """True if a retry can succeed; see ``engine.retry``."""


class CheckError(GuixTasksError):
    """A test or a check of an image failed."""

    exit_code = 1


class UsageError(GuixTasksError):
    """A setting or an argument is invalid, or the task is impossible in the current state."""

    exit_code = 2


class SettingsError(UsageError):
    """Settings are invalid; the message has one line per problem."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


FULL_DISK = (
    "the disk is full: `inv status --size` shows what uses it, `inv clean` removes this "
    "project's containers, stage images and cache volumes"
)

_FULL = "no space left on device|disk quota exceeded|database or disk is full|disk I/O error"
"""Messages of the kernel and of SQLite, which stores Guix's database.

SQLite reports an I/O error if it cannot write its journal; a defective disk is a rarer cause.
"""


def full_disk(text: str) -> str:
    """Return the end of a message with the hint if a text reports a full disk, else nothing."""
    is_full = re.search(_FULL, text, re.IGNORECASE)
    return f"; {FULL_DISK}" if is_full else ""


UPLOAD_LIMIT = (
    "a proxy or the registry refuses uploads of this size: raise its limit (in nginx, "
    "client_max_body_size)"
)

FEWER_LAYERS = (
    "squash BASE_IMAGE, combine steps of the Dockerfile, or use an engine with the containerd "
    "image store"
)

NO_SHELL = (
    "the image has no /bin/sh: set BASE_IMAGE to an image with Guix, or install Guix in the "
    "Dockerfile"
)

REFUSED = "the engine could not"
"""Start of the message about a call that the engine answered with an error."""


class EngineError(GuixTasksError):
    """The Docker Engine cannot be reached, or refused a call."""

    exit_code = 3


class NoEngineError(EngineError):
    """No Docker Engine is configured on this machine."""


class StageError(GuixTasksError):
    """A Guix command failed in a work container."""

    exit_code = 4


class MissingItemsError(StageError):
    """The warm store lacks items of the image in whose container a command ran."""


class DamagedStoreError(StageError):
    """The database of the warm store is damaged."""


class RegistryError(GuixTasksError):
    """A registry cannot be reached, or refused a push or a pull."""

    exit_code = 5


class BuilderError(GuixTasksError):
    """An image build failed, or the builder does not support it."""

    exit_code = 6


class StoppedError(KeyboardInterrupt):
    """Ctrl-C or SIGTERM interrupted the task; unfinished work has been undone.

    It is no ``Exception``, so that no error handler catches it.
    """

    exit_code = 130
