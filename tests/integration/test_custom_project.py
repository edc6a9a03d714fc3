"""Custom projects with the built wheel in a fresh virtual environment."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import pytest
from harness import call, expect_error

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
def program(wheel_programs: Path, tmp_path: Path) -> Path:
    """Return programs that do not use this checkout, and create an empty directory."""
    (tmp_path / "empty").mkdir()
    return wheel_programs


def run(program: Path, directory: Path, *arguments: str, **env: str) -> Result:
    base = {"PATH": os.environ["PATH"], "HOME": str(directory.parent), "LANG": "C.UTF-8"}
    return call([str(program), *arguments], {**base, **env}, 60, directory)


def test_init_creates_a_project_in_an_empty_directory(program: Path, tmp_path: Path) -> None:
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


def test_wheel_has_completion_scripts_and_metadata(program: Path, tmp_path: Path) -> None:
    for shell in ("bash", "zsh", "fish"):
        script = run(program / "guix-tasks", tmp_path, f"--print-completion-script={shell}")
        assert "_guix_tasks" in script.stdout, script.stderr
    version = run(program / "guix-tasks", tmp_path, "--version").stdout
    assert re.fullmatch(r"guix-tasks \d+\.\d+\.\d+, Invoke 3\.\d+\.\d+\n", version)


def test_package_is_runnable_as_a_python_module(program: Path, tmp_path: Path) -> None:
    directory = tmp_path / "empty"
    result = run(program / "python", directory, "-m", "guix_tasks", "--dry", "init")
    assert result.returncode == 0, result.stderr
    assert "init: would write tasks.py" in result.stderr
    assert [*directory.iterdir()] == []


def test_init_reports_a_file_in_place_of_a_directory(program: Path, tmp_path: Path) -> None:
    directory = tmp_path / "empty"
    (directory / ".github").write_text("a file")
    error = expect_error(run(program / "guix-tasks", directory, "init", "--ci=github"), 2)
    assert "/.github" in error


def test_init_keeps_a_tasks_py_without_guix_tasks(program: Path, tmp_path: Path) -> None:
    directory = tmp_path / "empty"
    (directory / "tasks.py").write_text("from invoke import task\n")
    result = run(program / "guix-tasks", directory, "init")
    assert result.returncode == 0, result.stderr
    assert "init: tasks.py exists, unchanged" in result.stderr


def test_guix_tasks_lists_the_tasks_of_the_project(program: Path, tmp_path: Path) -> None:
    directory = tmp_path / "empty"
    (directory / "tasks.py").write_text(TASKS)
    (directory / "subdirectory").mkdir()
    listed = run(program / "guix-tasks", directory / "subdirectory", "--list")
    assert "  deps " in listed.stdout, listed.stderr
    assert "Run our tests." in listed.stdout


@pytest.fixture
def custom(new_project: NewProject, program: Path, registry: object) -> Project:
    """Create a project with `init`, and use the channels of the offline example."""
    project = new_project(DOCKERFILE="Dockerfile", BUILD_CONTEXT=".", GUIX_PACKAGES="greet")
    # The env file of the tests has precedence over .env.
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
def test_custom_stages_are_made_updated_pushed_and_cached(custom: Project, docker: Docker) -> None:
    write_stages(custom)
    cache = f"{custom.repository}-cache"
    custom.set(CACHE_IMAGE=cache)
    # --- the first run makes all parents
    log = custom.ok("tested", timeout=600).stderr
    for child, parent in (("tested", "deps"), ("deps", "install"), ("install", "pull")):
        assert f"{child}: {custom.tag(parent)} is missing, so {parent} comes first" in log
    assert custom.id() == custom.id("tested")
    # hello is from the manifest that init wrote, greet from GUIX_PACKAGES
    tested = docker.run(custom.image, "sh", "-c", f"cat /tested {PROFILE}/share/greeting; hello")
    assert "(GNU tar)" in tested.stdout, tested.stderr
    assert tested.stdout.count("Hello, world!") == 2
    assert "hello from a channel" in tested.stdout
    assert docker.run(custom.image, "ls", "/var/guix/guix-tasks").returncode != 0
    assert docker.config(custom.image)["Cmd"] == ["sh"]  # from the Dockerfile
    custom.ok("verify")
    # --- the second run does nothing
    assert custom.ok("deps", "tested").stderr.count(": up to date") == 2
    # --- an input changes
    (custom.directory / "test.sh").write_text(f"{TEST}echo more >>/tested\n")
    status = custom.ok("status").stdout
    assert "stale: test.sh changed" in status
    assert "run `inv tested --upstream`" in expect_error(custom.inv("push"), 2)
    custom.ok("tested", "push")
    assert docker.run(custom.image, "cat", "/tested").stdout.endswith("more\n")
    # --- a command fails
    (custom.directory / "test.sh").write_text("echo it broke; exit 3\n")
    with custom.assert_unchanged():
        error = expect_error(custom.inv("tested"), 4)
    (diagnostics,) = (custom.directory / "out/failed").iterdir()
    assert "tested: the command failed with exit status 3" in error
    assert diagnostics.name.startswith("tested-")
    assert "it broke" in (diagnostics / "log").read_text()
    # --- another machine
    (custom.directory / "test.sh").write_text(TEST)
    assert {"t-deps", "t-tested"} <= custom.tags().keys()
    custom.ok("clean")
    assert custom.tags() == {}
    assert f"tested: taken from {cache}:tested-" in custom.ok("tested").stderr
