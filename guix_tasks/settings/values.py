"""Types of the values of settings, except image references and platforms (package ``oci``)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from guix_tasks.oci.platform import Platform


@dataclass(frozen=True, repr=False, slots=True)
class Secret:
    """Text that appears in no repr, log or error; ``reveal`` returns it."""

    _value: str

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "Secret(…)"


class Sandbox(Enum):
    """Privileges of a work container, in which the Guix daemon has to build."""

    AUTO = "auto"
    """The fewest privileges with which Guix can run isolated builds on this engine."""
    ROOTLESS = "rootless"
    """No root processes and no additional privileges; see ``stages.ownership``."""
    CAPABILITIES = "capabilities"
    """Only the capabilities that a daemon run by root needs; see ``stages.sandbox``."""
    PRIVILEGED = "privileged"
    NOCHROOT = "nochroot"
    """No isolation of builds; QEMU's emulation supports nothing else."""


class ImageStore(Enum):
    """Image store of a Docker Engine (docs.docker.com/engine/storage)."""

    CONTAINERD = "containerd"
    """Image store of containerd, the default of new installations since Engine 29."""
    OVERLAY2 = "overlay2"
    """Classic storage driver of Docker."""


class Driver(Enum):
    """Driver of a builder (docs.docker.com/build/builders/drivers)."""

    DOCKER = "docker"
    """The engine's BuildKit, which always exists."""
    CONTAINER = "docker-container"
    REMOTE = "remote"
    KUBERNETES = "kubernetes"


class Output(Enum):
    """Destination of an image that BuildKit builds."""

    REGISTRY = "registry"
    OCI = "oci"
    DOCKER = "docker"
    LOAD = "load"


@dataclass(frozen=True)
class Node:
    """Node of a builder, as an argument of ``docker buildx create``."""

    endpoint: str = ""
    """Empty for the default of the driver."""
    platforms: tuple[Platform, ...] = ()
    """Platforms to build on this node; empty: the platforms that the node reports."""
    options: tuple[tuple[str, str], ...] = ()
    """Names and values of driver options."""


@dataclass(frozen=True)
class Mount:
    """Local file or directory that is mounted in work containers."""

    source: Path
    target: str
    """Absolute path in the container."""
    read_only: bool = False


@dataclass(frozen=True)
class Listen:
    """Address on which a server of this machine listens."""

    address: str
    """IPv4 address."""
    port: int

    def __str__(self) -> str:
        return f"{self.address}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """True if only this machine can connect."""
        return self.address.startswith("127.")
