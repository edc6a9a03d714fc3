"""Pack records: ``out/build-*.json``, one file per system and format.

Each job of a CI matrix uploads its records; ``inv release`` joins them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence  # noqa: TC003 -- type of a field
from contextlib import suppress
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
    """Record of a file in ``out/`` that ``inv pack`` wrote."""

    system: str
    """Guix system, for example ``x86_64-linux``."""
    format: str
    file: str
    """File name in ``out/``."""
    sha256: str
    channels: Sequence[dict[str, str]]
    """Name, URL and commit of each channel of the Guix that packed it."""


def save(settings: Settings, packed: Packed) -> Path:
    """Write a record, replacing that of the same system and format, and return its path."""
    format_ = "" if packed.format == TARBALL else f"-{packed.format}"
    path = settings.output_directory / f"build-{packed.system}{format_}.json"
    # The record is published, and the URL of a channel may contain a token.
    write_whole(path, clean(f"{json.dumps(asdict(packed), indent=2)}\n").encode())
    return path


def load(settings: Settings) -> list[Packed]:
    """Return all pack records. Raise ``UsageError`` if one is invalid."""
    return [_read(path) for path in sorted(settings.output_directory.glob("build-*.json"))]


def _read(path: Path) -> Packed:
    with suppress(OSError, ValueError, TypeError, RecursionError):
        packed = Packed(**json.loads(path.read_text(encoding="utf-8")))
        texts = (packed.system, packed.format, packed.file, packed.sha256)
        has_texts = all(isinstance(text, str) and text and text.isprintable() for text in texts)
        if has_texts and "/" not in packed.file and isinstance(packed.channels, list):
            return packed
    raise UsageError(f"{path} is not a record of `inv pack`; delete it and run `inv pack` again")
