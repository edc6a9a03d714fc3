"""Digests of the content of files and folders.

A folder's digest is that of its files' names, modes and contents, so it is the same in every
checkout and on every machine.  Files of some size are not read twice: what was found is kept,
by size and time of change, in a cache that can be thrown away.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from guix_tasks import files as files_module

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

WORTH_THREADS = 200
"""Files from which hashing several at once beats starting threads."""

WORTH_CACHING = 1 << 20
"""Bytes from which looking a digest up beats making it."""


def text_digest(*texts: str) -> str:
    """The digest of a list of texts; no two lists run into one another."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """The digest of a file's content."""
    return _file_digest(str(path))


def content_digest(path: Path) -> str:
    """The same, read anew."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(WORTH_CACHING):
            digest.update(chunk)
    return digest.hexdigest()


def tree_digest(
    root: Path, files: Iterable[str] | None = None, *, without: Collection[Path] = ()
) -> str:
    """The digest of a file, or of a folder: all of it, or some files by relative name.

    ``without`` are folders that do not count, by their real paths.
    """
    if not root.is_dir():
        return file_digest(root)
    names = sorted(_walk(root, without) if files is None else files)
    if len(names) < WORTH_THREADS:
        return text_digest(*(_entry(root, name) for name in names))
    # Reading releases the interpreter, so several files are hashed at once.
    with ThreadPoolExecutor() as pool:
        return text_digest(*pool.map(lambda name: _entry(root, name), names))


def _walk(root: Path, without: Collection[Path]) -> Iterator[str]:
    real = root.resolve()
    for folder, folders, names in os.walk(root):
        place = os.path.relpath(folder, root)
        folders[:] = [each for each in folders if real / place / each not in without]
        links = (each for each in folders if (Path(folder) / each).is_symlink())
        yield from (os.path.normpath(f"{place}/{name}") for name in (*names, *links))


def _entry(root: Path, name: str) -> str:
    path = root / name
    if path.is_symlink():
        return f"{name} -> {path.readlink()}"
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        return f"{name} {stat.S_IFMT(mode):o}"
    return f"{name} {'x' if mode & stat.S_IXUSR else '-'} {file_digest(path)}"


@cache
def _file_digest(path: str) -> str:
    found = Path(path).stat()
    if found.st_size < WORTH_CACHING:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    key = text_digest(path, str(found.st_size), str(found.st_mtime_ns), str(found.st_ino))
    kept = files_module.cache_home() / "digests" / key
    with suppress(OSError):
        return kept.read_text()
    digest = content_digest(Path(path))
    # Only a cache: a disk that is full or closed to us does no harm.
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        files_module.write_whole(kept, digest.encode())
    return digest
