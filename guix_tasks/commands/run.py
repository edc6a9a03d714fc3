"""Run one command in a work container."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING

from guix_tasks.commands.push import require_image
from guix_tasks.errors import UsageError
from guix_tasks.oci.reference import quoted
from guix_tasks.settings.parsers import check_text
from guix_tasks.stages.container import Work, check_no_kept_container, work_container
from guix_tasks.stages.images import check_layers
from guix_tasks.stages.make import committed_work
from guix_tasks.stages.volumes import check_volumes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guix_tasks.stages.project import Project


def run(
    project: Project,
    argv: Sequence[str],
    *,
    stage: str | None,
    keep: bool,
    stdin: IO[bytes] | None = None,
) -> int:
    """Run one command in a work container of ``IMAGE`` and return its exit status.

    The command reads ``stdin``. With ``keep``, the container of a successful command is kept for
    ``commit``.

    Raise ``UsageError`` if there is no command or if an argument is not valid UTF-8 text, because
    the engine would change it.
    """
    if not argv:
        raise UsageError("run: the command is missing; use `inv run -- COMMAND ARGUMENT…`")
    try:
        for argument in argv:
            check_text(argument)
    except ValueError as error:
        raise UsageError(f"run: {quoted(argument)} {error}") from None
    if keep:
        check_no_kept_container(project.engine, project.settings)
    image = require_image(project, stage)
    if keep:
        check_volumes(project.settings, image)
        check_layers(project.engine, image)
    project = project.with_sandbox(image, as_root=True)
    work = Work("run", tuple(argv), {}, keep=keep, stdin=stdin is not None)
    if keep:
        work = committed_work(project, image.id, work)
    with work_container(project.engine, project.settings, image.id, work) as container:
        for is_error, data in project.engine.run(container, stdin):
            project.console.stream(data, error=is_error)
        project.console.end_streams()
        status = project.engine.wait(container)
        if keep and status:
            project.engine.remove(container)
        elif keep:
            project.console.print("run: kept the container; `inv commit` commits it as IMAGE")
    return status
