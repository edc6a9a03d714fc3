"""What platforms were pushed: ``out/digests/*.json``, one file for each job of a CI matrix."""

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
    """An image, or an index of images, that a registry has."""

    repository: str
    platforms: Sequence[Platform]
    digest: str
    commits: Mapping[str, str] = field(default_factory=dict)
    """The commit of each channel that it was made of; empty where that is not known."""

    @property
    def reference(self) -> str:
        return f"{self.repository}@{self.digest}"


def folder_of(settings: Settings) -> Path:
    return settings.output_folder / "digests"


def save(settings: Settings, pushed: Pushed) -> Path:
    """Write what was pushed for some platforms, in the place of what was there; the file."""
    folder = folder_of(settings)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{'_'.join(sorted(each.tag_suffix for each in pushed.platforms))}.json"
    record = {
        "repository": pushed.repository,
        "platforms": [str(each) for each in pushed.platforms],
        "digest": pushed.digest,
        "commits": dict(pushed.commits),
    }
    write_whole(path, f"{json.dumps(record, indent=2)}\n".encode())
    return path


def load(settings: Settings) -> dict[Path, Pushed]:
    """All that was pushed, by file.  Raises ``UsageError`` for a file that is not of this kind."""
    return {path: _read(path) for path in sorted(folder_of(settings).glob("[!.]*.json"))}


def _read(path: Path) -> Pushed:
    try:
        record = json.loads(path.read_text())
        platforms = tuple(Platform.parse(each) for each in record["platforms"])
        _ = platforms[0]
        reference = ImageReference.parse(f"{record['repository']}@{record['digest']}")
        commits = {str(name): str(commit) for name, commit in record.get("commits", {}).items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UsageError(
            f"{path} is not what a push wrote; delete it, and push that platform again"
        ) from None
    return Pushed(reference.name, platforms, str(reference.digest), commits)
