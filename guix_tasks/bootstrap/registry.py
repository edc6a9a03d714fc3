"""A local image registry: Debian's ``docker-registry``, unpacked, as a process on loopback.

Loopback alone keeps out no other user of the machine, so it asks for a password.  That is made
once, and is where only this user can read it.
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
from guix_tasks.bootstrap.service import Service, disk_trouble_is, locked
from guix_tasks.engine.accounts import HUB, Credentials, docker_accounts
from guix_tasks.engine.api import ContainerSpec
from guix_tasks.engine.retry import retried
from guix_tasks.errors import RegistryError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from guix_tasks.engine.api import Container, Engine
    from guix_tasks.ui.console import Console

# Port 5000, the usual one, is taken on macOS.
PORT = 5055

# Where to look when the suite of the host has no docker-registry.
_OTHER_SUITE = "sid"

# What stands in for Debian's package where the registry is a container.
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
    """The one account of the local registries of a user."""

    folder: Path

    @property
    def password_file(self) -> Path:
        return self.folder / "password"

    @property
    def accounts_file(self) -> Path:
        """What the registry reads: the user with the hash of the password."""
        return self.folder / "htpasswd"

    def credentials(self) -> Credentials | None:
        """None where the account was not made yet."""
        try:
            return Credentials(USER, self.password_file.read_text().strip())
        except OSError:
            return None

    def make(self) -> None:
        """Make it, unless it is there.  Raises ``RegistryError`` where nothing can hash."""
        if self.password_file.exists() and self.accounts_file.exists():
            return
        password = secrets.token_urlsafe()
        # Both or, where the next call makes them anew, the one without which nobody gets in.
        self.password_file.unlink(missing_ok=True)
        files.write_whole(self.accounts_file, f"{USER}:{_hashed(password)}\n".encode(), 0o600)
        files.write_whole(self.password_file, password.encode(), 0o600)

    def how_by_hand(self, port: int) -> str:
        file = shlex.quote(str(self.password_file))
        return f"by hand: docker login -u {USER} --password-stdin localhost:{port} < {file}"


def _hashed(password: str) -> str:
    """The bcrypt hash of a password, which is the only kind that a registry takes.

    The password is too long to be guessed, so the least cost does.  Python itself has no bcrypt;
    the C library of Linux has (on Debian libcrypt1, without which there is no Perl and no login),
    and macOS comes with Apache's program.
    """
    letters = "./ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
    # Of the last of the 22 letters only two bits are salt.
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
        done = subprocess.run(
            [program, "-niB", "-C4", USER],
            input=password, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode == 0:
            return done.stdout.strip().partition(":")[2]
    raise RegistryError(
        "the password of the local registry cannot be hashed: neither libcrypt nor the program "
        "htpasswd is on this machine; install one of them, or set IMAGE to a registry that you have"
    )


def accounts(engine: str) -> dict[str, Credentials]:
    """The account of each local registry of ours that an engine has as ``localhost``, by its host.

    ``engine`` is its URL.  Who else may listen on such a port is not told the password.
    """
    folder = local_registry().folder
    account = Account(folder).credentials()
    if account is None:
        return {}
    here = engine.startswith("unix://")
    ports = [each.stem for each in folder.glob("*.pid") if here and _runs(folder, each.stem)]
    ports += [each.stem for each in folder.glob("*.engine") if each.read_text() == engine]
    return {f"{host}:{port}": account for port in ports for host in ("localhost", _HOST)}


def _runs(folder: Path, port: str) -> bool:
    return port.isdecimal() and LocalRegistry(folder, int(port)).running()


@dataclass(frozen=True)
class LocalRegistry:
    """The registry on ``port``; all the ports of a user serve the same data."""

    folder: Path
    port: int = PORT

    @property
    def url(self) -> str:
        return f"http://{_HOST}:{self.port}"

    def running(self) -> bool:
        return self._service.pid() is not None

    def installed(self) -> bool:
        return self._service.program.exists()

    def up(self, console: Console) -> None:
        """Unpack it if need be, start it, and wait until it answers."""
        with disk_trouble_is(RegistryError), locked(self.folder / "lock"):
            self.folder.chmod(0o700)
            self.account.make()
            said = "started the local registry"
            if self.running():
                self._await(self.running)
                if asks_for_password(self.port):
                    said = "the local registry runs already"
                else:
                    console.say("the local registry asks for no password: starting it anew")
                    self._service.stop(_SECONDS)
            if not self.running():
                self._check_port()
                if not self.installed():
                    self._unpack(console)
                self._start()
        console.say(f"{said}: {self.url}")
        console.say(self.account.how_by_hand(self.port))

    def down(self, console: Console) -> None:
        """Stop it; the images that were pushed to it stay."""
        if not self.running():
            console.say(f"no local registry of ours runs on port {self.port}")
            return
        with disk_trouble_is(RegistryError), locked(self.folder / "lock"):
            self._service.stop(_SECONDS)
        console.say(f"stopped the local registry; its images stay until {self.folder} is deleted")

    @property
    def account(self) -> Account:
        return Account(self.folder)

    @property
    def _service(self) -> Service:
        return Service(
            program=self.folder / "root/usr/bin/docker-registry",
            pid_file=self.folder / f"{self.port}.pid",
            log=self.folder / f"{self.port}.log",
        )

    def _check_port(self) -> None:
        with socket.socket() as probe:
            # As the registry itself does: a port that was just left is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((_HOST, self.port))
            except OSError as error:
                raise RegistryError(
                    f"port {self.port} cannot be had for the local registry "
                    f"({error.strerror}): inv registry.up --port N takes another one, and "
                    f"IMAGE then begins with localhost:N/"
                ) from error

    def _unpack(self, console: Console) -> None:
        own = host_suite()
        if own is None:
            raise RegistryError(
                "the local registry is unpacked from Debian's package docker-registry, and "
                "this host is not Debian: set IMAGE to a registry that you have"
            )
        root = self.folder / "root"
        console.say(f"unpacking Debian's docker-registry into {root}")
        cache = files.cache_home() / "apt"
        try:
            Apt(cache, [own], failure=RegistryError).unpacked(["docker-registry"], root)
        except RegistryError:
            console.say(f"{own} did not give it: trying {_OTHER_SUITE}")
            Apt(cache, [_OTHER_SUITE], failure=RegistryError).unpacked(["docker-registry"], root)

    def _start(self) -> None:
        configuration = self.folder / f"{self.port}.yml"
        # JSON is YAML, and needs no rules for quoting of our own.
        configuration.write_text(json.dumps(self._configure(), indent=2) + "\n")
        started = self._service.start(["serve", str(configuration)])
        try:
            self._await(lambda: started.poll() is None)
        except BaseException:
            started.terminate()  # it may not be known as ours yet
            self._service.stop(_SECONDS)
            raise

    def _await(self, alive: Callable[[], bool]) -> None:
        answered = service.wait_until(lambda: not alive() or answers(self.port), _SECONDS)
        if not alive():
            cause = self._service.complaint()
        elif not answered:
            cause = f"it gives no answer for {_SECONDS:.0f} s"
        else:
            return
        raise RegistryError(f"the local registry did not start: {cause}; see {self._service.log}")

    def _configure(self) -> dict[str, object]:
        return {
            "version": 0.1,
            "log": {"level": "warn", "accesslog": {"disabled": True}},
            "storage": {
                "filesystem": {"rootdirectory": str(self.folder / "data")},
                "delete": {"enabled": True},
            },
            "http": {"addr": f"{_HOST}:{self.port}"},
            "auth": {"htpasswd": {"realm": _REALM, "path": str(self.account.accounts_file)}},
        }


@dataclass(frozen=True)
class ContainerRegistry:
    """The registry as a container, where the engine is on another machine, or in one of its own.

    Its ``localhost`` is then the engine's, as it is for ``push``.
    """

    engine: Engine
    port: int = PORT

    @property
    def _name(self) -> str:
        return f"guix-tasks-registry-{self.port}"

    @property
    def _folder(self) -> Path:
        return local_registry().folder

    @property
    def _mark(self) -> Path:
        """Where it is noted which engine has it; one of an older version is not noted."""
        return self._folder / f"{self.port}.engine"

    def up(self, console: Console) -> None:
        """Start it on the engine's loopback, unless it runs."""
        account = Account(self._folder)
        with disk_trouble_is(RegistryError), locked(self._folder / "lock"):
            self._folder.chmod(0o700)
            known = f"localhost:{self.port}" in accounts(self.engine.info().url)
            account.make()
            said = "the local registry runs already"
            if not known or not any(each.running for each in self._containers()):
                self._start(account, console)
                said = "started the local registry"
        console.say(f"{said}: port {self.port} of the engine")
        console.say(account.how_by_hand(self.port))

    def _start(self, account: Account, console: Console) -> None:
        self._remove()
        if self.engine.image(_IMAGE) is None:
            pull = partial(self.engine.pull, _IMAGE, docker_accounts(os.environ).find(HUB))
            retried(console, "the pull", pull, host=HUB)
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
        # Not mounted: the engine may be on another machine.
        self.engine.copy_in(container, _archive(_IMAGE_ACCOUNTS, account.accounts_file))
        self.engine.start(container)
        self._mark.write_text(self.engine.info().url)

    def down(self, console: Console) -> None:
        """Stop it; the images that were pushed to it stay, in a volume."""
        removed = self._remove()
        console.say("stopped the local registry" if removed else "no local registry of ours runs")

    def _containers(self) -> list[Container]:
        return self.engine.containers({_LABEL: str(self.port)})

    def _remove(self) -> bool:
        containers = self._containers()
        for container in containers:
            self.engine.remove(container.id)
        self._mark.unlink(missing_ok=True)
        return bool(containers)


def _archive(name: str, file: Path) -> bytes:
    """A tar archive of one file, under another name."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        content = file.read_bytes()
        member = tarfile.TarInfo(name.lstrip("/"))
        member.size, member.mode = len(content), 0o600
        tar.addfile(member, io.BytesIO(content))
    return data.getvalue()


def registry_for(engine: Engine, port: int = PORT) -> LocalRegistry | ContainerRegistry:
    """The registry that an engine reaches as ``localhost``."""
    # Docker Desktop's engine has a local socket, too, but its loopback is that of its machine.
    here = engine.info().is_local and on_debian()
    return local_registry(port) if here else ContainerRegistry(engine, port)


def local_registry(port: int = PORT) -> LocalRegistry:
    return LocalRegistry(files.data_home() / "registry", port)


def answers(port: int) -> bool:
    """Whether a registry answers on a port, if only to ask for a password."""
    return _status(port) in (http.client.OK, http.client.UNAUTHORIZED)


def asks_for_password(port: int) -> bool:
    """Whether the registry on a port lets nobody in who gives none."""
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
