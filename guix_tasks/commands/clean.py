"""Remove the containers, images and volumes of a project."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guix_tasks.commands.push import pushed_references
from guix_tasks.stages.container import find_server, project_labels, work_containers
from guix_tasks.stages.images import PREVIOUS, SQUASH, proven_stage

if TYPE_CHECKING:
    from guix_tasks.stages.project import Project


def clean(project: Project, *, work_only: bool = False) -> list[str]:
    """Remove the project's containers, stage images and volumes, and return their names.

    ``IMAGE`` and ``TAGS`` are removed if they point to a stage image of the project.
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
    for platform_project in project.each_platform():
        removed += _clean_images(platform_project)
    project.ledger.drop_unnamed()
    for volume in engine.volumes(project_labels(settings)):
        engine.remove_volume(volume)
        removed.append(volume)
    return removed


def print_removed(project: Project, removed: list[str]) -> None:
    """Print the names that ``clean`` removed, except in a dry run."""
    console = project.console
    if not removed:
        console.print("clean: nothing to remove")
    elif not project.engine.is_dry:
        for name in removed:
            console.print(f"clean: removed {name}")
        console.print(f"clean: {len(removed)} removed")


def _clean_images(project: Project) -> list[str]:
    engine, ledger, settings = project.engine, project.ledger, project.settings
    removed = []
    stages = {stage: image for stage in (*ledger.stages, SQUASH) if (image := ledger.find(stage))}
    previous = ledger.previous()
    if previous and proven_stage(previous):
        stages[PREVIOUS] = previous
    ids = {image.id for image in stages.values()}
    candidates = dict.fromkeys([str(ledger.image), *pushed_references(settings)])
    references = [ref for ref in candidates if (image := engine.image(ref)) and image.id in ids]
    # Tags of earlier pushes for one platform, which may not be in PLATFORMS any more.
    prefix = f"{settings.image}-linux-"
    tags = {tag for image in stages.values() for tag in image.tags if tag.startswith(prefix)}
    references += sorted(tags.difference(references))
    for reference in [*references, *(ledger.tag(stage) for stage in reversed(stages))]:
        engine.untag(reference)
        removed.append(reference)
    return removed
