"""Checks of this machine, each with a finding and a fix."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

from guix_tasks import guix
from guix_tasks.commands.doctor import builder, machine, sandbox, servers
from guix_tasks.commands.doctor.finding import Finding, failed, from_error, note, ok
from guix_tasks.errors import GuixTasksError, SettingsError
from guix_tasks.ui.format import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from guix_tasks.buildkit.buildx import Buildx
    from guix_tasks.settings import Settings
    from guix_tasks.stages.project import Project
    from guix_tasks.ui.console import Console

    Check = Callable[[], Finding | None]


def examine(
    load: Callable[[], Settings],
    open_project: Callable[[Settings], Project],
    find_buildx: Callable[[Project], Buildx | None],
) -> list[tuple[str, Finding]]:
    """Check the settings, the engine and the rest; return each finding with its check's name."""
    try:
        settings = load()
    except SettingsError as error:
        return [("settings", failed(problem)) for problem in error.problems]
    findings = [("settings", note(text)) for text in settings.notes]
    try:
        project = open_project(settings)
    except GuixTasksError as error:
        return [*findings, ("engine", from_error(error))]
    return [*findings, ("settings", ok("read")), *examine_project(project, find_buildx(project))]


def examine_project(project: Project, buildx: Buildx | None) -> list[tuple[str, Finding]]:
    """Run the checks of a project.

    No check changes anything. The checks run in parallel, because most of their time is spent
    waiting for servers.
    """
    names, checks = zip(*_checks(project, buildx), strict=True)
    with ThreadPoolExecutor(max_workers=len(checks)) as pool:
        findings = pool.map(_run, checks)
    return [(name, found) for name, found in zip(names, findings, strict=True) if found]


def _checks(project: Project, buildx: Buildx | None) -> list[tuple[str, Check]]:
    """Return the checks with their names, in the order of the output."""
    engine, settings = project.engine, project.settings
    return [
        ("engine", partial(machine.check_engine, engine)),
        ("host", partial(machine.check_host, engine)),
        ("clock", partial(machine.check_clock, engine)),
        ("disk", partial(machine.check_disk, project)),
        ("base image", partial(servers.check_base_image, project)),
        ("mounts", partial(machine.check_mounts, engine, settings)),
        *(
            ("sandbox", partial(sandbox.check_sandbox, platform_project))
            for platform_project in project.each_platform()
        ),
        ("store", partial(machine.check_stores, project)),
        ("proxy", partial(machine.check_proxies, engine, settings)),
        ("registry", partial(servers.check_registry, engine, settings)),
        ("buildx", partial(builder.check_buildx, buildx)),
        ("builder", partial(builder.check_builder, settings, buildx)),
        ("channels", partial(servers.check_channels, settings)),
        *(
            (f"channel {channel.name}", partial(servers.check_channel, engine, settings, channel))
            for channel in servers.channels(settings)
        ),
        *(
            ("substitutes", partial(servers.check_substitutes, project, url))
            for url in settings.guix_substitute_urls or guix.DEFAULT_SUBSTITUTE_URLS
        ),
    ]


def _run(check: Check) -> Finding | None:
    try:
        return check()
    except GuixTasksError as error:
        return from_error(error)
    except OSError as error:
        # For example an unreadable file, which does not concern the other checks.
        message = f"{error.filename or 'a file'}: {error.strerror or error}"
        return failed(message, "correct this and run `inv doctor` again")


def show(console: Console, findings: Sequence[tuple[str, Finding]], *, as_json: bool) -> bool:
    """Print one line per finding, or all findings as JSON; return True if a check failed."""
    if as_json:
        rows = [{"check": name, **asdict(found)} for name, found in findings]
        console.result(json.dumps(rows, indent=2))
    else:
        for name, found in findings:
            fix = f"; {found.fix}" if found.fix else ""
            console.result(f"{found.state:6} {printable(f'{name}: {found.message}{fix}')}")
    return any(found.state == "failed" for _, found in findings)
