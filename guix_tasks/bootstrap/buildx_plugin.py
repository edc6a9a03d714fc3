"""Installation of the buildx plugin for a user: one file in the Docker CLI's plugin directory."""

from __future__ import annotations

import shutil
import tempfile
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING

from guix_tasks import files
from guix_tasks.bootstrap.apt import Apt, required_suite
from guix_tasks.bootstrap.engine import SUITE
from guix_tasks.bootstrap.service import disk_errors_as
from guix_tasks.errors import BuilderError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from guix_tasks.ui.console import Console

_PACKAGE = "docker-buildx"
_IN_PACKAGE = "usr/libexec/docker/cli-plugins/docker-buildx"

_TIMEOUT = 60.0
"""Seconds without data from a server."""


def install_plugin(target: Path, url: str | None, sha256: str | None, console: Console) -> None:
    """Install the plugin at ``target`` from ``url`` or from Debian's package.

    Raise ``BuilderError`` if the file cannot be downloaded or does not match ``sha256``.
    """
    with disk_errors_as(BuilderError):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".guix-tasks-") as scratch:
            plugin = Path(scratch) / target.name
            if url and sha256:
                console.print(f"downloading buildx from {url}")
                files.write_whole(plugin, _download(url))
                if (digest := files.content_digest(plugin)) != sha256:
                    raise BuilderError(
                        f"BUILDX_SHA256: {url} has the SHA-256 {digest}, not {sha256}; it was "
                        "deleted: check which sum is right"
                    )
            else:
                _unpack(plugin, console)
            plugin.chmod(0o755)
            plugin.replace(target)
    console.print(f"installed buildx at {target}")


def _download(url: str) -> Iterator[bytes]:
    try:
        # requests has no file: URLs.  The parser of the setting accepts only http, https and file.
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:  # noqa: S310
            while data := response.read(1 << 20):
                yield data
    except (OSError, HTTPException) as error:
        cause = " ".join(str(getattr(error, "reason", None) or error).split())
        raise BuilderError(
            f"BUILDX_URL: cannot download {url}: {cause}; fix the URL or the server"
        ) from None


def _unpack(target: Path, console: Console) -> None:
    hint = (
        "install the package docker-buildx-plugin of Docker's archive, or set BUILDX_URL and "
        "BUILDX_SHA256"
    )
    suites = list(dict.fromkeys((required_suite("buildx", hint, BuilderError), SUITE)))
    console.print(f"unpacking buildx from Debian's package {_PACKAGE}")
    root = target.with_name("root")
    Apt(suites, failure=BuilderError).unpack([f"{_PACKAGE}/{SUITE}"], root)
    shutil.move(root / _IN_PACKAGE, target)
