"""Find the engine that is configured."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import docker
import docker.context
import docker.errors
import docker.utils

from guix_tasks.engine import podman_api
from guix_tasks.errors import EngineError, NoEngineError

if TYPE_CHECKING:
    from collections.abc import Mapping


DEFAULT_SOCKET = Path("/var/run/docker.sock")


@dataclass(frozen=True)
class Address:
    """Where an engine is, and which rule says so."""

    url: str
    origin: str
    tls: Any = field(default=None, repr=False)
    context: str | None = None


def find_engine(environment: Mapping[str, str], private_socket: Path) -> Address:
    """The first engine that is configured.

    In turn: ``DOCKER_HOST``, the CLI's context, the default socket, the private engine's socket.
    Whether it answers is not asked: one that is configured and does not answer is an error,
    never a reason to use another.  Raises ``NoEngineError`` where none is configured.
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
    other = next((each for each in podman_api.sockets() if each.is_socket()), None)
    raise NoEngineError(
        "no Docker Engine on this machine: DOCKER_HOST is not set, no context is chosen, "
        f"{DEFAULT_SOCKET} is not there; install Docker, or run `inv engine.up` for a private one"
        + (f", or use the Podman that is here: DOCKER_HOST=unix://{other}" if other else "")
    )


def _context(environment: Mapping[str, str]) -> Address | None:
    name = environment.get("DOCKER_CONTEXT") or None
    try:
        context = docker.context.ContextAPI.get_context(name)
        arguments = docker.context.ContextAPI.kwargs_from_context(name, dict(environment))
    except (docker.errors.DockerException, OSError, ValueError) as error:
        raise EngineError(
            f"the Docker context {name or 'that is chosen'} cannot be read: {error_line(error)}; "
            "see `docker context ls`"
        ) from None
    if context is None:
        raise EngineError(f"there is no Docker context {name!r}; see `docker context ls`")
    if context.Name == "default":
        return None
    url = arguments.get("base_url", "")
    return Address(url, f"context {context.Name}", arguments.get("tls"), context.Name)


def error_line(error: object) -> str:
    """The cause in one line: the engine's own explanation where there is one."""
    text = getattr(error, "explanation", None) or error
    plain = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
    return " ".join(plain.split())
