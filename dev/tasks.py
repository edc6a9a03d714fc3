"""Tasks of a checkout of guix-tasks: the demo, the linters and the tests."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from dev import CHECKOUT
from guix_tasks.cli.task import long_task, task

if TYPE_CHECKING:
    from guix_tasks.cli.session import Session


@long_task()
def demo(session: Session) -> None:
    """Build, push and run an example image.

    It starts a private engine if there is no engine, and uses only the
    settings of examples/offline/.
    """
    from dev.demo import ENV_FILE, prepare, print_next_steps, run_demo
    from guix_tasks.bootstrap.engine import private_engine
    from guix_tasks.errors import NoEngineError, UsageError
    from guix_tasks.settings import load_settings
    from guix_tasks.ui.console import Display

    if session.is_dry:
        raise UsageError("cannot run the demo with --dry; leave --dry out")
    output = Display(session.output or "auto")
    session.display(output)
    try:
        engine = session.engine({})
    except NoEngineError:
        private_engine().up(session.console)
        engine = session.engine({})
    # The settings name files that this makes in a fresh checkout.
    port = prepare(engine, session.console, CHECKOUT)
    settings = load_settings((CHECKOUT / ENV_FILE).parent, CHECKOUT, {})
    image = replace(settings.image, registry=f"localhost:{port}")
    project = session.open(session.use(replace(settings, output=output, image=image)))
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

    run_checks(unit_only=unit, only=only, soak=soak, durations=durations)
