"""Task that creates a project."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from invoke.tasks import task

from guix_tasks.cli.errors import report_errors

if TYPE_CHECKING:
    from invoke.context import Context


@task(
    help={"ci": "CI files: github, gitlab, both, none, or auto (from the Git remote)"},
    auto_shortflags=False,
)
def init(c: Context, ci: str = "auto") -> None:
    """Create a commented project in this directory.

    Existing files are not overwritten.
    """
    with report_errors():
        from guix_tasks.commands.init import write_start
        from guix_tasks.ui.console import Console

        write_start(Path.cwd(), Console(), ci=ci, dry=bool(c.config.run.dry))
