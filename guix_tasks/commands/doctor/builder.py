"""Checks of buildx and its builder."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from guix_tasks.buildkit.builder import find_builder, needed_syntax
from guix_tasks.commands.doctor.finding import Finding, from_error, note, ok
from guix_tasks.errors import GuixTasksError
from guix_tasks.settings.values import Driver

if TYPE_CHECKING:
    from guix_tasks.buildkit.buildx import Buildx
    from guix_tasks.settings import Settings


def check_buildx(buildx: Buildx | None) -> Finding:
    if buildx is None:
        fix = "`inv buildx.setup` installs it for your user"
        return note("not installed on this machine", fix)
    _, version, *_ = [*buildx.ask("version").split(), "?", "?"]
    return ok(f"{version} at {buildx.program}")


def check_builder(settings: Settings, buildx: Buildx | None) -> Finding | None:
    """Check that the builder runs insecure steps, unless that would start it."""
    if buildx is None:
        return None
    try:
        builder = find_builder(settings, buildx)
        if idle := [node for node in builder.nodes if node.status != "running"]:
            reason = next((f": {node.error}" for node in idle if node.error), "")
            fix = "`inv buildx.setup` starts it"
            if settings.buildx_driver is Driver.REMOTE:
                fix = "start its buildkitd, or correct BUILDX_NODES"
            return note(f"{', '.join(node.name for node in idle)} is not running{reason}", fix)
        syntax = needed_syntax(settings, buildx, builder.name)
    except GuixTasksError as error:
        # Stages that run in work containers need no builder.
        return replace(from_error(error), state="note")
    frontend = f"the frontend {syntax}" if syntax else "its built-in frontend"
    return ok(f"{builder.name} runs insecure steps with {frontend}")
