"""Where guix-tasks keeps what belongs to a user and not to a project.

The places are those of the XDG Base Directory Specification.
"""

from __future__ import annotations

import os
from pathlib import Path


def data_home() -> Path:
    """The folder for what must last: the private engine, the local registry."""
    return _xdg("XDG_DATA_HOME", ".local/share")


def cache_home() -> Path:
    """The folder for what can be thrown away and made again."""
    return _xdg("XDG_CACHE_HOME", ".cache")


def _xdg(variable: str, fallback: str) -> Path:
    # The specification says that a relative path in these variables is to be ignored.
    value = os.environ.get(variable, "")
    home = Path(value) if value.startswith("/") else Path.home() / fallback
    return home / "guix-tasks"
