"""Paths to which stages write, and the mounts that would exclude them from the image.

A commit excludes mounts and volumes.
"""

from __future__ import annotations

import posixpath
from pathlib import PurePosixPath

SUBSTITUTE_CACHE = "/var/guix/substitute"
"""Only directory of Guix's state that is no result of a stage."""

_RESULTS = (
    "/gnu/store",
    "/var/guix",
    # Guix's files in root's home; other files there, such as ~/.cache and ~/.ssh, are the user's.
    "/root/.config/guix/channels.scm",
    "/root/.config/guix/current",
    "/root/.guix-profile",
)


def normal_path(path: str) -> str:
    """Return a path of a container as the engine understands it: absolute, without ``..``."""
    return posixpath.normpath(f"/{path.lstrip('/')}")


def conflict(target: str) -> str | None:
    """Return the reason why a mount excludes a result, as ``covers /gnu/store``, or None."""
    path = PurePosixPath(normal_path(target))
    if path.is_relative_to(SUBSTITUTE_CACHE):
        return None
    for result in _RESULTS:
        if PurePosixPath(result).is_relative_to(path):
            return f"covers {result}"
        if path.is_relative_to(result):
            return f"is in {result}"
    return None
