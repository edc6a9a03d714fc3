"""The built-in stages, and how each finds the image that it starts from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guix_tasks.errors import EngineError, UsageError
from guix_tasks.ledger import PACKAGES_LABEL
from guix_tasks.stage import run_stage
from guix_tasks.stages.base import build_base
from guix_tasks.stages.install import install_stage
from guix_tasks.stages.pull import pull_stage

if TYPE_CHECKING:
    from guix_tasks.engine import Image
    from guix_tasks.stage import Project


def base(project: Project, *, upstream: bool = False) -> None:  # noqa: ARG001
    """Build the base stage, which has no stage above it."""
    build_base(project)


def pull(project: Project, *, commit: bool = True, upstream: bool = False) -> None:
    """Run ``guix pull`` on the base stage, and commit."""
    run_stage(
        project,
        pull_stage(project.settings),
        parent_image(project, "pull", upstream=upstream),
        commit=commit,
    )


def install(project: Project, *, commit: bool = True, upstream: bool = False) -> None:
    """Run ``guix package`` on the pull stage, and commit."""
    stage = install_stage(project.settings)
    before = _packages(project)
    run_stage(project, stage, parent_image(project, "install", upstream=upstream), commit=commit)
    after = _packages(project)
    gone = before - after
    if gone and after:
        project.console.say(f"install: no longer in the image: {' '.join(sorted(gone))}")


RUN = {"base": base, "pull": pull, "install": install}


def parent_image(project: Project, stage: str, *, upstream: bool) -> Image:
    """The image that a stage starts from; made first, with one line that says so, if missing.

    A stale one is made anew with ``upstream``, and is a ``UsageError`` without.
    """
    ledger = project.ledger
    parent = ledger.parent_of(stage)
    if parent is None:
        raise AssertionError(f"{stage} has no parent stage")
    if ledger.find(parent) is None:
        project.console.say(f"{stage}: {ledger.tag(parent)} is missing, so {parent} comes first")
        RUN[parent](project, upstream=upstream)
    elif why := ledger.stale(parent):
        if not upstream:
            raise UsageError(
                f"{parent} is stale ({why}); run `inv {parent}`, or `inv {stage} --upstream`"
            )
        RUN[parent](project, upstream=True)
    image = ledger.find(parent)
    if image is None:
        raise EngineError(f"the engine has lost {ledger.tag(parent)}; run it again")
    return image


def _packages(project: Project) -> set[str]:
    image = project.ledger.find("install")
    return set(image.labels.get(PACKAGES_LABEL, "").split()) if image else set()
