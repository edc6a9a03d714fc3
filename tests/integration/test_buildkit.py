"""Builds with BuildKit on real builders, and the commands of their steps in containers."""

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
from harness import (
    LOCK,
    READER,
    Result,
    builder_environment,
    expect_error,
    free_port,
    read_contents,
)

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
    from harness import BuiltProject, Docker, Project, ProjectFactory

    from guix_tasks.buildkit.buildx import Buildx
    from guix_tasks.engine.docker import DockerEngine

pytestmark = pytest.mark.engine

BUILDKIT_IMAGE = "moby/buildkit:buildx-stable-1"
"""Image of the builders that buildx creates."""

PLATFORM = Platform.parse("linux/amd64")


# --- Fixtures and helpers --------------------------------------------------------------------


@dataclass(frozen=True)
class Builder:
    """The environment in which ``inv`` uses a builder of the tests."""

    environment: dict[str, str]
    buildx: Buildx

    def with_variables(self, **environment: str) -> Builder:
        return Builder({**self.environment, **environment}, self.buildx)

    def inv(self, project: Project, *arguments: str, timeout: float = 240) -> Result:
        return project.inv(*arguments, env=self.environment, timeout=timeout)

    def ok(self, project: Project, *arguments: str) -> Result:
        result = self.inv(project, *arguments)
        assert result.returncode == 0, result.stderr
        return result


@pytest.fixture(scope="module")
def engine_builder(engine: DockerEngine, tmp_path_factory: pytest.TempPathFactory) -> Builder:
    """The builder that is part of the engine."""
    config = str(tmp_path_factory.mktemp("docker"))
    program = local_buildx({**os.environ, "DOCKER_CONFIG": config}, engine.address)
    if program is None:
        pytest.skip("buildx is not on this machine")
    environment = {**builder_environment("buildx"), "DOCKER_CONFIG": config}
    return Builder({**environment, "BUILDX_DRIVER": "docker"}, program)


@pytest.fixture(scope="module")
def insecure_builder(
    engine_builder: Builder,
    docker: Docker,
    tmp_path_factory: pytest.TempPathFactory,
    factory: ProjectFactory,
) -> Iterator[Builder]:
    """A builder of the driver docker-container, created by ``buildx.setup``."""
    is_local = docker("image", "inspect", BUILDKIT_IMAGE).returncode == 0
    if not is_local and docker("pull", BUILDKIT_IMAGE).returncode:
        pytest.skip(
            f"no builder can run insecure steps: the engine has no {BUILDKIT_IMAGE} and cannot "
            "pull it"
        )
    name = f"guix-tasks-test-{secrets.token_hex(4)}"
    created = engine_builder.with_variables(BUILDX_DRIVER="docker-container", BUILDX_BUILDER=name)
    project = factory.create(tmp_path_factory.mktemp("setup") / "project")
    try:
        created.ok(project, "buildx.setup")
        yield created
    finally:
        created.inv(project, "buildx.down")


@contextmanager
def serve_buildkit(program: Buildx) -> Iterator[str]:
    """Serve the BuildKit of the engine on a loopback port, with ``buildx dial-stdio``."""

    class Dial(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with subprocess.Popen(
                [program.program, "dial-stdio", "--builder=default"],
                env=dict(program.environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            ) as process:  # fmt: skip
                assert process.stdin
                assert process.stdout
                reply = threading.Thread(target=self._reply, args=(process,), daemon=True)
                reply.start()
                while data := self.request.recv(1 << 16):
                    process.stdin.write(data)
                    process.stdin.flush()
                process.terminate()

        def _reply(self, process: subprocess.Popen[bytes]) -> None:
            assert process.stdout
            with suppress(OSError, ValueError):  # either side may have closed the connection
                while data := os.read(process.stdout.fileno(), 1 << 16):
                    self.request.sendall(data)
                self.request.shutdown(socket.SHUT_RDWR)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Dial) as server:
        server.daemon_threads = True
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"tcp://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def describe(docker: Docker, image: str) -> dict[str, Any]:
    """Return the contents of an image, its configuration, and its channels and packages."""
    config = docker.config(image)
    kept = ("Cmd", "Entrypoint", "Env", "User", "WorkingDir", "ExposedPorts", "Volumes")
    return {
        "contents": read_contents(docker, image),
        "config": {name: config.get(name) or None for name in kept},
        "labels": {name: config["Labels"][name] for name in (CHANNELS_LABEL, PACKAGES_LABEL)},
    }


# --- The builder of the engine and a remote builder, without insecure steps ------------------


def test_setup_reports_support_for_insecure_steps(
    new_project: NewProject, engine_builder: Builder
) -> None:
    """If the frontend is too old, the error names a newer one."""
    project = new_project()
    result = engine_builder.inv(project, "buildx.setup")
    if result.returncode == 0:
        assert "runs insecure steps" in result.stderr
        return
    error = expect_error(result, 6)
    assert "unknown flag: --security" in error
    assert "docker/dockerfile:1" in error
    assert "set BUILDKIT_SYNTAX" in error


def test_unsupported_build_changes_nothing(
    new_project: NewProject, engine_builder: Builder
) -> None:
    project = new_project()
    result = engine_builder.inv(project, "buildx.build", timeout=600)
    if result.returncode == 0:
        pytest.skip("the builder of this engine runs insecure steps")
    with project.assert_unchanged():
        expect_error(engine_builder.inv(project, "buildx.build"), 6)
    assert not (project.directory / LOCK).exists()


def test_status_shows_the_builder_of_the_engine(
    new_project: NewProject, engine_builder: Builder
) -> None:
    status = engine_builder.ok(new_project(), "buildx.status").stdout
    node = r"^default +default +running +\S+ +linux/.* (security\.insecure|none)$"
    assert re.search(node, status, re.MULTILINE)
    assert re.search(r"^cache: [0-9.]+ ?[kMGT]?B$", status, re.MULTILINE)


def test_builder_of_the_engine_is_not_removed(
    new_project: NewProject, engine_builder: Builder
) -> None:
    assert "nothing to remove" in engine_builder.ok(new_project(), "buildx.down").stderr
    engine_builder.ok(new_project(), "buildx.status")


def test_missing_builder_is_reported(new_project: NewProject, engine_builder: Builder) -> None:
    project = new_project()
    missing = engine_builder.with_variables(
        BUILDX_DRIVER="docker-container", BUILDX_BUILDER="nobody-made-it"
    )
    for task in ("buildx.build", "buildx.status"):
        error = expect_error(missing.inv(project, task), 6)
        assert "nobody-made-it" in error
        assert "`inv buildx.setup` creates it" in error
    assert "builder nobody-made-it does not exist" in missing.ok(project, "buildx.down").stderr


def plain_definition(directory: Path, base: str, labels: dict[str, str], user: str) -> Definition:
    """Define a build without stages, and therefore without insecure steps."""
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
        platforms=[PLATFORM],
        network="none",
        user=user,
        labels={PLATFORM: labels},
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


def test_base_is_linked_and_labelled(
    engine_builder: Builder,
    docker: Docker,
    base_image: str,
    tmp_path: Path,
    factory: ProjectFactory,
) -> None:
    """Special characters in labels, build arguments and paths are preserved."""
    labels = {"a.b": '(list\n  \'x "y" ${HOME} $HOME %{if} \\n é)', "c": "", "d": "one two"}
    tag = f"{factory.registry}/guix-tasks-test-{factory.token}/linked:t"
    plain = plain_definition(tmp_path / "a ${directory}, really", base_image, labels, "nobody")
    paths = {"A_PATH": "/profile/a ${HOME} \"'$"}
    changes = {"tags": [tag], "output": "type=docker", "environment": {PLATFORM: paths}}
    definition = Definition(**{**vars(plain), **changes})
    bake(engine_builder.buildx, "default", definition, ASKED_TARGET)
    assert (definition.directory / "reports" / "name").read_text() == "nobody\n"
    lines = (definition.directory / "reports" / "environment").read_text().splitlines()
    assert "TEXT=${HOME} %{x} \"'$" in lines
    bake(engine_builder.buildx, "default", definition, "image")
    try:
        config = docker.config(tag)
        assert {name: config["Labels"][name] for name in labels} == labels
        assert config["User"] == "nobody"
        assert {"TEXT=${HOME} %{x} \"'$", "A_PATH=/profile/a ${HOME} \"'$"} <= set(config["Env"])
    finally:
        docker("rmi", "--force", tag)


def test_remote_builder_is_created_used_and_removed(
    new_project: NewProject, engine_builder: Builder, base_image: str, tmp_path: Path
) -> None:
    """It builds without insecure steps, which its frontend may not support."""
    name = f"guix-tasks-test-{secrets.token_hex(4)}"
    with serve_buildkit(engine_builder.buildx) as endpoint:
        remote = engine_builder.with_variables(
            BUILDX_DRIVER="remote", BUILDX_BUILDER=name, BUILDX_NODES=endpoint
        )
        project = new_project()
        try:
            first = remote.inv(project, "buildx.setup")
            assert first.returncode in (0, 6), first.stderr
            assert f"creating {name} (remote)" in first.stderr
            assert f"{name} exists" in remote.inv(project, "buildx.setup").stderr
            status = remote.ok(project, "buildx.status").stdout
            assert re.search(rf"^{name}0 +{endpoint} +running", status, re.MULTILINE)
            definition = plain_definition(tmp_path / "plain", base_image, {}, "nobody")
            bake(engine_builder.buildx, name, definition, ASKED_TARGET)
            assert (definition.directory / "reports" / "name").read_text() == "nobody\n"
        finally:
            removal = remote.inv(project, "buildx.down").stderr
        assert f"removed {name}" in removal
    assert buildx.inspect(engine_builder.buildx, name) is None


def test_unreachable_remote_builder_is_removed(
    new_project: NewProject, engine_builder: Builder
) -> None:
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    remote = engine_builder.with_variables(
        BUILDX_DRIVER="remote", BUILDX_NODES=endpoint, BUILDX_BUILDER="far"
    )
    project = new_project()
    error = expect_error(remote.inv(project, "buildx.setup"), 6)
    assert "correct BUILDX_NODES" in error
    assert "builder far does not exist" in remote.ok(project, "buildx.down").stderr


# --- A builder that runs insecure steps ------------------------------------------------------


def test_buildkit_makes_the_same_image(
    insecure_builder: Builder, new_project: NewProject, built_project: BuiltProject, docker: Docker
) -> None:
    """The image comes from one env file and is pushed, and its channels are locked."""
    project = new_project()
    result = insecure_builder.ok(project, "base", "buildx.setup", "buildx.build")
    reference = result.stdout.strip().splitlines()[-1]
    assert re.fullmatch(rf"{re.escape(project.image)}@sha256:[0-9a-f]{{64}}", reference)
    assert "base: copying" in result.stderr, "only the engine has the base image"
    docker.ok("pull", reference)
    assert describe(docker, reference) == describe(docker, built_project.project.image)
    lock = (project.directory / LOCK).read_text()
    assert guix.commits(lock) == guix.commits((built_project.project.directory / LOCK).read_text())
    # Nothing changed: every step is in the cache, also the pull of the floating channels.
    second = insecure_builder.ok(project, "buildx.build")
    assert second.stdout.strip() == reference
    assert "Updating channel" not in second.stderr, "the pull is in the cache"
    docker("rmi", "--force", reference)


def test_buildkit_sets_the_same_search_paths(
    insecure_builder: Builder, new_project: NewProject, docker: Docker
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
    insecure_builder.ok(project, "buildx.build", "--no-pull")
    assert docker.config(project.image)["Env"] == environment


def test_builder_is_recreated_with_its_cache(
    insecure_builder: Builder, new_project: NewProject
) -> None:
    """Setup of a matching builder changes nothing, and setup never selects the builder."""
    project = new_project()
    assert "exists" in insecure_builder.ok(project, "buildx.setup").stderr
    status = insecure_builder.ok(project, "buildx.status").stdout
    assert "network.host security.insecure" in status
    recreation = insecure_builder.ok(project, "--echo", "buildx.setup", "--recreate").stderr
    assert "rm --keep-state" in recreation
    assert "cache: 0B" not in insecure_builder.ok(project, "buildx.status").stdout
    selected = f"{insecure_builder.environment['BUILDX_BUILDER']}*"
    assert selected not in insecure_builder.buildx.ask("ls")


def test_builder_with_other_flags_is_reported(
    insecure_builder: Builder, new_project: NewProject, engine_host: str
) -> None:
    name = f"guix-tasks-test-{secrets.token_hex(4)}"
    insecure_builder.buildx.change(
        "create", f"--name={name}", "--driver=docker-container", "--driver-opt=network=host",
        "--bootstrap", engine_host,
    )  # fmt: skip
    other = insecure_builder.with_variables(BUILDX_BUILDER=name)
    project = new_project()
    try:
        error = expect_error(other.inv(project, "buildx.setup"), 6)
        assert "security.insecure" in error
        assert "--recreate" in error
        error = expect_error(other.inv(project, "buildx.build"), 6)
        assert "does not allow insecure steps" in error
        assert "runs insecure steps" in other.ok(project, "buildx.setup", "--recreate").stderr
    finally:
        other.inv(project, "buildx.down")


def test_failed_step_pushes_nothing(
    insecure_builder: Builder, new_project: NewProject, docker: Docker
) -> None:
    project = new_project(GUIX_PACKAGES="hello no-such-package")
    error = expect_error(insecure_builder.inv(project, "buildx.build", "--no-pull"), 4)
    assert "install: the command failed with exit status 1" in error
    assert docker("manifest", "inspect", "--insecure", project.image).returncode


def test_interrupted_build_pushes_nothing(
    insecure_builder: Builder, new_project: NewProject, docker: Docker
) -> None:
    project = new_project(GUIX_PACKAGES="hello")
    running = project.start(
        "buildx.build", "--no-pull", "--force", env=insecure_builder.environment
    )
    running.wait_for_output("will be installed")
    assert running.signal(signal.SIGINT) == 130
    assert "Traceback" not in running.output()
    assert docker("manifest", "inspect", "--insecure", project.image).returncode


def test_unreachable_registry_is_reported(
    insecure_builder: Builder, new_project: NewProject
) -> None:
    project = new_project(repository=f"localhost:{free_port()}/x/y", GUIX_PACKAGES="hello")
    error = expect_error(insecure_builder.inv(project, "buildx.build", "--no-pull"), 5)
    assert "inv registry.up" in error


def test_image_contains_no_secret(
    insecure_builder: Builder, new_project: NewProject, docker: Docker
) -> None:
    """The password of a proxy, the work directory and the mounts are not in the image."""
    project = new_project(BUILDX_OUTPUT="load", GUIX_PACKAGES="hello")
    builder = insecure_builder.with_variables(http_proxy="http://me:hunter2@127.0.0.1:9")
    result = builder.ok(project, "buildx.build", "--no-pull")
    assert "hunter2" not in result.stdout + result.stderr
    assert result.stdout.strip() == project.image
    assert "hunter2" not in docker.ok("history", "--no-trunc", project.image)
    assert "hunter2" not in json.dumps(docker.config(project.image))
    paths = "/.guix-tasks* /var/guix/guix-tasks* /offline /root/.cache"
    search = f"ls -d {paths}; grep -rl hunter2 /etc /root"
    matches = docker.run(project.image, "-c", search, options=("--entrypoint=sh",))
    assert matches.stdout == ""


def test_images_pushed_by_digest_are_joined(
    insecure_builder: Builder, new_project: NewProject, docker: Docker
) -> None:
    project = new_project(PLATFORMS="linux/amd64", GUIX_PACKAGES="hello")
    pushed = insecure_builder.ok(project, "buildx.build", "--no-pull", "--by-digest").stdout.strip()
    assert pushed.startswith(f"{project.repository}@sha256:")
    assert docker("manifest", "inspect", "--insecure", project.image).returncode, "no tag yet"
    joined = insecure_builder.ok(project, "manifest").stdout.strip()
    index = json.loads(docker.ok("manifest", "inspect", "--insecure", joined))
    assert [part["digest"] for part in index["manifests"]] == [pushed.partition("@")[2]]


def test_archive_is_in_the_output_directory(
    insecure_builder: Builder, new_project: NewProject
) -> None:
    project = new_project(BUILDX_OUTPUT="oci", GUIX_PACKAGES="hello")
    archive = Path(insecure_builder.ok(project, "buildx.build", "--no-pull").stdout.strip())
    assert archive.parent == project.directory / "out"
    with tarfile.open(archive) as tar:
        assert "index.json" in tar.getnames()
    names = [path.name for path in archive.parent.iterdir() if path.name != "logs"]
    assert names == [archive.name]


# --- Several platforms without BuildKit ------------------------------------------------------


def test_platforms_are_pushed_and_joined(
    new_project: NewProject, engine_builder: Builder, docker: Docker
) -> None:
    """The Dockerfile runs nothing, so it builds for any platform without emulation."""
    project = new_project(PLATFORMS="linux/amd64 linux/arm64", GUIX_SANDBOX="nochroot", TAGS="more")
    project.write_dockerfile("FROM scratch\nCOPY Dockerfile /\n")
    references = engine_builder.ok(project, "base", "push").stdout.split()
    digests = [reference.partition("@")[2] for reference in references]
    assert [reference.partition("@")[0] for reference in references] == [
        project.tag("linux-amd64"),
        project.tag("linux-arm64"),
    ]
    records = sorted((project.directory / "out" / "digests").iterdir())
    assert [record.name for record in records] == ["linux-amd64.json", "linux-arm64.json"]
    assert [json.loads(record.read_text())["digest"] for record in records] == digests
    joined = engine_builder.ok(project, "manifest").stdout.strip()
    assert joined.startswith(f"{project.image}@sha256:")
    for tag in ("t", "more"):
        index = json.loads(
            docker.ok("manifest", "inspect", "--insecure", f"{project.repository}:{tag}")
        )
        parts = {(part["platform"]["architecture"], part["digest"]) for part in index["manifests"]}
        assert parts == {("amd64", digests[0]), ("arm64", digests[1])}
    records[1].unlink()
    error = expect_error(engine_builder.inv(project, "manifest"), 2)
    assert "linux/arm64" in error
    engine_builder.ok(project, "clean")
    assert project.tags() == {}


def test_builds_without_isolation_make_the_same_image(
    new_project: NewProject, built_project: BuiltProject, docker: Docker
) -> None:
    """The work container is not privileged."""
    project = new_project("base", "pull", GUIX_SANDBOX="nochroot")
    output = project.ok("--echo", "install").stderr
    assert "--privileged" not in output
    assert "--security-opt=seccomp=unconfined" in output
    assert describe(docker, project.image) == describe(docker, built_project.project.image)


# --- The commands of the steps, without a builder --------------------------------------------

STUB = """#!/bin/sh
# Answers like a builder that runs insecure steps, and keeps the input of the last bake call.
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


def test_commands_of_the_steps_make_the_same_image(
    new_project: NewProject, built_project: BuiltProject, docker: Docker, tmp_path: Path
) -> None:
    """Run each command in a container, which checks the commands without a builder."""
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
    # Other lines of the Dockerfile make the configuration, so compare only the contents.
    assert read_contents(docker, steps.images["install"]) == read_contents(
        docker, built_project.project.image
    )


@dataclass
class Steps:
    """Run the steps of a Dockerfile in containers, as BuildKit would."""

    project: Project
    inputs: Path
    """Copy of the directory that ``bake`` reads."""
    contexts: dict[str, str]
    images: dict[str, str]
    """The image of each stage of the Dockerfile, by name."""

    def run(self, parent: str, name: str, lines: str) -> None:
        """Run the only ``RUN`` of a stage."""
        docker, container = self.project.docker, self.project.container_name()
        ((options, command),) = RUN.findall(lines)
        arguments = ["--name", container, *re.findall(r"^ENV (.*)$", lines, re.MULTILINE)]
        arguments = [f"--env={word}" if "DIRECTORY=" in word else word for word in arguments]
        for option in options.split():
            key, _, value = option.removeprefix("--").partition("=")
            if key == "network":
                arguments.append(f"--network={value}")
            elif key == "mount":
                arguments += self._mount(
                    dict(field.partition("=")[::2] for field in value.split(","))
                )
            else:
                assert option == "--security=insecure"
                arguments.append("--privileged")
        entry, *rest = json.loads(command)
        docker.ok("run", *arguments, f"--entrypoint={entry}", self.images[parent], *rest)
        self.images[name] = docker.ok("commit", container)
        self.project.image_ids.add(self.images[name])

    def _mount(self, fields: dict[str, str]) -> list[str]:
        """Convert a mount of a ``RUN`` to options of ``docker run``."""
        target, source = fields["target"], fields.get("source", "")
        if fields["type"] == "cache":
            identity = re.sub(r"\${\w+}", "", fields["id"])
            prefix = self.project.settings["CACHE_VOLUME"]
            return [f"--volume={prefix}-{identity}:{target}:nocopy"]
        if fields["type"] == "secret":
            return [f"--volume={self.inputs / fields['id']}:{target}:ro"]
        assert fields["type"] == "bind"
        if fields["from"] in self.images:
            copy = self.inputs / fields["from"]
            container = self.project.container_name()
            docker = self.project.docker
            docker.ok("create", "--name", container, self.images[fields["from"]])
            docker.ok("cp", f"{container}:{source}", str(copy))
            return [f"--volume={copy}:{target}:ro"]
        work = self.inputs / "work"
        directory = work if fields["from"] == "work" else Path(self.contexts[fields["from"]])
        return [f"--volume={directory / source}:{target}{'' if 'rw' in fields else ':ro'}"]
