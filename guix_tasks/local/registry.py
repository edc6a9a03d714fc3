"""A local image registry: Debian's ``docker-registry``, unpacked, as a process on loopback."""

from __future__ import annotations

import http.client
import json
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from guix_tasks import paths
from guix_tasks.engine import ContainerSpec
from guix_tasks.errors import RegistryError
from guix_tasks.local import process
from guix_tasks.local.debian import Apt, host_suite, on_debian
from guix_tasks.local.process import Service, disk_trouble_is, locked

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from guix_tasks.console import Console
    from guix_tasks.engine import Container, Engine

# Port 5000, the usual one, is taken on macOS.
PORT = 5055

# Where to look when the suite of the host has no docker-registry.
_OTHER_SUITE = "sid"

# What stands in for Debian's package where the registry is a container.
_IMAGE = "registry:3"
_IMAGE_CONFIGURATION = "/etc/distribution/config.yml"
_LABEL = "org.guix-tasks.registry"

_HOST = "127.0.0.1"
_SECONDS = 20.0


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
            if self.running():
                self._await(self.running)
                console.say(f"the local registry runs already: {self.url}")
                return
            self._check_port()
            if not self.installed():
                self._unpack(console)
            self._start()
        console.say(f"started the local registry: {self.url}")

    def down(self, console: Console) -> None:
        """Stop it; the images that were pushed to it stay."""
        if not self.running():
            console.say(f"no local registry of ours runs on port {self.port}")
            return
        with disk_trouble_is(RegistryError), locked(self.folder / "lock"):
            self._service.stop(_SECONDS)
        console.say(f"stopped the local registry; its images stay until {self.folder} is deleted")

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
        cache = paths.cache_home() / "apt"
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
        answered = process.wait_until(lambda: not alive() or answers(self.port), _SECONDS)
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

    def up(self, console: Console) -> None:
        """Start it on the engine's loopback, unless it runs."""
        if any(each.running for each in self._containers()):
            console.say(f"the local registry runs already: port {self.port} of the engine")
            return
        self._remove()
        if self.engine.image(_IMAGE) is None:
            self.engine.pull(_IMAGE, None)
        container = self.engine.create(
            ContainerSpec(
                name=self._name,
                image=_IMAGE,
                command=("registry", "serve", _IMAGE_CONFIGURATION),
                labels={_LABEL: str(self.port)},
                publish={self.port: 5000},
                binds=("guix-tasks-registry:/var/lib/registry",),
            )
        )
        self.engine.start(container)
        console.say(f"started the local registry: port {self.port} of the engine")

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
        return bool(containers)


def registry_for(engine: Engine, port: int = PORT) -> LocalRegistry | ContainerRegistry:
    """The registry that an engine reaches as ``localhost``."""
    # Docker Desktop's engine has a local socket, too, but its loopback is that of its machine.
    here = engine.info().is_local and on_debian()
    return local_registry(port) if here else ContainerRegistry(engine, port)


def local_registry(port: int = PORT) -> LocalRegistry:
    return LocalRegistry(paths.data_home() / "registry", port)


def answers(port: int) -> bool:
    """Whether a registry answers on a port."""
    connection = http.client.HTTPConnection(_HOST, port, timeout=5)
    try:
        connection.request("GET", "/v2/")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
