"""Discovery of the configured engine."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import docker
import docker.context
import docker.errors
import docker.utils

from guix_tasks.errors import EngineError, NoEngineError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


DEFAULT_SOCKET = Path("/var/run/docker.sock")


@dataclass(frozen=True)
class Address:
    """Address of an engine and the rule that found it."""

    url: str
    origin: str
    tls: Any = field(default=None, repr=False)
    context: str | None = None


def find_engine(environment: Mapping[str, str], private_socket: Path) -> Address:
    """Return the first configured engine.

    The order is ``DOCKER_HOST``, the Docker context, the default socket, the private engine's
    socket. No connection is made: a configured engine that does not answer is an error later and
    never a reason to use another one.

    Raise ``NoEngineError`` if no engine is configured, ``EngineError`` if the configuration is
    broken.
    """
    if environment.get("DOCKER_HOST"):
        try:
            arguments = docker.utils.kwargs_from_env(environment=dict(environment))
        except docker.errors.DockerException as error:
            raise EngineError(
                f"DOCKER_CERT_PATH has no certificates for DOCKER_HOST: {error_line(error)}"
            ) from None
        return Address(environment["DOCKER_HOST"], "DOCKER_HOST", arguments.get("tls"))
    context = _context(environment)
    if context:
        return context
    for socket, origin in ((DEFAULT_SOCKET, "default socket"), (private_socket, "private engine")):
        if socket.is_socket():
            return Address(f"unix://{socket}", origin)
    podman = next((socket for socket in podman_sockets() if socket.is_socket()), None)
    raise NoEngineError(
        "no Docker Engine on this machine: DOCKER_HOST is not set, no Docker context is selected, "
        f"{DEFAULT_SOCKET} does not exist; install Docker, or run `inv engine.up` for a private "
        "one" + (f", or use this machine's Podman: DOCKER_HOST=unix://{podman}" if podman else "")
    )


def _context(environment: Mapping[str, str]) -> Address | None:
    name = environment.get("DOCKER_CONTEXT") or None
    try:
        with _config_directory(environment):
            context = docker.context.ContextAPI.get_context(name)
            arguments = docker.context.ContextAPI.kwargs_from_context(name, dict(environment))
    except Exception as error:  # noqa: BLE001 -- what the SDK raises for a damaged file
        raise EngineError(
            f"cannot read the {f'Docker context {name}' if name else 'selected Docker context'}: "
            f"{error_line(error)}; see `docker context ls`"
        ) from None
    if context is None:
        raise EngineError(f"there is no Docker context {name!r}; see `docker context ls`")
    if context.Name == "default":
        return None
    url = str(arguments.get("base_url", ""))
    return Address(url, f"context {context.Name}", arguments.get("tls"), context.Name)


def podman_sockets() -> list[Path]:
    """Return the sockets of ``podman.socket``: the user's, then root's."""
    user = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}"
    return [Path(directory, "podman/podman.sock") for directory in (user, "/run")]


@contextmanager
def _config_directory(environment: Mapping[str, str]) -> Iterator[None]:
    """Set ``DOCKER_CONFIG`` of the settings for the SDK, which reads it in this process only."""
    previous = os.environ.pop("DOCKER_CONFIG", None)
    try:
        os.environ["DOCKER_CONFIG"] = environment.get("DOCKER_CONFIG", "")
        yield
    finally:
        del os.environ["DOCKER_CONFIG"]
        if previous is not None:
            os.environ["DOCKER_CONFIG"] = previous


def error_line(error: object) -> str:
    """Return an error's message in one line: the engine's explanation if it has one."""
    message = getattr(error, "explanation", None) or error
    text = message.decode(errors="replace") if isinstance(message, bytes) else str(message)
    return " ".join(text.split())
