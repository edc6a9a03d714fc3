"""Task that creates a project."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from guix_tasks.cli.task import task

if TYPE_CHECKING:
    from guix_tasks.cli.session import Session


@task(help={"ci": "also write the CI file of github or gitlab"})
def init(session: Session, ci: str = "none") -> None:
    """Create a commented project in this directory.

    Existing files are not overwritten.
    """
    from guix_tasks.commands.init import write_start

    write_start(Path.cwd(), session.console, ci=ci, dry=session.is_dry)
