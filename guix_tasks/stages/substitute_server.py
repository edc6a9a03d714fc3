"""The local substitute server of ``inv substitutes.up``, as work containers reach it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guix_tasks.stages.container import (
    SubstituteServer,
    find_server,
    network,
    read_container_file,
)

if TYPE_CHECKING:
    from guix_tasks.engine.api import Container, Engine
    from guix_tasks.settings import Settings
    from guix_tasks.stages.project import Project

LISTEN_LABEL = "org.guix-tasks.substitutes"
"""``ADDRESS:PORT`` on the engine's machine that the server listens on."""

KEYS = "/var/lib/guix-tasks"
"""Directory of the server's key pair in its container."""

PUBLIC_KEY = f"{KEYS}/signing-key.pub"

ANY = "0.0.0.0"  # noqa: S104 -- only at a user's request

_DEFAULT_NETWORKS = ("bridge", "podman")
"""Networks that Docker and Podman use for a container without an explicit network."""


def local_server(project: Project, task: str) -> SubstituteServer | None:
    """Return the running server, and print that the task uses it.

    Return None if there is none, or with a message if work containers cannot reach it.
    """
    engine, settings, console = project.engine, project.settings, project.console
    server = find_server(engine, settings)
    if server is None or not server.running:
        return None
    url, key = server_url(engine, settings, server), public_key(engine, server)
    if url is None or not key:
        console.print(
            "substitutes: work containers cannot reach the running server; after a change of "
            "NETWORK, run `inv substitutes.up` again"
        )
        return None
    if "http_proxy" in settings.proxies:
        console.print(
            f"substitutes: Guix asks {url} through http_proxy, because it ignores no_proxy; if the "
            "proxy cannot reach that address, set only https_proxy"
        )
    newest = project.ledger.last_stage()
    is_newest = newest is not None and newest.id == server.image
    age = "" if is_newest else ", of an older image; `inv substitutes.up` serves the newest"
    console.print(f"{task}: substitutes come from {url} first{age}")
    return SubstituteServer(url, key)


def server_url(engine: Engine, settings: Settings, server: Container) -> str | None:
    """Return the URL of a server for work containers, or None if they cannot reach it."""
    address, _, port = server.labels[LISTEN_LABEL].rpartition(":")
    work_network = network(engine, settings)
    if work_network == "host":
        return f"http://{'127.0.0.1' if address == ANY else address}:{port}"
    networks = (work_network,) if work_network else _DEFAULT_NETWORKS
    hosts = [host for name in networks if (host := server.addresses.get(name))]
    return f"http://{hosts[0]}:{port}" if hosts else None


def public_key(engine: Engine, server: Container) -> bytes:
    """Return the key that the server signs substitutes with, or nothing if it has none yet."""
    return read_container_file(engine, server.id, PUBLIC_KEY)
