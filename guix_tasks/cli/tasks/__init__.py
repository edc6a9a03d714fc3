"""The tasks, thin, and the root collection."""

from __future__ import annotations

from typing import TYPE_CHECKING

from invoke.collection import Collection

from dev import tasks as tasks_module
from guix_tasks.cli import custom
from guix_tasks.cli.custom import declare, declare_test
from guix_tasks.cli.tasks import buildkit, lifecycle, local, project

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

ns = Collection.from_module(lifecycle)
for collection in (*local.collections, buildkit.buildx):
    ns.add_collection(collection)
for task in (*local.tasks, tasks_module.demo, tasks_module.test, project.init):
    ns.add_task(task)

GROUPS = {
    "Begin": "init demo test",
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
        groups.append((title, [name for name in tasks.split() if name in custom]))
        own = [name for name in custom if name not in tasks.split()]
    return [(title, group) for title, group in [*groups, ("Of this project", custom)] if group]


def add_stage(
    name: str,
    command: str | Sequence[str],
    *,
    parent: str = "install",
    inputs: str | Sequence[str] = (),
    summary: str = "",
) -> None:
    """Add a stage, and the task of its name, to those of the project; for its ``tasks.py``.

    The ``command`` is run in a work container of the ``parent``'s image; as in a Dockerfile, a
    text is for the shell, a list is run as it is.  It is run by root (unless
    ``GUIX_SANDBOX=rootless`` is set), in a folder that holds the ``inputs``: files and folders of
    the project, by their names relative to it.  What it makes is committed, but for what is new
    in the store and no profile or root keeps.

    ``summary`` is what ``inv --list`` says.  ``IMAGE`` follows the stage that was added last, of
    those that were made.
    """
    stage = declare(name, command, parent, inputs, taken=_names())
    ns.add_task(custom.stage_task(stage, summary))


def add_test(
    name: str,
    command: str | Sequence[str],
    *,
    image: str = "",
    inputs: str | Sequence[str] = (),
    summary: str = "",
) -> None:
    """Add a task that tries the tarball of ``inv pack`` where there is no Guix.

    The tarball is unpacked at the root of a container of ``image``, or of one that has nothing at
    all, not even a shell; the ``command``, written as that of a stage, is run there without
    network, and fails as any other does.  The ``inputs`` are files and folders of the project,
    which it finds below ``/test``.
    """
    test = declare_test(name, command, image, inputs, taken=_names())
    ns.add_task(custom.test_task(test, summary))


def _names() -> list[str]:
    return [*ns.task_names, *ns.collections]
