"""Errors for invalid input: one line with the reason, an exit status, and no changes."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from harness import ROOT, call, expect_error, hide_packages, inv_argv

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import NewProject
    from harness import Result

START = "ARG BASE_IMAGE\nFROM ${BASE_IMAGE}\n"
SETPRIV = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--")


def inv(directory: Path, *arguments: str, **environment: str) -> Result:
    """Run the command line with no configuration except the given environment."""
    env = {"PATH": os.environ["PATH"], "HOME": str(directory), **environment}
    return call(inv_argv(*arguments), env, 60, directory)


# --- settings


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("IMAGE=https://localhost/x", "project.env:2: IMAGE: "),
        ("IMAGE='x/y", "project.env:2: not NAME=VALUE"),
        ("IMAGE", "project.env:2: IMAGE: has no '='"),
        ("GUIX_PACKAGE=hello", "did you mean GUIX_PACKAGES?"),
        ("GUIX_CHANNELS=nope.scm", "project.env:2: GUIX_CHANNELS: "),
        ("DOCKER_PASSWORD_FILE=nope\nDOCKER_USERNAME=me", "project.env:2: DOCKER_PASSWORD_FILE: "),
    ],
)
def test_invalid_line_is_reported_with_its_number(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "project.env").write_text(f"# mine\n{line}\n")
    result = inv(tmp_path, "base", "push", ENV_FILE="project.env")
    assert message in expect_error(result, 2)


def test_all_invalid_settings_are_reported_together(tmp_path: Path) -> None:
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
    ("host", "message"),
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
def test_unreachable_engine_is_reported(tmp_path: Path, host: str, message: str) -> None:
    error = expect_error(inv(tmp_path, "status", DOCKER_HOST=host), 3)
    assert message in error
    assert "DOCKER_HOST" in error


def test_missing_context_is_reported(tmp_path: Path) -> None:
    assert "'nope'" in expect_error(inv(tmp_path, "status", DOCKER_CONTEXT="nope"), 3)


def test_missing_certificates_are_reported(tmp_path: Path) -> None:
    docker = {"DOCKER_HOST": "tcp://127.0.0.1:1", "DOCKER_TLS_VERIFY": "1"}
    result = inv(tmp_path, "status", **docker, DOCKER_CERT_PATH=str(tmp_path))
    assert "DOCKER_CERT_PATH has no certificates" in expect_error(result, 3)


@pytest.fixture
def closed_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A socket with a listener, to which no user except root may connect."""
    monkeypatch.chdir(tmp_path)  # for a short path
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("docker.sock")
        listener.listen()
        Path("docker.sock").chmod(0)
        yield f"unix://{tmp_path}/docker.sock"


def test_missing_permission_on_the_socket_is_reported(tmp_path: Path, closed_socket: str) -> None:
    # Root can open every socket, unless setpriv removes the capabilities for it.
    prefix = SETPRIV if os.geteuid() == 0 else ()
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "DOCKER_HOST": closed_socket}
    error = expect_error(call([*prefix, *inv_argv("status")], env, 60, tmp_path), 3)
    assert closed_socket in error
    assert "the group" in error


# --- missing packages


@pytest.mark.parametrize("package", ["docker", "dotenv", "requests"])
@pytest.mark.parametrize("task", ["status", "pull", "registry.up", "demo"])
def test_missing_package_is_reported(tmp_path: Path, package: str, task: str) -> None:
    directory = ROOT if task == "demo" else tmp_path
    error = expect_error(inv(directory, task, **hide_packages(package, tmp_path)), 2)
    assert f"cannot import the package {package}" in error
    assert "./inv" in error


# --- builds


@pytest.mark.engine
def test_dockerfile_is_built(new_project: NewProject, builder: dict[str, str]) -> None:
    project = new_project(BUILD_ARGS="\"'WHAT=a b'\"")
    project.write_dockerfile(f"{START}ARG WHAT\nRUN echo $WHAT >/what\n")
    assert project.inv("base", env=builder).returncode == 0
    assert project.docker.run(project.image, "cat", "/what").stdout == "a b\n"


@pytest.mark.engine
def test_failed_build_is_reported(new_project: NewProject, builder: dict[str, str]) -> None:
    project = new_project("base")
    project.write_dockerfile(f"{START}RUN echo this is why >&2 && exit 7\n")
    with project.assert_unchanged():
        result = project.inv("base", env=builder)
    error = expect_error(result, 6)
    assert "context/Dockerfile: " in error
    assert "7" in error
    assert "this is why" in result.stderr


@pytest.mark.engine
def test_syntax_error_of_a_dockerfile_is_reported(
    new_project: NewProject, builder: dict[str, str]
) -> None:
    project = new_project("base")
    project.write_dockerfile(f"{START}RUM true\n")
    with project.assert_unchanged():
        error = expect_error(project.inv("base", env=builder), 6)
    assert "context/Dockerfile: " in error
    assert "RUM" in error


@pytest.mark.engine
@pytest.mark.both_stores
def test_missing_base_image_is_reported(new_project: NewProject, builder: dict[str, str]) -> None:
    project = new_project("base")
    project.write_dockerfile(START)
    project.set(BASE_IMAGE=f"{project.repository}:nope")
    with project.assert_unchanged():
        error = expect_error(project.inv("base", env=builder), 6)
    assert f"cannot get the base image {project.repository}:nope: " in error
    assert "BASE_IMAGE" in error


# --- stages


@pytest.mark.engine
def test_syntax_error_of_a_manifest_is_reported_by_guix(new_project: NewProject) -> None:
    project = new_project("base", "pull", GUIX_MANIFEST="mine.scm")
    (project.directory / "mine.scm").write_text("(list (channel\n")
    with project.assert_unchanged():
        assert ": missing closing parenthesis, and" in expect_error(project.inv("install"), 4)


@pytest.mark.engine
def test_base_without_guix_is_reported(new_project: NewProject) -> None:
    project = new_project(GUIX_SUBSTITUTE_KEYS="")
    project.write_dockerfile(f"{START}RUN rm /usr/bin/guix*\n")
    project.ok("base")
    with project.assert_unchanged():
        result = project.inv("pull")
    assert "pull: the command failed" in expect_error(result, 4)
    assert "this image has no guix-daemon" in result.stderr


@pytest.mark.engine
def test_base_without_a_shell_is_reported(new_project: NewProject) -> None:
    project = new_project(GUIX_SUBSTITUTE_KEYS="")
    project.write_dockerfile("FROM scratch\nCOPY Dockerfile /\n")
    project.ok("base")
    with project.assert_unchanged():
        error = expect_error(project.inv("pull"), 3)
        findings = project.inv("doctor", "--json").stdout
    assert "; the image has no /bin/sh: set BASE_IMAGE to an image with Guix" in error
    sandbox = next(each for each in json.loads(findings) if each["check"] == "sandbox")
    assert sandbox["fix"].startswith("the image has no /bin/sh")


@pytest.mark.engine
def test_verify_of_a_missing_image_is_an_error(new_project: NewProject) -> None:
    project = new_project()
    with project.assert_unchanged():
        assert project.image in expect_error(project.inv("verify"), 2)


@pytest.mark.engine
@pytest.mark.parametrize("task", ["push", "verify", "run"])
def test_unknown_stage_is_reported(new_project: NewProject, task: str) -> None:
    project = new_project("base")
    with project.assert_unchanged():
        error = expect_error(project.inv(task, "--stage=nope", "--", "true"), 2)
    assert "'nope'" in error
    assert "install" in error


@pytest.mark.engine
def test_failed_parent_stops_its_child(new_project: NewProject) -> None:
    project = new_project()
    project.write_dockerfile(f"{START}RUN false\n")
    with project.assert_unchanged():
        result = project.inv("install", "push")
    expect_error(result, 6)
    assert f"install: {project.tag('pull')} is missing, so pull comes first" in result.stderr
    assert f"pull: {project.tag('base')} is missing, so base comes first" in result.stderr
