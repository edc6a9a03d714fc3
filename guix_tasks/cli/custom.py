"""Custom stages and tests of a project's ``tasks.py``, and their tasks."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from invoke.exceptions import Exit

from guix_tasks.cli.task import long_task
from guix_tasks.cli.tasks import ns
from guix_tasks.cli.tasks.lifecycle import STAGE_HELP
from guix_tasks.errors import UsageError
from guix_tasks.stages.declarations import CustomStage, declared, declared_test

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from guix_tasks.cli.session import Session

custom_stages: list[CustomStage] = []
"""Custom stages of the project's ``tasks.py``."""


def add_stage(
    name: str,
    command: str | Sequence[str],
    *,
    parent: str = "install",
    inputs: str | Sequence[str] = (),
    summary: str = "",
) -> None:
    """Add a stage and a task of the same name to a project; call it in ``tasks.py``.

    ``command`` runs in a work container of the image of ``parent``.  As in a Dockerfile, a string
    is run by the shell and a list is executed directly.  The command runs as root (unless
    ``GUIX_SANDBOX=rootless`` is set) in a directory that contains the ``inputs``: files and
    directories of the project, named relative to it.  All changes are committed, except new store
    items that no profile and no garbage collector root refers to.

    ``summary`` is shown by ``inv --list``.  ``IMAGE`` points to the stage that was added last,
    among the stages that have an image.
    """
    from guix_tasks.stages.images import STAGES

    parents = [*STAGES, *(stage.name for stage in custom_stages)]
    with _errors_in_tasks_py():
        taken = [*ns.task_names, *ns.collections]
        stage = declared(name, command, parent, inputs, parents=parents, taken=taken)
    custom_stages.append(stage)

    def body(
        session: Session,
        force: bool = False,
        upstream: bool = False,
        no_commit: bool = False,
        keep_failed: bool = False,
    ) -> None:
        from guix_tasks.stages.lifecycle import StageOptions, make_each

        options = StageOptions(
            force=force, upstream=upstream, commit=not no_commit, keep_failed=keep_failed
        )
        with session.locked_project(name, one_platform=no_commit) as project:
            make_each(project, name, options)

    body.__doc__ = summary or f"Run the custom stage {name} on {parent}."
    ns.add_task(long_task(name=name, help=STAGE_HELP)(body))


def add_test(
    name: str,
    command: str | Sequence[str],
    *,
    image: str = "",
    inputs: str | Sequence[str] = (),
    summary: str = "",
) -> None:
    """Add a task that tests the tarball of ``inv pack`` in a container without Guix.

    The tarball is unpacked at the root of a container of ``image``; without an image, the container
    is empty and has not even a shell.  ``command`` has the same form as that of a stage.  It runs
    without network, and the task fails if it fails.  The ``inputs`` are files and directories of
    the project, mounted below ``/test``.  ``summary`` is shown by ``inv --list``.
    """
    with _errors_in_tasks_py():
        taken = [*ns.task_names, *ns.collections]
        test = declared_test(name, command, image, inputs, taken=taken)

    def body(session: Session, image: str = "") -> None:
        from guix_tasks.commands.custom_test import run_pack_test

        for project in session.project().each_platform():
            run_pack_test(project, test, image)

    body.__doc__ = summary or "Test the tarball of `inv pack` without Guix."
    image_help = "image of the test container, instead of the one in tasks.py"
    ns.add_task(long_task(name=name, help={"image": image_help})(body))


@contextmanager
def _errors_in_tasks_py() -> Iterator[None]:
    """Exit with one line if ``tasks.py`` declares an invalid stage or test."""
    try:
        yield
    except UsageError as error:
        raise Exit(f"error: tasks.py: {error}", error.exit_code) from None
