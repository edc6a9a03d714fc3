"""Local image registry: Debian's ``docker-registry``, unpacked, as a process on loopback.

Other users of the machine can reach loopback, so the registry requires a password.  The password
is generated once, in a file that only this user can read.
"""

from __future__ import annotations

import ctypes
import http.client
import io
import json
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import tarfile
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from guix_tasks import files
from guix_tasks.bootstrap import service
from guix_tasks.bootstrap.apt import Apt, host_suite, on_debian
from guix_tasks.bootstrap.service import Service, disk_errors_as, locked
from guix_tasks.engine.accounts import HUB, Credentials, docker_accounts
from guix_tasks.engine.api import ContainerSpec
from guix_tasks.engine.retry import retry_call
from guix_tasks.errors import RegistryError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from guix_tasks.engine.api import Container, Engine
    from guix_tasks.ui.console import Console

# The usual port 5000 is in use on macOS.
PORT = 5055

# Used if the suite of the host has no docker-registry.
_OTHER_SUITE = "sid"

# Used instead of Debian's package if the registry is a container.
_IMAGE = "registry:3"
_IMAGE_CONFIGURATION = "/etc/distribution/config.yml"
_IMAGE_ACCOUNTS = "/etc/distribution/htpasswd"
_LABEL = "org.guix-tasks.registry"

_HOST = "127.0.0.1"
_SECONDS = 20.0

USER = "guix-tasks"
_REALM = "the local registry of guix-tasks"


@dataclass(frozen=True)
class Account:
    """Account of all local registries of a user."""

    directory: Path

    @property
    def password_file(self) -> Path:
        return self.directory / "password"

    @property
    def accounts_file(self) -> Path:
        """File with the user and the hash of the password, which the registry reads."""
        return self.directory / "htpasswd"

    def credentials(self) -> Credentials | None:
        """Return the user and password, or None before the account is made."""
        try:
            return Credentials(USER, self.password_file.read_text().strip())
        except OSError:
            return None

    def make(self) -> None:
        """Make the account unless it exists.

        Raise ``RegistryError`` if no program or library can hash the password.
        """
        if self.password_file.exists() and self.accounts_file.exists():
            return
        password = secrets.token_urlsafe()
        # The password is written last: after an interruption, the next call recreates both files.
        self.password_file.unlink(missing_ok=True)
        files.write_whole(self.accounts_file, f"{USER}:{_hashed(password)}\n".encode(), 0o600)
        files.write_whole(self.password_file, password.encode(), 0o600)

    def login_hint(self, port: int) -> str:
        file = shlex.quote(str(self.password_file))
        return f"by hand: docker login -u {USER} --password-stdin localhost:{port} < {file}"


def _hashed(password: str) -> str:
    """Return the bcrypt hash of a password, the only kind that a registry accepts.

    The lowest cost is enough for a long random password.  Python has no bcrypt.  On Linux it is in
    libcrypt (on Debian libcrypt1, which Perl and login need), on macOS in Apache's ``htpasswd``.
    """
    letters = "./ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
    # Only two bits of the last of the 22 letters are salt.
    salt = "".join(secrets.choice(letters) for _ in range(21)) + secrets.choice(".Oeu")
    for library in ("libcrypt.so.1", "libcrypt.so.2", "libc.so"):
        try:
            crypt = ctypes.CDLL(library).crypt
        except (OSError, AttributeError):
            continue
        crypt.restype = ctypes.c_char_p
        hashed = crypt(password.encode(), f"$2b$04${salt}".encode())
        if hashed and hashed.startswith(b"$2b$04$"):
            return str(hashed.decode())
    if program := shutil.which("htpasswd"):
        process = subprocess.run(
            [program, "-niB", "-C4", USER],
            input=password, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if process.returncode == 0:
            return process.stdout.strip().partition(":")[2]
    raise RegistryError(
        "cannot hash the password of the local registry: neither libcrypt nor the program htpasswd "
        "is installed; install one of them, or set IMAGE to another registry"
    )


def accounts(engine: str) -> dict[str, Credentials]:
    """Return the accounts of the local registries that an engine reaches as ``localhost``.

    The keys are hosts with port; ``engine`` is the URL of the engine.  Ports on which another
    program listens have no account, so that it does not receive the password.
    """
    directory = local_registry().directory
    account = Account(directory).credentials()
    if account is None:
        return {}
    is_local = engine.startswith("unix://")
    ports = [
        file.stem for file in directory.glob("*.pid") if is_local and _runs(directory, file.stem)
    ]
    ports += [file.stem for file in directory.glob("*.engine") if file.read_text() == engine]
    return {f"{host}:{port}": account for port in ports for host in ("localhost", _HOST)}


def _runs(directory: Path, port: str) -> bool:
    return port.isdecimal() and LocalRegistry(directory, int(port)).running()


@dataclass(frozen=True)
class LocalRegistry:
    """Registry as a process; all ports of a user serve the same data."""

    directory: Path
    port: int = PORT

    @property
    def url(self) -> str:
        return f"http://{_HOST}:{self.port}"

    def running(self) -> bool:
        return self._service.pid() is not None

    def installed(self) -> bool:
        return self._service.program.exists()

    def up(self, console: Console) -> None:
        """Unpack the registry if necessary, start it, and wait until it answers."""
        with disk_errors_as(RegistryError), locked(self.directory / "lock"):
            self.directory.chmod(0o700)
            self.account.make()
            message = "started the local registry"
            if self.running():
                self._await(self.running)
                if requires_password(self.port):
                    message = "the local registry is already running"
                else:
                    console.print("restarting the local registry, which requires no password")
                    self._service.stop(_SECONDS)
            if not self.running():
                self._check_port()
                if not self.installed():
                    self._unpack(console)
                self._start()
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

    @property
    def account(self) -> Account:
        return Account(self.directory)

    @property
    def _service(self) -> Service:
        return Service(
            program=self.directory / "root/usr/bin/docker-registry",
            pid_file=self.directory / f"{self.port}.pid",
            log=self.directory / f"{self.port}.log",
        )

    def _check_port(self) -> None:
        with socket.socket() as probe:
            # Like the registry, accept a port that was just released.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((_HOST, self.port))
            except OSError as error:
                raise RegistryError(
                    f"cannot use port {self.port} for the local registry: {error.strerror}; use "
                    "another port with `inv registry.up --port N`, and IMAGE=localhost:N/..."
                ) from error

    def _unpack(self, console: Console) -> None:
        suite = host_suite()
        if suite is None:
            raise RegistryError(
                "cannot unpack the local registry from Debian's package docker-registry: this host "
                "is not Debian; set IMAGE to another registry"
            )
        root = self.directory / "root"
        console.print(f"unpacking Debian's docker-registry into {root}")
        cache = files.cache_home() / "apt"
        try:
            Apt(cache, [suite], failure=RegistryError).unpack(["docker-registry"], root)
        except RegistryError:
            console.print(f"cannot get docker-registry from {suite}; trying {_OTHER_SUITE}")
            Apt(cache, [_OTHER_SUITE], failure=RegistryError).unpack(["docker-registry"], root)

    def _start(self) -> None:
        configuration = self.directory / f"{self.port}.yml"
        # JSON is valid YAML and needs no quoting rules.
        configuration.write_text(json.dumps(self._configure(), indent=2) + "\n")
        process = self._service.start(["serve", str(configuration)])
        try:
            self._await(lambda: process.poll() is None)
        except BaseException:
            process.terminate()  # its pid file may not exist yet
            self._service.stop(_SECONDS)
            raise

    def _await(self, alive: Callable[[], bool]) -> None:
        answered = service.wait_until(lambda: not alive() or answers(self.port), _SECONDS)
        if not alive():
            cause = self._service.error_line()
        elif not answered:
            cause = f"no answer within {_SECONDS:.0f} s"
        else:
            return
        raise RegistryError(f"cannot start the local registry: {cause}; see {self._service.log}")

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


@dataclass(frozen=True)
class ContainerRegistry:
    """Registry as a container, for an engine on another or a virtual machine.

    It listens on the ``localhost`` of the engine, which ``push`` uses.
    """

    engine: Engine
    port: int = PORT

    @property
    def _name(self) -> str:
        return f"guix-tasks-registry-{self.port}"

    @property
    def _folder(self) -> Path:
        return local_registry().directory

    @property
    def _mark(self) -> Path:
        """File with the URL of the registry's engine; older versions did not write it."""
        return self._folder / f"{self.port}.engine"

    def up(self, console: Console) -> None:
        """Start the registry on the engine's loopback unless it is running."""
        account = Account(self._folder)
        with disk_errors_as(RegistryError), locked(self._folder / "lock"):
            self._folder.chmod(0o700)
            known = f"localhost:{self.port}" in accounts(self.engine.info().url)
            account.make()
            message = "the local registry is already running"
            if not known or not any(container.running for container in self._containers()):
                self._start(account, console)
                message = "started the local registry"
        console.print(f"{message}: port {self.port} of the engine")
        console.print(account.login_hint(self.port))

    def _start(self, account: Account, console: Console) -> None:
        self._remove()
        if self.engine.image(_IMAGE) is None:
            pull = partial(self.engine.pull, _IMAGE, docker_accounts(os.environ).find(HUB))
            retry_call(console, "the pull", pull)
        container = self.engine.create(
            ContainerSpec(
                name=self._name,
                image=_IMAGE,
                command=("registry", "serve", _IMAGE_CONFIGURATION),
                labels={_LABEL: str(self.port)},
                publish={self.port: 5000},
                binds=("guix-tasks-registry:/var/lib/registry",),
                environment={
                    "REGISTRY_AUTH": "htpasswd",
                    "REGISTRY_AUTH_HTPASSWD_REALM": _REALM,
                    "REGISTRY_AUTH_HTPASSWD_PATH": _IMAGE_ACCOUNTS,
                },
            )
        )
        # The engine may be on another machine, so the file cannot be mounted.
        self.engine.copy_in(container, _archive(_IMAGE_ACCOUNTS, account.accounts_file))
        self.engine.start(container)
        self._mark.write_text(self.engine.info().url)

    def down(self, console: Console) -> None:
        """Stop the registry; keep the pushed images in a volume."""
        removed = self._remove()
        console.print(
            "stopped the local registry"
            if removed
            else "no local registry of guix-tasks is running"
        )

    def _containers(self) -> list[Container]:
        return self.engine.containers({_LABEL: str(self.port)})

    def _remove(self) -> bool:
        containers = self._containers()
        for container in containers:
            self.engine.remove(container.id)
        self._mark.unlink(missing_ok=True)
        return bool(containers)


def _archive(name: str, file: Path) -> bytes:
    """Return a tar archive of one file under another name."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        content = file.read_bytes()
        member = tarfile.TarInfo(name.lstrip("/"))
        member.size, member.mode = len(content), 0o600
        tar.addfile(member, io.BytesIO(content))
    return data.getvalue()


def registry_for(engine: Engine, port: int = PORT) -> LocalRegistry | ContainerRegistry:
    """Return the registry that an engine reaches as ``localhost``."""
    # Docker Desktop's engine also has a local socket, but its loopback is in a virtual machine.
    is_local = engine.info().is_local and on_debian()
    return local_registry(port) if is_local else ContainerRegistry(engine, port)


def local_registry(port: int = PORT) -> LocalRegistry:
    return LocalRegistry(files.data_home() / "registry", port)


def answers(port: int) -> bool:
    """Return True if a registry answers on a port, even if it only asks for a password."""
    return _status(port) in (http.client.OK, http.client.UNAUTHORIZED)


def requires_password(port: int) -> bool:
    """Return True if the registry on a port requires a password."""
    return _status(port) == http.client.UNAUTHORIZED


def _status(port: int) -> int | None:
    connection = http.client.HTTPConnection(_HOST, port, timeout=5)
    try:
        connection.request("GET", "/v2/")
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
