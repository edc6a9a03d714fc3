"""Platforms of images, in the words of Docker and of Guix."""

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


# Other spellings: those of containerd's platforms package, and those of `uname -m`, which
# is what an engine answers when it is asked for its own architecture.
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


@dataclass(frozen=True)
class Platform:
    """An OCI platform that Guix has a system for: ``linux/arm64``, ``linux/arm/v7``."""

    os: str
    architecture: str
    variant: str | None = None

    def __post_init__(self) -> None:
        if str(self) not in _GUIX_SYSTEMS:
            known = ", ".join(_GUIX_SYSTEMS)
            raise ValueError(f"Guix has no system for platform {quoted(str(self))}; it has {known}")

    @classmethod
    def parse(cls, text: str) -> Platform:
        """``OS/ARCHITECTURE[/VARIANT]``; other spellings (``aarch64``, ``arm64/v8``) are mended."""
        os, _, machine = text.lower().partition("/")
        architecture, _, variant = _ARCHITECTURES.get(machine, machine).partition("/")
        return cls(os, architecture, variant or None)

    @property
    def guix_system(self) -> str:
        """The name that ``guix build --system`` takes."""
        return _GUIX_SYSTEMS[str(self)]

    @property
    def is_32_bit(self) -> bool:
        return self.architecture in ("386", "arm")

    def runs(self, other: Platform) -> bool:
        """Whether a machine of this platform runs programs of the other without emulation."""
        return other == self or (str(self), str(other)) == ("linux/amd64", "linux/386")

    @property
    def tag_suffix(self) -> str:
        """What stands for the platform in a tag, which cannot hold a slash."""
        return str(self).replace("/", "-")

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)
