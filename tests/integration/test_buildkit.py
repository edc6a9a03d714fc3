"""The BuildKit way on real builders, and the very commands of its steps where there is none."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import socketserver
import subprocess
import tarfile
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from harness import LOCK, READER, Result, builder_environment, contents, free_port, one_error

from guix_tasks import guix
from guix_tasks.buildkit import buildx
from guix_tasks.buildkit.bakefile import (
    ASKED_TARGET,
    Definition,
    bake_file,
    dockerfile,
)
from guix_tasks.cli.session import local_buildx
from guix_tasks.engine.api import BuildSpec
from guix_tasks.oci.platform import Platform
from guix_tasks.stages.images import CHANNELS_LABEL, PACKAGES_LABEL

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import NewProject
    from harness import Docker, Made, Project, Workshop

    from guix_tasks.buildkit.buildx import Buildx
    from guix_tasks.engine.docker import DockerEngine

pytestmark = pytest.mark.engine

BUILDKIT_IMAGE = "moby/buildkit:buildx-stable-1"
"""What buildx starts its builders from."""

OWN = Platform.parse("linux/amd64")


# --- What is needed for them ----------------------------------------------------------------


@dataclass(frozen=True)
class Builder:
    """The environment in which inv finds a builder of the tests' own."""

    environment: dict[str, str]
    buildx: Buildx

    def but(self, **environment: str) -> Builder:
        return Builder({**self.environment, **environment}, self.buildx)

    def inv(self, project: Project, *arguments: str, timeout: float = 240) -> Result:
        return project.inv(*arguments, env=self.environment, timeout=timeout)

    def ok(self, project: Project, *arguments: str) -> Result:
        result = self.inv(project, *arguments)
        assert result.returncode == 0, result.stderr
        return result


@pytest.fixture(scope="module")
def engines_own(engine: DockerEngine, tmp_path_factory: pytest.TempPathFactory) -> Builder:
    """The builder that is the engine itself."""
    config = str(tmp_path_factory.mktemp("docker"))
    found = local_buildx({**os.environ, "DOCKER_CONFIG": config}, engine.address)
    if found is None:
        pytest.skip("buildx is not on this machine")
    environment = {**builder_environment("buildx"), "DOCKER_CONFIG": config}
    return Builder({**environment, "BUILDX_DRIVER": "docker"}, found)


@pytest.fixture(scope="module")
def insecure(
    engines_own: Builder,
    docker: Docker,
    tmp_path_factory: pytest.TempPathFactory,
    workshop: Workshop,
) -> Iterator[Builder]:
    """A builder of the driver docker-container, made by ``buildx.setup``."""
    here = docker("image", "inspect", BUILDKIT_IMAGE).returncode == 0
    if not here and docker("pull", BUILDKIT_IMAGE).returncode:
        pytest.skip(
            f"no builder can run insecure steps here: {BUILDKIT_IMAGE}, which has buildkitd, is "
            "neither on this engine nor in its reach"
        )
    name = f"guix-tasks-test-{secrets.token_hex(4)}"
    made = engines_own.but(BUILDX_DRIVER="docker-container", BUILDX_BUILDER=name)
    project = workshop.project(tmp_path_factory.mktemp("setup") / "project")
    try:
        made.ok(project, "buildx.setup")
        yield made
    finally:
        made.inv(project, "buildx.down")


@contextmanager
def dialled(program: Buildx) -> Iterator[str]:
    """The engine's own BuildKit at a port of loopback, as ``buildx dial-stdio`` serves it."""

    class Dial(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with subprocess.Popen(
                [program.program, "dial-stdio", "--builder=default"],
                env=dict(program.environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            ) as process:  # fmt: skip
                assert process.stdin
                assert process.stdout
                back = threading.Thread(target=self._answer, args=(process,), daemon=True)
                back.start()
                while data := self.request.recv(1 << 16):
                    process.stdin.write(data)
                    process.stdin.flush()
                process.terminate()

        def _answer(self, process: subprocess.Popen[bytes]) -> None:
            assert process.stdout
            with suppress(OSError, ValueError):  # either side may have gone
                while data := os.read(process.stdout.fileno(), 1 << 16):
                    self.request.sendall(data)
                self.request.shutdown(socket.SHUT_RDWR)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Dial) as server:
        server.daemon_threads = True
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"tcp://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def facts(docker: Docker, image: str) -> dict[str, Any]:
    """The same, with how the image is set up and what it says of itself."""
    config = docker.config(image)
    kept = ("Cmd", "Entrypoint", "Env", "User", "WorkingDir", "ExposedPorts", "Volumes")
    return {
        "contents": contents(docker, image),
        "config": {name: config.get(name) or None for name in kept},
        "labels": {name: config["Labels"][name] for name in (CHANNELS_LABEL, PACKAGES_LABEL)},
    }


# --- The engine's own builder, and a remote one: all that needs no newer frontend ------------


def test_setup_says_whether_the_engine_can_do_it(
    new_project: NewProject, engines_own: Builder
) -> None:
    """On a frontend that does not know such steps, what would is named."""
    project = new_project()
    result = engines_own.inv(project, "buildx.setup")
    if result.returncode == 0:
        assert "runs insecure steps" in result.stderr
        return
    error = one_error(result, 6)
    assert "unknown flag: --security" in error
    assert "docker/dockerfile:1" in error
    assert "set BUILDKIT_SYNTAX" in error


def test_a_build_by_a_builder_that_cannot_do_it_touches_nothing(
    new_project: NewProject, engines_own: Builder
) -> None:
    project = new_project()
    result = engines_own.inv(project, "buildx.build", timeout=600)
    if result.returncode == 0:
        pytest.skip("this engine's own builder can")
    with project.unharmed():
        one_error(engines_own.inv(project, "buildx.build"), 6)
    assert not (project.directory / LOCK).exists()


def test_status_of_the_engines_own(new_project: NewProject, engines_own: Builder) -> None:
    said = engines_own.ok(new_project(), "buildx.status").stdout
    assert re.search(r"^default +default +running +\S+ +linux/\S+", said, re.MULTILINE)
    assert "security.insecure" in said or "none" in said
    assert re.search(r"^cache: [0-9.]+ ?[kMGT]?B$", said, re.MULTILINE)


def test_the_engines_own_is_not_removed(new_project: NewProject, engines_own: Builder) -> None:
    said = engines_own.ok(new_project(), "buildx.down").stderr
    assert "nothing to remove" in said
    engines_own.ok(new_project(), "buildx.status")


def test_a_builder_that_is_not_there(new_project: NewProject, engines_own: Builder) -> None:
    project = new_project()
    missing = engines_own.but(BUILDX_DRIVER="docker-container", BUILDX_BUILDER="nobody-made-it")
    for task in ("buildx.build", "buildx.status"):
        error = one_error(missing.inv(project, task), 6)
        assert "nobody-made-it" in error
        assert "`inv buildx.setup` creates it" in error
    assert "builder nobody-made-it does not exist" in missing.ok(project, "buildx.down").stderr


def plain_definition(directory: Path, base: str, labels: dict[str, str], user: str) -> Definition:
    """A build of no stages: it has all but an insecure step."""
    for name in ("empty", "work", "context"):
        (directory / name).mkdir(parents=True)
    (directory / "environment").write_text("")
    (directory / "context" / "Dockerfile").write_text(
        f"ARG BASE_IMAGE\nFROM ${{BASE_IMAGE}}\nARG TEXT\nENV TEXT=$TEXT\nUSER {user}\n"
    )
    context = directory / "context"
    arguments = {"BASE_IMAGE": base, "TEXT": "${HOME} %{x} \"'$"}
    return Definition(
        base=BuildSpec(context, context / "Dockerfile", arguments, network="none"),
        platforms=[OWN],
        network="none",
        user=user,
        labels={OWN: labels},
        directory=directory,
        contexts={"work": directory / "work"},
    )


def bake(program: Buildx, builder: str, definition: Definition, target: str) -> None:
    directory = definition.directory
    (directory / "Dockerfile").write_text(dockerfile(definition))
    (directory / "bake.json").write_text(bake_file(definition))
    log: list[bytes] = []
    program.stream(
        "bake", f"--builder={builder}", f"--file={directory / 'bake.json'}",
        "--allow=security.insecure", "--allow=fs=*", "--progress=plain", target, output=log.append,
    )  # fmt: skip


def test_a_base_is_linked_and_its_image_is_labelled(
    engines_own: Builder, docker: Docker, base_image: str, tmp_path: Path, workshop: Workshop
) -> None:
    """Whatever is in a label, a build argument or a path gets there as it is."""
    labels = {"a.b": '(list\n  \'x "y" ${HOME} $HOME %{if} \\n é)', "c": "", "d": "one two"}
    tag = f"{workshop.registry}/guix-tasks-test-{workshop.token}/linked:t"
    plain = plain_definition(tmp_path / "a ${directory}, really", base_image, labels, "nobody")
    paths = {"A_PATH": "/profile/a ${HOME} \"'$"}
    more = {"tags": [tag], "output": "type=docker", "environment": {OWN: paths}}
    definition = Definition(**{**vars(plain), **more})
    bake(engines_own.buildx, "default", definition, ASKED_TARGET)
    assert (definition.directory / "reports" / "name").read_text() == "nobody\n"
    lines = (definition.directory / "reports" / "environment").read_text().splitlines()
    assert "TEXT=${HOME} %{x} \"'$" in lines
    bake(engines_own.buildx, "default", definition, "image")
    try:
        config = docker.config(tag)
        assert {name: config["Labels"][name] for name in labels} == labels
        assert config["User"] == "nobody"
        assert {"TEXT=${HOME} %{x} \"'$", "A_PATH=/profile/a ${HOME} \"'$"} <= set(config["Env"])
    finally:
        docker("rmi", "--force", tag)


def test_a_remote_builder(
    new_project: NewProject, engines_own: Builder, base_image: str, tmp_path: Path
) -> None:
    """It is made, seen, built with as far as its frontend goes, and removed."""
    name = f"guix-tasks-test-{secrets.token_hex(4)}"
    with dialled(engines_own.buildx) as endpoint:
        remote = engines_own.but(BUILDX_DRIVER="remote", BUILDX_BUILDER=name, BUILDX_NODES=endpoint)
        project = new_project()
        try:
            first = remote.inv(project, "buildx.setup")
            assert first.returncode in (0, 6), first.stderr
            assert f"creating {name} (remote)" in first.stderr
            assert f"{name} exists" in remote.inv(project, "buildx.setup").stderr
            status = remote.ok(project, "buildx.status").stdout
            assert re.search(rf"^{name}0 +{endpoint} +running", status, re.MULTILINE)
            definition = plain_definition(tmp_path / "plain", base_image, {}, "nobody")
            bake(engines_own.buildx, name, definition, ASKED_TARGET)
            assert (definition.directory / "reports" / "name").read_text() == "nobody\n"
        finally:
            said = remote.inv(project, "buildx.down").stderr
        assert f"removed {name}" in said
    assert buildx.inspect(engines_own.buildx, name) is None


def test_a_remote_builder_that_does_not_answer(
    new_project: NewProject, engines_own: Builder
) -> None:
    """Nothing is left of what was begun."""
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    far = engines_own.but(BUILDX_DRIVER="remote", BUILDX_NODES=endpoint, BUILDX_BUILDER="far")
    project = new_project()
    error = one_error(far.inv(project, "buildx.setup"), 6)
    assert "correct BUILDX_NODES" in error
    assert "builder far does not exist" in far.ok(project, "buildx.down").stderr


# --- A builder that runs insecure steps ------------------------------------------------------


def test_the_image_is_the_same_both_ways(
    insecure: Builder, new_project: NewProject, made: Made, docker: Docker
) -> None:
    """From one env file, from a clean state; and what comes of it is in the registry, locked."""
    project = new_project()
    said = insecure.ok(project, "base", "buildx.setup", "buildx.build")
    reference = said.stdout.strip().splitlines()[-1]
    assert re.fullmatch(rf"{re.escape(project.image)}@sha256:[0-9a-f]{{64}}", reference)
    assert "base: copying" in said.stderr, "only the engine has the base image"
    docker.ok("pull", reference)
    assert facts(docker, reference) == facts(docker, made.project.image)
    lock = (project.directory / LOCK).read_text()
    assert guix.commits(lock) == guix.commits((made.project.directory / LOCK).read_text())
    # Nothing changed: every step is in the cache, also the one that pulled what floated before.
    again = insecure.ok(project, "buildx.build")
    assert again.stdout.strip() == reference
    assert "Updating channel" not in again.stderr, "it is in the cache"
    docker("rmi", "--force", reference)


def test_search_paths_are_the_same_both_ways(
    insecure: Builder, new_project: NewProject, docker: Docker
) -> None:
    project = new_project(
        "base",
        BUILDX_OUTPUT="load",
        GUIX_CHANNELS="",
        GUIX_CHANNELS_LOCK="",
        GUIX_PACKAGES="",
        GUIX_MANIFEST="manifest.scm",
    )
    (project.directory / "manifest.scm").write_text(READER)
    project.ok("install")
    environment = docker.config(project.image)["Env"]
    assert f"GREET_PATH={guix.PROFILE}/share/greet" in environment
    insecure.ok(project, "buildx.build", "--no-pull")
    assert docker.config(project.image)["Env"] == environment


def test_a_builder_is_made_anew_with_its_cache(insecure: Builder, new_project: NewProject) -> None:
    """Where all is well nothing is done; the selected builder is another before and after."""
    project = new_project()
    assert "exists" in insecure.ok(project, "buildx.setup").stderr
    before = insecure.ok(project, "buildx.status").stdout
    assert "network.host security.insecure" in before
    said = insecure.ok(project, "--echo", "buildx.setup", "--recreate").stderr
    assert "rm --keep-state" in said
    assert "cache: 0B" not in insecure.ok(project, "buildx.status").stdout
    selected = f"{insecure.environment['BUILDX_BUILDER']}*"
    assert selected not in insecure.buildx.ask("ls")


def test_a_builder_that_was_made_otherwise_is_told_of(
    insecure: Builder, new_project: NewProject, engine_host: str
) -> None:
    name = f"guix-tasks-test-{secrets.token_hex(4)}"
    insecure.buildx.change(
        "create", f"--name={name}", "--driver=docker-container", "--driver-opt=network=host",
        "--bootstrap", engine_host,
    )  # fmt: skip
    other = insecure.but(BUILDX_BUILDER=name)
    project = new_project()
    try:
        error = one_error(other.inv(project, "buildx.setup"), 6)
        assert "security.insecure" in error
        assert "--recreate" in error
        error = one_error(other.inv(project, "buildx.build"), 6)
        assert "does not allow insecure steps" in error
        assert "runs insecure steps" in other.ok(project, "buildx.setup", "--recreate").stderr
    finally:
        other.inv(project, "buildx.down")


def test_a_step_that_fails_pushes_nothing(
    insecure: Builder, new_project: NewProject, docker: Docker
) -> None:
    project = new_project(GUIX_PACKAGES="hello no-such-package")
    error = one_error(insecure.inv(project, "buildx.build", "--no-pull"), 4)
    assert "install: the command failed with exit status 1" in error
    assert docker("manifest", "inspect", "--insecure", project.image).returncode


def test_a_build_that_is_interrupted_pushes_nothing(
    insecure: Builder, new_project: NewProject, docker: Docker
) -> None:
    project = new_project(GUIX_PACKAGES="hello")
    running = project.start("buildx.build", "--no-pull", "--force", env=insecure.environment)
    running.await_output("will be installed")
    assert running.signal(signal.SIGINT) == 130
    assert "Traceback" not in running.said()
    assert docker("manifest", "inspect", "--insecure", project.image).returncode


def test_a_registry_that_is_not_there(insecure: Builder, new_project: NewProject) -> None:
    project = new_project(repository=f"localhost:{free_port()}/x/y", GUIX_PACKAGES="hello")
    error = one_error(insecure.inv(project, "buildx.build", "--no-pull"), 5)
    assert "inv registry.up" in error


def test_what_is_secret_is_in_no_layer(
    insecure: Builder, new_project: NewProject, docker: Docker
) -> None:
    """A proxy's password above all; and nothing of the work directory or the mounts is left."""
    project = new_project(BUILDX_OUTPUT="load", GUIX_PACKAGES="hello")
    secretive = insecure.but(http_proxy="http://me:hunter2@127.0.0.1:9")
    said = secretive.ok(project, "buildx.build", "--no-pull")
    assert "hunter2" not in said.stdout + said.stderr
    assert said.stdout.strip() == project.image
    assert "hunter2" not in docker.ok("history", "--no-trunc", project.image)
    assert "hunter2" not in json.dumps(docker.config(project.image))
    ours = "/.guix-tasks* /var/guix/guix-tasks* /offline /root/.cache"
    look = f"ls -d {ours}; grep -rl hunter2 /etc /root"
    left = docker.run(project.image, "-c", look, options=("--entrypoint=sh",))
    assert left.stdout == ""


def test_jobs_push_by_digest_and_the_last_one_joins(
    insecure: Builder, new_project: NewProject, docker: Docker
) -> None:
    project = new_project(PLATFORMS="linux/amd64", GUIX_PACKAGES="hello")
    said = insecure.ok(project, "buildx.build", "--no-pull", "--by-digest").stdout.strip()
    assert said.startswith(f"{project.repository}@sha256:")
    assert docker("manifest", "inspect", "--insecure", project.image).returncode, "no tag yet"
    joined = insecure.ok(project, "manifest").stdout.strip()
    found = json.loads(docker.ok("manifest", "inspect", "--insecure", joined))
    assert [each["digest"] for each in found["manifests"]] == [said.partition("@")[2]]


def test_an_archive_is_in_the_output_folder(insecure: Builder, new_project: NewProject) -> None:
    project = new_project(BUILDX_OUTPUT="oci", GUIX_PACKAGES="hello")
    said = insecure.ok(project, "buildx.build", "--no-pull").stdout.strip()
    assert Path(said).parent == project.directory / "out"
    with tarfile.open(said) as tar:
        assert "index.json" in tar.getnames()
    kept = [each.name for each in (project.directory / "out").iterdir() if each.name != "logs"]
    assert kept == [Path(said).name]


# --- Many platforms by run and commit --------------------------------------------------------


def test_platforms_are_pushed_one_by_one_and_joined(
    new_project: NewProject, engines_own: Builder, docker: Docker
) -> None:
    """The Dockerfile runs nothing, so it builds for any platform without emulation."""
    project = new_project(PLATFORMS="linux/amd64 linux/arm64", GUIX_SANDBOX="nochroot", TAGS="more")
    project.dockerfile("FROM scratch\nCOPY Dockerfile /\n")
    said = engines_own.ok(project, "base", "push").stdout.split()
    digests = [line.partition("@")[2] for line in said]
    assert [line.partition("@")[0] for line in said] == [
        project.tag("linux-amd64"),
        project.tag("linux-arm64"),
    ]
    records = sorted((project.directory / "out" / "digests").iterdir())
    assert [each.name for each in records] == ["linux-amd64.json", "linux-arm64.json"]
    assert [json.loads(each.read_text())["digest"] for each in records] == digests
    joined = engines_own.ok(project, "manifest").stdout.strip()
    assert joined.startswith(f"{project.image}@sha256:")
    for tag in ("t", "more"):
        found = json.loads(
            docker.ok("manifest", "inspect", "--insecure", f"{project.repository}:{tag}")
        )
        parts = {(each["platform"]["architecture"], each["digest"]) for each in found["manifests"]}
        assert parts == {("amd64", digests[0]), ("arm64", digests[1])}
    records[1].unlink()
    error = one_error(engines_own.inv(project, "manifest"), 2)
    assert "linux/arm64" in error
    engines_own.ok(project, "clean")
    assert project.tags() == {}


def test_an_emulated_platform_wants_no_isolation(new_project: NewProject) -> None:
    project = new_project(PLATFORMS="linux/riscv64")
    with project.unharmed():
        error = one_error(project.inv("install"), 2)
    assert "GUIX_SANDBOX=nochroot" in error


def test_a_task_for_one_platform_wants_to_know_which(new_project: NewProject) -> None:
    project = new_project(PLATFORMS="linux/amd64 linux/arm64")
    error = one_error(project.inv("run", "--", "true"), 2)
    assert "PLATFORMS=linux/amd64" in error


def test_builds_that_are_not_isolated_come_out_the_same(
    new_project: NewProject, made: Made, docker: Docker
) -> None:
    """And take no privilege."""
    project = new_project("base", "pull", GUIX_SANDBOX="nochroot")
    said = project.ok("--echo", "install").stderr
    assert "--privileged" not in said
    assert "--security-opt=seccomp=unconfined" in said
    assert facts(docker, project.image) == facts(docker, made.project.image)


# --- The very commands of the steps ----------------------------------------------------------

STUB = """#!/bin/sh
# Answers as a builder would that can do it; keeps what the last call of bake was given.
case $1 in
inspect)
    printf 'Name:   default\\nDriver: docker\\n\\nNodes:\\nName:      default\\n'
    printf 'Endpoint:  default\\nStatus:    running\\nPlatforms: linux/amd64\\n' ;;
build) ;;
bake)
    for word; do
        case $word in
        --file=*) directory=$(dirname "${word#*=}") ;;
        --metadata-file=*) metadata=${word#*=} ;;
        esac
    done
    mkdir -p "$directory/reports"
    echo 0 >"$directory/reports/user"
    rm -rf "$KEPT" && cp -r "$directory" "$KEPT"
    echo '{"image": {"containerimage.digest": "sha256:0"}}' >"$metadata" ;;
esac
"""

BLOCK = re.compile(r"^FROM (\S+) AS ((?:pull|install)\S*)\n((?:(?!FROM ).*\n)*)", re.MULTILINE)
RUN = re.compile(r"^RUN (.*?) (\[.*\])$", re.MULTILINE)


def test_the_commands_of_the_steps_make_the_same_image(
    new_project: NewProject, made: Made, docker: Docker, tmp_path: Path
) -> None:
    """Also where no builder can run them: one after the other in a container each."""
    plugins = tmp_path / "config" / "cli-plugins"
    plugins.mkdir(parents=True)
    (plugins / buildx.PROGRAM).write_text(STUB)
    (plugins / buildx.PROGRAM).chmod(0o755)
    project = new_project("base", "pull", BUILDX_DRIVER="docker")
    kept = tmp_path / "kept"
    environment = {"DOCKER_CONFIG": str(plugins.parent), "KEPT": str(kept)}
    assert project.inv("buildx.build", env=environment).returncode == 0
    text = (kept / "Dockerfile").read_text().replace(" \\\n   ", "")
    contexts = json.loads((kept / "bake.json").read_text())["target"]["image"]["contexts"]
    steps = Steps(project, kept, contexts, {"base": project.tag("base")})
    for parent, name, lines in BLOCK.findall(text):
        steps.run(parent, name, lines)
    # Its configuration is what the other lines of the Dockerfile make, so only what is in it.
    assert contents(docker, steps.images["install"]) == contents(docker, made.project.image)


@dataclass
class Steps:
    """What BuildKit does for the steps of a Dockerfile, in containers."""

    project: Project
    kept: Path
    contexts: dict[str, str]
    images: dict[str, str]
    """The image of each part of the Dockerfile, by name."""

    def run(self, parent: str, name: str, lines: str) -> None:
        """Do the only ``RUN`` of a part."""
        docker, container = self.project.docker, self.project.container_name()
        ((options, command),) = RUN.findall(lines)
        words = ["--name", container, *re.findall(r"^ENV (.*)$", lines, re.MULTILINE)]
        words = [f"--env={word}" if "DIRECTORY=" in word else word for word in words]
        for option in options.split():
            key, _, value = option.removeprefix("--").partition("=")
            if key == "network":
                words.append(f"--network={value}")
            elif key == "mount":
                words += self._mount(dict(each.partition("=")[::2] for each in value.split(",")))
            else:
                assert option == "--security=insecure"
                words.append("--privileged")
        entry, *rest = json.loads(command)
        docker.ok("run", *words, f"--entrypoint={entry}", self.images[parent], *rest)
        self.images[name] = docker.ok("commit", container)
        self.project.seen.add(self.images[name])

    def _mount(self, fields: dict[str, str]) -> list[str]:
        """A mount of a ``RUN`` as options of ``docker run``."""
        target, source = fields["target"], fields.get("source", "")
        if fields["type"] == "cache":
            identity = re.sub(r"\${\w+}", "", fields["id"])
            prefix = self.project.settings["CACHE_VOLUME"]
            return [f"--volume={prefix}-{identity}:{target}:nocopy"]
        if fields["type"] == "secret":
            return [f"--volume={self.kept / fields['id']}:{target}:ro"]
        assert fields["type"] == "bind"
        if fields["from"] in self.images:
            copy = self.kept / fields["from"]
            container = self.project.container_name()
            docker = self.project.docker
            docker.ok("create", "--name", container, self.images[fields["from"]])
            docker.ok("cp", f"{container}:{source}", str(copy))
            return [f"--volume={copy}:{target}:ro"]
        work = self.kept / "work"
        place = work if fields["from"] == "work" else Path(self.contexts[fields["from"]])
        return [f"--volume={place / source}:{target}{'' if 'rw' in fields else ':ro'}"]
