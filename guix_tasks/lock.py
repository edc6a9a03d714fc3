"""One ``inv`` at a time changes an image."""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING

from guix_tasks import files
from guix_tasks.files import text_digest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from guix_tasks.ui.console import Console


@contextmanager
def alone(console: Console, engine: str, image: str, task: str) -> Iterator[None]:
    """Wait until no other ``inv`` of this user works on an image of an engine, by its URL.

    The kernel lets go of the lock when its holder ends, in whatever way.  Where no lock can be
    made, as without a home that can be written to, the work goes on without one.
    """
    file = _open(text_digest(engine, image))
    if file is None:
        yield
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            console.say(f"{task}: waiting for {file.read() or 'another inv'}, which uses {image}")
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(f"`inv {task}` (process {os.getpid()})")
        file.flush()
        yield
        file.truncate(0)


def _open(name: str) -> IO[str] | None:
    folder = files.cache_home() / "locks"
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return (folder / name).open("a+")
    return None
