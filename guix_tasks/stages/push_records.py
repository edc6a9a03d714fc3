"""Push records: ``out/digests/*.json``, one file for each job of a CI matrix."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from guix_tasks.errors import UsageError
from guix_tasks.files import write_whole
from guix_tasks.oci.platform import Platform
from guix_tasks.oci.reference import ImageReference

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from guix_tasks.settings import Settings


@dataclass(frozen=True)
class Pushed:
    """An image or an image index that was pushed to a registry."""

    repository: str
    platforms: Sequence[Platform]
    digest: str
    commits: Mapping[str, str] = field(default_factory=dict)
    """Commits of the channels, by channel name; empty if they are unknown."""

    @property
    def reference(self) -> str:
        return f"{self.repository}@{self.digest}"


def records_directory(settings: Settings) -> Path:
    return settings.output_directory / "digests"


def save(settings: Settings, pushed: Pushed) -> Path:
    """Write the push record and return its path.  A record of the same platforms is replaced."""
    directory = records_directory(settings)
    directory.mkdir(parents=True, exist_ok=True)
    names = sorted(platform.tag_suffix for platform in pushed.platforms)
    path = directory / f"{'_'.join(names)}.json"
    record = {
        "repository": pushed.repository,
        "platforms": [str(platform) for platform in pushed.platforms],
        "digest": pushed.digest,
        "commits": dict(pushed.commits),
    }
    write_whole(path, f"{json.dumps(record, indent=2)}\n".encode())
    return path


def load(settings: Settings) -> dict[Path, Pushed]:
    """Return all push records by path.  Raise ``UsageError`` for an invalid record."""
    return {path: _read(path) for path in sorted(records_directory(settings).glob("[!.]*.json"))}


def _read(path: Path) -> Pushed:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        platforms = tuple(Platform.parse(text) for text in record["platforms"])
        _ = platforms[0]  # A record without a platform is invalid.
        reference = ImageReference.parse(f"{record['repository']}@{record['digest']}")
        commits = {str(name): str(commit) for name, commit in record.get("commits", {}).items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UsageError(
            f"{path} is not a push record; delete it and push that platform again"
        ) from None
    return Pushed(reference.name, platforms, str(reference.digest), commits)
