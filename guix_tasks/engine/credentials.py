"""Choice of the account for a registry, shared by the engine, buildx and ``doctor``."""

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

    Accounts of local registries started by ``registry.up`` come first, because each of them has
    only one account. The account of the settings is used only for the registry of ``IMAGE``. Then
    come ``DOCKER_AUTH_CONFIG`` and Docker's config.json with its credential helpers.
    """
    accounts = docker_accounts({**os.environ, **settings.docker_environment})
    given = dict(accounts.given)
    if settings.docker_username and settings.docker_password:
        given[settings.image.registry] = Credentials(
            settings.docker_username.reveal(), settings.docker_password.reveal()
        )
    with suppress(NoEngineError):  # there are no local registries without an engine
        given |= engine.local_accounts()
    return replace(accounts, given=given)


def credentials_for(engine: Engine, settings: Settings, reference: str) -> Credentials | None:
    """Return the account for the registry of an image reference, or None.

    Raise ``RegistryError`` if the credential helper of Docker's configuration fails.
    """
    return accounts_for(engine, settings).find(ImageReference.parse(reference).registry)


def remote_digest(engine: Engine, settings: Settings, reference: str) -> str | None:
    """Return the digest of a reference in its registry, or None if it is unknown."""
    try:
        return engine.remote_digest(reference, credentials_for(engine, settings, reference))
    except RegistryError:
        return None
