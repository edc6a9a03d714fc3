"""Collapsible sections in the logs of CI jobs.

Output of a build must not be interpreted as a command to the CI system. GitHub's runner stops
interpreting commands until it reads a random token. GitLab's section marks require a carriage
return and an escape sequence, which ``ui.log`` removes from logs.

The markup of a section must reach the log unchanged.
"""

from __future__ import annotations

import re
import secrets
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


class GitHub:
    """Markup of GitHub (docs.github.com, "Workflow commands for GitHub Actions")."""

    def __init__(self) -> None:
        self._token = secrets.token_hex(16)

    def start(self, name: str) -> str:
        return f"::group::{_escape(name)}\n::stop-commands::{self._token}\n"

    def end(self) -> str:
        return f"::{self._token}::\n::endgroup::\n"


class GitLab:
    """Markup of GitLab (docs.gitlab.com, "Custom collapsible sections")."""

    _END = "\r\x1b[0K"

    def __init__(self) -> None:
        # A job can run the same stage twice.
        self._suffix = secrets.token_hex(4)
        self._section = ""

    def start(self, name: str) -> str:
        self._section = f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}_{self._suffix}"
        return (
            f"section_start:{int(time.time())}:{self._section}[collapsed=true]{self._END}{name}\n"
        )

    def end(self) -> str:
        return f"section_end:{int(time.time())}:{self._section}{self._END}\n"


Fold = GitHub | GitLab
"""Markup of a collapsible section."""


def detect_fold(environment: Mapping[str, str]) -> Fold | None:
    """Return the markup of the CI system that runs this process, or None."""
    if _is_github(environment):
        return GitHub()
    return GitLab() if environment.get("GITLAB_CI") == "true" else None


def annotation(error: str, environment: Mapping[str, str]) -> str | None:
    """Return the line that annotates a GitHub job with an error of one line, or None elsewhere."""
    return f"::error::{_escape(error)}" if _is_github(environment) else None


def _is_github(environment: Mapping[str, str]) -> bool:
    return environment.get("GITHUB_ACTIONS") == "true"


def _escape(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
