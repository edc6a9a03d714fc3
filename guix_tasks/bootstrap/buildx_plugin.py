"""The buildx plugin for a user who has none: one file, put where the Docker CLI looks for it."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING

from guix_tasks import files
from guix_tasks.bootstrap.apt import Apt, host_suite
from guix_tasks.bootstrap.engine import SUITE
from guix_tasks.bootstrap.service import disk_trouble_is
from guix_tasks.errors import BuilderError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from guix_tasks.ui.console import Console

_PACKAGE = "docker-buildx"
_IN_PACKAGE = "usr/libexec/docker/cli-plugins/docker-buildx"

_TIMEOUT = 60.0
"""Seconds that a server may be silent."""


def install_plugin(target: Path, url: str | None, sha256: str | None, console: Console) -> None:
    """Put the plugin at ``target``: the file at ``url``, or else the one of Debian's package.

    A file from elsewhere has the given SHA-256 sum, or it is not kept.  Raises ``BuilderError``.
    """
    with disk_trouble_is(BuilderError):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".guix-tasks-") as scratch:
            made = Path(scratch) / target.name
            if url and sha256:
                console.say(f"getting buildx from {url}")
                _download(url, sha256, made)
            else:
                _unpack(made, console)
            made.chmod(0o755)
            made.replace(target)
    console.say(f"buildx is at {target}")


def _download(url: str, sha256: str, target: Path) -> None:
    digest = hashlib.sha256()
    with target.open("wb") as file:
        for data in _pieces(url):
            digest.update(data)
            file.write(data)
    if digest.hexdigest() != sha256:
        raise BuilderError(
            f"BUILDX_SHA256: what is at {url} has the sum {digest.hexdigest()}, not {sha256}; "
            "it was not kept: find out which is right"
        )


def _pieces(url: str) -> Iterator[bytes]:
    try:
        # Only http, https and file: the setting's parser lets no other scheme pass.
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:  # noqa: S310
            while data := answer.read(1 << 20):
                yield data
    except (OSError, HTTPException) as error:
        cause = " ".join(str(getattr(error, "reason", None) or error).split())
        raise BuilderError(f"BUILDX_URL: {url} cannot be had: {cause}; mend it") from None


def _unpack(target: Path, console: Console) -> None:
    own = host_suite()
    if own is None:
        raise BuilderError(
            "buildx is taken from Debian's packages, and this host is not Debian: install the "
            "package docker-buildx-plugin of Docker's archive, or set BUILDX_URL and BUILDX_SHA256"
        )
    console.say(f"unpacking buildx from Debian's package {_PACKAGE}")
    suites = list(dict.fromkeys((own, SUITE)))
    apt = Apt(files.cache_home() / "apt", suites, failure=BuilderError)
    root = target.with_name("root")
    apt.unpacked([f"{_PACKAGE}/{SUITE}"], root)
    shutil.move(root / _IN_PACKAGE, target)
