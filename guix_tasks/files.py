"""Files: where those of a user are, how they are read, written and locked, and their digests.

The places are those of the XDG Base Directory Specification.

A folder's digest is that of its files' names, modes and contents, so it is the same in every
checkout and on every machine.  Files of some size are not read twice: what was found is kept,
by size and time of change, in a cache that can be thrown away.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import select
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeVar

from guix_tasks.ui.console import Console

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

T = TypeVar("T")

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


_PREFIX = "guix-tasks-"

_REMOVE = 'read -r _; exec rm -rf -- "$1"'
"""A script that waits until the process at the other end of its standard input has ended."""

_FRESH = 60.0
"""Seconds in which a directory may not be locked yet."""


@contextmanager
def temporary_directory() -> Iterator[Path]:
    """Make a temporary directory for this user alone, which may hold secrets.

    It is removed at the end, also if this process is killed: a small process waits for that.
    What is left all the same, as after a power cut, is removed by the next call.
    """
    _remove_leftovers()
    directory = tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True)
    with directory as name:
        descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY)
        try:
            # The kernel lets go of it when this process ends, in whatever way.
            with suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with subprocess.Popen(
                ["/bin/sh", "-c", _REMOVE, "guix-tasks", name],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                cwd="/", start_new_session=True,
            ) as guard:  # fmt: skip
                try:
                    yield Path(name)
                finally:
                    directory.cleanup()
                    guard.kill()
        finally:
            os.close(descriptor)


def _remove_leftovers() -> None:
    """Remove the temporary directories of processes that have ended."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):
            about = path.lstat()
            if about.st_uid != os.geteuid() or time.time() - about.st_ctime < _FRESH:
                continue
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)


# --- Files that can be read only once: pipes, standard input, process substitutions -----------
#
# One ``inv`` runs several tasks, and each of them reads the settings and the files that they name.
# So what came out of such a file is kept for the rest of the process.  A regular file is read
# again: a task before may have written it.

_PATIENCE = 3.0
"""Seconds without any input after which a line reports what is waited for."""

_contents: dict[tuple[int, int], bytes] = {}
"""What was read, by the device and the number of the file."""


def read_file(path: Path) -> bytes:
    """Return the content of a file; one that can be read only once is read only once.

    Raises ``OSError``, and ``ValueError`` if no file can have that name.
    """
    found = path.stat()
    if stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode):
        return path.read_bytes()
    identity = (found.st_dev, found.st_ino)
    if identity not in _contents:
        _contents[identity] = _drain(path)
    return _contents[identity]


def read_text(path: Path, encoding: str = "utf-8", errors: str = "strict") -> str:
    """Return the content of a file as text, as ``Path.read_text`` does."""
    return io.TextIOWrapper(io.BytesIO(read_file(path)), encoding, errors).read()


@cache
def read_once(path: Path) -> bytes:
    """Return what a file, of any kind, held when this process first read it."""
    return read_file(path)


def is_pipe(path: Path) -> bool:
    """Return whether there is a pipe at a path; a missing file is none."""
    try:
        return stat.S_ISFIFO(path.stat().st_mode)
    except (OSError, ValueError):
        return False


@cache
def reopenable(path: Path) -> Path:
    """Return a path at which this process and its children can read a file any number of times.

    For a pipe that is a file in memory, which goes with this process.  Raises ``OSError``, also
    on a system that has no such files.
    """
    if not is_pipe(path):
        return path
    if sys.platform != "linux":
        raise OSError(errno.EOPNOTSUPP, "cannot be read more than once, because it is a pipe")
    file = os.memfd_create("guix-tasks")
    with os.fdopen(file, "wb", closefd=False) as memory:
        memory.write(read_file(path))
    return Path(f"/proc/{os.getpid()}/fd/{file}")


def forget_contents() -> None:
    """Forget all that was read, as a new process would have."""
    _contents.clear()
    read_once.cache_clear()
    reopenable.cache_clear()


def _drain(path: Path) -> bytes:
    # To open a pipe that nobody writes to would block before anything could be reported.
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    with os.fdopen(file, "rb") as stream:
        waiting = select.poll()
        waiting.register(file, select.POLLIN)
        if not waiting.poll(_PATIENCE * 1000):
            Console().say(f"waiting for {str(path)!r}: nothing has been written to it yet")
            waiting.poll()
        os.set_blocking(file, True)
        return stream.read()


# --- Digests ----------------------------------------------------------------------------------


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
    kept = cache_home() / "digests" / key
    with suppress(OSError):
        return kept.read_text()
    digest = content_digest(Path(path))
    # Only a cache: a disk that is full or closed to us does no harm.
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_whole(kept, digest.encode())
    return digest


# --- Locks ------------------------------------------------------------------------------------


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
