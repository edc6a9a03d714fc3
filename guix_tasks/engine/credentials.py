"""The account that a registry gets, for every way to it: the engine, buildx, Podman, ``doctor``."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from guix_tasks.engine.accounts import Accounts, Credentials, docker_accounts
from guix_tasks.errors import NoEngineError, RegistryError
from guix_tasks.oci.reference import ImageReference

if TYPE_CHECKING:
    from guix_tasks.engine.api import Engine
    from guix_tasks.settings import Settings


def accounts_for(engine: Engine, settings: Settings) -> Accounts:
    """Return the accounts of a project.

    Those of local registries of ours come first, as each of them knows one account only.  That of
    the settings is for the registry of ``IMAGE`` alone.  Then come ``DOCKER_AUTH_CONFIG`` and
    Docker's config.json with its credential helpers.
    """
    accounts = docker_accounts({**os.environ, **settings.docker_environment})
    given = dict(accounts.given)
    if settings.docker_username and settings.docker_password:
        given[settings.image.registry] = Credentials(
            settings.docker_username.reveal(), settings.docker_password.reveal()
        )
    with suppress(NoEngineError):  # nothing is its localhost then
        given |= engine.local_accounts()
    return replace(accounts, given=given)


def credentials_for(engine: Engine, settings: Settings, reference: str) -> Credentials | None:
    """Return the account for the registry of an image reference, or None.

    Raises ``RegistryError`` if the credential helper of Docker's configuration fails.
    """
    return accounts_for(engine, settings).find(ImageReference.parse(reference).registry)


def remote_digest(engine: Engine, settings: Settings, reference: str) -> str | None:
    """Return the digest that a registry has for a reference, or None if it cannot be told."""
    try:
        return engine.remote_digest(reference, credentials_for(engine, settings, reference))
    except RegistryError:
        return None
