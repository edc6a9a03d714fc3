"""Test an image in a fresh container."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from guix_tasks import guix
from guix_tasks.commands.push import require_image
from guix_tasks.errors import CheckError
from guix_tasks.stages.container import (
    ENTRY_POINT,
    WORK_DIRECTORY,
    Work,
    guix_environment,
    unstarted_container,
    work_container,
)
from guix_tasks.stages.images import CHANNELS_LABEL, PACKAGES_LABEL
from guix_tasks.stages.runner import run_container

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from guix_tasks.engine.api import Image
    from guix_tasks.stages.project import Project

_DAEMON = b"guix-daemon"

_SCRIPT_CHUNKS = 4
"""Parts of an entry point, of at most 2 MB each, in which the daemon's name is looked for."""

CHECKS = ("daemon", "build", "channels", "packages", "certificates")


def verify(project: Project, stage: str | None = None) -> None:
    """Run all checks and print their results. Raise ``CheckError`` if a check fails."""
    image = require_image(project, stage)
    project = project.with_sandbox(image, as_root=True)
    work = Work(
        "verify",
        (f"{WORK_DIRECTORY}/verify",),
        {
            "verify": Path(__file__).with_suffix(".sh").read_bytes(),
            "commits": _to_lines(guix.commits(image.labels.get(CHANNELS_LABEL, "")).values()),
            "packages": _to_lines(_package_rows(image)),
        },
        entry_point=_entry_point(project, image),
        environment=guix_environment(project.settings),
    )
    with work_container(project.engine, project.settings, image.id, work) as container:
        report = run_container(project, container, "verify")
    if project.engine.is_dry:
        return
    results = dict(_parse_results(report))
    for check in CHECKS:
        project.console.print(f"verify: {check}: {results.get(check, 'not reached')}")
    failures = [check for check in CHECKS if results.get(check) != "ok"]
    if failures:
        raise CheckError(f"verify: {project.ledger.image} failed: {', '.join(failures)}")


def _entry_point(project: Project, image: Image) -> tuple[str, ...]:
    """Return the image's entry point if it starts Guix's daemon, as it does for users of the image.

    Otherwise return that of guix-tasks. The entry point of an application would take the checks
    for arguments, or never end.
    """
    own: Sequence[str] = image.config.get("Entrypoint") or ()
    engine = project.engine
    if not own or engine.is_dry:
        return (ENTRY_POINT,)
    with unstarted_container(engine, project.settings, image.id) as container:
        for word in own:
            chunks = engine.copy_out(container, word) if word.startswith("/") else iter(())
            if _DAEMON in b"".join(itertools.islice(chunks, _SCRIPT_CHUNKS)):
                return tuple(own)
    return (ENTRY_POINT,)


def _parse_results(report: str) -> Iterator[tuple[str, str]]:
    """Yield the name of each check with ``ok`` or ``failed: REASON``."""
    for line in report.splitlines():
        verdict, _, rest = line.partition(" ")
        name, _, reason = rest.partition(": ")
        yield name, f"failed: {reason}" if verdict == "failed" else verdict


def _package_rows(image: Image) -> Iterator[str]:
    """Yield name, version and output of each package of the image's label, separated by tabs."""
    for package in image.labels.get(PACKAGES_LABEL, "").split():
        name, _, rest = package.partition("@")
        version, _, output = rest.partition(":")
        yield f"{name}\t{version}\t{output or 'out'}"


def _to_lines(texts: Iterable[str]) -> bytes:
    return "".join(f"{text}\n" for text in texts).encode()
