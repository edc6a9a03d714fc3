"""The builder that the settings name, and whether it can do what is asked of it."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from guix_tasks.buildkit import buildx as command
from guix_tasks.engine.diagnose import INSECURE_REFUSED, NO_BASE, UNKNOWN_FLAG
from guix_tasks.errors import BuilderError, RegistryError, UsageError
from guix_tasks.oci.platform import Platform
from guix_tasks.settings import Driver, Sandbox

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from guix_tasks.buildkit.buildx import Builder, Buildx
    from guix_tasks.settings import Settings

_ALLOW_INSECURE = {
    Driver.DOCKER: 'put {"builder": {"entitlements": {"security-insecure": true}}} into the '
    "engine's daemon.json and restart it, or use BUILDX_DRIVER=docker-container",
    Driver.CONTAINER: "`inv buildx.setup --recreate` makes one that does",
    Driver.KUBERNETES: "`inv buildx.setup --recreate` makes one that does",
    Driver.REMOTE: "start its buildkitd with --allow-insecure-entitlement security.insecure",
}


def builder_name(settings: Settings, buildx: Buildx) -> str:
    """The name of the builder that the settings mean, be it there or not."""
    return buildx.own if settings.buildx_driver is Driver.DOCKER else settings.buildx_builder


def find_builder(settings: Settings, buildx: Buildx) -> Builder:
    """The builder that the settings name.  Raises ``BuilderError`` where there is none."""
    name = builder_name(settings, buildx)
    found = command.inspect(buildx, name)
    if found is None:
        raise BuilderError(f"there is no builder {name!r}; `inv buildx.setup` makes it")
    driver = settings.buildx_driver.value
    if found.driver != driver:
        raise BuilderError(
            f"the builder {name} has the driver {found.driver}, not {driver}; mend BUILDX_DRIVER "
            "or BUILDX_BUILDER, or `inv buildx.setup --recreate`"
        )
    return found


def native_platforms(builder: Builder) -> Iterator[Platform]:
    """What a builder's machines are, or were said to be for."""
    for node in builder.nodes:
        for each in node.fixed or node.platforms[:1]:
            with suppress(ValueError):  # there are platforms that Guix has no system for
                yield Platform.parse(each)


def has_platform(builder: Builder, platform: Platform) -> bool:
    """Whether a node of the builder says that it has a platform, by emulation if need be."""
    return any(str(platform) in node.platforms for node in builder.nodes)


def lacking(platforms: Sequence[Platform], builder: Builder | None) -> list[Platform]:
    """Those of the platforms that no node of the builder has; all, where there is no builder."""
    return [each for each in platforms if not (builder and has_platform(builder, each))]


def refuse_platform(settings: Settings, builder: Builder, platform: Platform) -> None:
    """Refuse a platform that a builder lacks, or on which Guix could not isolate its builds."""
    if not any(node.platforms for node in builder.nodes):
        return  # it is not running yet, and buildx starts it
    if not has_platform(builder, platform):
        raise BuilderError(
            f"the builder {builder.name} has no {platform}; `inv buildx.setup --binfmt` adds it by "
            "emulation, to go with GUIX_SANDBOX=nochroot; a node of its own in BUILDX_NODES is "
            "faster"
        )
    native = any(each.runs(platform) for each in native_platforms(builder))
    if not native and settings.guix_sandbox is not Sandbox.NOCHROOT:
        raise UsageError(
            f"{platform} is emulated by the builder {builder.name}, and Guix cannot isolate its "
            "builds there: set GUIX_SANDBOX=nochroot, or give BUILDX_NODES a machine of that kind"
        )


def needed_syntax(settings: Settings, buildx: Buildx, builder: str) -> str | None:
    """The frontend to ask the builder for; None where its own knows insecure steps.

    Raises ``BuilderError`` where the builder does not allow such steps, or where the frontend that
    it would need is out of its reach.
    """
    try:
        command.probe(buildx, builder, None)
    except BuilderError as error:
        if INSECURE_REFUSED.search(str(error)):
            mend = _ALLOW_INSECURE[settings.buildx_driver]
            raise BuilderError(
                f"the builder {builder} does not allow insecure steps (security.insecure is not "
                f"allowed by its configuration); {mend}"
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
                f"), and {syntax} is out of its reach; set BUILDKIT_SYNTAX to one that it can get, "
                "or use a builder with BuildKit 0.26 or newer"
            ) from None
        raise
    return syntax
