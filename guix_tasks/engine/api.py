"""What guix-tasks asks of a Docker Engine, and the values it speaks in.

The stages own this narrow protocol.  ``docker.DockerEngine`` is the real one;
``TracedEngine`` shows every call that changes something and, on a dry run, leaves it at that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, NoReturn, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from datetime import datetime
    from pathlib import Path

    from guix_tasks.engine.accounts import Accounts, Credentials
    from guix_tasks.errors import NoEngineError


@dataclass(frozen=True)
class EngineInfo:
    """An engine as it describes itself, and where it was found."""

    url: str
    origin: str
    """Which rule found it: ``DOCKER_HOST``, ``context NAME``, ``default socket``…"""
    name: str
    version: str
    platform: str
    storage_driver: str
    has_bridge: bool
    """Whether containers get a network by default; the private engine has none to give."""
    root: str = ""
    """The folder of its images, on its own machine."""
    time: datetime | None = None
    """What its clock shows."""
    product: str = "Docker"
    """``Docker`` or ``Podman``."""
    cgroups: str = ""
    """The version of its cgroups."""
    security: tuple[str, ...] = ()
    """What limits its containers, by name: ``seccomp``, ``apparmor``, ``rootless``…"""
    context: str | None = None
    """The Docker CLI's context that names it."""
    uses_containerd: bool = False
    """Whether containerd keeps its images (the default since Docker Engine 29), not a classic
    storage driver.  Identifiers, sizes and digests of images differ between the two."""

    @property
    def store(self) -> str:
        """The image store, as Docker's documentation calls it."""
        name = self.storage_driver or "?"
        return f"containerd image store ({name})" if self.uses_containerd else name

    @property
    def kind(self) -> str:
        """What it is, with its version."""
        return f"{self.product} {self.version}{', rootless' if self.is_rootless else ''}"

    @property
    def is_rootless(self) -> bool:
        """Whether it has the rights of a user only, who is not root."""
        return "rootless" in self.security

    @property
    def is_local(self) -> bool:
        """Whether paths of this machine mean the same to the engine."""
        return self.url.startswith("unix://")


@dataclass(frozen=True)
class Image:
    """A local image."""

    id: str
    layers: tuple[str, ...]
    """The diff IDs, lowest layer first."""
    config: Mapping[str, Any]
    """The configuration in the words of the Docker API (``Env``, ``Cmd``, …)."""
    size: int
    """Bytes on the engine's disk, as ``docker images`` shows them."""
    created: str
    platform: str
    digests: tuple[str, ...] = ()
    """``NAME@sha256:…`` of every registry that is known to hold it."""
    tags: tuple[str, ...] = ()

    @property
    def labels(self) -> Mapping[str, str]:
        return self.config.get("Labels") or {}


@dataclass(frozen=True)
class Layer:
    """A layer, and what made it."""

    size: int
    """In bytes, unpacked."""
    made_by: str


@dataclass(frozen=True)
class ContainerSpec:
    """A container to be made.  ``command`` is all of it: the image's ENTRYPOINT is not used."""

    name: str
    image: str
    command: tuple[str, ...]
    labels: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    """Beware: a commit takes it into the image."""
    privileged: bool = False
    unmasked: bool = False
    """With all of ``/proc``: where some is hidden, Linux lets no user namespace mount it anew."""
    security: tuple[str, ...] = ()
    """As ``docker run --security-opt`` takes them."""
    capabilities: tuple[str, ...] | None = None
    """Those that it has; None: what the engine gives by default."""
    network: str | None = None
    publish: Mapping[int, int] = field(default_factory=dict)
    """Ports of the engine's machine, with the container's ports that they lead to."""
    publish_on: str = "127.0.0.1"
    """The address of the machine that they are on."""
    binds: tuple[str, ...] = ()
    """``SOURCE:TARGET[:ro]``, as ``docker run --volume`` takes them."""
    scratch: str | None = None
    """A folder that is on a volume of its own, which goes with the container."""
    memory_folders: tuple[str, ...] = ()
    """Folders that are in memory."""
    memory: int | None = None
    """In bytes."""
    user: str | None = None
    tty: bool = False
    init: bool = True
    no_healthcheck: bool = False
    platform: str | None = None


@dataclass(frozen=True)
class Container:
    """A container that the engine has."""

    id: str
    name: str
    image: str
    labels: Mapping[str, str]
    running: bool
    created: int
    """Seconds since the epoch."""
    addresses: Mapping[str, str] = field(default_factory=dict)
    """By the names of its networks; none on the host's."""


@dataclass(frozen=True)
class BuildSpec:
    """An image build: what ``docker build`` takes."""

    context: Path
    dockerfile: Path
    args: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, Path] = field(default_factory=dict)
    platform: str | None = None
    network: str | None = None
    """``host`` or ``none``; a build can join no other network."""
    proxies: Mapping[str, str] = field(default_factory=dict, repr=False)
    """More arguments, of the names that builders keep out of histories and of their caches."""
    accounts: Accounts | None = field(default=None, repr=False, compare=False)
    """The accounts of the registries that the Dockerfile's images come from."""


class Engine(Protocol):
    """A Docker Engine.  Every method may raise ``EngineError``.

    ``credentials`` are the account of the reference's registry; None asks it without an account.
    """

    is_dry: bool
    """Whether calls that would change something are left at being shown."""

    def info(self) -> EngineInfo: ...

    def local_accounts(self) -> Mapping[str, Credentials]:
        """The accounts of the local registries that were started for it, by their hosts."""
        ...

    def image(self, reference: str) -> Image | None:
        """The local image that a tag or an ID names."""

    def unnamed(self, labels: Mapping[str, str]) -> list[str]:
        """The IDs of images with these labels that have no tag, and that no image is made from."""

    def containers(self, labels: Mapping[str, str]) -> list[Container]:
        """All containers with these labels, newest first."""

    def remote_digest(self, reference: str, credentials: Credentials | None = None) -> str | None:
        """The digest that a registry has for a reference; None where it cannot be told."""

    def greet_registry(self, reference: str, credentials: Credentials | None) -> bool:
        """Ask a registry for an image, which need not be there; False where that cannot be asked.

        Raises ``RegistryError`` where it cannot be reached or refuses the account.
        """
        ...

    def volumes(self, labels: Mapping[str, str]) -> list[str]:
        """The names of all volumes with these labels."""

    def make_volume(self, name: str, labels: Mapping[str, str]) -> None:
        """Make a volume, unless it is there."""

    def remove_volume(self, name: str) -> None:
        """Remove a volume.  One that is not there is no error."""

    def tag(self, image: str, reference: str) -> None: ...

    def untag(self, reference: str) -> None:
        """Remove a tag, and the image with its last tag.  A tag that is not there is no error."""

    def drop(self, image: str) -> None:
        """Remove an image that no tag, container or other image holds; else leave it be."""

    def layers(self, image: str) -> list[Layer]:
        """What an image is made of, lowest first; steps that made no layer are left out."""

    def save(self, image: str) -> Iterator[bytes]:
        """An image as the tar archive that ``docker save`` makes."""

    def create(self, spec: ContainerSpec) -> str:
        """Make a container without starting it; its ID."""

    def copy_in(self, container: str, archive: bytes | IO[bytes]) -> None:
        """Unpack a tar archive at the root of a container's file system."""

    def copy_out(self, container: str, path: str) -> Iterator[bytes]:
        """A file or folder of a container, as a tar archive; nothing where there is none."""

    def run(self, container: str) -> Iterator[tuple[bool, bytes]]:
        """Start a container; its output as (is standard error, bytes), until it ends."""

    def received(self, container: str) -> int | None:
        """Bytes that came to a container over its network so far; None where it has not its own."""

    def start(self, container: str) -> None:
        """Start a container and leave it to itself."""

    def wait(self, container: str) -> int:
        """The exit status of a container, once it has one."""

    def stop(self, container: str, seconds: int) -> None:
        """SIGTERM, and SIGKILL after so many seconds."""

    def remove(self, container: str) -> None:
        """Remove a container, running or not.  One that is not there is no error."""

    def commit(self, container: str, config: Mapping[str, Any]) -> str:
        """Make an image of a container with exactly this configuration; its ID, as yet no tag."""

    def import_rootfs(self, archive: Iterator[bytes], reference: str) -> str:
        """Make an image of one layer from a tar archive; its ID."""

    def build(self, spec: BuildSpec, output: Callable[[bytes], None]) -> str:
        """Build an image, its log given to ``output``; its ID.  Raises ``BuilderError``."""

    def push(
        self, reference: str, credentials: Credentials | None, progress: Progress | None = None
    ) -> str:
        """Push a tag; the digest that the registry answered.  Raises ``RegistryError``."""

    def pull(
        self,
        reference: str,
        credentials: Credentials | None,
        platform: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Pull a reference, to local images.  Raises ``RegistryError``."""


class Progress(Protocol):
    """Told of each event of a push or a pull."""

    def __call__(self, layer: str, status: str, current: int, total: int) -> None: ...


def run_to_end(
    engine: Engine,
    spec: ContainerSpec,
    failure: Callable[[int], Exception],
    prepare: Callable[[str], None] | None = None,
) -> Iterator[tuple[bool, bytes]]:
    """Run a container to its end, and remove it; its output, as it comes, as that of ``run``.

    ``prepare`` is called with its ID before it starts.  Raises what ``failure`` makes of an exit
    status that is not 0.
    """
    container = engine.create(spec)
    try:
        if prepare:
            prepare(container)
        yield from engine.run(container)
        status = engine.wait(container)
    finally:
        engine.remove(container)
    if status:
        raise failure(status)


class NoEngine:
    """Stands where a machine has no engine and none is needed: BuildKit is somewhere else.

    It has no image; any other call raises the error that said so.
    """

    is_dry = False

    def __init__(self, error: NoEngineError) -> None:
        self._error = error

    def image(self, reference: str) -> Image | None:  # noqa: ARG002 -- it has none of any name
        return None

    def __getattr__(self, name: str) -> NoReturn:
        raise self._error


def build_options(spec: BuildSpec) -> Sequence[str]:
    """The options that ``docker build`` and ``docker buildx build`` share."""
    return (
        f"--file={spec.dockerfile}",
        *(f"--build-arg={name}={value}" for name, value in spec.args.items()),
        *(f"--secret=id={name},src={path}" for name, path in spec.secrets.items()),
        *([f"--platform={spec.platform}"] if spec.platform else []),
        *([f"--network={spec.network}"] if spec.network else []),
    )
