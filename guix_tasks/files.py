"""User directories, atomic writes, temporary directories, locks, pipes and digests."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import re
import select
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

from guix_tasks.ui.console import Console

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

T = TypeVar("T")

# --- User directories (XDG Base Directory Specification) --------------------------------------


def data_home() -> Path:
    """Return the directory of persistent data: the private engine and the local registry."""
    return _xdg("XDG_DATA_HOME", ".local/share")


def cache_home() -> Path:
    """Return the directory of data that can be recreated."""
    return _xdg("XDG_CACHE_HOME", ".cache")


def _xdg(variable: str, fallback: str) -> Path:
    # The specification requires that relative paths in these variables are ignored.
    value = os.environ.get(variable, "")
    home = Path(value) if value.startswith("/") else user_home() / fallback
    return home / "guix-tasks"


def user_home() -> Path:
    """Return the user's home directory; for a user without one, a path that does not exist."""
    try:
        return Path.home()
    except RuntimeError:
        return Path("/nonexistent")  # the home directory of such users in Debian


# --- Writing ----------------------------------------------------------------------------------


def write_whole(path: Path, content: bytes | Iterable[bytes], mode: int = 0o666) -> None:
    """Write or replace a file atomically.

    ``content`` can be an iterator of chunks; if it raises, no file is written. A link to the file
    stays, and so do the mode and the owner of an existing file. ``mode`` is that of a new file; the
    umask applies to it. A file that cannot be replaced, for example a mounted one, is overwritten.

    Raise ``OSError`` if the file cannot be written.
    """
    check_writable(path)
    target = Path(os.path.realpath(path))
    old = target.stat() if target.exists() else None
    is_replaced = os.access(target.parent, os.W_OK) and not (old and not stat.S_ISREG(old.st_mode))
    with nullcontext(target.parent) if is_replaced else temporary_directory() as directory:
        unfinished = directory / f".{target.name}.{os.getpid()}"
        try:
            unfinished.touch(old.st_mode & 0o777 if old else mode)
            with unfinished.open("wb") as file:
                file.writelines([content] if isinstance(content, bytes) else content)
            if not (is_replaced and _replace(target, unfinished, old)):
                with unfinished.open("rb") as source, target.open("wb") as file:
                    shutil.copyfileobj(source, file)
                unfinished.unlink()
        except BaseException as error:
            with suppress(OSError):
                unfinished.unlink()
            if isinstance(error, OSError):
                error.filename = error.filename or str(path)  # a failed write has no name
            raise


def _replace(target: Path, new: Path, old: os.stat_result | None) -> bool:
    """Give a new file the owner and the mode of the old one, and rename it to ``target``.

    Return False if the old file can only be overwritten: the file of another user, or a mount.
    """
    try:
        if old:
            os.chown(new, old.st_uid, old.st_gid)
            new.chmod(stat.S_IMODE(old.st_mode))
        new.replace(target)
    except OSError as error:
        if old is None or error.errno not in (errno.EBUSY, errno.EPERM, errno.EXDEV):
            raise
        return False
    return True


def check_writable(path: Path) -> None:
    """Raise ``OSError`` if a file or a directory can be neither written nor created."""
    target = Path(os.path.realpath(path))
    place = target if target.exists() else target.parent
    if not place.exists():
        code = errno.ENOENT
    elif place != target and not place.is_dir():
        code = errno.ENOTDIR
    elif os.access(place, os.W_OK):
        return
    else:
        code = errno.EROFS if os.statvfs(place).f_flag & os.ST_RDONLY else errno.EACCES
    raise OSError(code, os.strerror(code), str(path))


LONGEST_SOCKET = 107
"""Bytes of a socket's path (unix(7))."""

_PREFIX = ".guix-tasks-temporary-"
"""No name that a user would give a directory: leftovers with it are deleted."""

_REMOVE = 'read -r _; exec rm -rf -- "$1"'
"""Script that waits until the process that writes to its standard input has ended."""

_UNLOCKED_TIME = 60.0
"""Seconds after its creation during which a directory in use may still be unlocked."""


@contextmanager
def temporary_directory() -> Iterator[Path]:
    """Create a temporary directory that only this user can read, also for secrets.

    It is removed at the end. If this process is killed, a guard process removes it. After a power
    cut, the next call removes it.
    """
    _remove_leftovers()
    directory = tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True)
    with directory as name:
        descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY)
        try:
            # The kernel releases the lock when this process ends, even if it is killed.
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
            status = path.lstat()
            age = time.time() - status.st_ctime
            if status.st_uid != os.geteuid() or age < _UNLOCKED_TIME:
                continue
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)


# --- Locks ------------------------------------------------------------------------------------


@contextmanager
def image_lock(show: Callable[[str], None], engine: str, image: str, task: str) -> Iterator[None]:
    """Hold the lock of an image on an engine, given by its URL.

    If another ``inv`` of this user holds the lock, ``show`` its name and wait. The kernel releases
    the lock when its holder ends, even if it is killed. If no lock file can be created, for example
    without a writable home directory, continue without a lock.
    """
    directory = cache_home() / "locks"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (directory / text_digest(engine, image)).open("a+")
    except OSError:
        yield
        return
    with lock as file:
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


# --- Files that can be read only once: pipes, standard input, process substitutions -----------
#
# One ``inv`` runs several tasks, and each task reads the settings and the files to which they
# refer. Therefore the content of such a file is cached for the rest of the process. A regular file
# is not cached, because an earlier task can have written it.

_SILENT_WAIT = 3.0
"""Seconds without input after which a message reports the wait."""

_contents: dict[tuple[int, int], bytes] = {}
"""Cached contents by device and inode."""


def read_file(path: Path) -> bytes:
    """Return the content of a file, from a cache for pipes and other files readable only once.

    Raise ``OSError`` if the file cannot be read, and ``ValueError`` if no file can have that name.
    """
    status = path.stat()
    if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
        return path.read_bytes()
    identity = (status.st_dev, status.st_ino)
    if identity not in _contents:
        _contents[identity] = _read_pipe(path)
    return _contents[identity]


def read_text(path: Path, encoding: str = "utf-8", errors: str = "strict") -> str:
    """Return the content of a file as text, as ``Path.read_text`` does."""
    return io.TextIOWrapper(io.BytesIO(read_file(path)), encoding, errors).read()


@cache
def read_once(path: Path) -> bytes:
    """Return the content that a file of any kind had when this process first read it."""
    return read_file(path)


def is_pipe(path: Path) -> bool:
    """Return True if a path is a pipe, and False for a missing file."""
    try:
        return stat.S_ISFIFO(path.stat().st_mode)
    except (OSError, ValueError):
        return False


@cache
def reopenable(path: Path) -> Path:
    """Return a path from which this process and its children can read a file several times.

    The content of a pipe is copied to a file in memory, which ends with this process. Raise
    ``OSError`` if the pipe cannot be read or the system has no files in memory.
    """
    if not is_pipe(path):
        return path
    if sys.platform != "linux":
        raise OSError(errno.EOPNOTSUPP, "cannot be read more than once, because it is a pipe")
    file = os.memfd_create("guix-tasks")
    with os.fdopen(file, "wb", closefd=False) as memory:
        memory.write(read_file(path))
    return Path(f"/proc/{os.getpid()}/fd/{file}")


def _read_pipe(path: Path) -> bytes:
    # Opening a pipe without a writer would block, before the wait can be reported.
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    with os.fdopen(file, "rb") as stream:
        poll = select.poll()
        poll.register(file, select.POLLIN)
        if not poll.poll(_SILENT_WAIT * 1000):
            Console().print(f"waiting for {str(path)!r}: nothing has been written to it yet")
            poll.poll()
        os.set_blocking(file, True)
        return stream.read()


# --- Digests ----------------------------------------------------------------------------------
#
# The digest of a directory covers the names, modes and contents of its files, so it is the same in
# every checkout and on every machine.

WORTH_THREADS = 200
"""Number of files from which hashing them in parallel is worth the start of threads."""

WORTH_CACHING = 1 << 20
"""Size in bytes from which a file's digest is cached, by its size and time of change."""


def text_digest(*texts: str) -> str:
    """Return the digest of a list of texts; it differs for ``("ab",)`` and ``("a", "b")``."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the digest of a file's content, from a cache if the file has not changed."""
    status = path.stat()
    # Tools can set the time of modification, but not the time of change.
    state = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    return _digest_of_state(path, state)


@cache
def _digest_of_state(path: Path, state: tuple[int, ...]) -> str:
    """Return the digest of a file, given its size, its times and its inode."""
    if state[0] < WORTH_CACHING:
        return hashlib.sha256(read_file(path)).hexdigest()
    cached = cache_home() / "digests" / text_digest(str(path), *map(str, state))
    with suppress(OSError):
        saved = cached.read_bytes()
        if re.fullmatch(rb"[0-9a-f]{64}", saved):
            return saved.decode()
    digest = content_digest(path)
    with suppress(OSError):  # the cache is optional
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_whole(cached, digest.encode())
    return digest


def content_digest(path: Path) -> str:
    """Read a file and return the digest of its content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(WORTH_CACHING):
            digest.update(chunk)
    return digest.hexdigest()


def list_digest(describe: Callable[[T], str], items: Sequence[T]) -> str:
    """Return the digest of the descriptions of a list of items."""
    if len(items) < WORTH_THREADS:
        return text_digest(*map(describe, items))
    # Reading releases the interpreter lock, so threads hash files in parallel.
    with ThreadPoolExecutor() as pool:
        return text_digest(*pool.map(describe, items))


def tree_digest(root: Path, *, without: Collection[Path] = ()) -> str:
    """Return the digest of a file, or of a directory with all its files.

    ``without`` contains the real paths of files and directories to ignore.

    Raise ``OSError`` if a file or a directory cannot be read.
    """
    mode = root.stat().st_mode
    if stat.S_ISDIR(mode):
        return list_digest(partial(_entry, root), sorted(_walk(root, without)))
    if stat.S_ISREG(mode):
        digest = file_digest(root)
        return text_digest("x", digest) if mode & stat.S_IXUSR else digest
    return text_digest(f"{stat.S_IFMT(mode):o}")


def _walk(root: Path, without: Collection[Path]) -> Iterator[str]:
    """Yield the paths of files, links and empty directories, relative to ``root``."""
    real = os.path.realpath(root)
    ignored = {str(path) for path in without}
    above = {str(parent) for path in without for parent in path.parents}
    for directory, subdirectories, names in os.walk(real, onerror=raise_error):
        path = os.path.relpath(directory, real)
        kept = [name for name in names if f"{directory}/{name}" not in ignored]
        subdirectories[:] = [n for n in subdirectories if f"{directory}/{n}" not in ignored]
        # A directory that a task creates for its output is empty without it.
        if not (path == os.curdir or subdirectories or kept or directory in above):
            yield os.path.normpath(path)
        links = (name for name in subdirectories if Path(directory, name).is_symlink())
        yield from (os.path.normpath(f"{path}/{name}") for name in (*kept, *links))


def raise_error(error: OSError) -> NoReturn:
    """Raise an error of ``os.walk``, which otherwise skips directories that cannot be read."""
    raise error


def _entry(root: Path, name: str) -> str:
    path = root / name
    if path.is_symlink():
        return f"{name} -> {path.readlink()}"
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        return f"{name} {stat.S_IFMT(mode):o}"
    return f"{name} {'x' if mode & stat.S_IXUSR else '-'} {file_digest(path)}"
