"""The commands of the pages are run, and print what the pages show.

In a ``console`` block, ``$`` starts a command, ``>`` continues it, and the other lines must appear
in its output; ``…`` stands for any text.  A block with a title is appended to that file.
"""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING, NamedTuple

import pytest
from harness import PASSWORD, ROOT, USER, builder_environment, call, free_port
from planted import PLANTED

from guix_tasks.stages.images import STAGES

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import NewProject
    from harness import Project

FENCE = re.compile(r"^```(?:console|\w+ title=\"([^\"]+)\")\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = "--- the end of a command"

TUTORIAL = "docs/tutorial.md"
PAGES = [
    str(page.relative_to(ROOT))
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if FENCE.search(page.read_text(encoding="utf-8"))
]
PRIVATE_REGISTRY = "docs/how-to/private-registry.md"
SUBSTITUTES = "docs/how-to/substitutes.md"


def placeholders(project: Project) -> dict[str, str]:
    """Return the values of the test by the names on the pages."""
    return {
        "localhost:5055/tutorial": project.image,
        "ghcr.io/me/my-image-cache": f"{project.repository}-cache",
        "ghcr.io/me/my-image": project.image,
        "ghcr.io/me/hello": f"{project.repository}:hello",
        "registry.example:5000/team/image": project.image,
        "registry.example:5000": project.image.partition("/")[0],
        "robot": USER,
        "/run/secrets/registry-token": str(project.directory / "home" / "token"),
    }


class Step(NamedTuple):
    """A command, and the lines that it prints according to the page."""

    command: str
    shown: list[str]


def steps(text: str) -> list[Step]:
    found: list[Step] = []
    for title, block in FENCE.findall(text):
        if title:
            found.append(Step(f"cat >>{title} <<'{MARK}'\n{block}{MARK}", []))
            continue
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append(Step(line[2:], []))
            elif line == ">" or line.startswith("> "):
                command, shown = found.pop()
                found.append(Step(f"{command}\n{line[2:]}", shown))
            else:
                found[-1].shown.append(line)
    return found


def missing(shown: list[str], output: str) -> list[str]:
    """Return the lines that are not in an output in their order."""
    rest = output.splitlines()
    lost = []
    for line in (line for line in shown if line != "…"):
        pattern = ".*".join(
            re.escape(part) for part in re.split(r"\s*…\s*", " ".join(line.split()))
        )
        at = next(
            (n for n, real in enumerate(rest) if re.fullmatch(pattern, " ".join(real.split()))),
            None,
        )
        if at is None:
            lost.append(line)
        else:
            rest = rest[at + 1 :]
    return lost


def test_a_line_that_is_not_printed_is_missing() -> None:
    assert missing(["a … c", "…", "d"], "a b c\nx\nd") == []
    assert missing(["a", "…", "b"], "a\nb") == []
    assert missing(["d", "a … c"], "a b c\nx\nd") == ["a … c"]


def write_programs(directory: Path) -> None:
    """Make a directory with ``inv`` and the examples of a checkout, and with ``guix-tasks``."""
    directory.mkdir()
    (directory / "examples").symlink_to(ROOT / "examples")
    for name, command in (
        ("inv", f"{ROOT}/inv"),
        ("guix-tasks", f"env PYTHONPATH={ROOT} {sys.executable} -m guix_tasks"),
    ):
        (directory / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (directory / name).chmod(0o755)


@pytest.fixture
def page_project(page: str, new_project: NewProject, request: pytest.FixtureRequest) -> Project:
    """Make the project that a page assumes."""
    if page == TUTORIAL:
        return new_project()
    if page == SUBSTITUTES:
        listen = f"127.0.0.1:{free_port()}"
        return new_project(*STAGES, NETWORK="host", SUBSTITUTES_LISTEN=listen)
    if page == PRIVATE_REGISTRY:
        locked = request.getfixturevalue("locked")
        project = new_project(*STAGES, repository=f"{locked}/team/image")
        del project.settings["IMAGE"]  # the page sets it
        project.set()
        return project
    return new_project(*STAGES)


@pytest.mark.engine
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_print_what_it_shows(
    page: str, page_project: Project, tmp_path: Path
) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, value in placeholders(page_project).items():
        text = text.replace(f"{name}:latest", value).replace(name, value)
    commands = steps(text)
    needs_buildx = any(re.search(r"inv .*(buildx|manifest)", step.command) for step in commands)
    path = builder_environment("buildx")["PATH"] if needs_buildx else os.environ["PATH"]
    programs = tmp_path / "checkout"
    write_programs(programs)
    directory = programs if page == TUTORIAL else page_project.directory
    if page != TUTORIAL:
        (directory / "project.env").rename(directory / ".env")
        (directory / "tasks.py").write_text("from guix_tasks.tasks import ns\n")
        (directory / "Dockerfile").symlink_to(ROOT / "Dockerfile")
        (directory / "home" / "token").write_text(PASSWORD)
    env = page_project.environment | {
        "PATH": f"{programs}:{path}",
        "DOCKER_CONFIG": str(page_project.docker.directory),
    }
    del env["ENV_FILE"]
    script = "".join(f"{step.command}\necho '{MARK}'\n" for step in commands)
    result = call(["bash", "-ec", f"exec 2>&1\n{script}"], env, 240, directory)
    PLANTED.look_at_output(page, result.stdout)
    page_project.docker("rmi", "hello:latest")  # loaded by docs/how-to/small-image.md
    outputs = result.stdout.split(f"{MARK}\n")
    assert result.returncode == 0, outputs[-1]
    for step, output in zip(commands, outputs, strict=False):
        assert missing(step.shown, output) == [], f"{step.command}:\n{output}"
