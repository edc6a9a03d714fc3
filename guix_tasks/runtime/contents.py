"""Contents of a runtime image: a profile and its store items, as ``closure.scm`` prints them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from guix_tasks.errors import StageError
from guix_tasks.guix.search_paths import search_paths
from guix_tasks.runtime.layers import Item

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

LINK = "/profile"
"""Link of the image to the profile, so that its path stays the same."""


@dataclass(frozen=True)
class Contents:
    """A profile that Guix has built, and the store items that it needs."""

    profile: str
    items: Sequence[Item]
    hashes: Mapping[str, str]
    """SHA-256 of each item's nar, by path."""
    packages: Sequence[str]
    programs: Sequence[str]
    has_certificates: bool
    search_paths: str


def parse_contents(report: str) -> Contents:
    """Parse the report of the container: the lines of ``closure.scm`` and a profile's script."""
    profile, items, hashes = "", [], {}
    packages, programs, has_certificates = [], [], False
    for line in report.splitlines():
        match line.split("\t"):
            case ["profile", path]:
                profile = path
            case ["package", name, version, output]:
                suffix = "" if output == "out" else f":{output}"
                packages.append(f"{name}@{version}{suffix}")
            case ["program", name]:
                programs.append(name)
            case ["certificates"]:
                has_certificates = True
            case ["item", path, digest, size, references]:
                hashes[path] = digest
                items.append(Item(_name(path), path, int(size), frozenset(references.split())))
    if profile not in hashes:
        raise StageError("runtime: Guix did not describe the profile; the log shows the reason")
    return Contents(
        profile,
        items,
        hashes,
        sorted(packages),
        sorted(programs),
        has_certificates,
        search_paths(report, LINK),
    )


def _name(path: str) -> str:
    """Return the name of a store item without its hash: 32 characters and a hyphen."""
    return PurePosixPath(path).name[33:]
