"""Restore the previous image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guix_tasks.errors import UsageError

if TYPE_CHECKING:
    from guix_tasks.stages.project import Project


def rollback(project: Project) -> None:
    """Restore the previous ``IMAGE``. A second call undoes the first.

    Raise ``UsageError`` if there is no previous image.
    """
    image = project.ledger.roll_back()
    if image is None:
        raise UsageError(f"{project.ledger.image} has no previous image on this engine")
    project.console.print(f"rollback: {project.ledger.image} is now {image.id}")
