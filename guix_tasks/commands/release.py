"""Write ``out/build.json``, the index of packed files."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from guix_tasks.commands.pack_records import load
from guix_tasks.errors import CheckError, UsageError
from guix_tasks.files import content_digest, write_whole
from guix_tasks.guix import PACK_FORMATS, TARBALL

if TYPE_CHECKING:
    from pathlib import Path

    from guix_tasks.commands.pack_records import Packed
    from guix_tasks.settings import Settings
    from guix_tasks.ui.console import Console


def release(settings: Settings, console: Console) -> Path:
    """Write ``build.json`` for all packs, also those of other CI jobs, and return its path.

    The format is that of metacall/guix: URL and SHA-256 by Guix system. Formats other than a
    tarball have an entry with their name below the system. Existing entries of unchanged packs, and
    of packs without a record, are kept.

    Raise ``UsageError`` if there is no pack or no URL, and ``CheckError`` if a file differs from
    its record.
    """
    path = settings.output_directory / "build.json"
    packs, entries = load(settings), _read(path)
    if not packs:
        raise UsageError(
            f"nothing to release: {path.parent} contains no pack; run `inv pack` first"
        )
    for packed in packs:
        _check(settings, packed, console)
        entry = entries.setdefault(packed.system, {})
        record = entry if packed.format == TARBALL else entry.setdefault(packed.format, {})
        if record.get("sha256") == packed.sha256 and record.get("url"):
            console.print(f"release: {packed.file}: unchanged, at {record['url']}")
            continue
        if not settings.release_url:
            raise UsageError(
                f"the URL of {packed.file} is not set; set RELEASE_URL, or use `--url https://...`"
            )
        url = f"{settings.release_url.rstrip('/')}/{quote(packed.file)}"
        record.update(url=url, sha256=packed.sha256, channels=packed.channels)
        console.print(f"release: {packed.file}: upload it to {url}")
    write_whole(path, f"{json.dumps(entries, indent=2, sort_keys=True)}\n".encode())
    return path


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Return the entries of an existing ``build.json``; unknown keys of an entry are kept."""
    if not path.exists():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        entries = None
    valid = isinstance(entries, dict) and all(
        isinstance(entry, dict) and all(isinstance(entry.get(f, {}), dict) for f in PACK_FORMATS)
        for entry in entries.values()
    )
    if not valid:
        raise UsageError(
            f"{path} is not a valid build.json; delete it, or restore the released one"
        )
    return dict(entries)


def _check(settings: Settings, packed: Packed, console: Console) -> None:
    file = settings.output_directory / packed.file
    if not file.exists():
        console.print(
            f"release: {packed.file} does not exist here; using the SHA-256 of its record"
        )
    elif content_digest(file) != packed.sha256:
        raise CheckError(
            f"{file} differs from the packed file: the SHA-256 does not match; run `inv pack` again"
        )
