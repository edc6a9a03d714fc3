"""Tasks of a checkout of guix-tasks: the demo, the linters and the tests."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from invoke.tasks import task

from guix_tasks.cli.errors import report_errors
from guix_tasks.cli.session import display_option, docker_variables, open_engine_for, open_project
from guix_tasks.cli.tasks.output import long_task

if TYPE_CHECKING:
    from collections.abc import Iterator

    from invoke.context import Context

    from guix_tasks.engine.api import Engine
    from guix_tasks.stages.project import Project
    from guix_tasks.ui.console import Console

CHECKOUT = Path(__file__).parents[1]


@long_task()
def demo(c: Context) -> None:
    """Build, push and run an example image.

    It starts a private engine if there is no engine, and uses only the
    settings of examples/offline/.
    """
    with report_errors(), open_demo(c, CHECKOUT) as project:
        from dev.demo import print_next_steps, run_demo

        run_demo(project)
        print_next_steps(project)


@task(
    help={
        "unit": "run only the linters and the tests without an engine",
        "only": "run only the tests that match an expression (pytest -k)",
        "soak": "run only the repeated random tests, for an hour",
        "durations": "the number of slow tests to list",
    },
    auto_shortflags=False,
)
def test(
    c: Context, unit: bool = False, only: str = "", soak: bool = False, durations: int = 10
) -> None:
    """Run the linters and tests of guix-tasks."""
    with report_errors():
        from dev.checks import run_checks

        run_checks(CHECKOUT, unit_only=unit, only=only, soak=soak, durations=durations)


@contextmanager
def open_demo(c: Context, directory: Path) -> Iterator[Project]:
    """Set up the engine, base image and registry of the offline example, and open its project.

    Settings of the user and of the environment are ignored.
    """
    from dev.demo import ENV_FILE, prepare
    from guix_tasks.errors import UsageError
    from guix_tasks.settings import load_isolated
    from guix_tasks.ui.console import Console, Display, resolve_display

    if c.config.run.dry:
        raise UsageError("cannot run the demo with --dry; leave --dry out")
    display = resolve_display(Display(display_option() or "auto"), sys.stderr, os.environ)
    console = Console(display=display)
    prepare(engine_or_private(c, console), console, directory)
    yield open_project(c, replace(load_isolated(directory / ENV_FILE), output=display))


def engine_or_private(c: Context, console: Console) -> Engine:
    """Return the engine of this machine; start a private one if there is none."""
    from guix_tasks.bootstrap.engine import private_engine
    from guix_tasks.engine.discovery import find_engine
    from guix_tasks.errors import NoEngineError

    try:
        find_engine(docker_variables(os.environ), private_engine().socket)
    except NoEngineError:
        private_engine().up(console)
    return open_engine_for(c, {}, console)
