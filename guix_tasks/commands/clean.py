"""Remove what a project has made on an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guix_tasks.commands.push import pushed_references
from guix_tasks.stages.container import PROJECT_LABEL, find_server, work_containers
from guix_tasks.stages.container import project as project_name
from guix_tasks.stages.images import PREVIOUS, SQUASH, proven_stage

if TYPE_CHECKING:
    from guix_tasks.stages.project import Project


def clean(project: Project, *, work_only: bool = False) -> list[str]:
    """Remove the work containers, stage images and volumes of this project, nothing else.

    ``IMAGE`` and ``TAGS`` go with the stage image that they stand for.  What was removed.
    """
    engine, settings = project.engine, project.settings
    removed = []
    for container in work_containers(engine, settings):
        engine.remove(container.id)
        removed.append(container.name)
    if work_only:
        return removed
    if server := find_server(engine, settings):
        engine.remove(server.id)
        removed.append(server.name)
    for each in project.each_platform():
        removed += _clean_images(each)
    project.ledger.drop_unnamed()
    for volume in engine.volumes({PROJECT_LABEL: project_name(settings)}):
        engine.remove_volume(volume)
        removed.append(volume)
    return removed


def say_removed(project: Project, removed: list[str]) -> None:
    """Say what ``clean`` removed; a dry run has shown the calls, and removed nothing."""
    console = project.console
    if not removed:
        console.say("clean: nothing there")
    elif not project.engine.is_dry:
        for each in removed:
            console.say(f"clean: removed {each}")
        console.say(f"clean: {len(removed)} removed")


def _clean_images(project: Project) -> list[str]:
    engine, ledger, settings = project.engine, project.ledger, project.settings
    removed = []
    stages = {stage: image for stage in (*ledger.stages, SQUASH) if (image := ledger.find(stage))}
    before = ledger.previous()
    if before and proven_stage(before):
        stages[PREVIOUS] = before
    ids = {image.id for image in stages.values()}
    others = dict.fromkeys([str(ledger.image), *pushed_references(settings)])
    ours = [each for each in others if (image := engine.image(each)) and image.id in ids]
    # What a push for one platform has tagged, whatever PLATFORMS is now.
    by_platform = f"{settings.image}-linux-"
    tags = {tag for image in stages.values() for tag in image.tags if tag.startswith(by_platform)}
    ours += sorted(tags.difference(ours))
    for reference in [*ours, *(ledger.tag(stage) for stage in reversed(stages))]:
        engine.untag(reference)
        removed.append(reference)
    return removed
