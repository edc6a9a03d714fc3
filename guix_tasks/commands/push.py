"""Push: what the project made goes to its registry."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from guix_tasks import guix
from guix_tasks.engine.credentials import remote_digest
from guix_tasks.engine.retry import retried
from guix_tasks.errors import RegistryError, UsageError
from guix_tasks.stages.container import uncommitted
from guix_tasks.stages.images import CHANNELS_LABEL, HAND_MADE, SQUASH, proven_stage
from guix_tasks.stages.lifecycle import Lifecycle
from guix_tasks.stages.push_records import Pushed, save
from guix_tasks.stages.transfer import push_once

if TYPE_CHECKING:
    from guix_tasks.engine.api import Image
    from guix_tasks.settings import Settings
    from guix_tasks.stages.project import Project


def push(project: Project, stage: str | None = None) -> dict[str, str]:
    """Push ``IMAGE`` and ``TAGS``, or the tag of one stage; the digest of each reference.

    With ``PLATFORMS`` the platform's own tag is pushed instead, for an engine can push no digest,
    and what the registry answered is written down for ``inv manifest``.

    Raises ``UsageError`` where there is nothing to push or the stage is stale, and
    ``RegistryError`` where the registry refuses.
    """
    ledger, engine = project.ledger, project.engine
    image = image_to_use(project, stage)
    refuse_stale(project, image, "push")
    # Nor is it known of what a stage made that tasks.py no longer has.
    if proven_stage(image) not in (*ledger.stages, SQUASH, HAND_MADE):
        project.console.warn(
            f"{ledger.image} was made by none of these stages, so nobody knows whether it is up to "
            "date; pushing it as it is"
        )
    if left := uncommitted(engine, project.settings):
        project.console.warn(left)
    references = [ledger.tag(stage)] if stage else pushed_references(project.settings)
    digests = {}
    for reference in references:
        if not stage and reference != str(ledger.image):
            before = engine.image(reference)
            engine.tag(image.id, reference)
            if before:
                engine.drop(before.id)
        digests[reference] = retried(
            project.console,
            "the push",
            partial(_push, project, reference),
            host=project.settings.image.registry,
        )
    platform = project.settings.platform
    if platform and not stage and not engine.is_dry:
        (digest,) = digests.values()
        commits = guix.commits(image.labels.get(CHANNELS_LABEL, ""))
        pushed = Pushed(project.settings.image.name, (platform,), digest, commits)
        path = save(project.settings, pushed)
        project.console.say(
            f"push: {path}; `inv manifest` joins the platforms under {project.settings.image}"
        )
    return digests


def _push(project: Project, reference: str) -> str:
    """Push a tag, and see that the registry holds what it said that it took; the digest."""
    digest = push_once(project, reference)
    held = remote_digest(project.engine, project.settings, reference) if digest else None
    if held not in (None, digest):
        raise RegistryError(
            f"{reference} was pushed as {digest}, and the registry holds {held}: somebody else "
            "pushes that tag, or the registry is at fault; push again"
        )
    return digest


def pushed_references(settings: Settings) -> list[str]:
    """What ``push`` pushes: ``IMAGE`` and ``TAGS``, or the tag of the one platform."""
    image = settings.image
    if settings.platform:
        return [str(image.with_tag(f"{image.tag}-{settings.platform.tag_suffix}"))]
    return settings.references


def _stage_image(project: Project, stage: str) -> tuple[Image | None, str]:
    try:
        return project.ledger.find(stage), project.ledger.tag(stage)
    except ValueError:
        raise UsageError(
            f"--stage: {stage!r} can be no stage; "
            f"name {', '.join(project.ledger.stages)} or {SQUASH}"
        ) from None


def refuse_stale(project: Project, image: Image, task: str) -> None:
    """Refuse for a task an image that is its stage's and no longer answers to what is asked for.

    One that was made by hand, or rolled back to, is taken as it is.
    """
    ledger = project.ledger
    stage = proven_stage(ledger.last_stage() or image)
    current = ledger.find(stage) if stage in ledger.stages else None
    is_stage = current and image.id in (current.id, getattr(ledger.find(SQUASH), "id", None))
    why = Lifecycle(project).state(stage).why if stage and is_stage else None
    if why:
        upstream = "" if stage == "base" else " --upstream"
        raise UsageError(f"{stage} is stale ({why}); run `inv {stage}{upstream}`, then {task}")


def image_to_use(project: Project, stage: str | None = None) -> Image:
    """What ``IMAGE``, or the tag of one stage, stands for.  ``UsageError`` where it is missing."""
    ledger = project.ledger
    ledger.repair()
    if stage:
        image, reference = _stage_image(project, stage)
    else:
        reference = str(ledger.image)
        image = project.engine.image(reference)
    if image is None and stage not in (None, *ledger.stages, SQUASH):
        raise UsageError(
            f"there is no {reference} on this engine: no stage {stage!r} was made; "
            f"there are {', '.join(ledger.stages)} and {SQUASH}"
        )
    if image is None:
        raise UsageError(
            f"there is no {reference} on this engine; run `inv {stage or 'install'}`, or "
            "`docker pull` it if buildx.build pushed it"
        )
    return image
