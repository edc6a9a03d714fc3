"""The demo: the whole lifecycle on whatever machine this is, with real everything.

It uses the settings of ``examples/offline/`` alone, neither the user's nor the environment's, so
it can push to no registry but the local one.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from dev.offline import make_material
from guix_tasks.bootstrap.base_image import BASE_TAG, make_base
from guix_tasks.bootstrap.engine import private_engine
from guix_tasks.bootstrap.registry import registry_for
from guix_tasks.commands.clean import clean
from guix_tasks.commands.commit import commit
from guix_tasks.commands.push import push
from guix_tasks.commands.verify import verify
from guix_tasks.engine.api import ContainerSpec, run_to_end
from guix_tasks.errors import CheckError
from guix_tasks.stages.container import PROJECT_LABEL, network
from guix_tasks.stages.container import project as project_name
from guix_tasks.stages.images import STAGES
from guix_tasks.stages.lifecycle import Lifecycle, Wishes
from guix_tasks.stages.transfer import pull
from guix_tasks.ui.format import human_size, human_time

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from guix_tasks.engine.api import Engine
    from guix_tasks.stages.project import Project
    from guix_tasks.ui.console import Console

ENV_FILE = "examples/offline/.env"
GREETING = "Hello, world!"


def prepare(engine: Engine, console: Console, folder: Path) -> None:
    """Make what the example starts from: a base image, a registry, channels and substitutes."""
    if engine.image(BASE_TAG) is None:
        make_base(engine, console, BASE_TAG)
    make_material(engine, console, BASE_TAG, folder / "examples" / "offline")
    registry_for(engine).up(console)


def say_what_next(project: Project) -> None:
    """Say what is left running, and how to go on."""
    lines = [
        f"\nBy hand: ENV_FILE={ENV_FILE} ./inv pull install push",
        "For real: cp .env.example .env, say there what you want, then ./inv pull install push",
        "The registry goes on running; `./inv registry.down` stops it.",
    ]
    private = private_engine()
    if project.engine.info().url == private.url:
        lines.append("So does the private Docker Engine; `./inv engine.down` stops it.")
        lines.append(private.how_by_hand())
    for line in lines:
        project.console.say(line)


class Stopwatch:
    """The steps of the demo, with the seconds that each took."""

    def __init__(self, project: Project) -> None:
        self._project = project
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        self._project.console.say(f"\n== {name}")
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started


def run_demo(project: Project) -> None:
    """Base, pull, install, commit, verify and push; then away with it, back, and run it.

    Ends with a table.  Raises ``CheckError`` where the image that came back does not greet.
    """
    watch, lifecycle = Stopwatch(project), Lifecycle(project)
    steps: dict[str, Callable[[], object]] = {
        **{stage: partial(lifecycle.make, stage, Wishes()) for stage in STAGES},
        "commit": lambda: commit(project),
        "verify": lambda: verify(project),
    }
    for name, step in steps.items():
        with watch.step(name):
            step()
    sizes = {stage: _size(project, project.ledger.tag(stage)) for stage in STAGES}
    with watch.step("push"):
        (digest,) = push(project).values()
    with watch.step("pull it back, run hello"):
        clean(project)
        _greet(project, f"{project.settings.image.name}@{digest}")
    project.console.say("")
    project.console.table(
        ("step", "time", "size"),
        [(name, human_time(took), sizes.get(name, "")) for name, took in watch.seconds.items()],
    )
    project.console.result(f"{project.settings.image.name}@{digest}")


def _size(project: Project, reference: str) -> str:
    image = project.engine.image(reference)
    return human_size(image.size) if image else ""


def _greet(project: Project, reference: str) -> None:
    """Run hello in what the registry holds, as anybody would who pulls it."""
    engine = project.engine
    pull(project, reference)
    image = engine.image(reference)
    if image is None:
        raise CheckError(f"the engine pulled {reference} and does not have it")
    spec = ContainerSpec(
        name=f"guix-tasks-demo-{image.id.removeprefix('sha256:')[:12]}",
        image=reference,
        command=(*(image.config.get("Entrypoint") or ()), "hello"),
        labels={PROJECT_LABEL: project_name(project.settings)},
        network=network(engine, project.settings),
    )
    said = b""
    for _, data in run_to_end(engine, spec, partial(_failed, reference)):
        project.console.stream(data)
        said += data
    engine.untag(reference)
    if GREETING not in said.decode():
        raise CheckError(f"hello in {reference} said {said!r}")


def _failed(reference: str, status: int) -> CheckError:
    return CheckError(f"hello in {reference} ended with status {status}; its output is above")
