"""Demo: the whole lifecycle with a real engine, registry and Guix on any machine.

It uses only the settings of ``examples/offline/``, not those of the user or the environment, so it
can push only to the local registry.
"""

from __future__ import annotations

import socket
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from dev.offline import make_material
from guix_tasks.bootstrap.base_image import BASE_TAG, make_base
from guix_tasks.bootstrap.engine import private_engine
from guix_tasks.bootstrap.registry import PORT, LocalRegistry, registry_for
from guix_tasks.commands.clean import clean
from guix_tasks.commands.push import push
from guix_tasks.commands.verify import verify
from guix_tasks.engine.api import ContainerSpec, run_to_end
from guix_tasks.errors import CheckError
from guix_tasks.stages.container import network, project_labels
from guix_tasks.stages.images import STAGES
from guix_tasks.stages.lifecycle import Lifecycle, StageOptions
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


def prepare(engine: Engine, console: Console, directory: Path) -> int:
    """Create the base image, registry, channels and substitutes of the example.

    Return the port of the registry: the usual one, or a free one if another program uses that.
    """
    if engine.image(BASE_TAG) is None:
        make_base(engine, console, BASE_TAG)
    make_material(engine, console, BASE_TAG, directory / "examples" / "offline")
    registry = registry_for(engine)
    if isinstance(registry, LocalRegistry) and not registry.running() and registry.port_error():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            registry = registry_for(engine, free.getsockname()[1])
        console.print(
            f"port {PORT} is in use; the registry of the demo is localhost:{registry.port}"
        )
    registry.up(console)
    return registry.port


def print_next_steps(project: Project) -> None:
    """Print the running services and the next commands."""
    port = project.settings.image.registry.rpartition(":")[2]
    is_usual = port == str(PORT)
    variables = f"ENV_FILE={ENV_FILE}" + ("" if is_usual else f" IMAGE={project.settings.image}")
    down = "./inv registry.down" + ("" if is_usual else f" --port {port}")
    lines = [
        "\nThe image is in the registry, and no longer on the engine.",
        f"Repeat this example: {variables} ./inv base pull install push",
        "Make your own image: README.md, or the tutorial in docs/tutorial.md",
        f"The registry is still running; `{down}` stops it.",
    ]
    private = private_engine()
    if project.engine.info().url == private.url:
        lines.append("The private Docker Engine is still running; `./inv engine.down` stops it.")
        lines.append(private.shell_hint())
    for line in lines:
        project.console.print(line)


def run_demo(project: Project) -> None:
    """Build, verify and push the image, delete it, then pull it and run ``hello``.

    Print a table of durations and sizes.  Raise ``CheckError`` if the output of ``hello`` is wrong.
    """
    lifecycle = Lifecycle(project)
    seconds: dict[str, float] = {}

    @contextmanager
    def measured(name: str) -> Iterator[None]:
        project.console.print(f"\n== {name}")
        started = time.monotonic()
        yield
        seconds[name] = time.monotonic() - started

    steps: dict[str, Callable[[], object]] = {
        **{stage: partial(lifecycle.make, stage, StageOptions()) for stage in STAGES},
        "verify": lambda: verify(project),
    }
    for name, step in steps.items():
        with measured(name):
            step()
    images = {stage: project.ledger.find(stage) for stage in STAGES}
    sizes = {stage: human_size(image.size) for stage, image in images.items() if image}
    with measured("push"):
        (digest,) = push(project).values()
    with measured("pull the pushed image and run hello"):
        clean(project)
        _greet(project, f"{project.settings.image.name}@{digest}")
    project.console.print("")
    project.console.table(
        ("step", "time", "size"),
        [(name, human_time(took), sizes.get(name, "")) for name, took in seconds.items()],
    )
    project.console.result(f"{project.settings.image.name}@{digest}")


def _greet(project: Project, reference: str) -> None:
    """Pull the image from the registry and run ``hello`` in it."""
    engine = project.engine
    pull(project, reference)
    image = engine.image(reference)
    if image is None:
        raise CheckError(f"cannot find {reference} in the engine after the pull")
    spec = ContainerSpec(
        name=f"guix-tasks-demo-{image.id.removeprefix('sha256:')[:12]}",
        image=reference,
        command=(*(image.config.get("Entrypoint") or ()), "hello"),
        labels=project_labels(project.settings),
        network=network(engine, project.settings),
    )

    def failed(status: int) -> CheckError:
        return CheckError(f"hello in {reference} failed with status {status}; its output is above")

    output = b""
    for _, data in run_to_end(engine, spec, failed):
        project.console.stream(data)
        output += data
    engine.untag(reference)
    if GREETING not in output.decode():
        raise CheckError(f"hello in {reference} printed {output!r}, not {GREETING!r}")
