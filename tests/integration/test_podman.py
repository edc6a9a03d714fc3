"""The tasks on Podman, by the socket that it has for what speaks to Docker."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import tarfile
from typing import TYPE_CHECKING, Any

import pytest
from docker import APIClient
from harness import Docker, Made, Project, Workshop, call, eventually, inv_argv, one_error
from podmen import Podman, served
from recording_registry import serving

from guix_tasks.engine.discovery import DEFAULT_SOCKET
from guix_tasks.engine.podman_api import UNFINISHED_LABEL
from guix_tasks.stages.container import PROJECT_LABEL
from guix_tasks.stages.images import PACKAGES_LABEL, STAGES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

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
def podman(base_image: str, docker: Docker) -> Iterator[Podman]:
    with served() as found:
        save = subprocess.Popen(docker.argv("save", base_image), stdout=subprocess.PIPE)
        there = Docker(found.url, docker.directory)
        subprocess.run(there.argv("load"), stdin=save.stdout, check=True, capture_output=True)
        assert save.wait() == 0
        yield found


@pytest.fixture(scope="module")
def shop(podman: Podman, workshop: Workshop) -> Workshop:
    there = Docker(podman.url, workshop.docker.directory)
    return Workshop(there, workshop.registry, workshop.offline, workshop.data)


@pytest.fixture(scope="module")
def whole(shop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """The offline example, from the base to the registry."""
    project = shop.project(tmp_path_factory.mktemp("podman") / "project")
    try:
        yield Made(project, {task: project.ok(task) for task in (*STAGES, "verify", "push")})
    finally:
        project.remove()


@pytest.fixture
def bare(shop: Workshop, tmp_path: Path) -> Iterator[Project]:
    project = shop.project(tmp_path / "project", GUIX_SANDBOX="capabilities")
    yield project
    project.remove()


def test_the_first_line_says_what_it_is(whole: Made, podman: Podman) -> None:
    for result in whole.calls.values():
        first = result.stderr.splitlines()[0]
        assert re.fullmatch(rf"engine: \S* ?at {podman.url} \(DOCKER_HOST\), Podman \d\S+", first)


def test_it_gets_the_fewest_rights_that_podman_lets_have(whole: Made) -> None:
    said = whole.calls["pull"].stderr
    assert "Podman does not report the owners of files" in said
    assert "pull: in a capabilities container" in said


def test_the_packages_run(whole: Made) -> None:
    project = whole.project
    assert project.docker.run(project.image, "hello").stdout == GREETING
    assert project.ok("run", "--", "hello").stdout == GREETING
    assert project.inv("run", "--", "sh", "-c", "exit 7").returncode == 7
    labels = project.docker.labels(project.image)
    assert [each.partition("@")[0] for each in labels[PACKAGES_LABEL].split()] == ["greet", "hello"]


def test_stages_are_found_again(whole: Made) -> None:
    with whole.project.unharmed():
        said = whole.project.ok(*STAGES).stderr
    assert [f"{stage}: up to date" in said for stage in STAGES] == [True] * 3


def test_nothing_of_podmans_own_is_in_the_image(whole: Made) -> None:
    config = whole.project.docker.config(whole.project.image)
    base = whole.project.docker.config(whole.project.tag("base"))
    del config["Labels"], base["Labels"]
    assert config == base
    assert not re.search("container=|TERM=", " ".join(config["Env"]))
    assert not whole.project.docker.labels(whole.project.image)[PROJECT_LABEL]


def test_what_was_pushed_is_an_image_for_docker_too(whole: Made, docker: Docker) -> None:
    project = whole.project
    digest = whole.calls["push"].stdout.strip().rpartition("@")[2]
    assert re.fullmatch("sha256:[0-9a-f]{64}", digest)
    reference = f"{project.repository}@{digest}"
    docker.ok("pull", "--quiet", reference)
    try:
        assert docker.run(reference, "hello").stdout == GREETING
    finally:
        docker.ok("rmi", reference)


def test_squash_and_rollback(whole: Made) -> None:
    project, docker = whole.project, whole.project.docker
    before = project.id()
    project.ok("squash")
    layers = {
        tag: json.loads(docker.ok("image", "inspect", "--format={{json .RootFS.Layers}}", tag))
        for tag in (project.image, project.tag("base"))
    }
    assert len(layers[project.image]) == len(layers[project.tag("base")]) + 1
    assert docker.run(project.image, "hello").stdout == GREETING
    project.ok("rollback")
    assert project.id() == before


def test_status_for_machines(whole: Made, podman: Podman) -> None:
    project = whole.project
    found = json.loads(project.ok("status", "--json").stdout)
    engine = found["engine"]
    assert {engine["product"], engine["url"], engine["origin"], engine["rootless"]} == {
        "Podman", podman.url, "DOCKER_HOST", False,
    }  # fmt: skip
    stages = {each["stage"]: each for each in found["stages"]}
    assert [stages[name]["state"] for name in STAGES] == ["up to date"] * 3
    assert stages["IMAGE"]["id"] == stages["install"]["id"] == project.id()
    assert set(stages["pull"]["channels"]) == {"guix", "offline"}


def test_doctor(whole: Made) -> None:
    findings = {
        each["check"]: each
        for each in json.loads(whole.project.inv("doctor", "--json").stdout)
        if each["check"] in ("engine", "sandbox", "registry", "base image")
    }
    assert "Podman" in findings["engine"]["message"]
    assert {name: each["state"] for name, each in findings.items()} == dict.fromkeys(findings, "ok")


def test_a_command_that_fails_leaves_nothing(whole: Made) -> None:
    with whole.project.unharmed():
        error = one_error(whole.project.inv("install", "--package=no-such-package"), 4)
    assert "install: no-such-package: unknown package" in error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_one_that_is_ended_leaves_nothing(whole: Made, number: int) -> None:
    project = whole.project
    before, images = project.tags(), _unnamed(project)
    running = project.start("install", "--force")
    eventually(lambda: bool(project.containers()) or running.has_ended(), "a container")
    assert running.signal(number) == (130 if number == signal.SIGINT else -number)
    if number == signal.SIGKILL:
        project.ok("run", "--", "true")
    assert project.containers() == []
    assert project.tags() == before
    assert _unnamed(project) == images


def test_what_a_commit_left_unfinished_is_removed(whole: Made) -> None:
    project, docker = whole.project, whole.project.docker
    name = project.container_name()
    label = f"--label={PROJECT_LABEL}={project.image}"
    docker.ok("create", f"--name={name}", label, project.image, "true")
    api = APIClient(docker.host)
    change = f"LABEL {UNFINISHED_LABEL}=yes"
    left, kept = (api.commit(name, changes=changes)["Id"] for changes in ([change], []))
    api.close()
    docker.ok("rm", name)
    project.ok("install", "--force")
    try:
        assert docker("image", "inspect", left).returncode != 0
        assert docker("image", "inspect", kept).returncode == 0
    finally:
        docker.ok("rmi", kept)


def test_the_configuration_is_kept(bare: Project, podman: Podman) -> None:
    bare.dockerfile(CONFIGURED)
    bare.ok("base")
    before = _config(podman, bare.tag("base"))
    bare.ok("run", "--keep", "--", "touch", "/made")
    bare.ok("commit")
    after = _config(podman, bare.image)
    assert before["Healthcheck"]["Test"] == ["CMD-SHELL", "true"]
    assert before["Labels"]["of.mine"] == 'a "label"'
    assert after["Labels"].pop("of.mine") == before["Labels"].pop("of.mine")
    del before["Labels"], after["Labels"]
    assert after == before
    assert bare.docker.run(bare.image).stdout == "a b c\n"
    assert bare.docker.run(bare.image, "/made", options=("--entrypoint=ls",)).stdout == "/made\n"


def test_an_archive_becomes_an_image_of_that_name_alone(podman: Podman) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("made"))
    client, name = podman.client(), "localhost/guix-tasks-test/rootfs:t"
    made = client.import_rootfs(iter([buffer.getvalue()]), name)
    image = client.image(name)
    assert image
    assert (image.id, image.tags) == (made, (name,))
    client.untag(name)


def test_a_dockerfile_beside_its_context(bare: Project) -> None:
    (bare.directory / "context").mkdir()
    (bare.directory / "context" / "there").touch()
    (bare.directory / "context" / "ignored").touch()
    (bare.directory / "Dockerfile").write_text("ARG BASE_IMAGE\nFROM ${BASE_IMAGE}\nCOPY . /srv\n")
    (bare.directory / "Dockerfile.dockerignore").write_text("ignored\n")
    bare.set(BUILD_CONTEXT="context", DOCKERFILE="Dockerfile")
    bare.ok("base")
    assert bare.docker.run(bare.image, "ls", "/srv").stdout == "there\n"


def test_what_podman_cannot_do_is_said_in_a_line(bare: Project) -> None:
    (bare.directory / "secret").write_text("x")
    bare.dockerfile("ARG BASE_IMAGE\nFROM ${BASE_IMAGE}\n")
    bare.set(BUILD_SECRETS="a=secret")
    assert "BUILD_SECRETS needs BuildKit, and the engine is Podman" in one_error(
        bare.inv("base"), 6
    )
    bare.set(BUILD_SECRETS="", GUIX_SANDBOX="rootless")
    bare.ok("base")
    error = one_error(bare.inv("pull"), 3)
    assert "Podman does not report the owners of files; set GUIX_SANDBOX to auto" in error


def test_clean_leaves_nothing(bare: Project) -> None:
    before = set(bare.docker.ok("image", "ls", "--all", "--quiet", "--no-trunc").split())
    bare.dockerfile("ARG BASE_IMAGE\nFROM ${BASE_IMAGE}\nRUN touch /made\n")
    bare.ok("base")
    bare.ok("run", "--keep", "--", "true")
    assert bare.volumes()
    bare.ok("clean")
    after = set(bare.docker.ok("image", "ls", "--all", "--quiet", "--no-trunc").split())
    assert (bare.containers(), bare.volumes(), after - before) == ([], [], set())


def test_without_a_socket_of_dockers_it_is_named(podman: Podman, tmp_path: Path) -> None:
    """A hint, and no silent use."""
    own = tmp_path / "podman"
    own.mkdir()
    (own / "podman.sock").symlink_to(podman.socket)
    # An empty directory for the private engine's, too.
    environment = {
        "XDG_RUNTIME_DIR": str(tmp_path),
        "XDG_DATA_HOME": str(tmp_path),
        "HOME": str(tmp_path),
    }
    if DEFAULT_SOCKET.exists():
        pytest.skip("this machine has an engine at the default socket")
    said = call(inv_argv("status"), {"PATH": os.environ["PATH"], **environment}, 60, tmp_path)
    hint = f", or use this machine's Podman: DOCKER_HOST=unix://{own}/podman.sock"
    assert one_error(said, 3).endswith(hint)


def _config(podman: Podman, image: str) -> dict[str, Any]:
    found = podman.client().image(image)
    assert found
    return dict(found.config)


def _unnamed(project: Project) -> set[str]:
    return set(project.docker.ok("image", "ls", "--filter=dangling=true", "--quiet").split())


def test_each_registry_gets_its_own_account(shop: Workshop, tmp_path: Path) -> None:
    """Of a private base image, and of what is pushed."""
    with serving("deployer:for-home") as home, serving("baser:for-base") as base:
        account = {"DOCKER_USERNAME": "baser", "DOCKER_PASSWORD": "for-base"}
        model = shop.project(tmp_path / "base", f"{base.host}/x/base", **account)
        account = {"DOCKER_USERNAME": "deployer", "DOCKER_PASSWORD": "for-home"}
        reference = f"{base.host}/x/base:t"
        project = shop.project(
            tmp_path / "home", f"{home.host}/x/app", BASE_IMAGE=reference, **account
        )
        try:
            model.dockerfile("FROM scratch\nCOPY Dockerfile /\n")
            model.ok("base", "push")
            model.remove()
            base.forget()
            project.dockerfile("ARG BASE_IMAGE\nFROM $BASE_IMAGE\nCOPY Dockerfile /again\n")
            auths = {"auths": {base.host: {"auth": base.auth}}}
            env = {"DOCKER_AUTH_CONFIG": json.dumps(auths)}
            made = project.inv("base", "push", env=env)
            assert made.returncode == 0, made.stderr
            assert (home.seen, base.seen) == ({home.account}, {base.account})
        finally:
            model.remove()
            project.remove()
            project.docker("rmi", reference)


def test_mount_points_are_in_no_image(bare: Project) -> None:
    targets = "/etc/secret.conf", "/srv/a/b"
    bare.set(MOUNTS=f"project.env:{targets[0]} home:{targets[1]}")
    bare.ok("base")
    bare.ok("run", "--stage=base", "--keep", "--", "sh", "-c", "cat /etc/secret.conf >/opt/made")
    bare.ok("commit")
    argv = ("run", "--rm", "--network=none", "--entrypoint=", bare.image, "sh", "-c")
    listing = bare.docker.ok(*argv, f"ls -d /opt/made {' '.join(targets)} /srv/a || true")
    assert listing.split() == ["/opt/made"]
