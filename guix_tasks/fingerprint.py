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
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from guix_tasks import paths
from guix_tasks.pipes import read_file

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

T = TypeVar("T")

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


def list_digest(describe: Callable[[T], str], items: Sequence[T]) -> str:
    """The digest of a list of items, each of which is described by a text."""
    if len(items) < WORTH_THREADS:
        return text_digest(*map(describe, items))
    # Reading releases the interpreter, so several files are hashed at once.
    with ThreadPoolExecutor() as pool:
        return text_digest(*pool.map(describe, items))


def tree_digest(root: Path, *, without: Collection[Path] = ()) -> str:
    """The digest of a file, or of all that is in a directory.

    Directories in ``without``, by their real paths, do not count.
    """
    if not root.is_dir():
        return file_digest(root)
    return list_digest(partial(_entry, root), sorted(_walk(root, without)))


def _walk(root: Path, without: Collection[Path]) -> Iterator[str]:
    """The names of files, links and empty directories; those with files are in their names."""
    real = root.resolve()
    for folder, folders, names in os.walk(root):
        place = os.path.relpath(folder, root)
        folders[:] = [each for each in folders if real / place / each not in without]
        if place != os.curdir and not folders and not names:
            yield os.path.normpath(place)
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
        return hashlib.sha256(read_file(Path(path))).hexdigest()
    # The time of change, too: a tool that keeps the time of modification cannot set that.
    state = (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)
    key = text_digest(path, *map(str, state))
    kept = paths.cache_home() / "digests" / key
    with suppress(OSError):
        return kept.read_text()
    digest = content_digest(Path(path))
    # Only a cache: a disk that is full or closed to us does no harm.
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        paths.write_whole(kept, digest.encode())
    return digest
