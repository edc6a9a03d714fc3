"""The tasks on Podman, through its socket with the API of Docker."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import tarfile
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from docker import APIClient
from harness import (
    BuiltProject,
    Docker,
    Project,
    ProjectFactory,
    call,
    check_cache_is_shared,
    expect_error,
    inv_argv,
    wait_until,
)
from isolated_host import copy_image
from podman_service import PodmanService, run_podman
from recording_registry import run_registry

from guix_tasks.engine.api import UNFINISHED_LABEL
from guix_tasks.engine.discovery import DEFAULT_SOCKET
from guix_tasks.stages.container import PROJECT_LABEL
from guix_tasks.stages.images import PACKAGES_LABEL, STAGES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from guix_tasks.bootstrap.registry import LocalRegistry
    from guix_tasks.engine.docker import DockerEngine

pytestmark = pytest.mark.engine

GREETING = "Hello, world!\n"

CONFIGURED = """
ARG BASE_IMAGE
FROM ${BASE_IMAGE}
ENTRYPOINT ["/bin/echo", "a b"]
CMD ["c"]
ENV WORD="with 'quotes' and a space"
LABEL of.mine="a \\"label\\""
WORKDIR /srv
EXPOSE 80/tcp
VOLUME /data
STOPSIGNAL SIGUSR1
HEALTHCHECK --interval=5m CMD true
USER 1000
"""


@pytest.fixture(scope="module")
def podman(base_image: str, docker: Docker, registry: LocalRegistry) -> Iterator[PodmanService]:
    with run_podman(f"localhost:{registry.port}") as service:
        copy_image(base_image, docker, Docker(service.url, docker.directory))
        yield service


@pytest.fixture(scope="module")
def podman_factory(podman: PodmanService, factory: ProjectFactory) -> ProjectFactory:
    return replace(factory, docker=Docker(podman.url, factory.docker.directory))


@pytest.fixture(scope="module")
def built_project(
    podman_factory: ProjectFactory, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[BuiltProject]:
    """Run the offline example from base to push."""
    project = podman_factory.create(tmp_path_factory.mktemp("podman") / "project")
    try:
        calls = {task: project.ok(task) for task in (*STAGES, "verify", "push")}
        yield BuiltProject(project, calls)
    finally:
        project.remove()


@pytest.fixture
def project(podman_factory: ProjectFactory, tmp_path: Path) -> Iterator[Project]:
    project = podman_factory.create(tmp_path / "project", GUIX_SANDBOX="capabilities")
    yield project
    project.remove()


def test_first_line_names_the_engine(built_project: BuiltProject, podman: PodmanService) -> None:
    for result in built_project.calls.values():
        first = result.stderr.splitlines()[0]
        assert re.fullmatch(rf"engine: \S* ?at {podman.url} \(DOCKER_HOST\), Podman \d\S+", first)


def test_sandbox_is_capabilities(built_project: BuiltProject) -> None:
    log = built_project.calls["pull"].stderr
    assert "Podman does not report the owners of files" in log
    assert "pull: in a capabilities container" in log


def test_installed_packages_run(built_project: BuiltProject) -> None:
    project = built_project.project
    assert project.docker.run(project.image, "hello").stdout == GREETING
    assert project.ok("run", "--", "hello").stdout == GREETING
    assert project.inv("run", "--", "sh", "-c", "exit 7").returncode == 7
    labels = project.docker.labels(project.image)
    packages = labels[PACKAGES_LABEL].split()
    assert [package.partition("@")[0] for package in packages] == ["greet", "hello"]


def test_finished_stages_are_up_to_date(built_project: BuiltProject) -> None:
    with built_project.project.assert_unchanged():
        log = built_project.project.ok(*STAGES).stderr
    assert [f"{stage}: up to date" in log for stage in STAGES] == [True] * 3


def test_image_has_no_settings_of_podman_containers(built_project: BuiltProject) -> None:
    config = built_project.project.docker.config(built_project.project.image)
    base = built_project.project.docker.config(built_project.project.tag("base"))
    del config["Labels"], base["Labels"]
    assert config == base
    assert not re.search("container=|TERM=", " ".join(config["Env"]))
    assert not built_project.project.docker.labels(built_project.project.image)[PROJECT_LABEL]


def test_docker_runs_the_pushed_image(built_project: BuiltProject, docker: Docker) -> None:
    project = built_project.project
    digest = built_project.calls["push"].stdout.strip().rpartition("@")[2]
    assert re.fullmatch("sha256:[0-9a-f]{64}", digest)
    reference = f"{project.repository}@{digest}"
    docker.ok("pull", "--quiet", reference)
    try:
        assert docker.run(reference, "hello").stdout == GREETING
    finally:
        docker.ok("rmi", reference)


def test_cache_is_shared_with_docker(
    built_project: BuiltProject,
    factory: ProjectFactory,
    machine_engine: DockerEngine,
    tmp_path: Path,
) -> None:
    """The base image is on both engines, and Podman compresses its layer differently.

    Docker's containerd store then cannot use what it pulls, and makes the stages.
    """
    other = factory.create(tmp_path / "docker")
    try:
        can_take = not machine_engine.info().uses_containerd
        check_cache_is_shared(built_project.project, other, can_take=can_take)
        # The image from the cache is on the base image of the other engine.
        built_project.project.set(CACHE_IMAGE="")
        built_project.project.ok("install", "--force")
    finally:
        other.remove()


def test_rollback_restores_the_image_before_squash(built_project: BuiltProject) -> None:
    project, docker = built_project.project, built_project.project.docker
    image = project.id()
    project.ok("squash")
    layers = {
        tag: json.loads(docker.ok("image", "inspect", "--format={{json .RootFS.Layers}}", tag))
        for tag in (project.image, project.tag("base"))
    }
    assert len(layers[project.image]) == len(layers[project.tag("base")]) + 1
    assert docker.run(project.image, "hello").stdout == GREETING
    project.ok("rollback")
    assert project.id() == image


def test_json_status_names_engine_and_stages(
    built_project: BuiltProject, podman: PodmanService
) -> None:
    project = built_project.project
    status = json.loads(project.ok("status", "--json").stdout)
    engine = status["engine"]
    assert {engine["product"], engine["url"], engine["origin"], engine["rootless"]} == {
        "Podman", podman.url, "DOCKER_HOST", False,
    }  # fmt: skip
    stages = {stage["stage"]: stage for stage in status["stages"]}
    assert [stages[name]["state"] for name in STAGES] == ["up to date"] * 3
    assert stages["IMAGE"]["id"] == stages["install"]["id"] == project.id()
    assert set(stages["pull"]["channels"]) == {"guix", "offline"}


def test_doctor_checks_pass(built_project: BuiltProject) -> None:
    findings = {
        finding["check"]: finding
        for finding in json.loads(built_project.project.inv("doctor", "--json").stdout)
        if finding["check"] in ("engine", "sandbox", "registry", "base image")
    }
    assert "Podman" in findings["engine"]["message"]
    assert {finding["state"] for finding in findings.values()} == {"ok"}


def test_failed_stage_leaves_nothing(built_project: BuiltProject) -> None:
    with built_project.project.assert_unchanged():
        error = expect_error(built_project.project.inv("install", "--package=no-such-package"), 4)
    assert "install: no-such-package: unknown package" in error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_stage_leaves_nothing(built_project: BuiltProject, number: int) -> None:
    project = built_project.project
    tags, images = project.tags(), _untagged_images(project)
    task = project.start("install", "--force")
    wait_until(lambda: bool(project.containers()) or task.has_ended(), "a container exists")
    assert task.signal(number) == (130 if number == signal.SIGINT else -number)
    if number == signal.SIGKILL:
        project.ok("run", "--", "true")
    assert project.containers() == []
    assert project.tags() == tags
    assert _untagged_images(project) == images


def test_image_of_an_unfinished_commit_is_removed(built_project: BuiltProject) -> None:
    project, docker = built_project.project, built_project.project.docker
    name = project.container_name()
    label = f"--label={PROJECT_LABEL}={project.image}"
    docker.ok("create", f"--name={name}", label, project.image, "true")
    api = APIClient(docker.host)
    change = f"LABEL {UNFINISHED_LABEL}=yes"
    unfinished, other = (api.commit(name, changes=changes)["Id"] for changes in ([change], []))
    api.close()
    docker.ok("rm", name)
    project.ok("install", "--force")
    try:
        assert docker("image", "inspect", unfinished).returncode != 0
        assert docker("image", "inspect", other).returncode == 0
    finally:
        docker.ok("rmi", other)


def test_commit_preserves_the_configuration(project: Project, podman: PodmanService) -> None:
    project.write_dockerfile(CONFIGURED)
    project.ok("base")
    before = _config(podman, project.tag("base"))
    project.ok("run", "--keep", "--", "touch", "/made")
    project.ok("commit")
    after = _config(podman, project.image)
    assert before["Healthcheck"]["Test"] == ["CMD-SHELL", "true"]
    assert before["Labels"]["of.mine"] == 'a "label"'
    assert after["Labels"].pop("of.mine") == before["Labels"].pop("of.mine")
    del before["Labels"], after["Labels"]
    assert after == before
    assert project.docker.run(project.image).stdout == "a b c\n"
    listing = project.docker.run(project.image, "/made", options=("--entrypoint=ls",))
    assert listing.stdout == "/made\n"


def test_imported_archive_has_only_the_given_name(podman: PodmanService) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("made"))
    client, name = podman.client(), "localhost/guix-tasks-test/rootfs:t"
    imported = client.import_rootfs(iter([buffer.getvalue()]), name)
    image = client.image(name)
    assert image
    assert (image.id, image.tags) == (imported, (name,))
    client.untag(name)


def test_base_uses_a_dockerfile_outside_its_context(project: Project) -> None:
    (project.directory / "context").mkdir()
    (project.directory / "context" / "copied").touch()
    (project.directory / "context" / "ignored").touch()
    (project.directory / "Dockerfile").write_text("ARG BASE_IMAGE\nFROM $BASE_IMAGE\nCOPY . /srv\n")
    (project.directory / "Dockerfile.dockerignore").write_text("ignored\n")
    project.set(BUILD_CONTEXT="context", DOCKERFILE="Dockerfile")
    project.ok("base")
    assert project.docker.run(project.image, "ls", "/srv").stdout == "copied\n"


def test_unsupported_settings_are_one_error(project: Project) -> None:
    (project.directory / "secret").write_text("x")
    project.write_dockerfile("ARG BASE_IMAGE\nFROM ${BASE_IMAGE}\n")
    project.set(BUILD_SECRETS="a=secret")
    error = expect_error(project.inv("base"), 6)
    assert "BUILD_SECRETS needs BuildKit, and the engine is Podman" in error
    project.set(BUILD_SECRETS="", GUIX_SANDBOX="rootless")
    project.ok("base")
    error = expect_error(project.inv("pull"), 3)
    assert "Podman does not report the owners of files; set GUIX_SANDBOX to auto" in error


def test_clean_leaves_nothing(project: Project) -> None:
    listing = ("image", "ls", "--all", "--quiet", "--no-trunc")
    before = set(project.docker.ok(*listing).split())
    project.write_dockerfile("ARG BASE_IMAGE\nFROM ${BASE_IMAGE}\nRUN touch /made\n")
    project.ok("base")
    project.ok("run", "--keep", "--", "true")
    assert project.volumes()
    project.ok("clean")
    after = set(project.docker.ok(*listing).split())
    assert (project.containers(), project.volumes(), after - before) == ([], [], set())


def test_podman_is_suggested_if_docker_has_no_socket(podman: PodmanService, tmp_path: Path) -> None:
    if DEFAULT_SOCKET.exists():
        pytest.skip("this machine has an engine at the default socket")
    socket = tmp_path / "podman" / "podman.sock"
    socket.parent.mkdir()
    socket.symlink_to(podman.socket)
    # The empty data directory has no private engine.
    directories = dict.fromkeys(("XDG_RUNTIME_DIR", "XDG_DATA_HOME", "HOME"), str(tmp_path))
    result = call(inv_argv("status"), {"PATH": os.environ["PATH"], **directories}, 60, tmp_path)
    hint = f", or use this machine's Podman: DOCKER_HOST=unix://{socket}"
    assert expect_error(result, 3).endswith(hint)


def _config(podman: PodmanService, image: str) -> dict[str, Any]:
    details = podman.client().image(image)
    assert details
    return dict(details.config)


def _untagged_images(project: Project) -> set[str]:
    return set(project.docker.ok("image", "ls", "--filter=dangling=true", "--quiet").split())


def test_registries_of_image_and_base_get_their_own_accounts(
    podman_factory: ProjectFactory, tmp_path: Path
) -> None:
    with run_registry("deployer:for-home") as home, run_registry("baser:for-base") as base:
        account = {"DOCKER_USERNAME": "baser", "DOCKER_PASSWORD": "for-base"}
        model = podman_factory.create(tmp_path / "base", f"{base.host}/x/base", **account)
        account = {"DOCKER_USERNAME": "deployer", "DOCKER_PASSWORD": "for-home"}
        reference = f"{base.host}/x/base:t"
        project = podman_factory.create(
            tmp_path / "home", f"{home.host}/x/app", BASE_IMAGE=reference, **account
        )
        try:
            model.write_dockerfile("FROM scratch\nCOPY Dockerfile /\n")
            model.ok("base", "push")
            model.remove()
            base.reset()
            project.write_dockerfile("ARG BASE_IMAGE\nFROM $BASE_IMAGE\nCOPY Dockerfile /again\n")
            auths = {"auths": {base.host: {"auth": base.auth}}}
            env = {"DOCKER_AUTH_CONFIG": json.dumps(auths)}
            result = project.inv("base", "push", env=env)
            assert result.returncode == 0, result.stderr
            assert (home.accounts, base.accounts) == ({home.account}, {base.account})
        finally:
            model.remove()
            project.remove()
            project.docker("rmi", reference)


def test_image_has_no_mount_points(project: Project) -> None:
    targets = "/etc/secret.conf", "/srv/a/b"
    project.set(MOUNTS=f"project.env:{targets[0]} home:{targets[1]}")
    project.ok("base")
    project.ok("run", "--stage=base", "--keep", "--", "sh", "-c", "cat /etc/secret.conf >/opt/made")
    project.ok("commit")
    argv = ("run", "--rm", "--network=none", "--entrypoint=", project.image, "sh", "-c")
    listing = project.docker.ok(*argv, f"ls -d /opt/made {' '.join(targets)} /srv/a || true")
    assert listing.split() == ["/opt/made"]
