"""Create, inspect and remove the builder that allows insecure steps.

A builder belongs to the user, not to a project, and another tool may have created it. So a builder
that does not match the settings is only recreated on request, and the user's selected builder stays
selected.
"""

from __future__ import annotations

import re
import socket
from dataclasses import replace
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from guix_tasks.buildkit import buildx as command
from guix_tasks.buildkit.builder import builder_name, find_builder, has_platform, needed_syntax
from guix_tasks.engine.accounts import accounts_for
from guix_tasks.engine.diagnose import EMULATE, INSECURE_REFUSED, UNKNOWN_FLAG
from guix_tasks.errors import BuilderError, GuixTasksError
from guix_tasks.settings.values import Driver, Node
from guix_tasks.ui.log import LogReader
from guix_tasks.ui.redact import holds_secret

if TYPE_CHECKING:
    from collections.abc import Iterator

    from guix_tasks.buildkit.buildx import Builder, BuilderNode, Buildx
    from guix_tasks.settings import Settings
    from guix_tasks.stages.project import Project

ENTITLEMENTS = ("security.insecure", "network.host")

_FLAGS = " ".join(f"--allow-insecure-entitlement={name}" for name in ENTITLEMENTS)

# By default BuildKit truncates the log of a step at 2 MiB and so loses its error message.
_LOG_OPTIONS = {"env.BUILDKIT_STEP_LOG_MAX_SIZE": "-1", "env.BUILDKIT_STEP_LOG_MAX_SPEED": "-1"}

STATUS_HEADER = ("node", "endpoint", "status", "BuildKit", "platforms", "entitlements")


def set_up(project: Project, buildx: Buildx, *, recreate: bool = False, use: bool = False) -> None:
    """Create and start the builder of the settings, and check that it allows insecure steps.

    ``recreate`` replaces an existing builder and keeps its cache. ``use`` selects the builder for
    the user's `docker buildx`.

    Raise ``BuilderError`` if an existing builder does not match the settings and ``recreate`` is
    false, or if the builder cannot be created. A partly created builder is removed.
    """
    settings, console = project.settings, project.console
    # The images of BuildKit and of its frontend may be in a private registry.
    buildx = command.with_accounts(buildx, accounts_for(project.engine, settings))
    if settings.buildx_driver is not Driver.DOCKER:
        _ensure_builder(project, buildx, recreate=recreate)
    if buildx.perform:
        _check(project, buildx)
    if use:
        name = builder_name(settings, buildx)
        buildx.change("use", name)
        if buildx.perform:
            console.print(f"buildx.setup: `docker buildx` now builds with {name}")


def _check(project: Project, buildx: Buildx) -> None:
    """Check the entitlements, the frontend and the platforms of the builder."""
    settings, console = project.settings, project.console
    builder = find_builder(settings, buildx)
    syntax = needed_syntax(settings, buildx, builder.name)
    console.print(
        f"buildx.setup: {builder.name} ({builder.driver}) runs insecure steps"
        + (f", with the Dockerfile frontend {syntax}" if syntax else "")
    )
    if missing := [each for each in settings.platforms if not has_platform(builder, each)]:
        architectures = ",".join(platform.architecture for platform in missing)
        console.warn(
            f"no node supports {', '.join(map(str, missing))}: `{EMULATE} {architectures}` "
            "installs the emulator on the engine's machine; a machine of that platform in "
            "BUILDX_NODES is faster"
        )


def _ensure_builder(project: Project, buildx: Buildx, *, recreate: bool) -> None:
    settings, console = project.settings, project.console
    name = settings.buildx_builder
    nodes = _nodes(project, buildx)
    builder = command.inspect(buildx, name)
    if builder and not recreate:
        if differences := "; ".join(_differences(settings, builder, nodes)):
            raise BuilderError(
                f"builder {name} does not match the settings: {differences}; recreate it with "
                "`inv buildx.setup --recreate` (keeps the cache), or change BUILDX_DRIVER and "
                "BUILDX_NODES"
            )
        if idle := ", ".join(node.name for node in builder.nodes if node.status != "running"):
            console.print(f"buildx.setup: {idle} is not running; starting it")
            buildx.change("inspect", "--bootstrap", name)
        else:
            console.print(f"buildx.setup: {name} exists")
        return
    if buildx.perform:
        for node in nodes:
            check_endpoint(node.endpoint)
    if builder:
        buildx.change("rm", "--keep-state", name)
    _create(project, buildx, nodes)


def _nodes(project: Project, buildx: Buildx) -> list[Node]:
    settings = project.settings
    nodes = list(settings.buildx_nodes) or [Node()]
    if settings.buildx_driver is Driver.CONTAINER and not all(node.endpoint for node in nodes):
        # buildx finds the certificates of a Docker context by the name of the context.
        own = project.engine.info().url if buildx.own == "default" else buildx.own
        nodes = [replace(node, endpoint=node.endpoint or own) for node in nodes]
    return nodes


def _create(project: Project, buildx: Buildx, nodes: list[Node]) -> None:
    settings, console = project.settings, project.console
    name = settings.buildx_builder
    console.print(f"buildx.setup: creating {name} ({settings.buildx_driver.value})")
    with_account = [
        name
        for name, value in settings.proxies.items()
        if "@" in value and name.lower() != "ftp_proxy"
    ]
    if with_account and settings.buildx_driver is not Driver.REMOTE:
        console.warn(
            f"the builder does not use {with_account[0]}, as every user could see its account; "
            "set a proxy without an account, or a registry mirror in the builder's configuration"
        )
    try:
        for number, node in enumerate(nodes):
            buildx.change(*create_argv(settings, node, append=number > 0))
        with console.step("buildx.setup") as step:
            log = LogReader(step.log)
            buildx.stream("inspect", "--bootstrap", name, output=log.add)
            log.end()
    except BaseException:
        if buildx.perform:
            _undo(project, buildx)
        raise


def check_endpoint(endpoint: str) -> None:
    """Raise ``BuilderError`` if nothing listens; buildx would retry for 20 s and not name it."""
    try:
        parts = urlsplit(endpoint)
        if parts.scheme == "tcp" and parts.port:
            socket.create_connection((parts.hostname, parts.port), timeout=5).close()
        elif parts.scheme == "unix":
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(parts.path)
    except (OSError, ValueError) as error:
        raise BuilderError(
            f"{endpoint} does not answer: {getattr(error, 'strerror', None) or error}; start its "
            "daemon, or correct BUILDX_NODES"
        ) from None


def _undo(project: Project, buildx: Buildx) -> None:
    """Remove a partly created builder; a failure is only a warning, because an error is raised."""
    name = project.settings.buildx_builder
    try:
        if command.inspect(buildx, name):
            buildx.change("rm", "--keep-state", name)
    except GuixTasksError as error:
        project.console.warn(
            f"{name} is only partly created ({error}); `inv buildx.down` removes it"
        )


def create_argv(settings: Settings, node: Node, *, append: bool) -> list[str]:
    """Return the arguments of ``buildx create`` for a node."""
    starts_daemon = settings.buildx_driver is not Driver.REMOTE
    options = {
        **(_LOG_OPTIONS | _proxies(settings) if starts_daemon else {}),
        **_required_options(settings, node),
    }
    return [
        "create", f"--name={settings.buildx_builder}", f"--driver={settings.buildx_driver.value}",
        *(["--append"] if append else []),
        *([f"--buildkitd-flags={_FLAGS}"] if starts_daemon else []),
        *(f"--driver-opt={command.csv_field('='.join(item))}" for item in sorted(options.items())),
        *([f"--platform={','.join(map(str, node.platforms))}"] if node.platforms else []),
        *(["--", node.endpoint] if node.endpoint else []),
    ]  # fmt: skip


def _required_options(settings: Settings, node: Node) -> dict[str, str]:
    # Only the host's network reaches a registry on localhost.
    network = {"network": "host"} if settings.buildx_driver is Driver.CONTAINER else {}
    return {**network, **dict(node.options)}


def _proxies(settings: Settings) -> dict[str, str]:
    """Return the proxy variables of ``buildkitd``, except proxies with an account.

    Every user can see the options on the command line and in the description of the builder.
    """
    return {
        f"env.{name}": value
        for name, value in settings.proxies.items()
        if not (name.lower() == "ftp_proxy" or "@" in value or holds_secret(value))
    }


def _differences(settings: Settings, builder: Builder, nodes: list[Node]) -> Iterator[str]:
    """Yield the differences between a builder and the settings.

    Truncated logs or another proxy are no reason to replace a builder of another tool.
    """
    driver = settings.buildx_driver
    if builder.driver != driver.value:
        yield f"its driver is {builder.driver}, not {driver.value}"
        return
    if len(builder.nodes) != len(nodes):
        yield f"it has {len(builder.nodes)} nodes, not {len(nodes)}"
        return
    for node, expected in zip(builder.nodes, nodes, strict=True):
        if expected.endpoint and node.endpoint != expected.endpoint:
            yield f"its node {node.name} is at {node.endpoint}, not at {expected.endpoint}"
        if driver is not Driver.REMOTE and ENTITLEMENTS[0] not in entitlements(node):
            yield f"its node {node.name} was created without the entitlement {ENTITLEMENTS[0]}"
        for name, value in sorted(_required_options(settings, expected).items()):
            if node.options.get(name) != value:
                yield f"its node {node.name} was created without {name}={value}"
        if expected.platforms and set(map(str, expected.platforms)) != set(node.fixed):
            platforms = ", ".join(map(str, expected.platforms))
            current = ", ".join(node.fixed) or "all that it supports"
            yield f"its node {node.name} is for {current}, not {platforms}"


def entitlements(node: BuilderNode) -> list[str]:
    """Return the entitlements in the flags of a node's ``buildkitd``."""
    words = " ".join(node.flags)
    return sorted(set(re.findall(r"--allow-insecure-entitlement[= ](\S+)", words)))


# --- buildx.status and buildx.down ----------------------------------------------------------


def status_rows(project: Project, buildx: Buildx) -> list[tuple[str, ...]]:
    """Return a row for each node. Raise ``BuilderError`` if the builder does not exist."""
    builder = find_builder(project.settings, buildx)
    detected = _detected_entitlements(project.settings, buildx, builder)
    return [
        (
            node.name,
            node.endpoint,
            f"{node.status or 'unreachable'}" + (f": {node.error}" if node.error else ""),
            node.version or "-",
            " ".join(node.platforms) or "-",
            " ".join(entitlements(node) or detected) or "none",
        )
        for node in builder.nodes
    ]


def _detected_entitlements(settings: Settings, buildx: Buildx, builder: Builder) -> list[str]:
    """Return the entitlements of a builder without flags, detected by a build."""
    if any(node.flags for node in builder.nodes):
        return []
    try:
        needed_syntax(settings, buildx, builder.name)
    except GuixTasksError as error:
        if INSECURE_REFUSED.search(str(error)):
            return []
        # BuildKit checks the entitlement before it runs a frontend.
        if UNKNOWN_FLAG not in str(error):
            return ["unknown"]
    return [ENTITLEMENTS[0]]


def cache_size(project: Project, buildx: Buildx) -> str:
    """Return the cache size of all nodes together, or ``unknown`` if no node answers."""
    try:
        listing = buildx.ask("du", f"--builder={builder_name(project.settings, buildx)}")
    except GuixTasksError:
        return "unknown"
    total = re.search(r"^Total:\s*(\S+)", listing, re.MULTILINE)
    return total[1] if total else "unknown"


def remove_builder(project: Project, buildx: Buildx, *, keep_cache: bool) -> None:
    """Remove the builder and, unless ``keep_cache`` is true, its cache."""
    settings, console = project.settings, project.console
    name = settings.buildx_builder
    if settings.buildx_driver is Driver.DOCKER:
        console.print("buildx.down: the engine itself is the builder; nothing to remove")
    elif command.inspect(buildx, name) is None:
        console.print(f"buildx.down: builder {name} does not exist")
    else:
        buildx.change("rm", *(["--keep-state"] if keep_cache else []), name)
        console.print(f"buildx.down: removed {name}" + (", kept its cache" if keep_cache else ""))
