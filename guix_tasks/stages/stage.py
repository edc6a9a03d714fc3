"""A stage as data: its commands, their files, and the inputs that its key is made of."""

from __future__ import annotations

import hashlib
import shlex
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from guix_tasks import guix
from guix_tasks.files import file_digest, text_digest
from guix_tasks.guix.result_paths import SUBSTITUTE_CACHE
from guix_tasks.stages.container import RESOURCES, WORK_DIRECTORY, resource_files

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


COLLECT = ("collect.scm", "profile-tools.scm")
"""Scripts that delete what a stage added to the store and does not need, before the commit."""

RECORD = (
    "record.sh", "record.scm", "database.scm", "profile-tools.scm", "reuse.sh", "assemble.sh",
    "has-git.scm",
)  # fmt: skip
"""Scripts of a stage with the warm store: they record what it has made, and assemble an image."""

STATE = (
    "/var/guix/profiles", "/var/guix/gcroots", "/etc/guix", "/root/.config/guix",
    "/root/.guix-profile",
)  # fmt: skip
"""Guix's files outside of the store and of its database, which an assembled image gets."""

MISSING_ITEMS = 113
"""Exit status of a stage's script if the warm store lacks items of the container's image."""

LOCK = (
    "caches=${XDG_CACHE_HOME:-/root/.cache}",
    'if command -v flock >/dev/null && [ -r "$caches" ]; then',
    '    exec 9<"$caches"',
    "    if ! flock -n 9; then",
    '        echo "waiting for another run that uses the caches of this image on this engine"',
    "        flock 9",
    "    fi",
    "fi",
)
"""Commands that lock the caches.  Guix itself does not lock its checkouts of channels.

The kernel of the engine's machine has this lock, so it is one for all users of the engine, and ends
with the container."""

_CHECKOUTS = (
    'for checkout in "$caches"/guix/checkouts/*; do',
    '    set -- "$checkout"/.git/objects/pack/*.pack',
    "    if [ $# -ge 25 ]; then",
    f"        guix repl -- {WORK_DIRECTORY}/has-git.scm && break",
    '        echo "Guix has no git to pack the checkout of a channel: cloning it again"',
    '        rm -rf "$checkout"',
    "    fi",
    "done",
)
"""Each update of a channel adds a pack to its checkout, and from 26 on ``update-cached-checkout``
of Guix 1.5 fails without git.  Debian's package only recommends git."""

RETRY = "retry"
"""File in ``container.WORK_DIRECTORY`` if the script runs again after a network failure."""

FORGET_SUBSTITUTES = (
    f"if [ -e {WORK_DIRECTORY}/{RETRY} ]; then",
    "    caches=${XDG_CACHE_HOME:-/root/.cache}",
    f'    rm -rf {SUBSTITUTE_CACHE}/cache/* "$caches/guix/substitute" || :',
    "fi",
)
"""Commands before a retry.  Guix keeps a server's answers for up to 36 hours, also if the server
has since lost the item."""

_CHECK_ROOTS = (
    "for link in $(find /var/guix/profiles /var/guix/gcroots -type l 2>/dev/null || true); do",
    '    item=$(readlink "$link")',
    f'    case $item in /gnu/store/*) [ -e "$item" ] || exit {MISSING_ITEMS} ;; esac',
    "done",
)


@dataclass(frozen=True)
class Stage:
    """Commands that turn one image into another."""

    name: str
    commands: Sequence[Sequence[str]]
    """Argument lists, run in order in one work container."""
    report: Sequence[str]
    """Argument list of a command that describes the result on its standard output."""
    labels: Callable[[str], Mapping[str, str]]
    """Return the image's additional labels for a report."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Files of the commands, by path below ``container.WORK_DIRECTORY``."""
    extra_inputs: Mapping[str, str] = field(default_factory=dict)
    """Additional inputs: digests by name."""
    directory: str | None = None
    """Working directory of the commands, by default that of the image."""
    fetches: str | None = None
    """Channels file of the channels that the stage fetches, or None if it fetches none."""
    as_root: bool = False
    """Whether the commands write outside the store, Guix's state and root's profiles."""
    keep: str | None = None
    """Profile whose build dependencies survive garbage collection, for the next stage."""
    pinned: Callable[[str], Stage] | None = None
    """Return the pinned stage that reproduces a report's result; its inputs become the key."""
    check: Callable[[str], None] | None = None
    """Raise ``StageError`` if a report's result must not be committed."""
    is_pure: bool = False
    """Whether the result depends on nothing of the parent's image but its Guix."""

    def inputs(self, common: Mapping[str, str]) -> dict[str, str]:
        """Return the digests of everything that determines the result, by name.

        ``common`` are the inputs that all stages share.
        """
        words = [shlex.join(command) for command in (*self.commands, self.report)]
        words += [self.keep or "", *map(file_digest, map(RESOURCES.joinpath, (*COLLECT, *RECORD)))]
        files = {name: hashlib.sha256(content).hexdigest() for name, content in self.files.items()}
        return {"command": text_digest(*words), **files, **self.extra_inputs, **common}


def stage_files(stage: Stage) -> dict[str, bytes]:
    """Return the files of a stage below ``container.WORK_DIRECTORY``; ``stage`` is its script.

    At its end the script removes store items that the commands added and nothing needs, except
    items that are needed to build a profile like ``keep``. A failed removal does not fail the
    stage.
    """
    # Outside the directory, which each start replaces, because a retry needs the first list.
    items = f"{WORK_DIRECTORY}-store-before"
    profile = [stage.keep] if stage.keep else []
    collect = shlex.join(("guix", "repl", "--", f"{WORK_DIRECTORY}/collect.scm", items, *profile))
    script = guix.script(
        stage.commands,
        stage.report,
        before=[
            *FORGET_SUBSTITUTES,
            f"[ -e {items} ] || find /gnu/store -mindepth 1 -maxdepth 1 >{items} || true",
        ],
        finish=f"{collect} || echo 'the store could not be collected'",
        after=[f"rm -f {items}"],
        start=stage.directory,
    )
    return {**stage.files, "stage": script.encode(), **resource_files(COLLECT)}


def warm_stage_files(
    stage: Stage,
    result: str,
    *,
    earlier: str = "",
    check_roots: bool,
    after: Sequence[str] = (),
) -> dict[str, bytes]:
    """Return the files of a stage whose container has the warm store.

    The script records what it has made in the directory ``result``, or takes it from the directory
    ``earlier`` if that is a result with the same inputs. With ``check_roots`` it first checks that
    the warm store has what the container's image needs. ``after`` are shell commands.
    """
    reuse = shlex.join(("sh", f"{WORK_DIRECTORY}/reuse.sh", earlier, result))
    script = guix.script(
        stage.commands,
        stage.report,
        before=(
            *([f"if {reuse} >&3; then exit; fi"] if earlier else ()),
            *FORGET_SUBSTITUTES,
            *LOCK,
            *(_CHECKOUTS if stage.fetches is not None else ()),
            *(_CHECK_ROOTS if check_roots else ()),
        ),
        finish=shlex.join(("sh", f"{WORK_DIRECTORY}/record.sh", result, stage.keep or "", *STATE)),
        after=(f"""printf '%s\\n' "$report" >{result}/report""", *after),
        start=stage.directory,
    )
    return {**stage.files, "stage": script.encode(), **resource_files(RECORD)}
