"""Runtime images: the same on every engine, only what the packages need, few rights."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
from typing import TYPE_CHECKING

import pytest
from harness import ProjectFactory, call, expect_error
from isolated_host import copy_image
from podman_service import overlay_argv, unpack_packages, write_configuration, write_skopeo

from guix_tasks.stages.images import STAGES

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import NewProject
    from harness import Docker, Project
    from isolated_host import IsolatedHost

pytestmark = pytest.mark.engine

GREETING = "Hello, world!\n"
OPTIONS = ("--read-only", "--cap-drop=ALL", "--user=4242")

FILES = {
    "etc", "etc/group", "etc/nsswitch.conf", "etc/passwd", "gnu", "gnu/store", "profile", "root",
    "srv", "srv/app", "tmp", "usr", "usr/bin", "usr/bin/hi", "var", "var/tmp",
}  # fmt: skip
"""All paths of an image that are no store items."""
OF_DOCKER = {
    ".dockerenv", "dev", "etc/hostname", "etc/hosts", "etc/mtab", "etc/resolv.conf", "proc", "sys",
}  # fmt: skip
"""Paths that Docker adds to every container."""


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Return a ``PATH`` with skopeo."""
    write_skopeo(tmp_path / "programs")
    return f"{tmp_path / 'programs'}:{os.environ['PATH']}"


def new_runtime_project(new_project: NewProject, *stages: str, **settings: str) -> Project:
    project = new_project(*stages, **{"RUNTIME_ENTRYPOINT": "hello", **settings})
    project.set(RUNTIME_IMAGE=f"{project.repository}-runtime:1")
    return project


def contents(docker: Docker, image: str) -> dict[str, tarfile.TarInfo]:
    """Return the files of an image by their paths, without those that Docker adds."""
    container = docker.ok("create", image).strip()
    try:
        argv = docker.argv("export", container)
        archive = subprocess.run(
            argv, env=docker.environment, capture_output=True, check=True
        ).stdout
    finally:
        docker.ok("rm", container)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        members = {member.name: member for member in tar}
    return {
        name: member
        for name, member in members.items()
        if name not in OF_DOCKER and not name.startswith("dev/")
    }


def test_image_has_only_what_the_packages_need_and_runs_with_few_rights(
    new_project: NewProject, docker: Docker, path: str, tmp_path: Path
) -> None:
    project = new_runtime_project(
        new_project,
        *STAGES,
        GUIX_PACKAGES="hello greet",
        RUNTIME_LINKS="/usr/bin/hi=bin/hello",
        RUNTIME_DIRECTORY="/srv/app",
        RUNTIME_USER="app:1234",
        RUNTIME_PORTS="8080",
    )
    output = tmp_path / "output"
    pushed = project.inv("runtime.push", env={"PATH": path, "GITHUB_OUTPUT": str(output)})
    assert pushed.returncode == 0, pushed.stderr
    reference = pushed.stdout.strip()
    assert reference.startswith(f"{project.repository}-runtime@sha256:")
    assert (project.directory / "out" / "runtime-image.txt").read_text() == f"{reference}\n"
    assert output.read_text() == f"runtime-image={reference}\n"
    docker.ok("pull", "--quiet", reference)
    try:
        first = docker.run(reference, options=OPTIONS)
        assert first.stdout == GREETING, first.stderr
        assert docker.run(reference, options=("--entrypoint=/usr/bin/hi",)).stdout == GREETING
        members = contents(docker, reference)
        config = docker.config(reference)
    finally:
        docker.ok("rmi", reference)
    items = {name.split("/")[2] for name in members if name.startswith("gnu/store/")}
    assert sorted(item[33:] for item in items) == [
        "emacs-subdirs", "greet-1.0", "hello-2.12.2", "info-dir", "profile",
    ]  # fmt: skip
    assert {name for name in members if not name.startswith("gnu/store/")} == FILES
    owners = {(member.uid, member.gid) for name, member in members.items() if name != "srv/app"}
    assert owners == {(0, 0)}
    assert members["srv/app"].uid == 1234
    own = {name: member for name, member in members.items() if name not in ("etc", "usr")}
    assert {member.mtime for member in own.values()} == {1}
    assert config["User"] == "1234:1234"
    assert config["ExposedPorts"] == {"8080/tcp": {}}
    assert config["WorkingDir"] == "/srv/app"
    assert "PATH=/profile/bin:/profile/sbin" in config["Env"]
    # Podman in place of Docker.
    script = f"podman run --rm --read-only --cap-drop=ALL --network=none oci:{{}} >{tmp_path}/said"
    layout = f"{project.directory}/out/runtime:linux-amd64"
    argv = overlay_argv(unpack_packages(), "sh", "-ec", script.format(layout))
    result = call(argv, {**os.environ, **write_configuration(tmp_path)}, 120)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "said").read_text() == GREETING
    assert "runtime: up to date" in project.ok("runtime.build").stderr


def test_image_is_the_same_everywhere(
    new_project: NewProject,
    other_store: IsolatedHost,
    factory: ProjectFactory,
    tmp_path: Path,
) -> None:
    """One engine has a warm store and containers without root, the other has neither."""
    settings = {"GUIX_PACKAGES": "hello greet", "RUNTIME_ENTRYPOINT": "hello"}
    project = new_runtime_project(new_project, *STAGES, **settings)
    address = f"localhost:{other_store.registry.port}"
    other_factory = ProjectFactory(
        other_store.docker, address, factory.offline, other_store.directory
    )
    other = other_factory.create(
        tmp_path / "other", **settings, CACHE_VOLUME="", GUIX_SANDBOX="capabilities",
        RUNTIME_IMAGE="registry.test/other",
    )  # fmt: skip
    copy_image(project.tag("base"), project.docker, other.docker)
    other.docker.ok("tag", project.tag("base"), other.tag("base"))
    try:
        other.ok("pull", "install")
        environment = {"TZ": "Asia/Tokyo", "LC_ALL": "de_DE.UTF-8"}
        result = other.inv("runtime.build", env=environment)
        assert result.stdout.startswith("sha256:"), result.stderr
        assert project.ok("runtime.build").stdout == result.stdout
    finally:
        other.remove()
    # Another configuration needs no new layer.
    project.set(RUNTIME_PORTS="80")
    assert "0 new layers" in project.ok("runtime.build").stderr


def test_check_names_what_differs_from_the_registry(new_project: NewProject, path: str) -> None:
    project = new_runtime_project(new_project, *STAGES, GUIX_PACKAGES="hello greet")
    env = {"PATH": path}
    assert "is not in its registry" in expect_error(project.inv("runtime.check", env=env), 5)
    pushed = project.inv("runtime.push", env=env)
    assert pushed.returncode == 0, pushed.stderr
    checked = project.inv("runtime.check", env=env)
    assert checked.stdout.strip() == pushed.stdout.strip().rpartition("@")[2]
    project.set(RUNTIME_PORTS="80")
    assert "the settings of the image differ" in expect_error(
        project.inv("runtime.check", env=env), 1
    )
    project.set(GUIX_PACKAGES="hello")
    error = expect_error(project.inv("runtime.check", env=env), 2)
    assert "install is stale" in error
    project.ok("install")
    error = expect_error(project.inv("runtime.check", env=env), 1)
    assert "-greet-1.0" in error.partition("only in the registry: ")[2]
    layout = project.directory / "out" / "runtime"
    index = json.loads((layout / "index.json").read_text())
    assert [entry["platform"] for entry in index["manifests"]] == [
        {"architecture": "amd64", "os": "linux"}
    ]
