"""Values that only settings have; those of images and platforms are in ``reference``."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from guix_tasks.oci.platform import Platform


class Secret:
    """Text that shows itself only when it is asked to: not in a repr, a log, an error."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "Secret(…)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)


class Sandbox(Enum):
    """How a work container is run so that the Guix daemon can build in it."""

    AUTO = "auto"
    """The fewest rights with which Guix builds on this engine, its builds isolated."""
    ROOTLESS = "rootless"
    """Nothing in it runs as root, and no right is added; see ``stages.ownership``."""
    CAPABILITIES = "capabilities"
    """The rights that a daemon of root needs, and no others; see ``sandbox``."""
    PRIVILEGED = "privileged"
    NOCHROOT = "nochroot"
    """Builds are not isolated from one another; under QEMU they cannot be."""


class ImageStore(Enum):
    """Where a Docker Engine keeps images (docs.docker.com/engine/storage)."""

    CONTAINERD = "containerd"
    """The image store of containerd, the default of new installations since Engine 29."""
    OVERLAY2 = "overlay2"
    """Docker's classic storage driver."""


class Driver(Enum):
    """Where a builder's BuildKit runs (docs.docker.com/build/builders/drivers)."""

    DOCKER = "docker"
    """In the engine itself; it is there without being made."""
    CONTAINER = "docker-container"
    REMOTE = "remote"
    KUBERNETES = "kubernetes"


class Output(Enum):
    """Where BuildKit puts the image."""

    REGISTRY = "registry"
    OCI = "oci"
    DOCKER = "docker"
    LOAD = "load"


@dataclass(frozen=True)
class Node:
    """A machine of a builder, as ``docker buildx create`` takes it."""

    endpoint: str
    platforms: tuple[Platform, ...] = ()
    """Those that it is to be used for; none: those that it says it has."""
    options: tuple[tuple[str, str], ...] = ()
    """Of the driver, by name."""


@dataclass(frozen=True)
class Mount:
    """A local file or folder that a work container sees at an absolute path of its own."""

    source: Path
    target: str
    read_only: bool = False


@dataclass(frozen=True)
class Listen:
    """Where a server of this machine listens."""

    address: str
    """Of IPv4."""
    port: int

    def __str__(self) -> str:
        return f"{self.address}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        return self.address.startswith("127.")
