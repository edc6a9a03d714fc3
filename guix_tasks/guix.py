"""The commands of Guix, as argument lists.  Pure: nothing is run here.

The same lists run in a work container and in a ``RUN`` step of BuildKit.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

PROFILE = "/var/guix/profiles/per-user/root/guix-profile"
"""Root's default profile, by the path that other users may follow, too (``/root`` is closed)."""

CURRENT_GUIX = "/var/guix/profiles/per-user/root/current-guix"
"""Where ``guix pull`` of root puts what it pulled."""

CHANNELS_FILE = "/root/.config/guix/channels.scm"
"""What ``guix pull`` of root reads when it is given no ``--channels``."""


def pull_argv(channels: str | None) -> tuple[str, ...]:
    """``guix pull``; without a channels file it takes what the image has."""
    return ("guix", "pull", *([f"--channels={channels}"] if channels else []))


def describe_argv() -> tuple[str, ...]:
    """The channels of the Guix in use, with their commits, as a channels file."""
    return ("guix", "describe", "--format=channels")


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


@dataclass(frozen=True)
class Channel:
    """A channel as a channels file spells it out."""

    name: str
    url: str
    branch: str | None = None
    commit: str | None = None


def channels(text: str) -> dict[str, Channel]:
    """The channels that a channels file spells out, by name.

    The file is a Scheme program; what it computes is not seen here, only forms such as
    ``(channel (name 'guix) (url "…"))``.  ``guix describe`` prints nothing else.
    """
    code = re.sub(r'("(?:[^"\\\\]|\\\\.)*")|;[^\n]*', lambda match: match[1] or "", text)
    found = {}
    for form in re.split(r"\(channel\s", code)[1:]:
        # The introduction has a commit of its own.
        own = form.partition("(introduction")[0]
        fields = dict(re.findall(r"\((name|url|branch|commit)\s+['\"]?([^\s()\"]+)\"?\s*\)", own))
        if "name" in fields and "url" in fields:
            found[fields["name"]] = Channel(**fields)
    return found


def commits(text: str) -> dict[str, str]:
    """The commit of each channel in what ``guix describe --format=channels`` printed."""
    return {name: channel.commit for name, channel in channels(text).items() if channel.commit}


def script(
    commands: Sequence[Sequence[str]], report: Sequence[str], folder: str, *, keep: str | None
) -> str:
    """A shell script that runs the commands in order and stops at the first that fails.

    Its standard output is the report's alone; all the rest goes to standard error.  At the end
    it collects what the commands added to the store and nothing needs; ``keep`` is a profile
    whose like is still to be built.  That nothing could be collected is no failure of a stage.
    """
    before = f"{folder}/store-before"
    collect = ("guix", "repl", "--", f"{folder}/collect.scm", before, *([keep] if keep else []))
    lines = [
        "#!/bin/sh",
        "set -eu",
        "exec 3>&1 1>&2",
        f"find /gnu/store -mindepth 1 -maxdepth 1 >{before} || true",
        *(shlex.join(command) for command in commands),
        # After a pull `guix` is another program: forget where the shell found the first one.
        "hash -r",
        f"{shlex.join(collect)} || echo 'the store could not be collected' & collecting=$!",
        f"{shlex.join(report)} >&3",
        "wait $collecting",
    ]
    return "\n".join(lines) + "\n"


def installed(report: str) -> list[str]:
    """The packages in what ``guix package --list-installed`` printed, as ``NAME@VERSION:OUTPUT``.

    The output ``out`` goes without saying, as it does in Guix.
    """
    rows = (re.split(r"\s*\t\s*", line) for line in report.splitlines() if "\t" in line)
    return sorted(
        f"{name}@{version}" + ("" if output == "out" else f":{output}")
        for name, version, output, *_ in rows
    )
