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
    from collections.abc import Callable, Mapping

_GITLAB_HEADER_END = "\r\x1b[0K"


def section(name: str, environment: Mapping[str, str]) -> tuple[str, Callable[[], str]]:
    """Return the markup that starts a section, and a function that returns the markup of its end.

    Both are empty outside of a CI job.
    """
    if _is_github(environment):  # docs.github.com, "Workflow commands for GitHub Actions"
        token = secrets.token_hex(16)
        start = f"::group::{_escape(name)}\n::stop-commands::{token}\n"
        return start, lambda: f"::{token}::\n::endgroup::\n"
    if environment.get("GITLAB_CI") == "true":  # docs.gitlab.com, "Custom collapsible sections"
        # A job can run the same stage twice.
        key = f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}_{secrets.token_hex(4)}"
        header = f"{key}[collapsed=true]{_GITLAB_HEADER_END}{name}"
        start = f"section_start:{int(time.time())}:{header}\n"
        return start, lambda: f"section_end:{int(time.time())}:{key}{_GITLAB_HEADER_END}\n"
    return "", str


def annotation(error: str, environment: Mapping[str, str]) -> str | None:
    """Return the line that annotates a GitHub job with an error of one line, or None elsewhere."""
    return f"::error::{_escape(error)}" if _is_github(environment) else None


def _is_github(environment: Mapping[str, str]) -> bool:
    return environment.get("GITHUB_ACTIONS") == "true"


def _escape(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
