"""Commit the work container that a shell, a command or a stage kept."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from guix_tasks.errors import EngineError, UsageError
from guix_tasks.settings.values import Sandbox
from guix_tasks.stages.commit import commit_image
from guix_tasks.stages.container import drop_environment, kept_containers, kept_task
from guix_tasks.stages.images import ASSEMBLED_LABEL, FILES_LABEL, HAND_MADE, STAGE_LABEL
from guix_tasks.stages.store import LIVE_LABEL
from guix_tasks.stages.volumes import check_volumes
from guix_tasks.ui.format import human_size, human_time

if TYPE_CHECKING:
    from guix_tasks.engine.api import Container
    from guix_tasks.stages.project import Project


def commit(project: Project) -> None:
    """Commit the kept work container, if there is one, as ``IMAGE``.

    Raise ``UsageError`` if it is running or its command failed, and ``EngineError`` if its image no
    longer exists.
    """
    engine, console = project.engine, project.console
    project.ledger.drop_unnamed()
    kept = kept_containers(engine, project.settings)
    if not kept:
        console.print("commit: nothing to commit")
        return
    container, reference = kept[0], str(project.ledger.image)
    check_stopped(container)
    status = engine.wait(container.id) if container.started else 0
    task, is_rootless = kept_task(container)
    # The exit status of a shell is that of its last command only.
    if status and task != "shell":
        raise UsageError(
            f"cannot commit {container.name}: its command ended with status {status}; "
            "`inv clean --work` removes it"
        )
    parent = engine.image(container.image)
    if parent is None:
        raise EngineError(
            f"cannot commit {container.name}: its image, and so its configuration, no longer exists"
        )
    check_volumes(project.settings, parent)
    if status or not container.started:
        drop_environment(engine, container.id)
    sandbox = Sandbox.ROOTLESS if is_rootless else Sandbox.CAPABILITIES
    project = replace(project, settings=replace(project.settings, guix_sandbox=sandbox))
    current, started = engine.image(reference), time.monotonic()
    with console.step("commit", has_log=False):
        own = dict.fromkeys((ASSEMBLED_LABEL, FILES_LABEL, LIVE_LABEL), "")
        labels = {STAGE_LABEL: HAND_MADE, **own}
        image = commit_image(project, container.id, parent, reference, labels)
        project.ledger.keep(current)
        engine.remove(container.id)
    duration = human_time(time.monotonic() - started)
    console.print(f"commit: {reference}, {human_size(image.size)}, {duration}")


def check_stopped(container: Container) -> None:
    if container.running:
        raise UsageError(f"{container.name} is still running; exit its shell first")
