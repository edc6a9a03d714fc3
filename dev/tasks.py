"""Tasks of a checkout of guix-tasks: the demo, the linters and the tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from guix_tasks.cli.task import long_task, task

if TYPE_CHECKING:
    from guix_tasks.cli.session import Session
    from guix_tasks.engine.api import Engine
    from guix_tasks.stages.project import Project

CHECKOUT = Path(__file__).parents[1]


@long_task()
def demo(session: Session) -> None:
    """Build, push and run an example image.

    It starts a private engine if there is no engine, and uses only the
    settings of examples/offline/.
    """
    from dev.demo import print_next_steps, run_demo

    project = open_demo(session, CHECKOUT)
    run_demo(project)
    print_next_steps(project)


@task(
    help={
        "unit": "run only the linters and the tests without an engine",
        "only": "run only the tests that match an expression (pytest -k)",
        "soak": "run only the repeated random tests, for an hour",
        "durations": "the number of slow tests to list",
    },
)
def test(
    session: Session, unit: bool = False, only: str = "", soak: bool = False, durations: int = 10
) -> None:
    """Run the linters and tests of guix-tasks."""
    from dev.checks import run_checks

    run_checks(CHECKOUT, unit_only=unit, only=only, soak=soak, durations=durations)


def open_demo(session: Session, directory: Path) -> Project:
    """Set up the engine, base image and registry of the offline example, and open its project.

    Settings of the user and of the environment are ignored.
    """
    from dev.demo import ENV_FILE, prepare
    from guix_tasks.errors import UsageError
    from guix_tasks.settings import load_isolated
    from guix_tasks.ui.console import Display

    if session.is_dry:
        raise UsageError("cannot run the demo with --dry; leave --dry out")
    output = Display(session.output or "auto")
    session.display(output)
    # The settings name files that this makes in a fresh checkout.
    port = prepare(engine_or_private(session), session.console, directory)
    settings = load_isolated(directory / ENV_FILE)
    image = replace(settings.image, registry=f"localhost:{port}")
    return session.open(session.use(replace(settings, output=output, image=image)))


def engine_or_private(session: Session) -> Engine:
    """Return the engine of this machine; start a private one if there is none."""
    from guix_tasks.bootstrap.engine import private_engine
    from guix_tasks.errors import NoEngineError

    try:
        return session.engine({})
    except NoEngineError:
        private_engine().up(session.console)
    return session.engine({})
