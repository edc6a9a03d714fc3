"""What was packed: ``out/build-*.json``, one file for each system and format.

Each job of a CI matrix hands its own on; ``inv release`` joins them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence  # noqa: TC003 -- a field's
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from guix_tasks.errors import UsageError
from guix_tasks.files import write_whole
from guix_tasks.guix import TARBALL
from guix_tasks.ui.redact import clean

if TYPE_CHECKING:
    from pathlib import Path

    from guix_tasks.settings import Settings


@dataclass(frozen=True)
class Packed:
    """A file of ``out/`` that ``inv pack`` made."""

    system: str
    """As Guix calls it: ``x86_64-linux``."""
    format: str
    file: str
    """Its name in ``out/``."""
    sha256: str
    channels: Sequence[dict[str, str]]
    """Name, URL and commit of each channel of the Guix that packed it."""


def save(settings: Settings, packed: Packed) -> Path:
    """Write down what was packed, in the place of the last of this system and format; the file."""
    format_ = "" if packed.format == TARBALL else f"-{packed.format}"
    path = settings.output_folder / f"build-{packed.system}{format_}.json"
    # It is published, and the URL of a channel may hold a token.
    write_whole(path, clean(f"{json.dumps(asdict(packed), indent=2)}\n").encode())
    return path


def load(settings: Settings) -> list[Packed]:
    """All that was packed.  Raises ``UsageError`` for a file that does not say so."""
    return [_read(path) for path in sorted(settings.output_folder.glob("build-*.json"))]


def _read(path: Path) -> Packed:
    try:
        packed = Packed(**json.loads(path.read_text(encoding="utf-8")))
        words = (packed.system, packed.format, packed.file, packed.sha256)
        known = all(isinstance(each, str) and each for each in words) and "/" not in packed.file
        channels = isinstance(packed.channels, list)
    except (OSError, ValueError, TypeError, RecursionError):
        known = channels = False
    if not known or not channels:
        raise UsageError(f"{path} is not what `inv pack` wrote; delete it, and pack again")
    return packed
