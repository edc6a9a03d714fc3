"""The commands of Guix, as argument lists.  Pure: nothing is run here.

The same lists run in a work container and in a ``RUN`` step of BuildKit.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

PROFILE = "/var/guix/profiles/per-user/root/guix-profile"
"""Root's default profile, by the path that other users may follow, too (``/root`` is closed)."""

CURRENT_GUIX = "/var/guix/profiles/per-user/root/current-guix"
"""Where ``guix pull`` of root puts what it pulled."""

CHANNELS_FILE = "/root/.config/guix/channels.scm"
"""What ``guix pull`` of root reads when it is given no ``--channels``."""


UNAUTHENTICATED = "--disable-authentication"
"""The option of ``guix pull`` that lets it take commits that nobody vouches for."""


def pull_argv(channels: str | None, *, authenticate: bool = True) -> tuple[str, ...]:
    """``guix pull``; without a channels file it takes what the image has."""
    return (
        "guix", "pull",
        *([] if authenticate else [UNAUTHENTICATED]),
        *([f"--channels={channels}"] if channels else []),
    )  # fmt: skip


def describe_argv() -> tuple[str, ...]:
    """The channels of the Guix in use, with their commits, as a channels file."""
    return ("guix", "describe", "--format=channels")


def record_channels() -> str:
    """A shell command that lets ``guix pull`` of root stay at the channels of the Guix in use."""
    folder = CHANNELS_FILE.rpartition("/")[0]
    return f"mkdir -p {folder} && {shlex.join(describe_argv())} >{CHANNELS_FILE}"


def install_argv(manifest: str | None, packages: Sequence[str]) -> tuple[str, ...]:
    """One transaction that adds to the profile what a manifest and a list name.

    Raises ``ValueError`` for neither, since ``guix package`` alone would do nothing.
    """
    if not manifest and not packages:
        raise ValueError("neither a manifest nor packages")
    return (
        "guix", "package",
        *([f"--manifest={manifest}"] if manifest else []),
        *(f"--install={package}" for package in packages),
    )  # fmt: skip


def list_installed_argv() -> tuple[str, ...]:
    """What the profile has: name, version, output and store item, by tabs."""
    return ("guix", "package", "--list-installed")


def union_manifest(manifest: str) -> str:
    """A manifest of what the profile has and what another manifest names.

    ``guix package --manifest`` replaces a profile, and an image must not lose what its base
    profile has, the certificates above all.  ``manifest-add`` replaces an entry of the same name
    and output, as ``guix package --install`` does.
    """
    return (
        "(use-modules (guix profiles))\n"
        f'(manifest-add (profile-manifest "{PROFILE}")\n'
        f'              (manifest-entries (primitive-load "{manifest}")))\n'
    )


TARBALL, DOCKER, OCI = "tarball", "docker", "oci"

PACK_FORMATS = (TARBALL, DOCKER, OCI, "squashfs", "deb", "rpm", "appimage")
"""What ``guix pack`` of Guix 1.5 makes (``--list-formats``), and OCI, made of that of docker."""

IMAGES = (DOCKER, OCI)

COMPRESSIONS = ("gzip", "lzip", "xz", "bzip2", "zstd", "none")
"""What it compresses with (``%compressors``)."""


@dataclass(frozen=True)
class Pack:
    """What ``guix pack`` is to make, in its own words; nothing set is its default."""

    format: str = TARBALL
    relocatable: int = 0
    """1: where users may make namespaces; 2: anywhere else, too, but slower there."""
    symlinks: tuple[str, ...] = ()
    compression: str = ""
    max_layers: int = 0
    entry_point: str = ""


def pack_argv(pack: Pack, manifest: str) -> tuple[str, ...]:
    """``guix pack`` of a manifest."""
    if pack.format == OCI:  # each of its layers is compressed, and not the whole
        pack = replace(pack, format=DOCKER, compression="none")
    return (
        "guix", "pack", f"--format={pack.format}",
        *["--relocatable"] * pack.relocatable,
        *(f"--symlink={each}" for each in pack.symlinks),
        *([f"--compression={pack.compression}"] if pack.compression else []),
        *([f"--max-layers={pack.max_layers}"] if pack.max_layers else []),
        *([f"--entry-point={pack.entry_point}"] if pack.entry_point else []),
        f"--manifest={manifest}",
    )  # fmt: skip


_IS_PACKED = "is packed:"


def pack_manifest(manifest: str | None, packages: Sequence[str]) -> str:
    """A manifest of a manifest and a list, of which ``guix pack`` takes but one.

    When it is read it tells the names and versions, for ``packed``.
    """
    words = " ".join(f'"{each}"' for each in packages)
    theirs = f'(primitive-load "{manifest}")' if manifest else ""
    return (
        "(use-modules (guix profiles) (gnu packages))\n"
        "(define all\n"
        f"  (concatenate-manifests (list {theirs} (specifications->manifest '({words})))))\n"
        "(for-each (lambda (each)\n"
        f'            (simple-format #t "{_IS_PACKED}~A\\t~A~%"\n'
        "                           (manifest-entry-name each) (manifest-entry-version each)))\n"
        "          (manifest-entries all))\n"
        "all\n"
    )


def packed(report: str) -> tuple[str, list[tuple[str, str]]]:
    """The store item that ``guix pack`` made, and name and version of all that is in it."""
    entries = re.findall(rf"^{_IS_PACKED}(.*)\t(.*)$", report, re.MULTILINE)
    items = re.findall(r"^/gnu/store/.*$", report, re.MULTILINE)
    return items[-1] if items else "", entries


def pack_suffix(pack_format: str, item: str) -> str:
    """How the name of a packed file ends; that of an image tells it from a tarball."""
    ending = item.rpartition("-pack")[2]
    return f".{pack_format}{ending}" if pack_format in IMAGES else ending


DEFAULT_SUBSTITUTE_URLS = ("https://ci.guix.gnu.org", "https://bordeaux.guix.gnu.org")
"""What Guix asks for substitutes where it is not told (``%default-substitute-urls``)."""


@dataclass(frozen=True)
class Forecast:
    """What substitutes there are for one system, as ``resources/weather.scm`` says."""

    system: str
    wanted: dict[str, str]
    """What is to be had, by name and version, with one of ``stored`` and its like."""
    items: int = 0
    """How many items would be fetched, what the packages need included."""
    unpacked: int = 0
    """The bytes of these in the store."""
    packed: int = 0
    """The bytes to be downloaded, as far as the servers tell."""
    unknown: int = 0
    """The items of which they do not."""

    @property
    def missing(self) -> list[str]:
        """What would be built, or cannot be had for this system at all."""
        return [name for name, state in self.wanted.items() if state not in _THERE]


_THERE = ("stored", "substitutable")


def weather_argv(
    program: str, systems: Sequence[str], manifest: str | None, packages: Sequence[str]
) -> tuple[str, ...]:
    """Ask the substitute servers, by ``resources/weather.scm``."""
    return ("guix", "repl", "--", program, " ".join(systems), manifest or "", *packages)


_FORECAST = re.compile(
    r"^weather:(?:system\t(\S+)|wanted\t(\S+)\t(\S+)|fetch\t(\d{1,18}(?:\t\d{1,18}){3}))$",
    re.MULTILINE | re.ASCII,
)


def forecasts(report: str) -> list[Forecast]:
    """What that said, for each system that it came to the end of."""
    found = []
    system, wanted = "", dict[str, str]()
    for name, package, state, numbers in _FORECAST.findall(report):
        if name:
            system, wanted = name, {}
        elif package:
            wanted[package] = state
        else:
            found.append(Forecast(system, wanted, *map(int, numbers.split())))
    return found


def publish_script(address: str, port: int, keys: str) -> str:
    """A shell script that serves the store, by a key pair in a folder; it is made there once.

    What is served is packed as it is sent: a cache would take the room of a second store, and
    answer the first who asks that nothing is there.  Near by, quick packing is best.  Clients
    are to forget soon what they were told, since another store may be served at the next moment.
    """
    publish = (
        "guix", "publish", f"--listen={address}", f"--port={port}",
        "--compression=gzip:1", "--ttl=5s", "--negative-ttl=1s",
    )  # fmt: skip
    lines = [
        "#!/bin/sh",
        "set -eu",
        f"export GUIX_CONFIGURATION_DIRECTORY={keys}",
        f"[ -e {keys}/signing-key.sec ] || guix archive --generate-key",
        f"exec {shlex.join(publish)}",
    ]
    return "\n".join(lines) + "\n"


def is_publishing(line: str) -> bool:
    """Whether a line of ``guix publish`` says that it listens."""
    return "guix publish: publishing /gnu/store on " in line


def script(
    commands: Sequence[Sequence[str]],
    report: Sequence[str],
    folder: str,
    *,
    keep: str | None,
    start: str | None = None,
) -> str:
    """A shell script that runs the commands in order and stops at the first that fails.

    Its standard output is the report's alone; all the rest goes to standard error.  At the end
    it collects what the commands added to the store and nothing needs; ``keep`` is a profile
    whose like is still to be built.  That nothing could be collected is no failure of a stage.
    ``start`` is the folder that the commands start in, where that is not the image's own.
    """
    # Not in the folder, which goes with each start: a second try goes on from the first.
    before = f"{folder}-store-before"
    collect = ("guix", "repl", "--", f"{folder}/collect.scm", before, *([keep] if keep else []))
    lines = [
        "#!/bin/sh",
        "set -eu",
        "exec 3>&1 1>&2",
        f"[ -e {before} ] || find /gnu/store -mindepth 1 -maxdepth 1 >{before} || true",
        *([f"cd {start}"] if start else []),
        *(shlex.join(command) for command in commands),
        # After a pull `guix` is another program: forget where the shell found the first one.
        "hash -r",
        f"{shlex.join(collect)} || echo 'the store could not be collected' & collecting=$!",
        f"{shlex.join(report)} >&3",
        "wait $collecting",
        f"rm -f {before}",
    ]
    return "\n".join(lines) + "\n"


def installed(report: str) -> list[str]:
    """The packages in what ``guix package --list-installed`` printed, as ``NAME@VERSION:OUTPUT``.

    The output ``out`` goes without saying, as it does in Guix.
    """
    # Version, output and store item are behind the name.
    lines = (line for line in report.splitlines() if line.count("\t") > 1)
    rows = (re.split(r"[^\S\t]*\t[^\S\t]*", line) for line in lines)
    return sorted(
        f"{name}@{version}" + ("" if output == "out" else f":{output}")
        for name, version, output, *_ in rows
    )
