"""Work done by hand: one command, a shell, and the commit of what they left."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import TYPE_CHECKING

from guix_tasks.commands.push import image_to_use
from guix_tasks.errors import EngineError, UsageError
from guix_tasks.oci.reference import quoted
from guix_tasks.settings.parsers import check_text
from guix_tasks.stages.container import (
    Work,
    drop_environment,
    fill,
    kept_containers,
    refuse_second,
    work_container,
)
from guix_tasks.stages.images import HAND_MADE, STAGE_LABEL
from guix_tasks.stages.runner import commit_image
from guix_tasks.ui.format import human_size, human_time

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guix_tasks.engine.api import Container
    from guix_tasks.stages.project import Project


def _refuse_broken(word: str) -> None:
    """Refuse an argument that would reach the command as another: an engine takes UTF-8 alone."""
    try:
        check_text(word)
    except ValueError as error:
        raise UsageError(f"run: {quoted(word)} {error}") from None


def run(project: Project, argv: Sequence[str], *, stage: str | None, keep: bool) -> int:
    """Run one command in a work container of ``IMAGE``; its exit status.

    With ``keep`` the container of a command that succeeded is left for ``commit``.
    """
    if not argv:
        raise UsageError("run: no command; say `inv run -- COMMAND ARGUMENT…`")
    for word in argv:
        _refuse_broken(word)
    if keep:
        refuse_second(project.engine, project.settings)
    image = image_to_use(project, stage)
    project = project.settled(image, as_root=True)
    work = Work("run", tuple(argv), {}, keep=keep)
    with work_container(project.engine, project.settings, image.id, work) as container:
        for is_error, data in project.engine.run(container):
            project.console.stream(data, error=is_error)
        project.console.end_streams()
        status = project.engine.wait(container)
        if keep and status:
            # What failed is not for committing.
            project.engine.remove(container)
        elif keep:
            project.console.say("run: the container is kept; `inv commit` makes it the image")
    return status


def shell(project: Project, docker: Sequence[str], environment: dict[str, str], *,
          stage: str | None, fresh: bool) -> int:  # fmt: skip
    """A shell in a work container of ``IMAGE``; its exit status.

    The container is left for ``commit``.  One that is there is entered again, so that nothing
    done in it is lost, unless ``fresh`` is asked for.  ``docker`` is the command line that
    attaches the terminal.
    """
    if not sys.stdin.isatty():
        raise UsageError("shell: standard input is no terminal; use `inv run -- COMMAND`")
    engine, settings = project.engine, project.settings
    kept = kept_containers(engine, settings)
    work = Work("shell", (), {}, keep=True, tty=True)
    attach = [*docker, "start", "--attach", "--interactive"]
    if kept and not fresh and "-shell-" in kept[0].name:
        _refuse_running(kept[0])
        project.console.say("shell: the work container that is there is entered again")
        fill(engine, settings, kept[0].id, work)
        status = _attach(project, [*attach, kept[0].id], environment)
    else:
        drop = kept if fresh else []
        for container in drop:
            engine.remove(container.id)
        if not drop:
            refuse_second(project.engine, project.settings)
        image = image_to_use(project, stage)
        settings = project.settled(image, as_root=True).settings
        with work_container(engine, settings, image.id, work) as new:
            status = _attach(project, [*attach, new], environment)
    project.console.say("shell: the container is kept; `inv commit` makes it the image")
    return status


def commit(project: Project) -> None:
    """Commit the work container that was left, as ``IMAGE``; where there is none, say so."""
    engine, console = project.engine, project.console
    project.ledger.drop_unnamed()
    kept = kept_containers(engine, project.settings)
    if not kept:
        console.say("commit: nothing to commit")
        return
    container, reference = kept[0], str(project.ledger.image)
    _refuse_running(container)
    # What ended a shell says nothing of what was done in it.
    if "-shell-" not in container.name and (status := engine.wait(container.id)):
        raise UsageError(
            f"the command of {container.name} ended with status {status}, so it is not committed; "
            "`inv clean --work` drops it"
        )
    parent = engine.image(container.image)
    if parent is None:
        raise EngineError(f"the image of {container.name} is gone, so its configuration is unknown")
    drop_environment(engine, container.id)
    before, started = engine.image(reference), time.monotonic()
    with console.step("commit", has_log=False):
        image = commit_image(project, container.id, parent, reference, {STAGE_LABEL: HAND_MADE})
        project.ledger.keep(before)
        engine.remove(container.id)
    took = human_time(time.monotonic() - started)
    console.say(f"commit: {reference}, {human_size(image.size)}, {took}")


def rollback(project: Project) -> None:
    """Let ``IMAGE`` be what it was before it last moved; called again, what it is now."""
    image = project.ledger.roll_back()
    if image is None:
        raise UsageError(f"{project.ledger.image} has never been anything else on this engine")
    project.console.say(f"rollback: {project.ledger.image} is {image.id} again")


def _attach(project: Project, argv: Sequence[str], environment: dict[str, str]) -> int:
    if project.engine.is_dry:
        project.console.command(argv)
        return 0
    return subprocess.call(argv, env=environment)


def _refuse_running(container: Container) -> None:
    if container.running:
        raise UsageError(f"{container.name} is still running; leave its shell first")
