"""All tasks of a call use settings that are read from a pipe."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import pytest
from harness import call

if TYPE_CHECKING:
    from conftest import NewProject
    from harness import Project, Result

pytestmark = pytest.mark.engine

FORMS = {
    "process substitution": "ENV_FILE=<(cat project.env)",
    "standard input": "cat project.env | ENV_FILE=/dev/stdin",
    "here-document": "ENV_FILE=/dev/stdin",
    "named pipe": "ENV_FILE=pipe",
    "secret": "DOCKER_USERNAME=me DOCKER_PASSWORD_FILE=<(echo a password)",
}


def run_in_shell(project: Project, form: str, *arguments: str) -> Result:
    """Run the command line in a shell that passes the settings in one of the forms."""
    environment = {**project.environment, **({} if form == "secret" else {"ENV_FILE": ""})}
    end = " <project.env" if form == "here-document" else ""
    command = f'{FORMS[form]} "$@"{end}'
    argv = ["bash", "-c", command, "bash", *project.program, *arguments]
    return call(argv, environment, 120, project.directory)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "secret"])
def test_second_task_uses_the_settings_of_the_first(new_project: NewProject, form: str) -> None:
    project = new_project("base")
    writer = None
    if form == "named pipe":
        os.mkfifo(project.directory / "pipe")
        content = (project.directory / "project.env").read_bytes()
        writer = threading.Thread(target=(project.directory / "pipe").write_bytes, args=(content,))
        writer.start()
    result = run_in_shell(project, form, "base", "push", "status")
    if writer:
        writer.join()
    assert result.returncode == 0, result.stderr
    assert "base: up to date" in result.stderr
    assert f"{project.image}@sha256:" in result.stdout
    assert f"{project.repository}:t-base" in result.stdout


def test_second_task_uses_the_secret_of_the_first(new_project: NewProject) -> None:
    project = new_project("base")
    result = run_in_shell(project, "secret", "base", "status")
    assert result.returncode == 0, result.stderr
    assert "a password" not in result.stdout + result.stderr
