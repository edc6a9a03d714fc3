"""The tasks, thin, and the root collection."""

from __future__ import annotations

from typing import TYPE_CHECKING

from invoke.collection import Collection

from guix_tasks.cli.tasks import buildkit, lifecycle, local, project

if TYPE_CHECKING:
    from collections.abc import Iterable

ns = Collection.from_module(lifecycle)
for collection in (*local.collections, buildkit.buildx):
    ns.add_collection(collection)
for task in (*local.tasks, project.init):
    ns.add_task(task)

GROUPS = {
    "Begin": "init",
    "Make an image": "base pull install commit verify push",
    "Look, and work inside": "status doctor run shell",
    "Tidy": "squash rollback clean",
    "Pack and release": "pack release",
    "Substitutes": "weather substitutes.up substitutes.down",
    "BuildKit, and many platforms": "buildx.setup buildx.build buildx.status buildx.down manifest",
    "What this machine lacks": "rootfs registry.up registry.down engine.up engine.down",
}
"""The tasks by what they are for, in the order in which one needs them."""


def grouped(names: Iterable[str]) -> list[tuple[str, list[str]]]:
    """The groups, each with those of its tasks that are among ``names``; the project's own last."""
    own = list(names)
    groups = []
    for title, tasks in GROUPS.items():
        groups.append((title, [name for name in tasks.split() if name in own]))
        own = [name for name in own if name not in tasks.split()]
    return [(title, group) for title, group in [*groups, ("Of this project", own)] if group]
