"""A project of one's own: its start, and the task of a stage that its ``tasks.py`` adds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from invoke.tasks import task

from guix_tasks.cli.errors import guarded
from guix_tasks.cli.session import opened, opened_single
from guix_tasks.cli.tasks.lifecycle import FORCE, KEEP_FAILED, NO_COMMIT, UPSTREAM
from guix_tasks.cli.tasks.output import long_task

if TYPE_CHECKING:
    from invoke.context import Context
    from invoke.tasks import Task

    from guix_tasks.stages.declarations import OwnStage, OwnTest


@task(
    help={"ci": "for which CI: github, gitlab, both, none, or auto: what Git's remote tells"},
    auto_shortflags=False,
)
def init(c: Context, ci: str = "auto") -> None:
    """Write a commented start of a project, here.

    Nothing is overwritten.
    """
    with guarded():
        from guix_tasks.commands.init import write_start
        from guix_tasks.ui.console import Console

        write_start(Path.cwd(), Console(), ci=ci, dry=bool(c.config.run.dry))


def stage_task(own: OwnStage, summary: str) -> Task[Any]:
    """The task that makes a stage of a project's own."""

    def body(
        c: Context,
        force: bool = False,
        upstream: bool = False,
        no_commit: bool = False,
        keep_failed: bool = False,
    ) -> None:
        with (opened_single if no_commit else opened)(c) as project, project.alone(own.name):
            from guix_tasks.stages.lifecycle import Wishes, make_each

            wishes = Wishes(force, upstream, False, not no_commit, keep_failed)
            make_each(project, own.name, wishes)

    body.__doc__ = summary or f"Make the stage {own.name} of this project from {own.parent}."
    options = {**FORCE, **UPSTREAM, **NO_COMMIT, **KEEP_FAILED}
    return long_task(name=own.name, help=options)(body)


def test_task(own: OwnTest, summary: str) -> Task[Any]:
    """The task that runs a test of what a project has packed."""

    def body(c: Context, image: str = "") -> None:
        with opened(c) as project:
            from guix_tasks.commands.custom_test import try_each

            try_each(project, own, image)

    body.__doc__ = summary or "Try the tarball of `inv pack` where there is no Guix."
    options = {"image": "the image in whose container it is tried, instead of the usual one"}
    return long_task(name=own.name, help=options)(body)
