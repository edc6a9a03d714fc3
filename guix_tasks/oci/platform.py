"""Platforms of images, with the names of Docker and of Guix."""

from __future__ import annotations

from dataclasses import dataclass

from guix_tasks.oci.reference import quoted

_GUIX_SYSTEMS = {
    "linux/amd64": "x86_64-linux",
    "linux/386": "i686-linux",
    "linux/arm64": "aarch64-linux",
    "linux/arm/v7": "armhf-linux",
    "linux/ppc64le": "powerpc64le-linux",
    "linux/riscv64": "riscv64-linux",
}


_ARCHITECTURES = {
    "x86_64": "amd64",
    "x86-64": "amd64",
    "amd64/v1": "amd64",
    "i386": "386",
    "i686": "386",
    "aarch64": "arm64",
    "aarch64/v8": "arm64",
    "arm64/v8": "arm64",
    "arm": "arm/v7",
    "armhf": "arm/v7",
    "armv7l": "arm/v7",
}
"""Aliases: those of containerd's platforms package, and those of `uname -m`, which engines report
as their architecture."""


def canonical_name(text: str) -> str:
    """Return a platform with OCI's name of its architecture, whether or not Guix supports it."""
    os, _, machine = text.lower().partition("/")
    return f"{os}/{_ARCHITECTURES.get(machine, machine)}"


@dataclass(frozen=True)
class Platform:
    """OCI platform that Guix supports: ``linux/arm64``, ``linux/arm/v7``.

    Raise ``ValueError`` for other platforms.
    """

    os: str
    architecture: str
    variant: str | None = None

    def __post_init__(self) -> None:
        if not (self.os and self.architecture) or str(self) not in _GUIX_SYSTEMS:
            supported = ", ".join(_GUIX_SYSTEMS)
            name = quoted(str(self).strip("/"))
            raise ValueError(f"Guix does not support the platform {name}; use one of {supported}")

    @classmethod
    def parse(cls, text: str) -> Platform:
        """Parse ``OS/ARCHITECTURE[/VARIANT]`` or an alias such as ``aarch64`` or ``arm64/v8``."""
        os, _, machine = canonical_name(text).partition("/")
        architecture, _, variant = machine.partition("/")
        return cls(os, architecture, variant or None)

    @property
    def guix_system(self) -> str:
        """Value of ``guix build --system``."""
        return _GUIX_SYSTEMS[str(self)]

    @property
    def is_32_bit(self) -> bool:
        return self.architecture in ("386", "arm")

    def runs(self, other: Platform) -> bool:
        """Return True if this platform runs programs of another without emulation."""
        return other == self or (str(self), str(other)) == ("linux/amd64", "linux/386")

    @property
    def tag_suffix(self) -> str:
        """Name of the platform in tags, which cannot contain a slash."""
        return str(self).replace("/", "-")

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)
