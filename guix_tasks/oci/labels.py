"""Labels of images with the keys of OCI annotations.

The keys are defined in github.com/opencontainers/image-spec/blob/main/annotations.md.
"""

from __future__ import annotations

import re
import subprocess
from datetime import datetime, timezone
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_PREFIX = "org.opencontainers.image."

CREATED = f"{_PREFIX}created"
REVISION = f"{_PREFIX}revision"
SOURCE = f"{_PREFIX}source"
BASE_NAME = f"{_PREFIX}base.name"
BASE_DIGEST = f"{_PREFIX}base.digest"


def oci_annotations(project: Path) -> dict[str, str]:
    """Return the time, and the revision and address of the git repository of a project directory.

    The revision and address are omitted if git is missing or does not know them.
    """
    # `git describe` adds "-dirty" if files differ from the revision.
    revision = _git(project, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    annotations = {
        CREATED: datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z"),
        REVISION: revision,
        SOURCE: web_address(_git(project, "config", "--get", "remote.origin.url")),
    }
    return {name: text for name, text in annotations.items() if text}


def web_address(remote: str) -> str:
    """Return the web address of a git remote, or nothing if it is a local path."""
    http = re.fullmatch(r"(https?)://(?:[^/]*@)?(.+?)(?:\.git)?/*", remote)
    if http:
        return f"{http[1]}://{http[2]}"
    ssh = re.fullmatch(r"(?:ssh://)?[\w.-]+@([\w.-]+)(?::\d+)?[:/](.+?)(?:\.git)?/*", remote)
    return f"https://{ssh[1]}/{ssh[2].lstrip('/')}" if ssh else ""


def _git(project: Path, *arguments: str) -> str:
    try:
        result = subprocess.run(
            ["git", "-C", str(project), *arguments],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
    except (OSError, ValueError):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
