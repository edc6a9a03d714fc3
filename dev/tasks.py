"""The tasks of a checkout of guix-tasks itself: the demo, and its linters and tests."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from invoke.tasks import task

from guix_tasks.cli.errors import guarded
from guix_tasks.cli.session import chosen_display, docker_variables, open_engine_for, open_project
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
    """Make, push and run an example, on a bare machine.

    It starts an engine where there is none, and uses the settings of
    examples/offline/ alone.
    """
    with guarded(), open_demo(c, CHECKOUT) as project:
        from dev.demo import run_demo, say_what_next

        run_demo(project)
        say_what_next(project)


@task(
    help={
        "unit": "only what needs no engine",
        "only": "only the tests that match (pytest -k)",
        "soak": "only the tests with numbers, and those for an hour",
        "durations": "how many of the slowest tests to list",
    },
    auto_shortflags=False,
)
def test(
    c: Context, unit: bool = False, only: str = "", soak: bool = False, durations: int = 10
) -> None:
    """Run the linters and tests of guix-tasks itself."""
    with guarded():
        from dev.checks import run_checks

        run_checks(CHECKOUT, unit_only=unit, only=only, soak=soak, durations=durations)


@contextmanager
def open_demo(c: Context, folder: Path) -> Iterator[Project]:
    """The offline example, with all that it needs set up: engine, base image, registry.

    Its settings are its own: neither the user's nor the environment's.
    """
    from dev.demo import ENV_FILE, prepare
    from guix_tasks.errors import UsageError
    from guix_tasks.settings import load_isolated
    from guix_tasks.ui.console import Console, Display, settled_display

    if c.config.run.dry:
        raise UsageError("the demo does real work only; leave --dry out")
    chosen = settled_display(Display(chosen_display() or "auto"), sys.stderr, os.environ)
    console = Console(display=chosen)
    prepare(engine_or_private(c, console), console, folder)
    yield open_project(c, replace(load_isolated(folder / ENV_FILE), output=chosen))


def engine_or_private(c: Context, console: Console) -> Engine:
    """The engine of this machine; where there is none, a private one is started."""
    from guix_tasks.bootstrap.engine import private_engine
    from guix_tasks.engine.discovery import find_engine
    from guix_tasks.errors import NoEngineError

    try:
        find_engine(docker_variables(os.environ), private_engine().socket)
    except NoEngineError:
        private_engine().up(console)
    return open_engine_for(c, {}, console)
