"""Verify: an image tested from outside, in a fresh container."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from guix_tasks import guix
from guix_tasks.commands.push import image_to_use
from guix_tasks.errors import CheckError
from guix_tasks.stages.container import ENTRY_POINT, FOLDER, Work, guix_environment, work_container
from guix_tasks.stages.images import CHANNELS_LABEL, PACKAGES_LABEL
from guix_tasks.stages.runner import perform

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from guix_tasks.engine.api import Image
    from guix_tasks.stages.project import Project

CHECKS = ("daemon", "build", "channels", "packages", "certificates")


def verify(project: Project, stage: str | None = None) -> None:
    """Run every check and say how it went.  ``CheckError`` names those that failed.

    The image's own entry point starts the daemon, where it has one; that is what its users get.
    """
    image = image_to_use(project, stage)
    project = project.settled(image, as_root=True)
    work = Work(
        "verify",
        (f"{FOLDER}/verify",),
        {
            "verify": Path(__file__).with_suffix(".sh").read_bytes(),
            "commits": _lines(guix.commits(image.labels.get(CHANNELS_LABEL, "")).values()),
            "packages": _lines(_rows(image)),
        },
        entry_point=tuple(image.config.get("Entrypoint") or (ENTRY_POINT,)),
        environment=guix_environment(project.settings),
    )
    with work_container(project.engine, project.settings, image.id, work) as container:
        report = perform(project, container, "verify")
    if project.engine.is_dry:
        return
    answers = dict(_answers(report))
    for check in CHECKS:
        project.console.say(f"verify: {check}: {answers.get(check, 'was not reached')}")
    wrong = [check for check in CHECKS if answers.get(check) != "ok"]
    if wrong:
        raise CheckError(f"verify: {project.ledger.image} failed: {', '.join(wrong)}")


def _answers(report: str) -> Iterator[tuple[str, str]]:
    """Each check with ``ok``, or with ``failed: REASON``."""
    for line in report.splitlines():
        verdict, _, rest = line.partition(" ")
        name, _, reason = rest.partition(": ")
        yield name, f"failed: {reason}" if verdict == "failed" else verdict


def _rows(image: Image) -> Iterator[str]:
    """The packages that the image's label names, as name, version and output by tabs."""
    for package in image.labels.get(PACKAGES_LABEL, "").split():
        name, _, rest = package.partition("@")
        version, _, output = rest.partition(":")
        yield f"{name}\t{version}\t{output or 'out'}"


def _lines(texts: Iterable[str]) -> bytes:
    return "".join(f"{text}\n" for text in texts).encode()
