"""Logs of CI jobs that can be folded: parts with a heading, which are closed at first.

What a build prints must not be taken for a command to the CI system: GitHub's runner is told to
obey none until it hears a word that no build can know.  GitLab's marks need a carriage return and
an escape sequence, which no line of a log has here (``ui.log``).
"""

from __future__ import annotations

import re
import secrets
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping


class Fold(Protocol):
    """One part of a log; its lines are to be written as they are."""

    def start(self, name: str, now: float) -> str:
        """What is written before it; ``now`` in seconds of Unix time."""

    def end(self, now: float) -> str:
        """What is written after it."""


class GitHub:
    """docs.github.com, "Workflow commands for GitHub Actions"."""

    def __init__(self) -> None:
        self._word = secrets.token_hex(16)

    def start(self, name: str, now: float) -> str:  # noqa: ARG002 -- the runner has a clock
        return f"::group::{_escaped(name)}\n::stop-commands::{self._word}\n"

    def end(self, now: float) -> str:  # noqa: ARG002
        return f"::{self._word}::\n::endgroup::\n"


class GitLab:
    """docs.gitlab.com, "Custom collapsible sections"."""

    _END = "\r\x1b[0K"

    def __init__(self) -> None:
        # The same stage may be run twice in a job.
        self._suffix = secrets.token_hex(4)
        self._section = ""

    def start(self, name: str, now: float) -> str:
        self._section = f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}_{self._suffix}"
        return f"section_start:{int(now)}:{self._section}[collapsed=true]{self._END}{name}\n"

    def end(self, now: float) -> str:
        return f"section_end:{int(now)}:{self._section}{self._END}\n"


def found(environment: Mapping[str, str]) -> Fold | None:
    """How the job folds that this process is in; None where it is in none that does."""
    if _is_github(environment):
        return GitHub()
    return GitLab() if environment.get("GITLAB_CI") == "true" else None


def annotation(error: str, environment: Mapping[str, str]) -> str | None:
    """The line that shows an error, of one line, beside a job of GitHub's; None elsewhere."""
    return f"::error::{_escaped(error)}" if _is_github(environment) else None


def _is_github(environment: Mapping[str, str]) -> bool:
    return environment.get("GITHUB_ACTIONS") == "true"


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
