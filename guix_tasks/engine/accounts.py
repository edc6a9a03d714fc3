"""Accounts of registries: those of a project's settings and of Docker's configuration.

An account is looked up by the host of its registry and sent to no other registry.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import docker.auth

from guix_tasks.errors import NoEngineError, RegistryError
from guix_tasks.files import user_home
from guix_tasks.oci.reference import ImageReference
from guix_tasks.ui import redact

if TYPE_CHECKING:
    from collections.abc import Mapping

    from guix_tasks.engine.api import Engine
    from guix_tasks.settings import Settings

HUB = docker.auth.INDEX_NAME

AUTH_CONFIG = "DOCKER_AUTH_CONFIG"
"""Variable with accounts for Docker's command line, in the form of its config.json."""

_HELPER_SECONDS = 60.0


@dataclass(frozen=True)
class Credentials:
    """Account of a registry.  Never printed."""

    username: str
    password: str = field(repr=False)
    identity_token: str = field(default="", repr=False)
    """Refresh token that replaces user and password."""

    def __post_init__(self) -> None:
        if self.password:
            redact.add(self.password, f"{self.username}:{self.password}")
        if self.identity_token:
            redact.add(self.identity_token)


@dataclass(frozen=True)
class Accounts:
    """Accounts of a project: ``given``, then those of Docker's configuration."""

    environment: Mapping[str, str] = field(repr=False)
    """Environment of Docker's command line and of its credential helpers."""
    given: Mapping[str, Credentials] = field(default_factory=dict)
    """By host."""

    def find(self, host: str) -> Credentials | None:
        """Return the account of a registry, or None.

        Raise ``RegistryError`` if the credential helper of Docker's configuration fails.
        """
        return self.given.get(host) or self.of_docker(host)

    def of_docker(self, host: str) -> Credentials | None:
        """Return the account from Docker's config.json or its credential helper, or None."""
        config, key = self._config, docker_key(host)
        helper = _object(config.get("credHelpers")).get(key, config.get("credsStore"))
        if helper and isinstance(helper, str):
            account = _ask_helper(helper, host, self.environment)
            if account:
                return account
        auths = _object(config.get("auths"))
        # The exact name wins over a URL of the same host.
        names = sorted(auths, key=lambda name: name != key)
        return next((_decoded(auths[name]) for name in names if _host(name) == host), None)

    def every(self) -> dict[str, Credentials]:
        """Return all accounts by host, for a build whose Dockerfile may name any registry.

        A credential helper that fails is skipped, as Docker's command line does.
        """
        config = self._config
        names = [*_object(config.get("auths")), *_object(config.get("credHelpers"))]
        accounts = {}
        for host in dict.fromkeys([*self.given, *map(_host, names)]):
            with suppress(RegistryError):
                if account := self.find(host):
                    accounts[host] = account
        return accounts

    @property
    def _config(self) -> dict[str, object]:
        # A broken file counts as empty; Docker's command line does the same after a warning.
        try:
            directory = docker_config_directory(self.environment)
            return _json_object((directory / "config.json").read_bytes())
        except OSError:
            return {}


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


def docker_accounts(environment: Mapping[str, str]) -> Accounts:
    """Return Docker's accounts: ``DOCKER_AUTH_CONFIG``, config.json and credential helpers."""
    auths = _object(_json_object(environment.get(AUTH_CONFIG, "")).get("auths"))
    accounts = {_host(name): _decoded(entry) for name, entry in auths.items()}
    # Docker ignores identity tokens here as well.
    given = {host: a for host, a in accounts.items() if a and not a.identity_token}
    return Accounts(environment, given)


def auth_config(accounts: Mapping[str, Credentials]) -> str:
    """Return the value of ``DOCKER_AUTH_CONFIG`` for these accounts."""
    auths = {
        docker_key(host): {"auth": base64.b64encode(f"{a.username}:{a.password}".encode()).decode()}
        for host, a in accounts.items()
    }
    return json.dumps({"auths": auths})


def docker_config_directory(environment: Mapping[str, str]) -> Path:
    """Return the user's directory of Docker's plugins, contexts and accounts."""
    return Path(environment.get("DOCKER_CONFIG") or user_home() / ".docker")


def docker_key(host: str) -> str:
    """Return the key of a registry's account in Docker's configuration."""
    return docker.auth.INDEX_URL if host == HUB else host


def _host(name: str) -> str:
    """Return the host in a key of Docker's configuration, which may be a URL."""
    return docker.auth.resolve_index_name(name)


def _decoded(entry: object) -> Credentials | None:
    """Return the account in an entry of ``auths``, or None for a broken or empty one."""
    fields = _object(entry)
    token, auth = fields.get("identitytoken"), fields.get("auth")
    if token and isinstance(token, str):
        return Credentials("", "", token)
    if not isinstance(auth, str):
        return None
    try:
        username, password = docker.auth.decode_auth(auth)
    except ValueError:
        return None
    password = password.strip("\0")
    return Credentials(username, password) if username and password else None


def _ask_helper(helper: str, host: str, environment: Mapping[str, str]) -> Credentials | None:
    """Ask a credential helper by the protocol of github.com/docker/docker-credential-helpers."""
    program = f"docker-credential-{helper}"
    try:
        done = subprocess.run(
            [program, "get"], input=docker_key(host), env=dict(environment), capture_output=True,
            encoding="utf-8", errors="replace", check=False, timeout=_HELPER_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise _helper_error(host, f"{program} does not answer") from None
    except FileNotFoundError:
        raise _helper_error(host, f"{program} is not installed, or not on PATH") from None
    except (OSError, ValueError) as error:
        raise _helper_error(host, f"{program}: {getattr(error, 'strerror', error)}") from None
    if done.returncode:
        reason = " ".join((done.stdout.strip() or done.stderr.strip()).split())
        if "credentials not found" in reason.lower():
            return None
        raise _helper_error(host, f"{program}: {reason or f'exit status {done.returncode}'}")
    answer = _json_object(done.stdout)
    username, secret = answer.get("Username"), answer.get("Secret")
    if not isinstance(username, str) or not isinstance(secret, str):
        raise _helper_error(host, f"{program} printed an answer without Username and Secret")
    if not secret:  # some helpers print an empty answer for an unknown host
        return None
    is_token = username == docker.auth.TOKEN_USERNAME
    return Credentials("", "", secret) if is_token else Credentials(username, secret)


def _helper_error(host: str, reason: str) -> RegistryError:
    return RegistryError(
        f"cannot get the account of {host} from Docker's configuration: {reason}; "
        "fix its config.json, or set DOCKER_USERNAME and DOCKER_PASSWORD for the registry of IMAGE"
    )


def _json_object(text: str | bytes) -> dict[str, object]:
    """Return the object in a JSON text, or an empty one if it has none."""
    try:
        return _object(json.loads(text))
    except (ValueError, RecursionError):
        return {}


def _object(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}
