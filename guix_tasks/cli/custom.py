"""Stages and tests that a project's ``tasks.py`` adds, and their tasks."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from invoke.exceptions import Exit

from guix_tasks.cli.session import custom_stages, opened, opened_single
from guix_tasks.cli.tasks import ns
from guix_tasks.cli.tasks.lifecycle import FORCE, KEEP_FAILED, NO_COMMIT, UPSTREAM
from guix_tasks.cli.tasks.output import long_task

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from invoke.context import Context
    from invoke.tasks import Task

    from guix_tasks.stages.declarations import OwnStage, OwnTest


def add_stage(
    name: str,
    command: str | Sequence[str],
    *,
    parent: str = "install",
    inputs: str | Sequence[str] = (),
    summary: str = "",
) -> None:
    """Add a stage, and the task of its name, to those of the project; for its ``tasks.py``.

    The ``command`` is run in a work container of the ``parent``'s image; as in a Dockerfile, a
    text is for the shell, a list is run as it is.  It is run by root (unless
    ``GUIX_SANDBOX=rootless`` is set), in a folder that holds the ``inputs``: files and folders of
    the project, by their names relative to it.  What it makes is committed, but for what is new
    in the store and no profile or root keeps.

    ``summary`` is what ``inv --list`` says.  ``IMAGE`` follows the stage that was added last, of
    those that were made.
    """
    stage = declare(name, command, parent, inputs, taken=_names())
    ns.add_task(stage_task(stage, summary))


def add_test(
    name: str,
    command: str | Sequence[str],
    *,
    image: str = "",
    inputs: str | Sequence[str] = (),
    summary: str = "",
) -> None:
    """Add a task that tries the tarball of ``inv pack`` where there is no Guix.

    The tarball is unpacked at the root of a container of ``image``, or of one that has nothing at
    all, not even a shell; the ``command``, written as that of a stage, is run there without
    network, and fails as any other does.  The ``inputs`` are files and folders of the project,
    which it finds below ``/test``.
    """
    test = declare_test(name, command, image, inputs, taken=_names())
    ns.add_task(test_task(test, summary))


def _names() -> list[str]:
    return [*ns.task_names, *ns.collections]


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


def declare(
    name: str,
    command: str | Sequence[str],
    parent: str,
    inputs: str | Sequence[str],
    *,
    taken: Collection[str],
) -> OwnStage:
    """Add a stage to those that each project here has."""
    from guix_tasks.stages.declarations import declared
    from guix_tasks.stages.images import STAGES

    parents = [*STAGES, *(each.name for each in custom_stages)]
    with _importing():
        own = declared(name, command, parent, inputs, parents=parents, taken=taken)
    custom_stages.append(own)
    return own


def declare_test(
    name: str,
    command: str | Sequence[str],
    image: str,
    inputs: str | Sequence[str],
    *,
    taken: Collection[str],
) -> OwnTest:
    """A test of what is packed."""
    from guix_tasks.stages.declarations import declared_test

    with _importing():
        return declared_test(name, command, image, inputs, taken=taken)


@contextmanager
def _importing() -> Iterator[None]:
    """While ``tasks.py`` is imported: what is wrong there ends ``inv`` with one line."""
    from guix_tasks.errors import UsageError

    try:
        yield
    except UsageError as error:
        raise Exit(f"error: tasks.py: {error}", error.exit_code) from None
