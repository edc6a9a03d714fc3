"""The commands of the documentation print the output that the pages show.

In a ``console`` block, ``$`` starts a command, ``>`` continues it, and the other lines must appear
in its output; ``…`` stands for any text.  A block with a title is appended to that file.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from typing import TYPE_CHECKING, NamedTuple

import pytest
from git_servers import GitServers, run_git_servers
from harness import PASSWORD, ROOT, USER, builder_environment, call, free_port
from planted_secrets import PLANTED_SECRETS
from podman_service import write_skopeo

from guix_tasks.stages.images import STAGES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import NewProject
    from harness import Docker, Project

FENCE = re.compile(r"^```(?:console|\w+ title=\"([^\"]+)\")\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = "--- the end of a command"

TUTORIAL = "docs/tutorial.md"
PAGES = [
    str(page.relative_to(ROOT))
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if FENCE.search(page.read_text(encoding="utf-8"))
]
NETWORKS = "docs/how-to/networks.md"
PRIVATE_CHANNEL = "docs/how-to/private-channel.md"
PRIVATE_REGISTRY = "docs/how-to/private-registry.md"
SUBSTITUTES = "docs/how-to/substitutes.md"


def placeholders(project: Project) -> dict[str, str]:
    """Map names on the pages to values of the test."""
    home = project.directory / "home"
    return {
        "localhost:5055/tutorial": project.image,
        "ghcr.io/me/my-image-cache": f"{project.repository}-cache",
        "ghcr.io/me/my-image": project.image,
        "ghcr.io/me/hello": f"{project.repository}-hello",
        "registry.example:5000/team/image": project.image,
        "registry.example:5000": project.image.partition("/")[0],
        "robot": USER,
        "/run/secrets/registry-token": str(home / "token"),
        "/run/secrets/channels": str(home / "channels"),
    }


class Step(NamedTuple):
    """A command, and the lines that it prints according to the page."""

    command: str
    expected: list[str]


def parse_steps(text: str) -> list[Step]:
    steps: list[Step] = []
    for title, block in FENCE.findall(text):
        if title:
            steps.append(Step(f"cat >>{title} <<'{MARK}'\n{block}{MARK}", []))
            continue
        for line in block.splitlines():
            if line.startswith("$ "):
                steps.append(Step(line[2:], []))
            elif line == ">" or line.startswith("> "):
                command, expected = steps.pop()
                steps.append(Step(f"{command}\n{line[2:]}", expected))
            else:
                steps[-1].expected.append(line)
    return steps


def missing_lines(expected: list[str], output: str) -> list[str]:
    """Return the lines that are not in an output in their order."""
    rest = output.splitlines()
    missing = []
    for line in (line for line in expected if line != "…"):
        pattern = ".*".join(
            re.escape(part) for part in re.split(r"\s*…\s*", " ".join(line.split()))
        )
        index = next(
            (n for n, real in enumerate(rest) if re.fullmatch(pattern, " ".join(real.split()))),
            None,
        )
        if index is None:
            missing.append(line)
        else:
            rest = rest[index + 1 :]
    return missing


def test_missing_lines_are_lines_that_are_not_printed_in_order() -> None:
    assert missing_lines(["a … c", "…", "d"], "a b c\nx\nd") == []
    assert missing_lines(["a", "…", "b"], "a\nb") == []
    assert missing_lines(["d", "a … c"], "a b c\nx\nd") == ["a … c"]


def write_programs(directory: Path) -> None:
    """Create a directory with ``inv``, ``guix-tasks`` and the examples of a checkout."""
    directory.mkdir()
    (directory / "examples").symlink_to(ROOT / "examples")
    for name, command in (
        ("inv", f"{ROOT}/inv"),
        ("guix-tasks", f"env PYTHONPATH={ROOT} {sys.executable} -m guix_tasks"),
    ):
        (directory / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (directory / name).chmod(0o755)


@pytest.fixture
def servers(docker: Docker, offline: Path, tmp_path: Path) -> Iterator[GitServers]:
    directory = tmp_path / "git"
    directory.mkdir()
    with run_git_servers(docker, offline, directory) as git_servers:
        yield git_servers


@pytest.fixture
def page_project(
    page: str, new_project: NewProject, offline: Path, request: pytest.FixtureRequest
) -> Project:
    """Create the project that a page assumes."""
    if page == TUTORIAL:
        return new_project()
    if page == SUBSTITUTES:
        listen = f"127.0.0.1:{free_port()}"
        return new_project(*STAGES, NETWORK="host", SUBSTITUTES_LISTEN=listen)
    if page in (NETWORKS, PRIVATE_CHANNEL):
        servers: GitServers = request.getfixturevalue("servers")
        project = new_project("base", NETWORK="host", GUIX_CHANNELS="channels.scm")
        url = "https://git.guix.gnu.org" if page == NETWORKS else f"{servers.https}/offline"
        text = (offline / "channels.scm").read_text().replace("file:///offline", url)
        (project.directory / "channels.scm").write_text(text)
        shutil.copy(servers.file("ca.pem"), project.directory / "company-ca.pem")
        if page == PRIVATE_CHANNEL:
            project.set(EXTRA_CA_FILE="company-ca.pem")
            servers.token = PLANTED_SECRETS.plant()
            account = servers.https.replace("//", f"//me:{servers.token}@")
            (project.directory / "home" / "channels").write_text(f"{account}\n")
        return project
    if page == PRIVATE_REGISTRY:
        private_registry = request.getfixturevalue("private_registry")
        project = new_project(*STAGES, repository=f"{private_registry}/team/image")
        del project.settings["IMAGE"]  # the page sets it
        project.set()
        return project
    return new_project(*STAGES)


@pytest.mark.engine
@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_print_the_shown_output(
    page: str, page_project: Project, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    if page == NETWORKS:
        mirror = f"{request.getfixturevalue('servers').https}/offline/"
        text = text.replace("https://mirror.example/guix/", mirror)
    for name, value in placeholders(page_project).items():
        text = text.replace(f"{name}:latest", value).replace(name, value)
    steps = parse_steps(text)
    needs_buildx = any(re.search(r"inv .*(buildx|manifest)", step.command) for step in steps)
    path = builder_environment("buildx")["PATH"] if needs_buildx else os.environ["PATH"]
    programs = tmp_path / "checkout"
    write_programs(programs)
    if "inv runtime.push" in text:
        write_skopeo(programs)
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
    script = "".join(f"{step.command}\necho '{MARK}'\n" for step in steps)
    result = call(["bash", "-ec", f"exec 2>&1\n{script}"], env, 240, directory)
    PLANTED_SECRETS.check_output(page, result.stdout)
    # Images of docs/how-to/small-image.md.
    page_project.docker("rmi", "hello:latest", f"{page_project.repository}-hello:latest")
    outputs = result.stdout.split(f"{MARK}\n")
    assert result.returncode == 0, outputs[-1]
    for step, output in zip(steps, outputs, strict=False):
        assert missing_lines(step.expected, output) == [], f"{step.command}:\n{output}"
