"""Substitutes that Guix ignores because the image does not trust their keys.

To Guix these are missing: it builds everything from source and prints no reason. The signatures
that it has read are in the narinfos of a server, or in the daemon's cache of them.
"""

from __future__ import annotations

import base64
import hashlib
from contextlib import suppress
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from guix_tasks import guix
from guix_tasks.errors import StageError
from guix_tasks.files import read_text
from guix_tasks.guix.result_paths import SUBSTITUTE_CACHE
from guix_tasks.settings.values import Sandbox
from guix_tasks.stages.container import (
    ROOTLESS_CACHES,
    mounted_path,
    read_container_file,
    read_container_files,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from guix_tasks.engine.api import Engine
    from guix_tasks.guix.progress import Activity
    from guix_tasks.settings import Settings
    from guix_tasks.stages.project import Project


class SubstituteTrust:
    """Check in a running stage that the image trusts the substitutes that Guix does not use.

    If it trusts none of them, the stage is stopped, or with ``GUIX_FALLBACK`` a warning is printed.
    """

    def __init__(self, project: Project, container: str, name: str) -> None:
        self._project = project
        self._container = container
        self._name = name
        self._warning = ""
        self._is_trusted = False

    def look(self, activity: Activity) -> None:
        """Check the servers if Guix begins to build without substitutes."""
        if self._warning or self._is_trusted or not activity.take_build_without_substitutes():
            return
        engine, settings = self._project.engine, self._project.settings
        acl = read_container_file(engine, self._container, guix.ACL, follow=True)
        trusted = guix.public_keys(acl.decode(errors="replace"))
        untrusted = []
        for url in settings.guix_substitute_urls or guix.DEFAULT_SUBSTITUTE_URLS:
            keys: set[str] = set()
            for narinfo in _narinfos(engine, settings, self._container, url):
                keys |= guix.signing_keys(narinfo)
                if keys & trusted:
                    self._is_trusted = True
                    return
            if keys:
                untrusted.append(urlsplit(url).hostname or url)
        if not untrusted:
            return
        self._warning = (
            f"{self._name}: the image does not trust the key of the substitutes of "
            f"{', '.join(untrusted)}, so Guix builds everything from source; set "
            "GUIX_SUBSTITUTE_KEYS to the server's public key"
        )
        if settings.guix_fallback:
            self._project.console.print(self._warning)
        else:
            engine.stop(self._container, seconds=10)

    def raise_if_stopped(self) -> None:
        """Raise ``StageError`` if the stage was stopped."""
        if self._warning and not self._project.settings.guix_fallback:
            raise StageError(f"{self._warning}, or set GUIX_FALLBACK=yes")


def _narinfos(engine: Engine, settings: Settings, container: str, url: str) -> Iterator[str]:
    """Yield the narinfos of a server that a container has."""
    if urlsplit(url).scheme == "file":
        source = mounted_path(settings, urlsplit(url).path)
        with suppress(OSError):
            for path in source.glob("*.narinfo") if source else ():
                yield read_text(path, "utf-8", "replace")
        return
    # See ``narinfo-cache-file`` in Guix.
    name = base64.b32encode(hashlib.sha256(url.encode()).digest()).decode().lower().rstrip("=")
    cache = f"{SUBSTITUTE_CACHE}/cache"
    if settings.guix_sandbox is Sandbox.ROOTLESS:
        cache = f"{ROOTLESS_CACHES['rootless']}/guix/substitute"
    for _, content in read_container_files(engine, container, f"{cache}/{name}"):
        yield content.decode(errors="replace")
