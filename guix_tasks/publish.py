"""Push: what the project made goes to its registry."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guix_tasks.errors import UsageError
from guix_tasks.ledger import STAGES, proven_stage
from guix_tasks.lifecycle import Lifecycle
from guix_tasks.transfer import credentials, transfer

if TYPE_CHECKING:
    from guix_tasks.engine import Image
    from guix_tasks.stage import Project


def push(project: Project, stage: str | None = None) -> dict[str, str]:
    """Push ``IMAGE`` and ``TAGS``, or the tag of one stage; the digest of each reference.

    Raises ``UsageError`` where there is nothing to push or the stage is stale, and
    ``RegistryError`` where the registry refuses.
    """
    ledger, engine = project.ledger, project.engine
    image = image_to_use(project, stage)
    made_by = proven_stage(image)
    if made_by in STAGES and (why := Lifecycle(project).state(made_by).why):
        upstream = "" if made_by == "base" else " --upstream"
        raise UsageError(
            f"{ledger.tag(made_by)} is stale ({why}); run `inv {made_by}{upstream}`, then push"
        )
    references = [ledger.tag(stage)] if stage else [str(project.settings.image)]
    if not stage:
        for tag in project.settings.tags:
            reference = str(project.settings.image.with_tag(tag))
            engine.tag(image.id, reference)
            references.append(reference)
    digests = {}
    for reference in references:
        with transfer(project, f"push {reference}") as progress:
            digests[reference] = engine.push(reference, credentials(project), progress)
    return digests


def image_to_use(project: Project, stage: str | None = None) -> Image:
    """What ``IMAGE``, or the tag of one stage, stands for.  ``UsageError`` where it is missing."""
    ledger = project.ledger
    ledger.repair()
    if stage:
        image, reference = ledger.find(stage), ledger.tag(stage)
    else:
        reference = str(project.settings.image)
        image = project.engine.image(reference)
    if image is None:
        raise UsageError(f"there is no {reference} on this engine; run `inv {stage or 'install'}`")
    return image
