"""The builder of the settings, and checks of its features."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from guix_tasks.buildkit import buildx as command
from guix_tasks.engine.diagnose import EMULATE, INSECURE_REFUSED, NO_BASE, UNKNOWN_FLAG
from guix_tasks.errors import BuilderError, RegistryError, UsageError
from guix_tasks.oci.platform import Platform
from guix_tasks.settings.values import Driver, Sandbox

if TYPE_CHECKING:
    from collections.abc import Iterator

    from guix_tasks.buildkit.buildx import Builder, Buildx
    from guix_tasks.settings import Settings

_ALLOW_INSECURE = {
    Driver.DOCKER: 'put {"builder": {"entitlements": {"security-insecure": true}}} into the '
    "engine's daemon.json and restart it, or use BUILDX_DRIVER=docker-container",
    Driver.REMOTE: "start its buildkitd with --allow-insecure-entitlement security.insecure",
}


def builder_name(settings: Settings, buildx: Buildx) -> str:
    """Return the name of the settings' builder, which may not exist."""
    return buildx.own if settings.buildx_driver is Driver.DOCKER else settings.buildx_builder


def find_builder(settings: Settings, buildx: Buildx) -> Builder:
    """Return the settings' builder.

    Raise ``BuilderError`` if it does not exist or has another driver.
    """
    name = builder_name(settings, buildx)
    builder = command.inspect(buildx, name)
    if builder is None:
        raise BuilderError(f"there is no builder {name!r}; `inv buildx.setup` creates it")
    driver = settings.buildx_driver.value
    if builder.driver != driver:
        raise BuilderError(
            f"the builder {name} has the driver {builder.driver}, not {driver}; change "
            "BUILDX_DRIVER or BUILDX_BUILDER, or run `inv buildx.setup --recreate`"
        )
    return builder


def native_platforms(builder: Builder) -> Iterator[Platform]:
    """Yield the platforms that were set for a builder's nodes, else their native platforms."""
    for node in builder.nodes:
        for platform in node.fixed or node.platforms[:1]:
            with suppress(ValueError):  # Guix has no system for some platforms
                yield Platform.parse(platform)


def has_platform(builder: Builder, platform: Platform) -> bool:
    """Return True if a node of the builder reports a platform, native or emulated."""
    return any(str(platform) in node.platforms for node in builder.nodes)


def check_platform(settings: Settings, builder: Builder, platform: Platform) -> None:
    """Check that a builder can build a platform.

    Raise ``BuilderError`` if no node has the platform, and ``UsageError`` if it is emulated, where
    Guix cannot isolate builds, but the settings require isolation.
    """
    if not any(node.platforms for node in builder.nodes):
        return  # the platforms are unknown until buildx starts the builder
    if not has_platform(builder, platform):
        raise BuilderError(
            f"the builder {builder.name} has no {platform}; `{EMULATE} {platform.architecture}` "
            "adds it by emulation, which needs GUIX_SANDBOX=nochroot; a native node in "
            "BUILDX_NODES is faster"
        )
    is_native = any(native.runs(platform) for native in native_platforms(builder))
    if not is_native and settings.guix_sandbox is not Sandbox.NOCHROOT:
        raise UsageError(
            f"{platform} is emulated by the builder {builder.name}, and Guix cannot isolate its "
            "builds there: set GUIX_SANDBOX=nochroot, or add a native node to BUILDX_NODES"
        )


def needed_syntax(settings: Settings, buildx: Buildx, builder: str) -> str | None:
    """Return the Dockerfile frontend to use, or None if the built-in one has insecure steps.

    Raise ``BuilderError`` if the builder does not allow insecure steps, or if it needs a frontend
    that it cannot pull.
    """
    try:
        command.probe(buildx, builder, None)
    except BuilderError as error:
        if INSECURE_REFUSED.search(str(error)):
            hint = _ALLOW_INSECURE.get(
                settings.buildx_driver, "run `inv buildx.setup --recreate`, which allows them"
            )
            raise BuilderError(
                f"the builder {builder} does not allow insecure steps (security.insecure is not "
                f"allowed by its configuration); {hint}"
            ) from None
        if UNKNOWN_FLAG not in str(error):
            raise
    else:
        return None
    syntax = str(settings.buildkit_syntax)
    try:
        command.probe(buildx, builder, syntax)
    except (BuilderError, RegistryError) as error:
        if any(words in str(error) for words in NO_BASE):
            raise BuilderError(
                f"the builder {builder} has a Dockerfile frontend older than 1.20 (`{UNKNOWN_FLAG}`"
                f"), and cannot pull {syntax}; set BUILDKIT_SYNTAX to one that it can pull, or use "
                "a builder with BuildKit 0.26 or newer"
            ) from None
        raise
    return syntax
