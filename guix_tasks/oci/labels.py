"""What an image says of itself in the words of OCI, as labels.

github.com/opencontainers/image-spec/blob/main/annotations.md has the words.
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
    """When an image was made, and of which revision of the project in this folder.

    What git cannot tell, or is not there to tell, is left out.
    """
    # As `git describe` says it, so with "-dirty" where files differ from the revision.
    revision = _git(project, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    found = {
        CREATED: datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z"),
        REVISION: revision,
        SOURCE: web_address(_git(project, "config", "--get", "remote.origin.url")),
    }
    return {name: text for name, text in found.items() if text}


def web_address(remote: str) -> str:
    """Where people find a git repository, from where git does; empty where nobody else could."""
    over_http = re.fullmatch(r"(https?)://(?:[^/]*@)?(.+?)(?:\.git)?/*", remote)
    if over_http:
        return f"{over_http[1]}://{over_http[2]}"
    over_ssh = re.fullmatch(r"(?:ssh://)?[\w.-]+@([\w.-]+)(?::\d+)?[:/](.+?)(?:\.git)?/*", remote)
    return f"https://{over_ssh[1]}/{over_ssh[2].lstrip('/')}" if over_ssh else ""


def _git(folder: Path, *arguments: str) -> str:
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
    except (OSError, ValueError):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
