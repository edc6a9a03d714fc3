"""Files: where those of a user are, how they are written and locked, digests of their content.

The places are those of the XDG Base Directory Specification.

A folder's digest is that of its files' names, modes and contents, so it is the same in every
checkout and on every machine.  Files of some size are not read twice: what was found is kept,
by size and time of change, in a cache that can be thrown away.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

WORTH_THREADS = 200
"""Files from which hashing several at once beats starting threads."""

WORTH_CACHING = 1 << 20
"""Bytes from which looking a digest up beats making it."""


def data_home() -> Path:
    """The folder for what must last: the private engine, the local registry."""
    return _xdg("XDG_DATA_HOME", ".local/share")


def cache_home() -> Path:
    """The folder for what can be thrown away and made again."""
    return _xdg("XDG_CACHE_HOME", ".cache")


def write_whole(path: Path, content: bytes | Iterable[bytes], mode: int = 0o666) -> None:
    """Write a file, in the place of what was there, wholly or not at all.  Raises ``OSError``.

    The content may come piece by piece; what is raised on its way leaves nothing behind, either.

    ``mode`` is less the umask, as ever.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.touch(mode)
        if isinstance(content, bytes):
            unfinished.write_bytes(content)
        else:
            with unfinished.open("wb") as file:
                file.writelines(content)
        unfinished.replace(path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink()
        raise


def _xdg(variable: str, fallback: str) -> Path:
    # The specification says that a relative path in these variables is to be ignored.
    value = os.environ.get(variable, "")
    home = Path(value) if value.startswith("/") else Path.home() / fallback
    return home / "guix-tasks"


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
    kept = cache_home() / "digests" / key
    with suppress(OSError):
        return kept.read_text()
    digest = content_digest(Path(path))
    # Only a cache: a disk that is full or closed to us does no harm.
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_whole(kept, digest.encode())
    return digest


@contextmanager
def alone(show: Callable[[str], None], engine: str, image: str, task: str) -> Iterator[None]:
    """Wait until no other ``inv`` of this user works on an image of an engine, by its URL.

    The kernel lets go of the lock when its holder ends, in whatever way.  Where no lock can be
    made, as without a home that can be written to, the work goes on without one.
    """
    file = _open_lock(text_digest(engine, image))
    if file is None:
        yield
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            show(f"{task}: waiting for {file.read() or 'another inv'}, which uses {image}")
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(f"`inv {task}` (process {os.getpid()})")
        file.flush()
        yield
        file.truncate(0)


def _open_lock(name: str) -> IO[str] | None:
    folder = cache_home() / "locks"
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return (folder / name).open("a+")
    return None
