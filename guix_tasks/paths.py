"""Where guix-tasks keeps what belongs to a user and not to a project, and how files get there.

The places are those of the XDG Base Directory Specification.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


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


def _xdg(variable: str, fallback: str) -> Path:
    # The specification says that a relative path in these variables is to be ignored.
    value = os.environ.get(variable, "")
    home = Path(value) if value.startswith("/") else Path.home() / fallback
    return home / "guix-tasks"
