"""Serve substitutes locally: run ``guix publish`` of the newest stage image in a container."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from guix_tasks import guix
from guix_tasks.engine.api import ContainerSpec
from guix_tasks.errors import EngineError, UsageError
from guix_tasks.files import write_whole
from guix_tasks.settings.values import Sandbox
from guix_tasks.stages import container
from guix_tasks.stages.images import proven_stage
from guix_tasks.stages.ownership import USER, grant_ownership
from guix_tasks.stages.substitute_server import ANY, KEYS, LISTEN_LABEL, public_key, server_url
from guix_tasks.ui.log import LogReader

if TYPE_CHECKING:
    from guix_tasks.engine.api import Container, Image
    from guix_tasks.stages.project import Project

START_SECONDS = 60.0
"""Seconds until the server must listen."""


def up(project: Project) -> None:
    """Serve the store of the newest stage image and print the settings for other machines.

    A server that already serves this image keeps running.

    Raise ``UsageError`` if there is no stage image or no network, and ``EngineError`` if the server
    does not start.
    """
    engine, settings, console = project.engine, project.settings, project.console
    if settings.network == "none":
        raise UsageError(
            "NETWORK=none: a substitute server would be unreachable; remove the NETWORK line, or "
            "set a network"
        )
    image = project.ledger.last_stage()
    if image is None:
        raise UsageError("there is no stage to serve; run `inv base pull install` first")
    stage = proven_stage(image)
    server = container.find_server(engine, settings)
    if server and _serves(project, server, image):
        console.print(f"substitutes: already serving the stage {stage}")
    else:
        _stop(project, server)
        _start(project, image)
        if engine.is_dry:
            return
        console.print(f"substitutes: serving the stage {stage}")
        server = container.find_server(engine, settings)
    if server:
        _print_settings(project, server)


def down(project: Project) -> None:
    """Stop the server and keep its key pair."""
    server = container.find_server(project.engine, project.settings)
    _stop(project, server)
    if server is None:
        project.console.print("substitutes: no server of this project is running")
    elif not project.engine.is_dry:
        project.console.print(
            "substitutes: stopped; the key is kept until `inv clean`, which also removes volumes"
        )


def _stop(project: Project, server: Container | None) -> None:
    if server:
        project.engine.remove(server.id)
        project.engine.drop(server.image)


def _serves(project: Project, server: Container, image: Image) -> bool:
    has_address = server.labels.get(LISTEN_LABEL) == str(project.settings.substitutes_listen)
    url = has_address and server_url(project.engine, project.settings, server)
    return bool(url) and server.running and server.image == image.id


def _start(project: Project, image: Image) -> None:
    """Start the server as an unprivileged user without capabilities.

    ``guix publish`` queries the daemon, which must own the database of the store. So the daemon
    runs as the same user, which gets the database.
    """
    engine, listen = project.engine, project.settings.substitutes_listen
    # The server neither fetches nor builds.
    settings = replace(
        project.settings,
        guix_sandbox=Sandbox.ROOTLESS,
        guix_substitute_urls=(),
        guix_substitute_keys=(),
        proxies=MappingProxyType({}),
    )
    network_name = container.network(engine, settings)
    has_host_network = network_name == "host"
    # The volume of the key pair; only the server mounts it.
    digest = container.project_digest(settings)
    volume = f"{settings.cache_volume or 'guix-tasks'}-{digest}-signing-key"
    labels = container.project_labels(settings)
    engine.create_volume(volume, labels)
    server = engine.create(
        ContainerSpec(
            name=container.server_name(settings),
            image=image.id,
            command=(container.ENTRY_POINT, f"{container.WORK_DIRECTORY}/serve"),
            labels={**labels, LISTEN_LABEL: str(listen)},
            network=network_name,
            publish={} if has_host_network else {listen.port: listen.port},
            publish_on=listen.address,
            binds=(f"{volume}:{KEYS}",),
            user=USER,
            capabilities=(),
            security=("no-new-privileges",),
            no_healthcheck=bool(image.config.get("Healthcheck")),
            platform=str(settings.platform) if settings.platform else None,
        )
    )
    try:
        if not engine.is_dry:
            caches = container.ROOTLESS_CACHES.values()
            owner = grant_ownership(engine, server, caches, unread=(KEYS,))
            address = listen.address if has_host_network else ANY
            script = guix.publish_script(address, listen.port, KEYS).encode()
            files = {**container.common_files(settings), "serve": script}
            engine.copy_in(server, container.archive(files, owner))
        _await_start(project, server)
    except BaseException:
        engine.remove(server)
        raise


def _await_start(project: Project, server: str) -> None:
    """Start the container and wait until it listens; it outlives this process."""
    log, last_line = LogReader(), ""
    with container.time_limit(project.engine, server, START_SECONDS, grace=1):
        for _, data in project.engine.run(server):
            for line in log.read(data):
                if guix.is_publishing(line):
                    return
                last_line = line.strip() or last_line
    if not project.engine.is_dry:
        raise EngineError(
            f"cannot start the substitute server: {last_line or 'no output'}; "
            "if its port is in use, set another in SUBSTITUTES_LISTEN"
        )


def _print_settings(project: Project, server: Container) -> None:
    """Write the public key, and print the settings with which another machine asks the server."""
    settings, console = project.settings, project.console
    listen = settings.substitutes_listen
    key = public_key(project.engine, server)
    if not key:
        raise EngineError("the substitute server has no key; run `inv substitutes.up` again")
    # The name differs between projects.
    name = settings.image.repository.rpartition("/")[2]
    path = settings.output_directory / f"substitutes-{name}.pub"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, key)
    host = project.engine.info().name if listen.address == ANY else listen.address
    url = f"http://{host}:{listen.port}"
    console.print(f"substitutes: {url}, public key: {path}")
    if listen.is_loopback:
        console.print(
            "substitutes: unreachable for other machines; "
            f"`inv substitutes.up --listen {ANY}:{listen.port}` makes it reachable"
        )
        return
    note = f"; replace {host} with a name that it resolves" if listen.address == ANY else ""
    console.print(f"substitutes: for .env of another machine, with the key next to it{note}:")
    urls = settings.guix_substitute_urls or guix.DEFAULT_SUBSTITUTE_URLS
    # Another machine cannot read the directories of this one and needs no key for them.
    urls = tuple(url for url in urls if not url.startswith("file:"))
    keys = [path.name, *(key.name for key in settings.guix_substitute_keys if urls)]
    console.result(f'GUIX_SUBSTITUTE_URLS="{" ".join((url, *urls))}"')
    console.result(f'GUIX_SUBSTITUTE_KEYS="{" ".join(keys)}"')
