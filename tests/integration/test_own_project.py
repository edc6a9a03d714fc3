"""A custom project: the built wheel in a fresh virtual environment, from an empty directory."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import pytest
from harness import call, one_error

from guix_tasks.commands.init import FILES
from guix_tasks.stages.images import STAGES

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import NewProject
    from harness import Docker, Project, Result

TASKS = """
from guix_tasks.tasks import add_stage, ns

add_stage(
    "deps",
    "guix package --profile=/var/guix/profiles/deps --manifest=guix/deps.scm",
    inputs=["guix"],
)
add_stage("tested", ["sh", "test.sh"], parent="deps", inputs="test.sh", summary="Run our tests.")
"""

PROFILE = "/var/guix/profiles/per-user/root/guix-profile"

TEST = """
/var/guix/profiles/deps/bin/tar --version | head -n 1 >/tested
hello >>/tested
"""


@pytest.fixture
def program(programs_of_wheel: Path, tmp_path: Path) -> Path:
    """Programs that nothing of this checkout is seen by."""
    (tmp_path / "empty").mkdir()
    return programs_of_wheel


def run(program: Path, directory: Path, *arguments: str, **env: str) -> Result:
    ours = {"PATH": os.environ["PATH"], "HOME": str(directory.parent), "LANG": "C.UTF-8", **env}
    return call([str(program), *arguments], ours, 60, directory)


def test_from_an_empty_folder(program: Path, tmp_path: Path) -> None:
    directory = tmp_path / "empty"
    listed = run(program / "guix-tasks", directory, "--list")
    assert "  init " in listed.stdout, listed.stderr
    result = run(program / "guix-tasks", directory, "init")
    assert result.returncode == 0, result.stderr
    files = (path for path in directory.rglob("*") if path.is_file())
    assert {str(path.relative_to(directory)) for path in files} == set(FILES)
    for name in ("inv", "guix-tasks"):
        listed = run(program / name, directory, "--list")
        assert listed.returncode == 0, listed.stderr
        for task in (*STAGES, "push", "buildx.build", "init"):
            assert f"  {task} " in listed.stdout


def test_what_is_not_python_is_in_the_wheel_too(program: Path, tmp_path: Path) -> None:
    for shell in ("bash", "zsh", "fish"):
        script = run(program / "guix-tasks", tmp_path, f"--print-completion-script={shell}")
        assert "_guix_tasks" in script.stdout, script.stderr
    version = run(program / "guix-tasks", tmp_path, "--version").stdout
    assert re.fullmatch(r"guix-tasks \d+\.\d+\.\d+, Invoke 3\.\d+\.\d+\n", version)


def test_python_can_be_asked_too(program: Path, tmp_path: Path) -> None:
    directory = tmp_path / "empty"
    result = run(program / "python", directory, "-m", "guix_tasks", "--dry", "init")
    assert result.returncode == 0, result.stderr
    assert "init: would write tasks.py" in result.stderr
    assert [*directory.iterdir()] == []


def test_a_folder_that_may_not_be_written_is_one_line(program: Path, tmp_path: Path) -> None:
    directory = tmp_path / "empty"
    (directory / ".github").write_text("a file where a directory is to be")
    error = one_error(run(program / "guix-tasks", directory, "init", "--ci=github"), 2)
    assert "/.github" in error


def test_a_tasks_py_of_another_kind_is_in_nobodys_way(program: Path, tmp_path: Path) -> None:
    directory = tmp_path / "empty"
    (directory / "tasks.py").write_text("from invoke import task\n")
    result = run(program / "guix-tasks", directory, "init")
    assert result.returncode == 0, result.stderr
    assert "init: tasks.py exists, unchanged" in result.stderr


def test_guix_tasks_is_inv_where_there_is_a_tasks_py(program: Path, tmp_path: Path) -> None:
    directory = tmp_path / "empty"
    (directory / "tasks.py").write_text(TASKS)
    (directory / "below").mkdir()
    listed = run(program / "guix-tasks", directory / "below", "--list")
    assert "  deps " in listed.stdout, listed.stderr
    assert "Run our tests." in listed.stdout


@pytest.fixture
def own(new_project: NewProject, program: Path, registry: object) -> Project:
    """The start that `init` writes, with the channels of the offline example."""
    project = new_project(DOCKERFILE="Dockerfile", BUILD_CONTEXT=".", GUIX_PACKAGES="greet")
    # What is in the env file of the tests comes after .env, and so wins.
    project.program = [str(program / "guix-tasks")]
    project.ok("init")
    project.program = [str(program / "inv")]
    return project


def write_stages(project: Project) -> None:
    (project.directory / "tasks.py").write_text(TASKS)
    (project.directory / "guix").mkdir()
    (project.directory / "guix/deps.scm").write_text('(specifications->manifest \'("tar"))\n')
    (project.directory / "test.sh").write_text(TEST)


@pytest.mark.engine
def test_the_start_shows_what_it_would_do(own: Project) -> None:
    with own.unharmed():
        result = own.ok("--dry", "base")
    assert f"+ docker build --file={own.directory}/Dockerfile" in result.stderr


@pytest.mark.engine
def test_a_project_with_stages_of_its_own(own: Project, docker: Docker) -> None:
    """From the files of `init` to what a registry has, and all that may go wrong between."""
    write_stages(own)
    cache = f"{own.repository}-cache"
    own.set(CACHE_IMAGE=cache)
    # --- made, with all parents
    said = own.ok("tested", timeout=600).stderr
    for child, parent in (("tested", "deps"), ("deps", "install"), ("install", "pull")):
        assert f"{child}: {own.tag(parent)} is missing, so {parent} comes first" in said
    assert own.id() == own.id("tested")
    # hello is of the manifest that init wrote, greet of GUIX_PACKAGES
    tested = docker.run(own.image, "sh", "-c", f"cat /tested {PROFILE}/share/greeting; hello")
    assert "(GNU tar)" in tested.stdout, tested.stderr
    assert tested.stdout.count("Hello, world!") == 2
    assert "hello from a channel" in tested.stdout
    assert docker.run(own.image, "ls", "/var/guix/guix-tasks").returncode != 0
    assert docker.config(own.image)["Cmd"] == ["sh"]  # of the Dockerfile
    own.ok("verify")
    # --- and not made again
    assert own.ok("deps", "tested").stderr.count(": up to date") == 2
    # --- an input that changes
    (own.directory / "test.sh").write_text(f"{TEST}echo more >>/tested\n")
    status = own.ok("status").stdout
    assert "stale: test.sh changed" in status
    assert "run `inv tested --upstream`" in one_error(own.inv("push"), 2)
    own.ok("tested", "push")
    assert docker.run(own.image, "cat", "/tested").stdout.endswith("more\n")
    # --- a command that fails
    (own.directory / "test.sh").write_text("echo it broke; exit 3\n")
    with own.unharmed():
        error = one_error(own.inv("tested"), 4)
    (kept,) = (own.directory / "out/failed").iterdir()
    assert "tested: the command failed with exit status 3" in error
    assert kept.name.startswith("tested-")
    assert "it broke" in (kept / "log").read_text()
    # --- another machine
    (own.directory / "test.sh").write_text(TEST)
    before = own.tags()
    assert {"t-deps", "t-tested"} <= set(before)
    own.ok("clean")
    assert own.tags() == {}
    assert f"tested: taken from {cache}:tested-" in own.ok("tested").stderr
