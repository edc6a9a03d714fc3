"""The demo, and the tests of guix-tasks itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from guix_tasks.cli.errors import guarded
from invoke.tasks import task

from dev.tasks import open_demo
from guix_tasks.cli.session import project_folder
from guix_tasks.cli.tasks.output import long_task

if TYPE_CHECKING:
    from invoke.context import Context


@long_task()
def demo(c: Context) -> None:
    """Make, push and run an example, on a bare machine.

    It starts an engine where there is none, and uses the settings of
    examples/offline/ alone.
    """
    with guarded(), open_demo(c, project_folder(Path.cwd())) as project:
        from dev.demo import run_demo, say_what_next

        run_demo(project)
        say_what_next(project)


@task(
    help={
        "unit": "only what needs no engine",
        "only": "only the tests that match (pytest -k)",
        "soak": "only the tests with numbers, and those for an hour",
    },
    auto_shortflags=False,
)
def test(c: Context, unit: bool = False, only: str = "", soak: bool = False) -> None:
    """Run the linters and tests of guix-tasks itself."""
    with guarded():
        from dev.checks import run_checks

        run_checks(project_folder(Path.cwd()), unit_only=unit, only=only, soak=soak)
