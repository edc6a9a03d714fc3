"""Images on their way to a registry and back."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from guix_tasks.console import TransferProgress
from guix_tasks.engine import Credentials

if TYPE_CHECKING:
    from collections.abc import Iterator

    from guix_tasks.stage import Project


def credentials(project: Project) -> Credentials | None:
    """What the settings say; None leaves it to Docker's own configuration."""
    settings = project.settings
    if settings.docker_username and settings.docker_password:
        return Credentials(settings.docker_username.reveal(), settings.docker_password.reveal())
    return None


@contextmanager
def transfer(project: Project, what: str) -> Iterator[TransferProgress]:
    """The progress of one push or pull."""
    progress = TransferProgress(project.console, what)
    try:
        yield progress
    finally:
        progress.end()
