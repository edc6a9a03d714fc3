"""Builders that allow insecure steps: made, looked at, removed.

A builder belongs to the user, not to a project, and another tool may have made it.  So one that is
not as it should be is reported, and only made anew when that is asked for; and the builder that
the user has selected stays selected.
"""

from __future__ import annotations

import re
import shlex
import socket
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from guix_tasks.buildkit import buildx as command
from guix_tasks.buildkit.builder import builder_name, find_builder, lacking, needed_syntax
from guix_tasks.engine.api import ContainerSpec, run_to_end
from guix_tasks.engine.credentials import accounts_for, credentials_for
from guix_tasks.engine.diagnose import INSECURE_REFUSED, UNKNOWN_FLAG
from guix_tasks.engine.retry import retried
from guix_tasks.errors import BuilderError, EngineError, GuixTasksError
from guix_tasks.settings import Driver, Node
from guix_tasks.stages.container import PROJECT_LABEL, container_name
from guix_tasks.stages.container import project as project_name
from guix_tasks.ui.log import Log
from guix_tasks.ui.redact import holds_secret

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from guix_tasks.buildkit.buildx import Builder, BuilderNode, Buildx
    from guix_tasks.oci.platform import Platform
    from guix_tasks.settings import Settings
    from guix_tasks.stages.project import Project

ENTITLEMENTS = ("security.insecure", "network.host")

_FLAGS = shlex.join(f"--allow-insecure-entitlement={each}" for each in ENTITLEMENTS)

_WITH_DAEMON = (Driver.CONTAINER, Driver.KUBERNETES)
"""The drivers that start a ``buildkitd`` of their own."""

# BuildKit clips the log of a step at 2 MiB, and so just the end, which one needs.
_LOGS = {"env.BUILDKIT_STEP_LOG_MAX_SIZE": "-1", "env.BUILDKIT_STEP_LOG_MAX_SPEED": "-1"}

BINFMT_IMAGE = "tonistiigi/binfmt:latest"
"""What Docker's documentation on multi-platform builds names for emulation."""

STATUS_HEADER = ("node", "endpoint", "status", "BuildKit", "platforms", "entitlements")


@dataclass(frozen=True)
class SetupWishes:
    """How the builder is to be made, where that differs from the usual."""

    recreate: bool = False
    """Made anew where it is there already, with its cache kept."""
    use: bool = False
    """Selected for the user's own ``docker buildx`` too."""
    binfmt: bool = False
    """Emulators installed for the platforms that it lacks."""


def set_up(project: Project, buildx: Buildx, wishes: SetupWishes) -> None:
    """Let there be a builder as the settings want it, running, that allows insecure steps.

    Raises ``BuilderError`` for one that is otherwise and is not to be made anew, and for one that
    cannot be made; what was begun of it is removed.
    """
    settings, console = project.settings, project.console
    # The image of BuildKit, or of its frontend, may be in a private registry.
    buildx = command.with_accounts(buildx, accounts_for(project.engine, settings))
    if settings.buildx_driver is not Driver.DOCKER:
        _make(project, buildx, recreate=wishes.recreate)
    if buildx.perform:
        _check(project, buildx, install=wishes.binfmt)
    elif wishes.binfmt and settings.platforms:
        found = command.inspect(buildx, builder_name(settings, buildx))
        if missing := lacking(settings.platforms, found):
            console.command(_binfmt_argv(missing))
    if wishes.use:
        name = builder_name(settings, buildx)
        buildx.change("use", name)
        if buildx.perform:
            console.say(f"buildx.setup: `docker buildx` builds with {name} from now on")


def _check(project: Project, buildx: Buildx, *, install: bool) -> None:
    """See that the builder does what it is for."""
    settings = project.settings
    builder = find_builder(settings, buildx)
    syntax = needed_syntax(settings, buildx, builder.name)
    project.console.say(
        f"buildx.setup: {builder.name} ({builder.driver}) runs insecure steps"
        + (f", with the Dockerfile frontend {syntax}" if syntax else "")
    )
    _check_platforms(project, buildx, builder, install=install)


def _make(project: Project, buildx: Buildx, *, recreate: bool) -> None:
    settings, console = project.settings, project.console
    name = settings.buildx_builder
    wanted = _nodes(project, buildx)
    found = command.inspect(buildx, name)
    wrong = list(_differences(settings, found, wanted)) if found else []
    if found and wrong and not recreate:
        raise BuilderError(
            f"the builder {name} is not as it should be: {'; '.join(wrong)}; "
            "`inv buildx.setup --recreate` makes it anew and keeps its cache, or mend "
            "BUILDX_DRIVER and BUILDX_NODES"
        )
    if found and not recreate:
        idle = [node.name for node in found.nodes if node.status != "running"]
        if idle:
            console.say(f"buildx.setup: {', '.join(idle)} does not run; starting it")
            buildx.change("inspect", "--bootstrap", name)
        else:
            console.say(f"buildx.setup: {name} is there")
        return
    if buildx.perform:
        for node in wanted:
            refuse_silent(node.endpoint)
    if found:
        buildx.change("rm", "--keep-state", name)
    _create(project, buildx, wanted)


def _nodes(project: Project, buildx: Buildx) -> tuple[Node, ...]:
    if project.settings.buildx_nodes:
        return project.settings.buildx_nodes
    if project.settings.buildx_driver is Driver.KUBERNETES:
        return (Node(f"kubernetes://{project.settings.buildx_builder}0"),)
    # buildx takes a context by its name, with the certificates that belong to it.
    return (Node(project.engine.info().url if buildx.own == "default" else buildx.own),)


def _create(project: Project, buildx: Buildx, nodes: tuple[Node, ...]) -> None:
    settings, console = project.settings, project.console
    name = settings.buildx_builder
    console.say(f"buildx.setup: making {name} ({settings.buildx_driver.value})")
    with_account = [
        name
        for name, value in settings.proxies.items()
        if "@" in value and name.lower() != "ftp_proxy"
    ]
    if with_account and settings.buildx_driver in _WITH_DAEMON:
        console.warn(
            f"the builder itself goes without {with_account[0]}, whose account all could see; "
            "name a proxy without one, or a registry mirror in the builder's own configuration"
        )
    if settings.buildx_driver is Driver.KUBERNETES:
        console.warn("the driver kubernetes is experimental: guix-tasks was never run with it")
    try:
        for number, node in enumerate(nodes):
            buildx.change(*create_argv(settings, node, append=number > 0))
        with console.step("buildx.setup") as step:
            log = Log(step.log)
            buildx.stream("inspect", "--bootstrap", name, output=log.add)
            log.end()
    except BaseException:
        if buildx.perform:
            _undo(project, buildx)
        raise


def refuse_silent(endpoint: str) -> None:
    """Refuse an endpoint at which nobody listens: buildx would try for 20 s and not say which."""
    parts = urlsplit(endpoint)
    try:
        if parts.scheme == "tcp":
            socket.create_connection((parts.hostname, parts.port or 0), timeout=5).close()
        elif parts.scheme == "unix":
            with socket.socket(socket.AF_UNIX) as there:
                there.connect(parts.path)
    except OSError as error:
        raise BuilderError(
            f"nobody answers at {endpoint}: {error.strerror or error}; start what is to be there, "
            "or mend BUILDX_NODES"
        ) from None


def _undo(project: Project, buildx: Buildx) -> None:
    """Remove what was begun of a builder; the error that is under way is the one to tell."""
    name = project.settings.buildx_builder
    try:
        if command.inspect(buildx, name):
            buildx.change("rm", "--keep-state", name)
    except GuixTasksError as error:
        project.console.warn(f"{name} is half made ({error}); `inv buildx.down` removes it")


def create_argv(settings: Settings, node: Node, *, append: bool) -> list[str]:
    """The ``buildx create`` of a node."""
    driver = settings.buildx_driver
    endpoint = ["--", node.endpoint]
    options = (command.csv_field("=".join(each)) for each in _options(settings, node))
    if driver is Driver.KUBERNETES:
        endpoint = [f"--node={node.endpoint.removeprefix('kubernetes://')}"]
    return [
        "create", f"--name={settings.buildx_builder}", f"--driver={driver.value}",
        *(["--append"] if append else []),
        *([f"--buildkitd-flags={_FLAGS}"] if driver in _WITH_DAEMON else []),
        *(f"--driver-opt={option}" for option in options),
        *([f"--platform={','.join(map(str, node.platforms))}"] if node.platforms else []),
        *endpoint,
    ]  # fmt: skip


def _options(settings: Settings, node: Node) -> list[tuple[str, str]]:
    # The host's network, so that a registry on localhost is reached.
    network = {"network": "host"} if settings.buildx_driver is Driver.CONTAINER else {}
    own = settings.buildx_driver in _WITH_DAEMON
    own_options = {**_LOGS, **_proxies(settings)} if own else {}
    return sorted({**network, **own_options, **dict(node.options)}.items())


def _proxies(settings: Settings) -> dict[str, str]:
    """What the builder's own downloads go through, but for a proxy with an account.

    Options are seen on the command line, and by whoever may look at the builder.
    """
    return {
        f"env.{name}": value
        for name, value in settings.proxies.items()
        if not (name.lower() == "ftp_proxy" or "@" in value or holds_secret(value))
    }


def _differences(settings: Settings, found: Builder, wanted: tuple[Node, ...]) -> Iterator[str]:
    """In which ways a builder is not what the settings want."""
    driver = settings.buildx_driver
    if found.driver != driver.value:
        yield f"its driver is {found.driver}, not {driver.value}"
        return
    if len(found.nodes) != len(wanted):
        yield f"it has {len(found.nodes)} nodes, not {len(wanted)}"
        return
    for node, want in zip(found.nodes, wanted, strict=True):
        yield from _node_differences(settings, node, want)


def _node_differences(settings: Settings, node: BuilderNode, want: Node) -> Iterator[str]:
    driver = settings.buildx_driver
    if driver is Driver.KUBERNETES:
        if node.name != want.endpoint.removeprefix("kubernetes://"):
            yield f"its node is {node.name}"
    elif node.endpoint != want.endpoint:
        yield f"its node {node.name} is at {node.endpoint}, not at {want.endpoint}"
    if driver in _WITH_DAEMON and ENTITLEMENTS[0] not in entitlements(node):
        yield f"its node {node.name} was made without the entitlement {ENTITLEMENTS[0]}"
    there = dict(node.options)
    # That another's builder clips logs, or has another proxy, is no reason to replace it.
    beside = {*_LOGS, *_proxies(settings)}
    asked = (pair for pair in _options(settings, want) if pair[0] not in beside)
    for name, value in asked:
        if there.get(name) != value:
            yield f"its node {node.name} was made without {name}={value}"
    if want.platforms and set(map(str, want.platforms)) != set(node.fixed):
        wanted = ", ".join(map(str, want.platforms))
        given = ", ".join(node.fixed) or "all that it has"
        yield f"its node {node.name} is for {given}, not {wanted}"


def entitlements(node: BuilderNode) -> list[str]:
    """What the flags of a node's ``buildkitd`` allow."""
    words = " ".join(node.flags)
    return sorted(set(re.findall(r"--allow-insecure-entitlement[= ](\S+)", words)))


def _check_platforms(project: Project, buildx: Buildx, builder: Builder, *, install: bool) -> None:
    """See that every platform has a node, by emulation if need be."""
    missing = lacking(project.settings.platforms, builder)
    if not missing:
        return
    argv = _binfmt_argv(missing)
    shown = ", ".join(map(str, missing))
    if not install:
        project.console.warn(
            f"no node has {shown}: `{shlex.join(argv)}` lets the engine's machine emulate it "
            "(`inv buildx.setup --binfmt` runs that); a machine of that kind in BUILDX_NODES is "
            "faster"
        )
        return
    _install_emulators(project, argv[-1])
    left = lacking(missing, command.inspect(buildx, builder.name))
    if left:
        raise BuilderError(
            f"the builder has no {', '.join(map(str, left))} yet; `inv buildx.setup --recreate` "
            "lets it look again"
        )


def _binfmt_argv(missing: Sequence[Platform]) -> list[str]:
    names = ",".join(each.architecture for each in missing)
    return ["docker", "run", "--privileged", "--rm", BINFMT_IMAGE, "--install", names]


def _install_emulators(project: Project, names: str) -> None:
    engine, console = project.engine, project.console
    if engine.image(BINFMT_IMAGE) is None:
        account = credentials_for(engine, project.settings, BINFMT_IMAGE)
        pull = partial(engine.pull, BINFMT_IMAGE, account)
        retried(console, "the pull", pull, host="docker.io")
    image = engine.image(BINFMT_IMAGE)
    if image is None:
        raise EngineError(f"the engine pulled {BINFMT_IMAGE} and does not have it")
    spec = ContainerSpec(
        name=container_name("binfmt"),
        image=image.id,
        command=(*(image.config.get("Entrypoint") or ()), "--install", names),
        labels={PROJECT_LABEL: project_name(project.settings)},
        privileged=True,
        network="none",
    )

    def failed(_status: int) -> BuilderError:
        return BuilderError(f"emulators for {names} were not installed; the output above says why")

    with console.step("binfmt") as step:
        log = Log(step.log)
        for _, data in run_to_end(engine, spec, failed):
            log.add(data)
        log.end()


# --- Status and down ------------------------------------------------------------------------


def status_rows(project: Project, buildx: Buildx) -> list[tuple[str, ...]]:
    """A row for each node of the builder.  Raises ``BuilderError`` where there is none."""
    builder = find_builder(project.settings, buildx)
    allowed = _allowed(project.settings, buildx, builder)
    return [
        (
            node.name,
            node.endpoint,
            f"{node.status or 'unreachable'}" + (f": {node.error}" if node.error else ""),
            node.version or "-",
            " ".join(node.platforms) or "-",
            " ".join(entitlements(node) or allowed) or "none",
        )
        for node in builder.nodes
    ]


def _allowed(settings: Settings, buildx: Buildx, builder: Builder) -> list[str]:
    """What a builder without flags of ours says that it allows."""
    if any(node.flags for node in builder.nodes):
        return []
    try:
        needed_syntax(settings, buildx, builder.name)
    except GuixTasksError as error:
        if INSECURE_REFUSED.search(str(error)):
            return []
        # The entitlement is looked at first, so a frontend was only asked where it is given.
        return [ENTITLEMENTS[0] if UNKNOWN_FLAG in str(error) else "unknown"]
    return [ENTITLEMENTS[0]]


def cache_size(project: Project, buildx: Buildx) -> str:
    """What the cache of the builder takes, all nodes together; ``unknown`` where none answers."""
    try:
        name = builder_name(project.settings, buildx)
        return parse_cache_size(buildx.ask("du", f"--builder={name}"))
    except GuixTasksError:
        return "unknown"


def parse_cache_size(listing: str) -> str:
    """The total in what ``buildx du`` printed."""
    fields: Mapping[str, str] = dict(
        line.split(":", 1) for line in listing.splitlines() if line.startswith("Total:")
    )
    return fields.get("Total", "unknown").strip()


def take_down(project: Project, buildx: Buildx, *, keep_cache: bool) -> None:
    """Remove the builder, and its cache unless that is to be kept."""
    settings, console = project.settings, project.console
    name = settings.buildx_builder
    if settings.buildx_driver is Driver.DOCKER:
        console.say("buildx.down: the builder is the engine itself; nothing to remove")
    elif command.inspect(buildx, name) is None:
        console.say(f"buildx.down: there is no builder {name}")
    else:
        buildx.change("rm", *(["--keep-state"] if keep_cache else []), name)
        console.say(f"buildx.down: removed {name}" + (", its cache kept" if keep_cache else ""))
