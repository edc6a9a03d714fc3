"""The container engine protocol and its values.

To support another container engine, implement ``Engine``. ``docker.DockerEngine`` is the complete
implementation; ``podman.PodmanEngine`` overrides the calls in which Podman differs from Docker.
``podman.open_engine`` chooses one of the two. ``dry_run.TracedEngine`` wraps any engine, prints
each call that changes state, and skips these calls in a dry run.
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

UNFINISHED_LABEL = "org.guix-tasks.unfinished"
"""Label of an image that Podman has committed, and that has no configuration yet."""


@dataclass(frozen=True)
class EngineInfo:
    """Description of an engine, as reported by the engine, and the origin of its address."""

    url: str
    origin: str
    """The rule that found the engine: ``DOCKER_HOST``, ``context NAME``, ``default socket``…"""
    name: str
    version: str
    platform: str
    storage_driver: str
    has_bridge: bool
    """True if containers get a network by default. The private engine has no such network."""
    root: str = ""
    """Directory of the engine's images, on the engine's machine."""
    time: datetime | None = None
    """Time of the engine's clock."""
    product: str = "Docker"
    """``Docker`` or ``Podman``."""
    cgroups: str = ""
    """Version of the cgroups."""
    security: tuple[str, ...] = ()
    """Names of the security options: ``seccomp``, ``apparmor``, ``rootless``…"""
    first_id: int = 0
    """ID on the engine's machine of the user that is root in containers (``userns-remap``)."""
    context: str | None = None
    """Name of the Docker context with the engine's address."""
    uses_containerd: bool = False
    """True if the engine keeps images in the containerd image store (the default since Docker
    Engine 29), false for a classic storage driver. IDs, sizes and digests differ between them."""

    @property
    def store(self) -> str:
        """The image store, as named in Docker's documentation."""
        name = self.storage_driver or "?"
        return f"containerd image store ({name})" if self.uses_containerd else name

    @property
    def kind(self) -> str:
        """Product and version."""
        return f"{self.product} {self.version}{', rootless' if self.is_rootless else ''}"

    @property
    def is_podman(self) -> bool:
        return self.product == "Podman"

    @property
    def is_rootless(self) -> bool:
        """True if the engine runs with the rights of a user other than root."""
        return "rootless" in self.security

    @property
    def is_local(self) -> bool:
        """True if the engine and this machine share a file system, so that paths are equal."""
        return self.url.startswith("unix://")

    @property
    def shares_loopback(self) -> bool:
        """True if ``localhost`` is the same for the engine and for this machine.

        Rootless Docker runs in a network namespace of its own (rootlesskit), Docker Desktop in a
        virtual machine.  Both have a local socket.
        """
        is_apart = self.is_rootless and not self.is_podman
        return self.is_local and not is_apart and self.name != "docker-desktop"


@dataclass(frozen=True)
class Image:
    """A local image."""

    id: str
    layers: tuple[str, ...]
    """Diff IDs, lowest layer first."""
    config: Mapping[str, Any]
    """Configuration with the keys of the Docker API (``Env``, ``Cmd``, …)."""
    size: int
    """Bytes on the engine's disk, as shown by ``docker images``."""
    created: str
    platform: str
    digests: tuple[str, ...] = ()
    """``NAME@sha256:…`` of every registry that is known to have the image."""
    tags: tuple[str, ...] = ()

    @property
    def labels(self) -> Mapping[str, str]:
        return self.config.get("Labels") or {}


@dataclass(frozen=True)
class Layer:
    """A layer of an image and the command that created it."""

    size: int
    """In bytes, uncompressed."""
    made_by: str


@dataclass(frozen=True)
class ContainerSpec:
    """Options of a new container.

    ``command`` is the complete command line: it replaces both ENTRYPOINT and CMD of the image.
    """

    name: str
    image: str
    command: tuple[str, ...]
    labels: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    """A commit copies these variables into the image."""
    privileged: bool = False
    unmasked: bool = False
    """Mount ``/proc`` completely. With parts of it hidden, Linux does not let a user namespace
    mount another one."""
    security: tuple[str, ...] = ()
    """Values of ``docker run --security-opt``."""
    capabilities: tuple[str, ...] | None = None
    """All capabilities of the container, or None for the engine's default."""
    network: str | None = None
    publish: Mapping[int, int] = field(default_factory=dict)
    """Container port by host port."""
    publish_on: str = "127.0.0.1"
    """Host address of the published ports."""
    binds: tuple[str, ...] = ()
    """``SOURCE:TARGET[:ro]``, the values of ``docker run --volume``."""
    scratch: str | None = None
    """Directory on an anonymous volume, which is removed with the container."""
    tmpfs_directories: tuple[str, ...] = ()
    """Directories in memory, as with ``docker run --tmpfs``."""
    devices: tuple[str, ...] = ()
    """Devices of the engine's machine, by their paths."""
    memory: int | None = None
    """In bytes."""
    user: str | None = None
    tty: bool = False
    stdin: bool = False
    """Whether ``Engine.run`` passes an input on."""
    logged: bool = True
    """Whether the engine keeps the output."""
    no_healthcheck: bool = False
    platform: str | None = None


@dataclass(frozen=True)
class Container:
    """A container of the engine, running or not."""

    id: str
    name: str
    image: str
    labels: Mapping[str, str]
    running: bool
    started: bool = True
    """Whether it has ever been started."""
    addresses: Mapping[str, str] = field(default_factory=dict)
    """IP address by network name; empty on the host's network."""


@dataclass(frozen=True)
class BuildSpec:
    """Options of an image build, as for ``docker build``."""

    context: Path
    dockerfile: Path
    args: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, Path] = field(default_factory=dict)
    platform: str | None = None
    network: str | None = None
    """``host`` or ``none``. A build cannot join another network."""
    proxies: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Predefined proxy arguments, which builders keep out of image histories and cache keys."""
    accounts: Accounts | None = field(default=None, repr=False, compare=False)
    """Accounts of the registries from which the Dockerfile's images come."""


class Engine(Protocol):
    """A container engine.

    Every method may raise ``EngineError``; ``build`` also ``BuilderError``; ``check_registry``,
    ``push`` and ``pull`` also ``RegistryError``. ``image`` parameters are an ID or a tag,
    ``container`` parameters an ID. ``labels`` select objects that have all of these labels.

    ``credentials`` is the account of the registry of ``reference``, or None for anonymous access.
    """

    is_dry: bool
    """True if calls that change state are only printed (``inv --dry``)."""

    def info(self) -> EngineInfo:
        """Return the description of the engine."""

    def local_accounts(self) -> Mapping[str, Credentials]:
        """Return the accounts of the local registries that serve this engine, by host."""

    # --- images ---

    def image(self, reference: str) -> Image | None:
        """Return the local image with this tag or ID, or None."""

    def unnamed(self, labels: Mapping[str, str]) -> list[str]:
        """Return the IDs of images without a tag and without child images."""

    def layers(self, image: str) -> list[Layer]:
        """Return the layers of an image, lowest first, without empty layers."""

    def tag(self, image: str, reference: str) -> None:
        """Set a tag. An existing tag moves to the image."""

    def untag(self, reference: str) -> None:
        """Remove a tag, and the image if this was its last tag. A missing tag is not an error."""

    def drop(self, image: str) -> None:
        """Remove an image if no tag, container or other image refers to it."""

    def save(self, image: str) -> Iterator[bytes]:
        """Return an image as the tar archive of ``docker save``."""

    def import_rootfs(self, archive: Iterator[bytes], reference: str) -> str:
        """Create an image with one layer from a tar archive and return its ID."""

    def build(self, spec: BuildSpec, output: Callable[[bytes], None]) -> str:
        """Build an image, pass the log to ``output`` and return the image's ID."""

    # --- registries ---

    def remote_digest(self, reference: str, credentials: Credentials | None = None) -> str | None:
        """Return the digest of a reference in its registry, or None if it is unknown."""

    def check_registry(self, reference: str, credentials: Credentials | None) -> bool:
        """Check that the registry of a reference answers and accepts the account.

        The image itself may be missing. Return False if the engine has no call for this check.
        """

    def push(
        self, reference: str, credentials: Credentials | None, progress: Progress | None = None
    ) -> str:
        """Push a tag and return the digest from the registry's answer."""

    def pull(
        self, reference: str, credentials: Credentials | None, progress: Progress | None = None
    ) -> None:
        """Pull a reference into the local images."""

    # --- volumes ---

    def volumes(self, labels: Mapping[str, str]) -> list[str]:
        """Return the names of the volumes with these labels."""

    def create_volume(self, name: str, labels: Mapping[str, str]) -> None:
        """Create a volume. An existing volume of this name is left unchanged."""

    def remove_volume(self, name: str) -> None:
        """Remove a volume. A missing volume is not an error."""

    # --- containers ---

    def containers(self, labels: Mapping[str, str]) -> list[Container]:
        """Return the containers with these labels, running or not, newest first."""

    def create(self, spec: ContainerSpec) -> str:
        """Create a container without starting it and return its ID."""

    def copy_in(self, container: str, archive: bytes | IO[bytes]) -> None:
        """Unpack a tar archive into the root directory of a container."""

    def copy_out(self, container: str, path: str) -> Iterator[bytes]:
        """Return a file or directory of a container as a tar archive; empty if it is missing.

        The owners are IDs on the engine's machine (``EngineInfo.first_id``), unlike in ``copy_in``.
        """

    def changed_paths(self, container: str) -> list[str]:
        """Return what a container added, changed and deleted, with the directories above it."""

    def run(self, container: str, stdin: IO[bytes] | None = None) -> Iterator[tuple[bool, bytes]]:
        """Start a container and yield its output until it exits.

        The items are ``(is_standard_error, data)``. A container with ``ContainerSpec.stdin``
        receives ``stdin`` to its end.
        """

    def start(self, container: str) -> None:
        """Start a container in the background."""

    def bytes_received(self, container: str) -> int | None:
        """Return the bytes received over a container's network, or None on a shared network."""

    def wait(self, container: str) -> int:
        """Wait until a container exits and return its exit status."""

    def lacked_memory(self, container: str) -> bool:
        """Return True if a process of a container was killed because memory ran out."""

    def stop(self, container: str, seconds: int) -> None:
        """Send SIGTERM, and SIGKILL after ``seconds``."""

    def remove(self, container: str) -> None:
        """Remove a container, running or not. A missing container is not an error."""

    def commit(self, container: str, config: Mapping[str, Any], comment: str = "") -> str:
        """Commit a container with exactly this image configuration and return the image's ID.

        The image has no tag yet.  ``docker history`` shows the comment.
        """


class Progress(Protocol):
    """Callback for the events of a push or a pull. ``current`` and ``total`` are in bytes."""

    def __call__(self, layer: str, status: str, current: int, total: int) -> None: ...


def run_to_end(
    engine: Engine,
    spec: ContainerSpec,
    failure: Callable[[int], Exception],
    prepare: Callable[[str], None] | None = None,
) -> Iterator[tuple[bool, bytes]]:
    """Run a container, yield its output like ``Engine.run``, and remove the container.

    ``prepare`` is called with the container's ID before the start.

    Raise ``failure(status)`` if the exit status is not 0.
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
    """Placeholder engine for a machine without one, if a remote BuildKit does the build.

    It has no images. Every other call raises the error of the failed search for an engine.
    """

    is_dry = False

    def __init__(self, error: NoEngineError) -> None:
        self._error = error

    def image(self, reference: str) -> Image | None:  # noqa: ARG002 -- there are no images
        return None

    def __getattr__(self, name: str) -> NoReturn:
        raise self._error


def build_options(spec: BuildSpec) -> Sequence[str]:
    """Return the options that ``docker build`` and ``docker buildx build`` share."""
    return (
        f"--file={spec.dockerfile}",
        *(f"--build-arg={name}={value}" for name, value in spec.args.items()),
        *(f"--secret=id={name},src={path}" for name, path in spec.secrets.items()),
        *([f"--platform={spec.platform}"] if spec.platform else []),
        *([f"--network={spec.network}"] if spec.network else []),
    )
