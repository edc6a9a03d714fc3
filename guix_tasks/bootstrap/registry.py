"""Local image registry: Debian's ``docker-registry``, unpacked, as a process on loopback.

Other users of the machine can reach loopback, so the registry requires a password.  The password
is generated once, in a file that only this user can read.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import socket
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING

from guix_tasks import files
from guix_tasks.bootstrap.apt import Apt, on_debian, required_suite
from guix_tasks.bootstrap.service import Service, disk_errors_as, http_status, locked
from guix_tasks.engine.accounts import HUB, Credentials, docker_accounts
from guix_tasks.engine.api import ContainerSpec
from guix_tasks.engine.retry import retry_call
from guix_tasks.errors import RegistryError
from guix_tasks.stages.container import archive

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from guix_tasks.engine.api import Container, Engine, EngineInfo
    from guix_tasks.ui.console import Console

# The usual port 5000 is in use on macOS.
PORT = 5055

# Used if the suite of the host has no docker-registry.
_OTHER_SUITE = "sid"

# Used instead of Debian's package if the registry is a container.
_IMAGE = "registry:3"
_IMAGE_DIRECTORY = "/etc/distribution"
_LABEL = "org.guix-tasks.registry"

_HOST = "127.0.0.1"
_SECONDS = 20.0

USER = "guix-tasks"
_REALM = "the local registry of guix-tasks"


class Account:
    """Account of all local registries of a user."""

    def __init__(self, directory: Path) -> None:
        self.password_file = directory / "password"
        self.accounts_file = directory / "htpasswd"
        """File with the user and the hash of the password, which the registry reads."""

    def credentials(self) -> Credentials | None:
        """Return the user and password, or None before the account is made."""
        try:
            return Credentials(USER, self.password_file.read_text(encoding="utf-8").strip())
        except (OSError, ValueError):
            return None

    def make(self) -> None:
        """Make the account unless it exists."""
        if self.password_file.exists() and self.accounts_file.exists():
            return
        import bcrypt  # noqa: PLC0415 -- the tasks that only use an account do without it

        password = secrets.token_urlsafe()
        # A registry accepts only bcrypt.  Its lowest cost is enough for a long random password.
        hashed = bcrypt.hashpw(password.encode(), bcrypt.gensalt(rounds=4)).decode()
        # The password is written last: after an interruption, the next call recreates both files.
        self.password_file.unlink(missing_ok=True)
        files.write_whole(self.accounts_file, f"{USER}:{hashed}\n".encode(), 0o600)
        files.write_whole(self.password_file, password.encode(), 0o600)

    def login_hint(self, port: int) -> str:
        file = shlex.quote(str(self.password_file))
        return f"by hand: docker login -u {USER} --password-stdin localhost:{port} < {file}"


def accounts(engine: EngineInfo) -> dict[str, Credentials]:
    """Return the accounts of the local registries that an engine reaches as ``localhost``.

    The keys are hosts with port.  Ports on which another program listens have no account, so that
    it does not receive the password.
    """
    directory = local_registry().directory
    account = Account(directory).credentials()
    if account is None:
        return {}
    url = engine.url.encode()
    ports = [mark.stem for mark in directory.glob("*.engine") if mark.read_bytes() == url]
    if engine.shares_loopback:
        started = [file.stem for file in directory.glob("*.pid") if file.stem.isdecimal()]
        ports += [port for port in started if LocalRegistry(directory, int(port)).running()]
    return {f"{host}:{port}": account for port in ports for host in ("localhost", _HOST)}


class LocalRegistry:
    """Registry as a process; all ports of a user serve the same data."""

    def __init__(self, directory: Path, port: int = PORT) -> None:
        self.directory = directory
        self.port = port
        self.url = f"http://{_HOST}:{port}"
        self.account = Account(directory)
        self._service = Service(
            program=directory / "root/usr/bin/docker-registry",
            pid_file=directory / f"{port}.pid",
            log=directory / f"{port}.log",
        )

    def running(self) -> bool:
        return self._service.pid() is not None

    def installed(self) -> bool:
        return self._service.program.exists()

    def up(self, console: Console) -> None:
        """Unpack the registry if necessary, start it, and wait until it answers."""
        with disk_errors_as(RegistryError), locked(self.directory / "lock"):
            self.directory.chmod(0o700)
            self.account.make()
            if self.running():
                self._wait(self.running)
                message = "the local registry is already running"
            else:
                if error := self.port_error():
                    raise RegistryError(
                        f"cannot use port {self.port} for the local registry: {error}; use another "
                        "port with `inv registry.up --port N`, and IMAGE=localhost:N/..."
                    )
                if not self.installed():
                    self._unpack(console)
                self._start()
                message = "started the local registry"
        console.print(f"{message}: {self.url}")
        console.print(self.account.login_hint(self.port))

    def down(self, console: Console) -> None:
        """Stop the registry; keep the pushed images."""
        if not self.running():
            console.print(f"no local registry of guix-tasks is running on port {self.port}")
            return
        with disk_errors_as(RegistryError), locked(self.directory / "lock"):
            self._service.stop(_SECONDS)
        console.print(f"stopped the local registry; delete {self.directory} to delete its images")

    def port_error(self) -> str:
        """Return the reason why the port cannot be used, or an empty string."""
        with socket.socket() as probe:
            # Like the registry, accept a port that was just released.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((_HOST, self.port))
            except OSError as error:
                return error.strerror or str(error)
        return ""

    def _unpack(self, console: Console) -> None:
        package, root = "docker-registry", self.directory / "root"
        suite = required_suite("the local registry", "set IMAGE to another registry", RegistryError)
        console.print(f"unpacking Debian's {package} into {root}")
        try:
            Apt([suite], failure=RegistryError).unpack([package], root)
        except RegistryError:
            console.print(f"cannot get {package} from {suite}; trying {_OTHER_SUITE}")
            Apt([_OTHER_SUITE], failure=RegistryError).unpack([package], root)

    def _start(self) -> None:
        configuration = self.directory / f"{self.port}.yml"
        # JSON is valid YAML and needs no quoting rules.
        configuration.write_text(json.dumps(self._configure(), indent=2) + "\n", encoding="utf-8")
        process = self._service.start(["serve", str(configuration)])
        try:
            self._wait(lambda: process.poll() is None)
        except BaseException:
            process.terminate()  # its pid file may not exist yet
            self._service.stop(_SECONDS)
            raise

    def _wait(self, alive: Callable[[], bool]) -> None:
        if problem := self._service.wait(alive, lambda: answers(self.port), _SECONDS):
            raise RegistryError(f"cannot start the local registry: {problem}")

    def _configure(self) -> dict[str, object]:
        return {
            "version": 0.1,
            "log": {"level": "warn", "accesslog": {"disabled": True}},
            "storage": {
                "filesystem": {"rootdirectory": str(self.directory / "data")},
                "delete": {"enabled": True},
            },
            "http": {"addr": f"{_HOST}:{self.port}"},
            "auth": {"htpasswd": {"realm": _REALM, "path": str(self.account.accounts_file)}},
        }


class ContainerRegistry:
    """Registry as a container, for an engine that does not share this machine's loopback.

    It listens on the ``localhost`` of the engine, which ``push`` uses.
    """

    def __init__(self, engine: Engine, port: int = PORT) -> None:
        self.engine = engine
        self.port = port
        self._directory = local_registry().directory
        self._account = Account(self._directory)
        self._mark = self._directory / f"{port}.engine"
        """File with the URL of the registry's engine."""

    def up(self, console: Console) -> None:
        """Start the registry on the engine's loopback unless it is running."""
        with disk_errors_as(RegistryError), locked(self._directory / "lock"):
            self._directory.chmod(0o700)
            is_known = f"localhost:{self.port}" in accounts(self.engine.info())
            self._account.make()
            message = "the local registry is already running"
            if not is_known or not any(container.running for container in self._containers()):
                self._start(console)
                message = "started the local registry"
        console.print(f"{message}: port {self.port} of the engine")
        console.print(self._account.login_hint(self.port))

    def _start(self, console: Console) -> None:
        self._remove()
        pull_missing(self.engine, console, _IMAGE)
        container = self.engine.create(
            ContainerSpec(
                name=f"guix-tasks-registry-{self.port}",
                image=_IMAGE,
                command=("registry", "serve", f"{_IMAGE_DIRECTORY}/config.yml"),
                labels={_LABEL: str(self.port)},
                publish={self.port: 5000},
                binds=("guix-tasks-registry:/var/lib/registry",),
                environment={
                    "REGISTRY_AUTH": "htpasswd",
                    "REGISTRY_AUTH_HTPASSWD_REALM": _REALM,
                    "REGISTRY_AUTH_HTPASSWD_PATH": f"{_IMAGE_DIRECTORY}/htpasswd",
                },
            )
        )
        # The engine may be on another machine, so the file cannot be mounted.
        content = {"htpasswd": self._account.accounts_file.read_bytes()}
        self.engine.copy_in(container, archive(content, directory=_IMAGE_DIRECTORY))
        self.engine.start(container)
        self._mark.write_text(self.engine.info().url, encoding="utf-8")

    def down(self, console: Console) -> None:
        """Stop the registry; keep the pushed images in a volume."""
        stopped, absent = "stopped the local registry", "no local registry of guix-tasks is running"
        console.print(stopped if self._remove() else absent)

    def _containers(self) -> list[Container]:
        return self.engine.containers({_LABEL: str(self.port)})

    def _remove(self) -> bool:
        containers = self._containers()
        for container in containers:
            self.engine.remove(container.id)
        self._mark.unlink(missing_ok=True)
        return bool(containers)


def pull_missing(engine: Engine, console: Console, image: str) -> None:
    """Pull an image from Docker Hub unless the engine has it."""
    if engine.image(image) is None:
        account = docker_accounts(os.environ).find(HUB)
        retry_call(console, "the pull", partial(engine.pull, image, account))


def registry_for(engine: Engine, port: int = PORT) -> LocalRegistry | ContainerRegistry:
    """Return the registry that an engine reaches as ``localhost``."""
    is_process = engine.info().shares_loopback and on_debian()
    return local_registry(port) if is_process else ContainerRegistry(engine, port)


def local_registry(port: int = PORT) -> LocalRegistry:
    return LocalRegistry(files.data_home() / "registry", port)


def answers(port: int) -> bool:
    """Return True if a registry answers on a port and asks for a password."""
    return http_status((_HOST, port), "/v2/") == HTTPStatus.UNAUTHORIZED
