"""Release: ``out/build.json``, which says where each system's packs are to be had."""

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
    """Write ``build.json`` for what was packed, here or in the jobs of a CI matrix; the file.

    Its form is that of metacall/guix: URL and SHA-256 by Guix system, and by a further name below
    that where it is no tarball.  What it says already of a pack that did not change, and of what
    was not packed, stays.  Raises ``UsageError``, and ``CheckError`` for a file that is not the one
    that was packed.
    """
    path = settings.output_folder / "build.json"
    packs, entries = load(settings), _read(path)
    if not packs:
        raise UsageError(f"nothing to release: no pack is in {path.parent}; run `inv pack` first")
    for packed in packs:
        _check(settings, packed, console)
        entry = entries.setdefault(packed.system, {})
        own = entry if packed.format == TARBALL else entry.setdefault(packed.format, {})
        if own.get("sha256") == packed.sha256 and own.get("url"):
            console.say(f"release: {packed.file}: unchanged, at {own['url']}")
            continue
        url = _url(settings, packed.file)
        own.update(url=url, sha256=packed.sha256, channels=packed.channels)
        console.say(f"release: {packed.file}: to be at {url}")
    write_whole(path, f"{json.dumps(entries, indent=2, sort_keys=True)}\n".encode())
    return path


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """What is released already; of each system's entry, what is no pack is kept as it is."""
    if not path.exists():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        entries = None
    known = isinstance(entries, dict) and all(
        isinstance(each, dict) and all(isinstance(each.get(f, {}), dict) for f in PACK_FORMATS)
        for each in entries.values()
    )
    if not known:
        raise UsageError(f"{path} is no build.json; delete it, or put the released one there")
    return dict(entries)


def _check(settings: Settings, packed: Packed, console: Console) -> None:
    file = settings.output_folder / packed.file
    if not file.exists():
        console.say(f"release: {packed.file} is not here; its SHA-256 is what its job said")
    elif content_digest(file) != packed.sha256:
        raise CheckError(f"{file} is not what was packed: its SHA-256 is another; pack it again")


def _url(settings: Settings, name: str) -> str:
    if not settings.release_url:
        raise UsageError(
            f"where {name} will be is not said: set RELEASE_URL, or say `--url https://...`"
        )
    return f"{settings.release_url.rstrip('/')}/{quote(name)}"
