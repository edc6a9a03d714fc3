"""Substitutes near by: ``guix publish`` of the newest stage image, in a container."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from guix_tasks import guix
from guix_tasks.engine.api import ContainerSpec
from guix_tasks.errors import EngineError, UsageError
from guix_tasks.files import write_whole
from guix_tasks.settings.values import Sandbox
from guix_tasks.stages.container import (
    ENTRY_POINT,
    FOLDER,
    PROJECT_LABEL,
    ROOTLESS_CACHES,
    archive,
    common_files,
    find_server,
    network,
    project_digest,
    server_name,
    time_limit,
)
from guix_tasks.stages.container import project as project_name
from guix_tasks.stages.images import proven_stage
from guix_tasks.stages.log_faults import Lines
from guix_tasks.stages.ownership import USER, lend
from guix_tasks.stages.substitute_server import ANY, KEYS, LISTEN_LABEL, public_key, server_url

if TYPE_CHECKING:
    from pathlib import Path

    from guix_tasks.engine.api import Container, Image
    from guix_tasks.settings import Settings
    from guix_tasks.stages.project import Project

START_SECONDS = 60.0
"""How long the server may take to listen."""


def up(project: Project) -> None:
    """Serve the store of the newest stage image, and say how other machines are to use it.

    One that serves it already is left alone.  Raises ``UsageError`` where there is nothing to
    serve or no network to serve on, ``EngineError`` where the server does not start.
    """
    engine, settings, console = project.engine, project.settings, project.console
    if settings.network == "none":
        raise UsageError(
            "NETWORK=none: nobody reaches a server there; take the NETWORK line out, or name a "
            "network"
        )
    image = project.ledger.last_stage()
    if image is None:
        raise UsageError("no stage is there to serve from; run `inv base pull install` first")
    stage = proven_stage(image)
    server = find_server(engine, settings)
    if server and _serves(project, server, image):
        console.say(f"substitutes: the stage {stage} is served already")
    else:
        if server:
            engine.remove(server.id)
            engine.drop(server.image)
        _start(project, image)
        if engine.is_dry:
            return
        console.say(f"substitutes: the stage {stage} is served")
        server = find_server(engine, settings)
    if server:
        _tell(project, server)


def down(project: Project) -> None:
    """Stop serving; the key pair stays, for the next time."""
    server = find_server(project.engine, project.settings)
    if server is None:
        project.console.say("substitutes: no server of this project is there")
        return
    project.engine.remove(server.id)
    project.engine.drop(server.image)
    if not project.engine.is_dry:
        project.console.say(
            "substitutes: stopped; the key stays until `inv clean`, which removes volumes, too"
        )


def _serves(project: Project, server: Container, image: Image) -> bool:
    listens = server.labels.get(LISTEN_LABEL) == str(project.settings.substitutes_listen)
    reached = listens and server_url(project.engine, project.settings, server)
    return bool(reached) and server.running and server.image == image.id


def _start(project: Project, image: Image) -> None:
    """Start the server, in which nothing is root and no right is given.

    It asks Guix's daemon what is in the store, which reads that from a database that it has to
    own, so that and a daemon are the unprivileged user's.
    """
    engine = project.engine
    # It fetches and builds nothing.
    settings = replace(
        project.settings,
        guix_sandbox=Sandbox.ROOTLESS,
        guix_substitute_urls=(),
        guix_substitute_keys=(),
        proxies=MappingProxyType({}),
    )
    spec = _spec(project, image)
    engine.make_volume(_volume(settings), {PROJECT_LABEL: project_name(settings)})
    container = engine.create(spec)
    try:
        if not engine.is_dry:
            owner = lend(engine, container, ROOTLESS_CACHES.values(), unread=(KEYS,))
            files = {**common_files(settings), "serve": _script(spec, settings)}
            engine.copy_in(container, archive(files, owner))
        _await_start(project, container)
    except BaseException:
        engine.remove(container)
        raise


def _spec(project: Project, image: Image) -> ContainerSpec:
    settings, listen = project.settings, project.settings.substitutes_listen
    name = network(project.engine, settings)
    return ContainerSpec(
        name=server_name(settings),
        image=image.id,
        command=(ENTRY_POINT, f"{FOLDER}/serve"),
        labels={PROJECT_LABEL: project_name(settings), LISTEN_LABEL: str(listen)},
        network=name,
        publish={} if name == "host" else {listen.port: listen.port},
        publish_on=listen.address,
        binds=(f"{_volume(settings)}:{KEYS}",),
        user=USER,
        capabilities=(),
        security=("no-new-privileges",),
        no_healthcheck=bool(image.config.get("Healthcheck")),
        platform=str(settings.platform) if settings.platform else None,
    )


def _volume(settings: Settings) -> str:
    """Where the key pair is kept; nothing else sees that volume."""
    return f"{settings.cache_volume or 'guix-tasks'}-{project_digest(settings)}-signing-key"


def _script(spec: ContainerSpec, settings: Settings) -> bytes:
    listen = settings.substitutes_listen
    address = listen.address if spec.network == "host" else ANY
    return guix.publish_script(address, listen.port, KEYS).encode()


def _await_start(project: Project, container: str) -> None:
    """Start the container and come back when it listens; it stays when this process has gone."""
    lines, last = Lines(), ""
    with time_limit(project.engine, container, START_SECONDS, grace=1):
        for _, data in project.engine.run(container):
            for line in lines.add(data):
                if guix.is_publishing(line):
                    return
                last = line.strip() or last
    if not project.engine.is_dry:
        raise EngineError(
            f"the substitute server did not start ({last or 'it said nothing'}); where its port "
            "is taken, choose another by SUBSTITUTES_LISTEN"
        )


def _tell(project: Project, server: Container) -> None:
    settings, console = project.settings, project.console
    listen = settings.substitutes_listen
    key = public_key(project.engine, server)
    if not key:
        raise EngineError("the substitute server has no key; run `inv substitutes.up` again")
    path = key_file(settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, key)
    host = project.engine.info().name if listen.address == ANY else listen.address
    url = f"http://{host}:{listen.port}"
    console.say(f"substitutes: {url}, its public key: {path}")
    if listen.is_loopback:
        console.say(
            "substitutes: other machines do not reach it; "
            f"`inv substitutes.up --listen {ANY}:{listen.port}` lets them"
        )
        return
    known = f" and a name that it knows in the place of {host}" if listen.address == ANY else ""
    console.say(f"substitutes: for the .env of another machine, with the key beside it{known}:")
    for line in _lines(settings, url, path):
        console.result(line)


def key_file(settings: Settings) -> Path:
    """Where its public key is written; the keys of several projects can lie beside each other."""
    name = settings.image.repository.rpartition("/")[2]
    return settings.output_folder / f"substitutes-{name}.pub"


def _lines(settings: Settings, url: str, key: Path) -> tuple[str, str]:
    """What another machine has to set to take from here first."""
    urls = settings.guix_substitute_urls or guix.DEFAULT_SUBSTITUTE_URLS
    # A folder of this machine is none of another's, and so is its key.
    urls = tuple(each for each in urls if not each.startswith("file:"))
    names = [key.name, *(each.name for each in settings.guix_substitute_keys if urls)]
    return (
        f'GUIX_SUBSTITUTE_URLS="{" ".join((url, *urls))}"',
        f'GUIX_SUBSTITUTE_KEYS="{" ".join(names)}"',
    )
