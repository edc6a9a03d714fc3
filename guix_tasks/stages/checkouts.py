"""Git checkouts of channels in ``CACHE_IMAGE``, so that a fresh machine does not clone them.

A pull whose channels have moved needs the repository of each channel with its whole history: 0.5 GB
for Guix, from a server that is often slow. The cache volume contains them. Once in a while they
are pushed as an image of one layer next to the stages, and an engine without that volume fills it
from there. ``guix pull`` then fetches only what is newer.

The image also contains Guix's list of the commits that it has authenticated. Anyone who can write
to ``CACHE_IMAGE`` can replace whole stages, so this trusts nobody more.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from guix_tasks.errors import GuixTasksError
from guix_tasks.stages.container import (
    WORK_DIRECTORY,
    archive,
    cache_volumes,
    image_platform,
    project_digest,
    project_labels,
    resource_files,
    shell_work,
    unstarted_container,
    work_container,
)
from guix_tasks.stages.transfer import pull, push

if TYPE_CHECKING:
    from guix_tasks.engine.api import Image
    from guix_tasks.stages.project import Project

_MAX_AGE = 30
"""Age in days after which the checkouts are pushed again."""

_DIRECTORY = "guix-tasks-caches"
"""Directory of the checkouts in their image, and below ``/dev`` in containers that copy them."""

_SCRIPT = "pack-checkouts.sh"

_MARK = "pushed-checkouts"
"""File of the volume with the time of the last push to ``CACHE_IMAGE``, in seconds."""


def take_checkouts(project: Project) -> None:
    """Fill the cache volume from ``CACHE_IMAGE`` if this engine does not have the volume.

    Without such an image, or if it cannot be pulled, Guix clones its channels.
    """
    engine, settings = project.engine, project.settings
    names = _names(project)
    labels = project_labels(settings)
    if names is None or engine.is_dry or names[0] in engine.volumes(labels):
        return
    volume, reference = names
    try:
        pull(project, reference)
    except GuixTasksError:
        return
    try:
        engine.create_volume(volume, labels)
        # The engine fills an empty volume from the directory of the image at its first mount. It
        # has imported the image, so the platform of that is its own.
        native, binds = replace(settings, platforms=()), (f"{volume}:/{_DIRECTORY}",)
        with unstarted_container(engine, native, reference, binds):
            project.console.print(f"pull: starts from the checkouts of {reference}")
    except GuixTasksError as error:
        project.console.warn(f"the checkouts of {reference} were not copied: {error}")
        engine.remove_volume(volume)
    finally:
        engine.untag(reference)


def push_checkouts(project: Project, image: Image) -> None:
    """Push the checkouts of the cache volume to ``CACHE_IMAGE`` if those there are missing or old.

    ``image`` is one with a shell.
    """
    engine, console = project.engine, project.console
    names = _names(project)
    if names is None or engine.is_dry:
        return
    volume, reference = names
    caches = f"/dev/{_DIRECTORY}"
    work = shell_work(
        "checkouts",
        (f"{WORK_DIRECTORY}/{_SCRIPT}", caches, _MARK, str(_MAX_AGE)),
        resource_files((_SCRIPT,)),
        (f"{volume}:{caches}",),
        logged=False,
    )
    try:
        with work_container(engine, project.settings, image.id, work) as container:
            chunks = (data for is_log, data in engine.run(container) if not is_log)
            first = next(chunks, None)
            if first is None:
                return
            engine.import_rootfs(itertools.chain([first], chunks), reference)
            try:
                if status := engine.wait(container):
                    console.detail(f"checkouts: tar failed with exit status {status}")
                    return
                push(project, reference)
            finally:
                engine.untag(reference)
            mark = f"{int(time.time())}\n".encode()
            engine.copy_in(container, archive({_MARK: mark}, directory=caches))
    except GuixTasksError as error:
        console.warn(f"the checkouts of the channels were not pushed to CACHE_IMAGE: {error}")


def _names(project: Project) -> tuple[str, str] | None:
    """Return the volume with the checkouts and their reference in ``CACHE_IMAGE``, if there are.

    Podman fills a volume from an image only when a container starts, and this image has no program.
    """
    settings = project.settings
    if project.engine.info().is_podman:
        return None
    volumes = [name for name in cache_volumes(settings) if not name.endswith("-substitutes")]
    if settings.cache_image is None or not volumes:
        return None
    kind = volumes[0].rpartition("-")[2]
    platform = image_platform(project.engine, settings).replace("/", "-")
    tag = f"checkouts-{kind}-{platform}-{project_digest(settings)}"
    return volumes[0], str(settings.cache_image.with_tag(tag))
