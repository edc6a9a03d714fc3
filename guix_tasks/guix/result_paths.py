"""The paths of an image that stages write, and which mounts would keep that out of it.

A commit takes nothing of what is on a mount or a volume.
"""

from __future__ import annotations

import posixpath
from pathlib import PurePosixPath

SUBSTITUTE_CACHE = "/var/guix/substitute"
"""The only part of Guix's state that is no part of a result."""

_RESULTS = (
    "/gnu/store",
    "/var/guix",
    # What Guix writes to root's home; the rest of it, ~/.cache and ~/.ssh say, is the user's.
    "/root/.config/guix/channels.scm",
    "/root/.config/guix/current",
    "/root/.guix-profile",
)


def normal_path(path: str) -> str:
    """Return a path of a container as the engine understands it: absolute, without ``..``."""
    return posixpath.normpath(f"/{path.lstrip('/')}")


def conflict(target: str) -> str | None:
    """Explain which result a mount at this path would take, as ``covers /gnu/store``, or None."""
    path = PurePosixPath(normal_path(target))
    if path.is_relative_to(SUBSTITUTE_CACHE):
        return None
    for result in _RESULTS:
        if PurePosixPath(result).is_relative_to(path):
            return f"covers {result}"
        if path.is_relative_to(result):
            return f"is in {result}"
    return None
