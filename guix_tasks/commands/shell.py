"""Open a shell in a work container."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from guix_tasks.commands.commit import check_stopped
from guix_tasks.commands.push import require_image
from guix_tasks.errors import UsageError
from guix_tasks.stages.container import (
    WORK_DIRECTORY,
    Work,
    check_no_kept_container,
    fill,
    kept_containers,
    kept_task,
    work_container,
)
from guix_tasks.stages.images import check_layers
from guix_tasks.stages.make import committed_work
from guix_tasks.stages.volumes import check_volumes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guix_tasks.stages.project import Project

_TRACES = (
    "/var/guix/daemon-socket", "/var/guix/db", "/var/guix/gc.lock", "/var/guix/substitute",
    "/var/guix/temproots", "/root/.bash_history", "/root/.cache", "/run", "/etc/hosts",
)  # fmt: skip
"""Files that the daemon, the shell or the engine writes if nothing is done in a container."""

_TRIES, _PAUSE = 20, 0.1
"""Number of looks at a container until it counts as detached, and seconds between them."""


def shell(project: Project, docker: Sequence[str], environment: dict[str, str], *,
          stage: str | None, fresh: bool) -> int:  # fmt: skip
    """Open a shell in a work container of ``IMAGE`` and return its exit status.

    The container is kept for ``commit`` if a file has changed. The next shell re-enters a kept
    container, so that no work is lost, unless ``fresh`` is true. ``docker`` is the command line of
    the engine's client, with its options; it attaches the terminal and gets ``environment``.
    """
    if not sys.stdin.isatty():
        raise UsageError("shell: standard input is not a terminal; use `inv run -- COMMAND`")
    engine, settings = project.engine, project.settings
    kept = kept_containers(engine, settings)
    work = Work("shell", (), {}, keep=True, tty=True)
    attach = [*docker, "start", "--attach", "--interactive"]
    if kept and not fresh and kept_task(kept[0])[0] == "shell":
        check_stopped(kept[0])
        project.console.print("shell: re-entering the kept work container")
        fill(engine, settings, kept[0].id, committed_work(project, kept[0].image, work))
        status = _attach(project, [*attach, kept[0].id], environment)
    else:
        if fresh:
            for container in kept:
                engine.remove(container.id)
        else:
            check_no_kept_container(engine, settings)
        image = require_image(project, stage)
        check_volumes(settings, image)
        check_layers(engine, image)
        project = project.with_sandbox(image, as_root=True)
        settings, work = project.settings, committed_work(project, image.id, work)
        with work_container(engine, settings, image.id, work) as container_id:
            # A rootless daemon gets the directories of Guix.
            granted = [] if engine.is_dry else engine.changed_paths(container_id)
            status = _attach(project, [*attach, container_id], environment)
        if not engine.is_dry and _is_unchanged(project, container_id, granted):
            engine.remove(container_id)
            project.console.print("shell: no file has changed; removed the container")
            return status
    project.console.print("shell: kept the container; `inv commit` commits it as IMAGE")
    return status


def _is_unchanged(project: Project, container: str, before: Sequence[str]) -> bool:
    """Return whether a container has ended and has changed only what every container changes.

    ``before`` are the changes before its start.
    """
    # The engine's list of containers is a moment late.
    for _ in range(_TRIES):
        if not any(kept.running for kept in kept_containers(project.engine, project.settings)):
            break
        time.sleep(_PAUSE)
    else:
        return False
    paths = {PurePosixPath(path) for path in project.engine.changed_paths(container)}
    # If the entry point was killed, its files stay and count as changes.
    own = (PurePosixPath(path) for path in before if not path.startswith(WORK_DIRECTORY))
    # A directory is listed if something in it changed.
    changed = paths.difference(own, *(path.parents for path in paths))
    traces = (*_TRACES, *(mount.target for mount in project.settings.mounts))
    return all(any(path.is_relative_to(trace) for trace in traces) for path in changed)


def _attach(project: Project, argv: Sequence[str], environment: dict[str, str]) -> int:
    if project.engine.is_dry:
        project.console.command(argv)
        return 0
    return subprocess.call(argv, env=environment)
