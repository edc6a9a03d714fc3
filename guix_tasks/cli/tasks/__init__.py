"""The Invoke tasks and their root collection."""

from __future__ import annotations

from typing import TYPE_CHECKING

from invoke.collection import Collection

from guix_tasks.cli.tasks import buildkit, lifecycle, local, project, runtime

if TYPE_CHECKING:
    from collections.abc import Iterable

ns = Collection.from_module(lifecycle)
for collection in (
    local.engine,
    local.registry,
    local.substitutes,
    buildkit.buildx,
    runtime.runtime,
):
    ns.add_collection(collection)
for task in (local.rootfs, project.init):
    ns.add_task(task)

GROUPS = {
    "Start a project": "init",
    "Build an image": "base pull install commit verify push",
    "Inspect and debug": "status doctor run shell",
    "Clean up": "squash rollback clean",
    "Pack and release": "pack release",
    "Runtime image": "runtime.build runtime.push runtime.check",
    "Substitutes": "weather substitutes.up substitutes.down",
    "BuildKit and platforms": "buildx.setup buildx.build buildx.status buildx.down manifest",
    "Local infrastructure": "rootfs registry.up registry.down engine.up engine.down",
}
"""Titles and task names of the groups, in the order of the list."""


def grouped(names: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Return the groups that contain one of ``names``; a project's custom tasks come last."""
    custom = list(names)
    groups = []
    for title, tasks in GROUPS.items():
        groups.append((title, [name for name in tasks.split() if name in custom]))
        custom = [name for name in custom if name not in tasks.split()]
    return [
        (title, group) for title, group in [*groups, ("Tasks of this project", custom)] if group
    ]
