"""Command lines and scripts of Guix, and parsers of their output.

Work containers and ``RUN`` steps of BuildKit run the same command lines.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

PROFILE = "/var/guix/profiles/per-user/root/guix-profile"
"""Default profile of root, by the path that all users can read (unlike ``/root``)."""

CURRENT_GUIX = "/var/guix/profiles/per-user/root/current-guix"
"""Profile that ``guix pull`` of root creates."""

CHANNELS_FILE = "/root/.config/guix/channels.scm"
"""Channels file that ``guix pull`` of root reads without ``--channels``."""

DESCRIBE = ("guix", "describe", "--format=channels")
"""Command that prints the channels and commits in use as a channels file."""

LIST_INSTALLED = ("guix", "package", "--list-installed")
"""Command that prints the installed packages; see ``installed``."""

UNAUTHENTICATED = "--disable-authentication"
"""Option of ``guix pull`` that accepts commits without trusted signatures."""


def pull_argv(channels: str | None, *, authenticate: bool = True) -> tuple[str, ...]:
    """Return ``guix pull``, by default with the channels of the image."""
    return (
        "guix", "pull",
        *([] if authenticate else [UNAUTHENTICATED]),
        *([f"--channels={channels}"] if channels else []),
    )  # fmt: skip


def record_channels() -> str:
    """Return a shell command that pins ``guix pull`` of root to the channels and commits in use."""
    directory = CHANNELS_FILE.rpartition("/")[0]
    return f"mkdir -p {directory} && {shlex.join(DESCRIBE)} >{CHANNELS_FILE}"


def install_argv(manifest: str | None, packages: Sequence[str]) -> tuple[str, ...]:
    """Return one transaction that installs a manifest and packages."""
    return (
        "guix", "package",
        *([f"--manifest={manifest}"] if manifest else []),
        *(f"--install={package}" for package in packages),
    )  # fmt: skip


def union_manifest(manifest: str) -> str:
    """Return a manifest with the packages of the profile and of another manifest.

    ``guix package --manifest`` replaces a profile, but an image must keep the packages of its base
    profile, above all the certificates. Like ``guix package --install``, ``manifest-add`` replaces
    an entry of the same name and output.
    """
    return (
        "(use-modules (guix profiles))\n"
        f'(manifest-add (profile-manifest "{PROFILE}")\n'
        f'              (manifest-entries (primitive-load "{manifest}")))\n'
    )


TARBALL, DOCKER = "tarball", "docker"

PACK_FORMATS = (TARBALL, DOCKER, "squashfs", "deb", "rpm", "appimage")
"""Formats of ``guix pack`` 1.5 (``--list-formats``)."""

COMPRESSIONS = ("gzip", "lzip", "xz", "bzip2", "zstd", "none")
"""Compression methods of ``guix pack`` (``%compressors``)."""


@dataclass(frozen=True)
class Pack:
    """Options of ``guix pack``; the defaults are those of Guix."""

    format: str = TARBALL
    relocatable: int = 0
    """1: relocatable with user namespaces; 2: relocatable everywhere, but slower without them."""
    symlinks: tuple[str, ...] = ()
    compression: str = ""
    max_layers: int = 0
    entry_point: str = ""


def pack_argv(pack: Pack, manifest: str) -> tuple[str, ...]:
    """Return ``guix pack`` of a manifest."""
    return (
        "guix", "pack", f"--format={pack.format}",
        *["--relocatable"] * pack.relocatable,
        *(f"--symlink={symlink}" for symlink in pack.symlinks),
        *([f"--compression={pack.compression}"] if pack.compression else []),
        *([f"--max-layers={pack.max_layers}"] if pack.max_layers else []),
        *([f"--entry-point={pack.entry_point}"] if pack.entry_point else []),
        f"--manifest={manifest}",
    )  # fmt: skip


_IS_PACKED = "is packed:"


def pack_manifest(manifest: str | None, packages: Sequence[str]) -> str:
    """Return a manifest that combines a manifest and packages, since ``guix pack`` takes only one.

    When Guix loads it, it prints the names and versions of packages for ``packed``.
    """
    names = " ".join(f'"{package}"' for package in packages)
    loaded = f'(primitive-load "{manifest}")' if manifest else ""
    return (
        "(use-modules (guix profiles) (gnu packages))\n"
        "(define all\n"
        f"  (concatenate-manifests (list {loaded} (specifications->manifest '({names})))))\n"
        "(for-each (lambda (each)\n"
        f'            (simple-format #t "{_IS_PACKED}~A\\t~A~%"\n'
        "                           (manifest-entry-name each) (manifest-entry-version each)))\n"
        "          (manifest-entries all))\n"
        "all\n"
    )


def packed(report: str) -> tuple[str, list[tuple[str, str]]]:
    """Return the store item of a ``guix pack``, and the names and versions of its packages."""
    entries = re.findall(rf"^{_IS_PACKED}(.*)\t(.*)$", report, re.MULTILINE)
    items = re.findall(r"^/gnu/store/.*$", report, re.MULTILINE)
    return items[-1] if items else "", entries


def pack_suffix(pack_format: str, item: str) -> str:
    """Return the file name suffix of a pack; the suffix of an image contains its format."""
    suffix = item.rpartition("-pack")[2]
    return f".{pack_format}{suffix}" if pack_format == DOCKER else suffix


DEFAULT_SUBSTITUTE_URLS = ("https://ci.guix.gnu.org", "https://bordeaux.guix.gnu.org")
"""Guix's default substitute servers (``%default-substitute-urls``)."""


@dataclass(frozen=True)
class Forecast:
    """Availability of substitutes for one system, as reported by ``resources/weather.scm``."""

    system: str
    wanted: dict[str, str]
    """State of each requested package, by name and version; for example ``stored``."""
    items: int = 0
    """Number of store items to download, including dependencies."""
    unpacked: int = 0
    """Size of these items in the store, in bytes."""
    packed: int = 0
    """Size of the downloads in bytes, without ``unknown`` items."""
    unknown: int = 0
    """Number of items whose download size the servers do not report."""

    @property
    def missing(self) -> list[str]:
        """Packages that Guix would build, or that do not exist for this system."""
        return [name for name, state in self.wanted.items() if state not in _AVAILABLE]


_AVAILABLE = ("stored", "substitutable")


def weather_argv(
    program: str, systems: Sequence[str], manifest: str | None, packages: Sequence[str]
) -> tuple[str, ...]:
    """Return the command that queries substitute servers with ``resources/weather.scm``."""
    return ("guix", "repl", "--", program, " ".join(systems), manifest or "", *packages)


_FORECAST = re.compile(
    r"^weather:(?:system\t(\S+)|wanted\t(\S+)\t(\S+)|fetch\t(\d{1,18}(?:\t\d{1,18}){3}))$",
    re.MULTILINE | re.ASCII,
)


def forecasts(report: str) -> list[Forecast]:
    """Parse the output of ``resources/weather.scm``, without systems whose report is incomplete."""
    complete = []
    system, wanted = "", dict[str, str]()
    for name, package, state, numbers in _FORECAST.findall(report):
        if name:
            system, wanted = name, {}
        elif package:
            wanted[package] = state
        else:
            complete.append(Forecast(system, wanted, *map(int, numbers.split())))
    return complete


def publish_script(address: str, port: int, keys: str) -> str:
    """Return a shell script that serves the store with ``guix publish``.

    ``keys`` is the directory of the key pair, which the script generates once. Items are compressed
    while they are sent: a cache would need the space of a second store and return "not found" to
    the first request. Compression is fast because the network is local, and zstd is offered if this
    Guix has it. The lifetimes of responses are short because the server can serve another store at
    any time.
    """
    publish = (
        "guix", "publish", f"--listen={address}", f"--port={port}",
        "--compression=gzip:1", "--ttl=5s", "--negative-ttl=1s",
    )  # fmt: skip
    zstd = ("guix", "publish", "--compression=zstd:1", "--version")
    lines = [
        "#!/bin/sh",
        "set -eu",
        f"export GUIX_CONFIGURATION_DIRECTORY={keys}",
        f"[ -e {keys}/signing-key.sec ] || guix archive --generate-key",
        "zstd=",
        f"if {shlex.join(zstd)} >/dev/null 2>&1; then zstd=--compression=zstd:1; fi",
        f"exec {shlex.join(publish)} $zstd",
    ]
    return "\n".join(lines) + "\n"


def is_publishing(line: str) -> bool:
    """Return True for the line that ``guix publish`` prints when it is ready."""
    return "guix publish: publishing /gnu/store on " in line


def script(
    commands: Sequence[Sequence[str]],
    report: Sequence[str],
    *,
    before: Sequence[str] = (),
    finish: str = "true",
    after: Sequence[str] = (),
    start: str | None = None,
) -> str:
    """Return a shell script that runs commands in order and stops at the first failure.

    Only the command ``report`` writes to standard output; all other output goes to standard error.
    ``before`` and ``after`` are shell commands. ``finish`` is one that runs next to ``report``.
    In ``after`` the variable ``report`` contains the output of ``report``.
    The commands run in the directory ``start``, by default the working directory of the image.
    """
    lines = [
        "#!/bin/sh",
        "set -eu",
        "exec 3>&1 1>&2",
        *before,
        *([f"cd {start}"] if start else []),
        *(shlex.join(command) for command in commands),
        # A pull replaces the program `guix`, so clear the shell's cache of its path.
        "hash -r",
        f"{finish} & finishing=$!",
        f"report=$({shlex.join(report)})",
        """printf '%s\\n' "$report" >&3""",
        "wait $finishing",
        *after,
    ]
    return "\n".join(lines) + "\n"


def installed(report: str) -> list[str]:
    """Parse the output of ``guix package --list-installed`` into ``NAME@VERSION:OUTPUT``.

    As in Guix, the output ``out`` is omitted.
    """
    # Name, version, output and store item are separated by tabs.
    lines = (line for line in report.splitlines() if line.count("\t") > 1)
    rows = (re.split(r"[^\S\t]*\t[^\S\t]*", line) for line in lines)
    return sorted(
        f"{name}@{version}" + ("" if output == "out" else f":{output}")
        for name, version, output, *_ in rows
    )
