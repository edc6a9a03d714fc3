"""Where guix-tasks keeps what belongs to a user and not to a project, and how files get there.

The places are those of the XDG Base Directory Specification.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


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
