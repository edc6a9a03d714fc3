"""Checks of the engine and its machine: host, clock, disk, mounts, warm stores and proxies."""

from __future__ import annotations

import shutil
from contextlib import suppress
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from guix_tasks.commands.doctor.finding import Finding, failed, from_error, note, ok
from guix_tasks.stages.container import binds, proxy_error_line
from guix_tasks.stages.store import check_store, store_volumes
from guix_tasks.ui.format import human_size

if TYPE_CHECKING:
    from guix_tasks.engine.api import Engine
    from guix_tasks.settings import Settings
    from guix_tasks.stages.project import Project

_MIN_FREE_BYTES = 4_000_000_000
"""Approximate size in bytes of a pull and an install of Guix's own packages."""

_MAX_CLOCK_SECONDS = 60
"""Maximum clock difference. Certificates and signatures are only valid for a period of time."""


def check_engine(engine: Engine) -> Finding:
    info = engine.info()
    address = f"{info.name} at {info.url} ({info.origin})"
    return ok(f"{address}, {info.kind}, {info.platform}, {info.store}")


def check_host(engine: Engine) -> Finding:
    info = engine.info()
    limits = ", ".join([f"cgroups v{info.cgroups or '?'}", *info.security])
    if not info.is_rootless:
        return ok(limits)
    return note(
        f"{limits}: privileged containers of a rootless engine have only the user's rights",
        "if the sandbox check fails, use an engine that runs as root",
    )


def check_clock(engine: Engine) -> Finding:
    time = engine.info().time
    if time is None:
        return note("the engine does not report its time")
    drift = (datetime.now(timezone.utc) - time).total_seconds()
    if abs(drift) <= _MAX_CLOCK_SECONDS:
        return ok(f"{abs(drift):.0f} s between this machine and the engine")
    direction = "behind" if drift > 0 else "ahead of"
    return failed(
        f"the engine's clock is {abs(drift):.0f} s {direction} this machine's",
        "set both clocks by NTP: certificates are valid for a period of time",
    )


def check_disk(project: Project) -> Finding:
    info, free = project.engine.info(), None
    with suppress(OSError):  # The directory may be in a virtual machine or closed to this user.
        free = shutil.disk_usage(info.root).free if info.is_local and info.root else None
    if free is None:
        return note("the engine's disk is not visible from this machine")
    base_image = str(project.settings.base_image)
    image = project.ledger.newest() or project.engine.image(base_image)
    # During a commit the new and the old image are both on the disk.
    needed = max(_MIN_FREE_BYTES, 2 * image.size if image else 0)
    message = f"{human_size(free)} free at {info.root}; about {human_size(needed)} is needed"
    if free < needed:
        return failed(message, "free some space: `inv clean`, `docker system prune`")
    return ok(message)


def check_mounts(engine: Engine, settings: Settings) -> Finding | None:
    """Check that the engine sees MOUNTS; their existence is checked with the settings."""
    if binds(engine, settings):
        return ok("the engine is on this machine and sees MOUNTS")
    return None


def check_stores(project: Project) -> Finding | None:
    """Check the databases of the project's warm stores; None if it has none yet."""
    if not project.settings.cache_volume:
        return note("CACHE_VOLUME is empty, so each stage starts cold", "set CACHE_VOLUME")
    volumes, image = store_volumes(project), project.ledger.find("base")
    if not volumes:
        return None
    if image is None or project.engine.is_dry:
        return note(f"{', '.join(volumes)}: not checked, because there is no base stage")
    for volume in volumes:
        if error_line := check_store(project, volume, image):
            return failed(
                f"the database of the volume {volume} is damaged: {error_line}",
                f"remove it with `docker volume rm {volume}`, and the next run creates it again",
            )
    return ok(f"{', '.join(volumes)}: the database is intact")


def check_proxies(engine: Engine, settings: Settings) -> Finding | None:
    if problem := proxy_error_line(engine, settings):
        return from_error(problem)
    names = ", ".join(name for name in settings.proxies if name.islower())
    return ok(f"{names}: used by stages, builds and these checks") if settings.proxies else None
