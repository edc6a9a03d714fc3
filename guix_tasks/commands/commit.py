"""Commit the work container that a shell, a command or a stage has left."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from guix_tasks.errors import EngineError, UsageError
from guix_tasks.stages.container import drop_environment, kept_containers
from guix_tasks.stages.images import HAND_MADE, STAGE_LABEL
from guix_tasks.stages.runner import commit_image
from guix_tasks.stages.volumes import check_volumes
from guix_tasks.ui.format import human_size, human_time

if TYPE_CHECKING:
    from guix_tasks.engine.api import Container
    from guix_tasks.stages.project import Project


def commit(project: Project) -> None:
    """Commit the work container that was left, as ``IMAGE``; where there is none, say so."""
    engine, console = project.engine, project.console
    project.ledger.drop_unnamed()
    kept = kept_containers(engine, project.settings)
    if not kept:
        console.say("commit: nothing to commit")
        return
    container, reference = kept[0], str(project.ledger.image)
    refuse_running(container)
    # What ended a shell says nothing of what was done in it.
    if "-shell-" not in container.name and (status := engine.wait(container.id)):
        raise UsageError(
            f"the command of {container.name} ended with status {status}, so it is not committed; "
            "`inv clean --work` drops it"
        )
    parent = engine.image(container.image)
    if parent is None:
        raise EngineError(f"the image of {container.name} is gone, so its configuration is unknown")
    check_volumes(project.settings, parent)
    drop_environment(engine, container.id)
    before, started = engine.image(reference), time.monotonic()
    with console.step("commit", has_log=False):
        image = commit_image(project, container.id, parent, reference, {STAGE_LABEL: HAND_MADE})
        project.ledger.keep(before)
        engine.remove(container.id)
    took = human_time(time.monotonic() - started)
    console.say(f"commit: {reference}, {human_size(image.size)}, {took}")


def refuse_running(container: Container) -> None:
    if container.running:
        raise UsageError(f"{container.name} is still running; leave its shell first")
