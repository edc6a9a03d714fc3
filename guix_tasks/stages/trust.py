"""Substitutes that Guix ignores because the image does not trust their keys.

To Guix these are missing: it builds everything from source and prints no reason. The signatures
that it has read are in the narinfos of a server, or in the daemon's cache of them.
"""

from __future__ import annotations

import base64
import hashlib
import re
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from guix_tasks import guix
from guix_tasks.errors import StageError
from guix_tasks.guix.result_paths import SUBSTITUTE_CACHE
from guix_tasks.settings.values import Sandbox
from guix_tasks.stages.container import ROOTLESS_CACHES, read_container_file

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guix_tasks.engine.api import Engine
    from guix_tasks.settings import Settings
    from guix_tasks.stages.project import Project

_MAX_DERIVATIONS = 8
"""Number of derivations of a list that are looked up. A server that has one has nearly all."""


class SubstituteTrust:
    """Check in a running stage that the image trusts the substitutes that Guix does not use.

    If it trusts none of them, the stage is stopped, or with ``GUIX_FALLBACK`` a warning is printed.
    """

    def __init__(self, project: Project, container: str, name: str) -> None:
        self._project = project
        self._container = container
        self._name = name
        self._warning = ""

    def check(self, derivations: Sequence[str]) -> None:
        """Check the substitutes of derivations that Guix builds, until one is not trusted."""
        if not derivations or self._warning:
            return
        engine, settings = self._project.engine, self._project.settings
        servers = untrusted_servers(engine, settings, self._container, derivations)
        if not servers:
            return
        names = ", ".join(urlsplit(url).hostname or url for url in servers)
        self._warning = (
            f"{self._name}: the image does not trust the key of the substitutes ({names}), so Guix "
            "builds everything from source; set GUIX_SUBSTITUTE_KEYS to the server's public key"
        )
        if settings.guix_fallback:
            self._project.console.print(self._warning)
        else:
            engine.stop(self._container, seconds=10)

    def raise_if_stopped(self) -> None:
        """Raise ``StageError`` if the stage was stopped."""
        if self._warning and not self._project.settings.guix_fallback:
            raise StageError(f"{self._warning}, or set GUIX_FALLBACK=yes")


def untrusted_servers(
    engine: Engine, settings: Settings, container: str, derivations: Sequence[str]
) -> list[str]:
    """Return the servers with substitutes for ``derivations``, which Guix builds in a container.

    None is returned if the image trusts the key of one of these substitutes.
    """
    acl = read_container_file(engine, container, guix.ACL, follow=True)
    trusted = guix.public_keys(acl.decode(errors="replace"))
    servers: dict[str, None] = {}
    for derivation in derivations[:: -(-len(derivations) // _MAX_DERIVATIONS)]:
        text = read_container_file(engine, container, derivation).decode(errors="replace")
        output = re.match(r'Derive\(\[\("[^"]*","/gnu/store/([0-9a-z]{32})-', text)
        for url in settings.guix_substitute_urls or guix.DEFAULT_SUBSTITUTE_URLS:
            path = _narinfo(settings, url, output[1]) if output else ""
            narinfo = read_container_file(engine, container, path) if path else b""
            if keys := guix.signing_keys(narinfo.decode(errors="replace")):
                if keys & trusted:
                    return []
                servers[url] = None
    return list(servers)


def _narinfo(settings: Settings, url: str, item: str) -> str:
    """Return the path of a narinfo in a container (``narinfo-cache-file`` in Guix)."""
    if urlsplit(url).scheme == "file":
        return f"{urlsplit(url).path.rstrip('/')}/{item}.narinfo"
    rootless = settings.guix_sandbox is Sandbox.ROOTLESS
    cache = (
        f"{ROOTLESS_CACHES['rootless']}/guix/substitute"
        if rootless
        else f"{SUBSTITUTE_CACHE}/cache"
    )
    server = base64.b32encode(hashlib.sha256(url.encode()).digest()).decode().lower().rstrip("=")
    return f"{cache}/{server}/{item}"
