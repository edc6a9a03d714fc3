"""Images on their way to a registry and back."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from guix_tasks.console import TransferProgress
from guix_tasks.engine import Credentials
from guix_tasks.reference import ImageReference
from guix_tasks.retry import retried

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


def push(project: Project, reference: str) -> str:
    """Push a tag, and again after a fault that passes; the digest that the registry answered."""
    host = ImageReference.parse(reference).registry
    return retried(project.console, "the push", partial(push_once, project, reference), host=host)


def push_once(project: Project, reference: str) -> str:
    with transfer(project, f"push {reference}") as progress:
        return project.engine.push(reference, credentials(project), progress)


def pull(project: Project, reference: str) -> None:
    """Pull a reference, and again after a fault that passes; that it is not there is none."""

    def once() -> None:
        with transfer(project, f"pull {reference}") as progress:
            project.engine.pull(reference, credentials(project), progress=progress)

    host = ImageReference.parse(reference).registry
    retried(project.console, "the pull", once, host=host)
