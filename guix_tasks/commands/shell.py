"""A shell in a work container."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from guix_tasks.commands.commit import refuse_running
from guix_tasks.commands.push import image_to_use
from guix_tasks.errors import UsageError
from guix_tasks.stages.container import Work, fill, kept_containers, refuse_second, work_container
from guix_tasks.stages.volumes import check_volumes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guix_tasks.stages.project import Project


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
        refuse_running(kept[0])
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
        check_volumes(settings, image)
        settings = project.settled(image, as_root=True).settings
        with work_container(engine, settings, image.id, work) as new:
            status = _attach(project, [*attach, new], environment)
    project.console.say("shell: the container is kept; `inv commit` makes it the image")
    return status


def _attach(project: Project, argv: Sequence[str], environment: dict[str, str]) -> int:
    if project.engine.is_dry:
        project.console.command(argv)
        return 0
    return subprocess.call(argv, env=environment)
