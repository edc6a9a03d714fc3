"""What bad input gets: a line that says what is wrong, a status, and nothing changed."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from harness import ROOT, call, inv_argv, one_error, without

from guix_tasks.engine.discovery import DEFAULT_SOCKET

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import NewProject
    from harness import Result

START = "ARG BASE_IMAGE\nFROM ${BASE_IMAGE}\n"
SETPRIV = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--")


def inv(directory: Path, *arguments: str, **environment: str) -> Result:
    """The command line where nothing is configured but what is said here."""
    env = {"PATH": os.environ["PATH"], "HOME": str(directory), **environment}
    return call(inv_argv(*arguments), env, 60, directory)


# --- settings


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("IMAGE=localhost:5055/Capital", "project.env:2: IMAGE: "),
        ("IMAGE=https://localhost/x", "project.env:2: IMAGE: "),
        ("IMAGE=x/y@sha256:0", "project.env:2: IMAGE: "),
        ("IMAGE='x/y", "project.env:2: not NAME=VALUE"),
        ("IMAGE", "project.env:2: IMAGE: has no '='"),
        ("GUIX_PACKAGE=hello", "did you mean GUIX_PACKAGES?"),
        ("PLATFORMS=linux/sparc", "project.env:2: PLATFORMS: "),
        ("GUIX_CHANNELS=nope.scm", "project.env:2: GUIX_CHANNELS: "),
        ("GUIX_MANIFEST=nope.scm", "project.env:2: GUIX_MANIFEST: "),
        ("GUIX_PACKAGES=--help", "project.env:2: GUIX_PACKAGES: "),
        ("GUIX_SUBSTITUTE_KEYS=nope.pub", "project.env:2: GUIX_SUBSTITUTE_KEYS: "),
        ("MOUNTS=nope:/there", "project.env:2: MOUNTS: "),
        ("GUIX_SANDBOX=none", "project.env:2: GUIX_SANDBOX: "),
        ("STAGE_MEMORY=much", "project.env:2: STAGE_MEMORY: "),
        ("STAGE_TIMEOUT=soon", "project.env:2: STAGE_TIMEOUT: "),
        ("DOCKER_PASSWORD_FILE=nope\nDOCKER_USERNAME=me", "project.env:2: DOCKER_PASSWORD_FILE: "),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "project.env").write_text(f"# mine\n{line}\n")
    result = inv(tmp_path, "base", "push", ENV_FILE="project.env")
    assert words in one_error(result, 2)


def test_all_that_is_bad_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("IMAGE=No\nPLATFORMS=no\n")
    result = inv(tmp_path, "status", GUIX_CHANNELS="nope.scm", ENV_FILE="nope.env")
    assert result.returncode == 2
    assert sorted(line.split(": ")[1] for line in result.stderr.splitlines()) == [
        ".env:1",
        ".env:2",
        "environment",
        "environment",
    ]


# --- the engine


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("unix:///no/such/docker.sock", "no such file"),
        ("tcp://127.0.0.1:1", "connection refused"),
        ("tcp://registry.invalid:2375", "registry.invalid"),
        ("127.0.0.1", "127.0.0.1"),
        ("nonsense", "nonsense"),
        ("unix://", "unix://"),
        ("npipe:////./pipe/docker", "npipe"),
    ],
)
def test_an_engine_that_is_not_there(tmp_path: Path, host: str, words: str) -> None:
    error = one_error(inv(tmp_path, "status", DOCKER_HOST=host), 3)
    assert words in error
    assert "DOCKER_HOST" in error


@pytest.mark.skipif(DEFAULT_SOCKET.exists(), reason="this machine has an engine of its own")
def test_no_engine_at_all(tmp_path: Path) -> None:
    assert "`inv engine.up`" in one_error(inv(tmp_path, "status"), 3)


def test_a_context_that_is_not_there(tmp_path: Path) -> None:
    assert "'nope'" in one_error(inv(tmp_path, "status", DOCKER_CONTEXT="nope"), 3)


def test_certificates_that_are_not_there(tmp_path: Path) -> None:
    docker = {"DOCKER_HOST": "tcp://127.0.0.1:1", "DOCKER_TLS_VERIFY": "1"}
    result = inv(tmp_path, "status", **docker, DOCKER_CERT_PATH=str(tmp_path))
    assert "DOCKER_CERT_PATH" in one_error(result, 3)


@pytest.fixture
def closed_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A socket that something listens at, and that nobody may use."""
    monkeypatch.chdir(tmp_path)  # for a short path
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("docker.sock")
        listener.listen()
        Path("docker.sock").chmod(0)
        yield f"unix://{tmp_path}/docker.sock"


def test_no_permission_on_the_socket(tmp_path: Path, closed_socket: str) -> None:
    # To root a file is never closed, unless it gives that privilege up.
    prefix = SETPRIV if os.geteuid() == 0 else ()
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "DOCKER_HOST": closed_socket}
    error = one_error(call([*prefix, *inv_argv("status")], env, 60, tmp_path), 3)
    assert closed_socket in error
    assert "the group" in error


# --- a Python that lacks something


@pytest.mark.parametrize("package", ["docker", "dotenv", "requests"])
@pytest.mark.parametrize("task", ["status", "pull", "registry.up", "demo"])
def test_a_missing_package_is_named(tmp_path: Path, package: str, task: str) -> None:
    directory = ROOT if task == "demo" else tmp_path
    error = one_error(inv(directory, task, **without(package, tmp_path)), 2)
    assert f"cannot import the package {package}" in error
    assert "./inv" in error


# --- builds


@pytest.mark.engine
def test_a_dockerfile_that_builds(new_project: NewProject, builder: dict[str, str]) -> None:
    project = new_project(BUILD_ARGS="\"'WHAT=a b'\"")
    project.dockerfile(f"{START}ARG WHAT\nRUN echo $WHAT >/what\n")
    assert project.inv("base", env=builder).returncode == 0
    assert project.docker.run(project.image, "cat", "/what").stdout == "a b\n"


@pytest.mark.engine
def test_a_dockerfile_that_does_not_build(new_project: NewProject, builder: dict[str, str]) -> None:
    project = new_project("base")
    project.dockerfile(f"{START}RUN echo this is why >&2 && exit 7\n")
    with project.unharmed():
        result = project.inv("base", env=builder)
    error = one_error(result, 6)
    assert "context/Dockerfile: " in error
    assert "7" in error
    assert "this is why" in result.stderr


@pytest.mark.engine
def test_a_dockerfile_with_a_mistake(new_project: NewProject, builder: dict[str, str]) -> None:
    project = new_project("base")
    project.dockerfile(f"{START}RUM true\n")
    with project.unharmed():
        error = one_error(project.inv("base", env=builder), 6)
    assert "context/Dockerfile: " in error
    assert "RUM" in error


@pytest.mark.engine
@pytest.mark.both_stores
def test_a_base_image_that_is_nowhere(new_project: NewProject, builder: dict[str, str]) -> None:
    project = new_project("base")
    project.dockerfile(START)
    project.set(BASE_IMAGE=f"{project.repository}:nope")
    with project.unharmed():
        error = one_error(project.inv("base", env=builder), 6)
    assert f"cannot get the base image {project.repository}:nope: " in error
    assert "BASE_IMAGE" in error


@pytest.mark.engine
@pytest.mark.parametrize("setting", ["DOCKERFILE", "BUILD_CONTEXT"])
def test_nothing_to_build_from(
    new_project: NewProject, builder: dict[str, str], setting: str
) -> None:
    project = new_project("base", **{setting: "nope"})
    with project.unharmed():
        assert setting in one_error(project.inv("base", env=builder), 2)


# --- stages


@pytest.mark.engine
def test_a_package_that_guix_does_not_know(new_project: NewProject) -> None:
    project = new_project("base", "pull")
    with project.unharmed():
        result = project.inv("install", "--package", "no-such-package")
    error = one_error(result, 4)
    assert "install: no-such-package: unknown package" in error
    assert "`inv run -- guix search no-such-package`" in error


@pytest.mark.engine
def test_channels_that_do_not_parse_are_an_error_before_work(new_project: NewProject) -> None:
    project = new_project("base", GUIX_CHANNELS="mine.scm")
    (project.directory / "mine.scm").write_text("(list (channel\n")
    with project.unharmed():
        assert "mine.scm:1: ( is not closed; " in one_error(project.inv("pull"), 2)


@pytest.mark.engine
def test_a_manifest_that_does_not_parse_is_an_error_of_guix(new_project: NewProject) -> None:
    project = new_project("base", "pull", GUIX_MANIFEST="mine.scm")
    (project.directory / "mine.scm").write_text("(list (channel\n")
    with project.unharmed():
        assert "install: the command failed" in one_error(project.inv("install"), 4)


@pytest.mark.engine
def test_channels_that_do_not_fit_the_lock_name_update(new_project: NewProject) -> None:
    project = new_project("base", "pull", GUIX_CHANNELS="mine.scm")
    text = '(list (channel (name \'other) (url "https://other.test")))\n'
    (project.directory / "mine.scm").write_text(text)
    with project.unharmed():
        assert "--update" in one_error(project.inv("pull"), 2)


@pytest.mark.engine
def test_a_base_without_guix(new_project: NewProject) -> None:
    project = new_project(GUIX_SUBSTITUTE_KEYS="")
    project.dockerfile(f"{START}RUN rm /usr/bin/guix*\n")
    project.ok("base")
    with project.unharmed():
        result = project.inv("pull")
    assert "pull: the command failed" in one_error(result, 4)
    assert "this image has no guix-daemon" in result.stderr


@pytest.mark.engine
@pytest.mark.parametrize("task", ["push", "verify", "run -- true", "push --stage=pull"])
def test_there_is_no_image(new_project: NewProject, task: str) -> None:
    project = new_project()
    with project.unharmed():
        assert project.image in one_error(project.inv(*task.split()), 2)


@pytest.mark.engine
@pytest.mark.parametrize("task", ["push", "verify", "run"])
def test_there_is_no_such_stage(new_project: NewProject, task: str) -> None:
    project = new_project("base")
    with project.unharmed():
        error = one_error(project.inv(task, "--stage=nope", "--", "true"), 2)
    assert "'nope'" in error
    assert "install" in error


@pytest.mark.engine
def test_a_parent_that_fails_stops_the_child(new_project: NewProject) -> None:
    project = new_project()
    project.dockerfile(f"{START}RUN false\n")
    with project.unharmed():
        result = project.inv("install", "push")
    one_error(result, 6)
    assert f"install: {project.tag('pull')} is missing, so pull comes first" in result.stderr
    assert f"pull: {project.tag('base')} is missing, so base comes first" in result.stderr
