"""Restore the previous image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guix_tasks.errors import UsageError

if TYPE_CHECKING:
    from guix_tasks.stages.project import Project


def rollback(project: Project) -> None:
    """Let ``IMAGE`` be what it was before it last moved; called again, what it is now."""
    image = project.ledger.roll_back()
    if image is None:
        raise UsageError(f"{project.ledger.image} has never been anything else on this engine")
    project.console.say(f"rollback: {project.ledger.image} is {image.id} again")
