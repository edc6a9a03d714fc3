"""Checks of the registries of ``BASE_IMAGE`` and ``IMAGE``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guix_tasks.commands.doctor.finding import Finding, failed, note, ok
from guix_tasks.engine import podman_api
from guix_tasks.engine.credentials import credentials_for, remote_digest
from guix_tasks.ui.format import human_size

if TYPE_CHECKING:
    from guix_tasks.engine.api import Engine
    from guix_tasks.settings import Settings
    from guix_tasks.stages.project import Project


def check_base_image(project: Project) -> Finding:
    engine, reference = project.engine, str(project.settings.base_image)
    if image := engine.image(reference):
        return ok(f"{reference} is on the engine, {human_size(image.size)}")
    if remote_digest(engine, project.settings, reference):
        return ok(f"{reference} is in its registry")
    if project.ledger.find("base"):
        # BuildKit does not store the image of a FROM line on the engine.
        return note(f"{reference} is unavailable; the existing base stage can still be used")
    if engine.info().product == podman_api.NAME:
        return note(
            f"{reference} is not on the engine, and Podman cannot query its registry",
            f"`podman pull {reference}` shows whether it can be pulled",
        )
    return failed(
        f"{reference} is neither on the engine nor in its registry",
        "set BASE_IMAGE to an image that the engine can pull, or run `inv rootfs`",
    )


def check_registry(engine: Engine, settings: Settings) -> Finding:
    """Query the registry for the image. A missing image is not an error."""
    reference, registry = str(settings.image), settings.image.registry
    account = credentials_for(engine, settings, reference)
    if not engine.check_registry(reference, account):
        return note(
            f"{registry} was not tested: Podman only tests registries with an account",
            "set DOCKER_USERNAME and DOCKER_PASSWORD",
        )
    if registry in engine.local_accounts():
        return ok(f"{registry} answers to the account that `inv registry.up` created")
    if settings.docker_username:
        return ok(f"{registry} answers to DOCKER_USERNAME")
    return ok(f"{registry} answers to the account of Docker's configuration, if any")
