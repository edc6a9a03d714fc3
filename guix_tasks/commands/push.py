"""Push images to the registry."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from guix_tasks import guix
from guix_tasks.engine.accounts import remote_digest
from guix_tasks.engine.retry import retry_call
from guix_tasks.errors import RegistryError, UsageError
from guix_tasks.files import check_writable
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
    """Push ``IMAGE`` and ``TAGS``, or the tag of one stage, and return the digests by reference.

    With ``PLATFORMS``, push a tag of the platform instead, because an engine cannot push by digest,
    and write a push record for ``inv manifest``.

    Raise ``UsageError`` if there is nothing to push or the stage is stale, and ``RegistryError`` if
    the registry refuses.
    """
    ledger, engine = project.ledger, project.engine
    image = require_image(project, stage)
    check_up_to_date(project, image, "push")
    # A stage that tasks.py no longer declares cannot be checked either.
    if proven_stage(image) not in (*ledger.stages, SQUASH, HAND_MADE):
        project.console.warn(
            f"{ledger.image} was not built by a stage of this project; pushing it without an "
            "up-to-date check"
        )
    custom = [custom_stage.name for custom_stage in project.custom_stages]
    missing = [] if stage else [name for name in custom if not ledger.find(name)]
    if missing:
        project.console.warn(
            f"{ledger.image} is pushed without {', '.join(missing)}, which has no image; "
            f"run `inv {' '.join(missing)} push` to include it"
        )
    if warning := uncommitted(engine, project.settings):
        project.console.warn(warning)
    platform = None if stage or engine.is_dry else project.settings.platform
    if platform:
        check_writable(project.settings.output_directory)
    references = [ledger.tag(stage)] if stage else pushed_references(project.settings)
    digests = {}
    for reference in references:
        if not stage and reference != str(ledger.image):
            replaced_image = engine.image(reference)
            engine.tag(image.id, reference)
            if replaced_image:
                engine.drop(replaced_image.id)
        digests[reference] = retry_call(
            project.console, "the push", partial(_push, project, reference)
        )
    if platform:
        (digest,) = digests.values()
        commits = guix.commits(image.labels.get(CHANNELS_LABEL, ""))
        pushed = Pushed(project.settings.image.name, (platform,), digest, commits)
        path = save(project.settings, pushed)
        project.console.print(
            f"push: wrote {path}; `inv manifest` joins the platforms as {project.settings.image}"
        )
    return digests


def _push(project: Project, reference: str) -> str:
    """Push a tag, check that the registry has the pushed digest, and return it."""
    try:
        digest = push_once(project, reference)
    except RegistryError:
        if digest := _pushed_before(project, reference):
            project.console.print(f"push: {reference}: the registry has this image already")
            return digest
        raise
    stored = remote_digest(project.engine, project.settings, reference) if digest else None
    if stored not in (None, digest):
        raise RegistryError(
            f"{reference} was pushed as {digest}, but the registry has {stored}: either another "
            "client pushes the same tag, or the registry is faulty; push again"
        )
    return digest


def _pushed_before(project: Project, reference: str) -> str:
    """Return the digest of a tag in the registry if that is the local image, else nothing.

    A registry with immutable tags refuses to push a tag again, also if that changes nothing.
    """
    stored = remote_digest(project.engine, project.settings, reference)
    image = project.engine.image(reference)
    name = reference.rpartition(":")[0]
    return stored if stored and image and f"{name}@{stored}" in image.digests else ""


def pushed_references(settings: Settings) -> list[str]:
    """Return the references to push: ``IMAGE`` and ``TAGS``, or the tag of the platform."""
    image = settings.image
    if settings.platform:
        return [str(image.with_tag(f"{image.tag}-{settings.platform.tag_suffix}"))]
    return settings.references


def check_up_to_date(project: Project, image: Image, task: str) -> None:
    """Raise ``UsageError`` if an image is that of a stale stage.

    An image that was committed by hand or restored by ``inv rollback`` is not checked.
    """
    ledger = project.ledger
    stage = proven_stage(ledger.last_stage() or image)
    current = ledger.find(stage) if stage in ledger.stages else None
    is_stage = current and image.id in (current.id, getattr(ledger.find(SQUASH), "id", None))
    reason = Lifecycle(project).state(stage).why if stage and is_stage else None
    if reason:
        upstream = "" if stage == "base" else " --upstream"
        raise UsageError(f"{stage} is stale ({reason}); run `inv {stage}{upstream}`, then {task}")


def require_image(project: Project, stage: str | None = None) -> Image:
    """Return ``IMAGE`` or the image of a stage. Raise ``UsageError`` if it does not exist."""
    ledger = project.ledger
    ledger.repair()
    stages = ", ".join(ledger.stages)
    try:
        reference = ledger.tag(stage) if stage else str(ledger.image)
        image = ledger.find(stage) if stage else project.engine.image(reference)
    except ValueError:
        raise UsageError(
            f"--stage: {stage!r} is not a valid stage name; use {stages} or {SQUASH}"
        ) from None
    if image:
        return image
    if stage not in (None, *ledger.stages, SQUASH):
        raise UsageError(
            f"{reference} does not exist on this engine: the project has no stage {stage!r}; "
            f"its stages are {stages} and {SQUASH}"
        )
    raise UsageError(
        f"{reference} does not exist on this engine; run `inv {stage or 'install'}`, or "
        "`docker pull` it if buildx.build pushed it"
    )
