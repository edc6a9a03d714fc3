"""The substitute server near by: whether ``substitutes.up`` has started one that stages reach."""

from __future__ import annotations

import io
import tarfile
from typing import TYPE_CHECKING

from guix_tasks.stages.container import Nearby, find_server, network

if TYPE_CHECKING:
    from guix_tasks.engine.api import Container, Engine
    from guix_tasks.settings import Settings
    from guix_tasks.ui.console import Console

LISTEN_LABEL = "org.guix-tasks.substitutes"
"""``ADDRESS:PORT`` of the machine that the server is reached at."""

KEYS = "/var/lib/guix-tasks"
"""Where its key pair is, in its container."""

PUBLIC_KEY = f"{KEYS}/signing-key.pub"

ANY = "0.0.0.0"  # noqa: S104 -- where a user asks for it

_USUAL_NETWORKS = ("bridge", "podman")
"""The network of a container that names none, by the engine's kind."""


def nearby(engine: Engine, settings: Settings, console: Console) -> Nearby | None:
    """The server that is up, if work containers reach it; where they do not, say so."""
    server = find_server(engine, settings)
    if server is None or not server.running:
        return None
    url, key = server_url(engine, settings, server), public_key(engine, server)
    if url is None or not key:
        console.say(
            "substitutes: work containers do not reach the server that is up; after a change of "
            "NETWORK, run `inv substitutes.up` again"
        )
        return None
    return Nearby(url, key, server.image)


def server_url(engine: Engine, settings: Settings, server: Container) -> str | None:
    """Where a work container reaches a server; None where it does not."""
    address, _, port = server.labels[LISTEN_LABEL].rpartition(":")
    name = network(engine, settings)
    if name == "host":
        return f"http://{'127.0.0.1' if address == ANY else address}:{port}"
    names = (name,) if name else _USUAL_NETWORKS
    found = (server.addresses.get(each) for each in names)
    host = next((each for each in found if each), None)
    return f"http://{host}:{port}" if host else None


def public_key(engine: Engine, server: Container) -> bytes:
    """The key that its substitutes are signed by; nothing where it has none as yet."""
    pieces = b"".join(engine.copy_out(server.id, PUBLIC_KEY))
    if not pieces:
        return b""
    with tarfile.open(fileobj=io.BytesIO(pieces)) as tar:
        file = tar.extractfile(tar.getmembers()[0])
        return file.read() if file else b""
