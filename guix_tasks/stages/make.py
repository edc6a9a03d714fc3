"""Make the image of a stage: run its commands, and commit or assemble the result."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from guix_tasks.errors import DamagedStoreError, MissingItemsError, StageError
from guix_tasks.settings.values import Sandbox
from guix_tasks.stages.channel_access import grant_access
from guix_tasks.stages.checkouts import push_checkouts, take_checkouts
from guix_tasks.stages.commit import commit_image, commit_unnamed
from guix_tasks.stages.container import (
    MOUNT_POINTS,
    WORK_DIRECTORY,
    Work,
    cache_prefix,
    check_no_kept_container,
    common_inputs,
    mount_inputs,
    mount_points,
    work_container,
)
from guix_tasks.stages.images import (
    ASSEMBLED_LABEL,
    FILES_LABEL,
    GUIX_KEY_LABEL,
    REPORTED_LABELS,
    STAGE_LABEL,
    check_layers,
    files_digest,
    is_child,
    key_of,
    stage_labels,
)
from guix_tasks.stages.runner import run_with_retries
from guix_tasks.stages.stage import Stage, stage_files, warm_stage_files
from guix_tasks.stages.store import (
    LIVE_LABEL,
    assemble,
    fill_store,
    guix_key,
    is_reusable,
    new_result,
    result_directory,
    store_volume,
    store_volumes,
    trust_digest,
)
from guix_tasks.stages.substitute_server import local_server
from guix_tasks.stages.volumes import check_volumes
from guix_tasks.ui.format import pasteable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from guix_tasks.engine.api import Image
    from guix_tasks.stages.project import Project
    from guix_tasks.ui.console import Step


def run_stage(
    project: Project,
    stage: Stage,
    parent: Image,
    *,
    commit: bool = True,
    force: bool = False,
    keep_failed: bool = False,
) -> Image | None:
    """Run a stage's commands in a container of ``parent`` and commit it as the stage's image.

    Return None if nothing was committed: with ``commit=False`` the container is kept for
    ``inv commit``; without ``force`` a result that equals the current image is not committed.

    Raise ``StageError`` if a command fails. No tag moves in that case, and the container is
    removed unless ``keep_failed`` is true.
    """
    check_volumes(project.settings, parent)
    warm = commit and not keep_failed and cache_prefix(project.settings) is not None
    # The files of a custom stage outside of the store are a layer of their own.
    check_layers(project.engine, parent, 2 if warm and stage.as_root else 1)
    current = project.ledger.find(stage.name)
    if warm and current and not force:
        image = _reassemble(project, stage, parent, current)
        if image:
            return image
    # Before the run, so that a file that is edited meanwhile makes the stage stale.
    common = common_inputs(project.engine, project.settings)
    project = project.with_sandbox(parent, as_root=stage.as_root)
    console, settings = project.console, project.settings
    if not commit or keep_failed:
        check_no_kept_container(project.engine, settings)
    with console.step(stage.name) as step:
        console.detail(f"{stage.name}: in a {settings.guix_sandbox.value} container")
        for command in stage.commands:
            console.detail(pasteable(command))
        if warm:
            if stage.fetches is not None:
                take_checkouts(project)
            image = _run_warm(project, stage, parent, current, step, common=common, force=force)
            if stage.fetches is not None:
                push_checkouts(project, parent)
            return image
        with _stage_container(
            project, stage, parent, stage_files(stage), keep=not commit, keep_failed=keep_failed
        ) as (container, work):
            report = _run_commands(project, stage, container, work)
            step.show_activity(lambda: "committing")
            if not commit:
                console.print(f"{stage.name}: not committed; `inv commit` commits the container")
                return None
            labels = {**_labels(project, stage, parent, report, common), LIVE_LABEL: ""}
            if not force and current and _is_unchanged(project, current, parent, labels):
                return None
            return commit_image(project, container, parent, project.ledger.tag(stage.name), labels)


def _run_warm(
    project: Project,
    stage: Stage,
    parent: Image,
    current: Image | None,
    step: Step,
    *,
    common: Mapping[str, str],
    force: bool,
) -> Image | None:
    """Run a stage's commands with the warm store, and assemble its image from the result."""
    trust = trust_digest(project, stage, parent)
    volume = store_volume(project, trust)
    previous = current if current and current.labels.get(ASSEMBLED_LABEL) == trust else None
    seeds = (parent, *([previous] if previous else []))
    if volume not in store_volumes(project):
        fill_store(project, volume, seeds)
    result = new_result()
    # Only install reuses a result: pull can fetch other commits from the same inputs.
    inputs = stage.inputs(common)
    earlier = "" if force or stage.pinned else guix_key(stage, parent, inputs)
    run = partial(_run_in_store, project, stage, parent, volume, result=result, earlier=earlier)
    try:
        report, start = run(check_roots=True)
    except (MissingItemsError, DamagedStoreError) as error:
        if isinstance(error, DamagedStoreError):
            project.console.print(f"{stage.name}: the volume {volume} is damaged; recreating it")
            project.engine.remove_volume(volume)
        fill_store(project, volume, seeds)
        # The volume was just filled from these images.
        report, start = run(check_roots=False)

    step.show_activity(lambda: "assembling")
    try:
        labels = {
            **_labels(project, stage, parent, report, common),
            ASSEMBLED_LABEL: trust,
            FILES_LABEL: "" if stage.as_root else files_digest(parent),
        }
        if not force and current and _is_unchanged(project, current, parent, labels):
            return None
        starts = [start]
        if previous and not force and is_reusable(project, stage, parent, previous):
            starts.insert(0, previous)
        made = assemble(project, stage, parent, volume, labels, result=result, starts=starts)
    finally:
        if start is not parent:
            project.engine.drop(start.id)
    if made is None:
        # Guix takes the items for valid, so only another volume can get them back.
        project.engine.remove_volume(volume)
        raise StageError(
            f"{stage.name}: the volume {volume} lacked store items that its database contains, and "
            f"nothing was committed; it was removed, run `inv {stage.name}` again"
        )
    return made


def _run_in_store(
    project: Project,
    stage: Stage,
    parent: Image,
    volume: str,
    *,
    result: str,
    earlier: str,
    check_roots: bool,
) -> tuple[str, Image]:
    """Run a stage's commands with the warm store, and record what they made as ``result``.

    If the volume has the result ``earlier``, which has the same inputs, that is taken instead.

    Return their report and the image to assemble on: ``parent``, or an untagged image with the
    files that the commands of a custom stage wrote outside of the store.

    Raise ``MissingItemsError`` if the volume lacks items of ``parent``.
    """
    files = warm_stage_files(
        stage,
        result_directory(result),
        earlier=result_directory(earlier) if earlier else "",
        check_roots=check_roots,
    )
    with _stage_container(project, stage, parent, files, store=volume) as (container, work):
        report = _run_commands(project, stage, container, work)
        return report, commit_unnamed(project, container, parent) if stage.as_root else parent


def _reassemble(project: Project, stage: Stage, parent: Image, current: Image) -> Image | None:
    """Assemble a stage on a new parent without running Guix if Guix would make the same.

    Return None if it might make something else, or if no volume has the result.
    """
    inputs = stage.inputs(common_inputs(project.engine, project.settings))
    key = guix_key(stage, parent, inputs)
    if not key or current.labels.get(GUIX_KEY_LABEL) != key:
        return None
    own = stage.labels("")
    reported = {name: current.labels[name] for name in REPORTED_LABELS if name in own}
    trust = trust_digest(project, stage, parent)
    labels = {
        **stage_labels(stage.name, key_of(parent), inputs),
        **own,
        **reported,
        GUIX_KEY_LABEL: key,
        ASSEMBLED_LABEL: trust,
        FILES_LABEL: files_digest(parent),
    }
    is_trusted = current.labels.get(ASSEMBLED_LABEL) == trust
    is_start = is_trusted and is_reusable(project, stage, parent, current)
    starts = [current, parent] if is_start else [parent]
    with project.console.step(stage.name) as step:
        step.show_activity(lambda: "assembling")
        for volume in store_volumes(project):
            image = assemble(project, stage, parent, volume, labels, result=key, starts=starts)
            if image:
                project.console.print(f"{stage.name}: Guix has nothing to do; assembled again")
                return image
    return None


def _run_commands(project: Project, stage: Stage, container: str, work: Work) -> str:
    report = run_with_retries(project, container, work).strip()
    if stage.check:
        stage.check(report)
    return report


def _labels(
    project: Project, stage: Stage, parent: Image, report: str, common: Mapping[str, str]
) -> dict[str, str]:
    """Return the labels of a stage's image for a report.

    ``common`` are the inputs before the run. The run itself can have changed writable mounts.
    """
    writable = [mount for mount in project.settings.mounts if not mount.read_only]
    common = {**common, **mount_inputs(project.settings, writable)}
    # A dry run has no report to pin the stage by.
    pinned = stage.pinned(report) if stage.pinned and report else stage
    inputs = pinned.inputs(common)
    return {
        **stage_labels(stage.name, key_of(parent), inputs),
        **stage.labels(report),
        GUIX_KEY_LABEL: guix_key(pinned, parent, inputs),
        ASSEMBLED_LABEL: "",
        FILES_LABEL: "",
    }


def _is_unchanged(
    project: Project, current: Image, parent: Image, labels: Mapping[str, str]
) -> bool:
    if not is_child(current, parent) or not labels.items() <= current.labels.items():
        return False
    project.console.print(f"{current.labels[STAGE_LABEL]}: unchanged")
    return True


@contextmanager
def _stage_container(
    project: Project,
    stage: Stage,
    parent: Image,
    files: Mapping[str, bytes],
    *,
    keep: bool = False,
    keep_failed: bool = False,
    store: str = "",
) -> Iterator[tuple[str, Work]]:
    """Create the container of a stage, with access to its channels; yield its ID and its work."""
    engine, settings = project.engine, project.settings
    with grant_access(engine, settings, stage.fetches) as access:
        work = Work(
            stage.name,
            (f"{WORK_DIRECTORY}/stage",),
            {**files, **access.files},
            keep=keep,
            keep_failed=keep_failed,
            local_server=local_server(project, stage.name),
            binds=access.binds,
            store=store,
        )
        if not store or stage.as_root:
            work = committed_work(project, parent.id, work)
        with work_container(engine, settings, parent.id, work) as container:
            yield container, work


def committed_work(project: Project, image: str, work: Work) -> Work:
    """Return a work whose container of an image can be committed without its mount points.

    Print a note if the targets of ``MOUNTS`` stay, because the entry point may not unmount them.
    """
    sandbox = project.settings.guix_sandbox
    points = mount_points(project.engine, project.settings, image, work)
    if sandbox not in (Sandbox.ROOTLESS, Sandbox.NOCHROOT):
        lines = "".join(f"{point}\n" for point in points)
        return replace(work, files={**work.files, MOUNT_POINTS: lines.encode()})
    targets = {mount.target for mount in project.settings.mounts}.intersection(points)
    if targets:
        project.console.print(
            f"{work.name}: {', '.join(sorted(targets))} will be in the image, empty, because a "
            f"{sandbox.value} container cannot remove the targets of MOUNTS"
        )
    return work
