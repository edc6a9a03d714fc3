"""Files that can be read only once: pipes, standard input, process substitutions.

One ``inv`` runs several tasks, and each of them reads the settings and the files that they name.
So what came out of such a file is kept for the rest of the process.  A regular file is read again:
a task before may have written it.
"""

from __future__ import annotations

import errno
import io
import os
import select
import stat
import sys
from functools import cache
from pathlib import Path

from guix_tasks.console import Console
from guix_tasks.reference import quoted

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


def forget() -> None:
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
            Console().say(f"waiting for {quoted(str(path))}: nothing has been written to it yet")
            waiting.poll()
        os.set_blocking(file, True)
        return stream.read()
