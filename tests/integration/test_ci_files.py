"""The CI files of ``init`` and of the examples, run job by job as on GitHub and GitLab."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from ci_emulator import FailedJobError, Pipeline, Runner, Workflow
from harness import LOCK, ROOT, call, log_in, wait_until
from isolated_host import add_registry_and_base
from planted_secrets import ENVIRONMENT, PLANTED_SECRETS

from guix_tasks.bootstrap.engine import private_engine
from guix_tasks.buildkit import buildx
from guix_tasks.commands.init import CI_FILES
from guix_tasks.stages.images import STAGES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from conftest import NewProject
    from harness import Docker, Project, ProjectFactory
    from isolated_host import IsolatedHost

    from guix_tasks.bootstrap.registry import LocalRegistry

GITHUB, GITLAB = (target for target, _ in CI_FILES.values())
EXAMPLES = ROOT / "examples/ci"


@pytest.fixture
def repository(wheel_programs: Path, tmp_path: Path) -> Path:
    """A project as written by `init`."""
    directory = tmp_path / "repository"
    directory.mkdir()
    home = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    for ci in CI_FILES:
        command = [str(wheel_programs / "guix-tasks"), "init", f"--ci={ci}"]
        result = call(command, home, 60, directory)
        assert result.returncode == 0, result.stderr
    return directory


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory in which the first job creates its Python."""
    return tmp_path_factory.mktemp("ci") / "python"


@pytest.fixture(scope="session")
def plugin() -> str:
    program = buildx.find_program(os.environ, private_engine().buildx_path())
    if program is None:
        pytest.skip("buildx is not on this machine, and `inv manifest` needs it")
    return program


def settings(project: Project, wheels: Path) -> dict[str, str]:
    """Return an environment with the offline example and the wheel for `pip install`."""
    offline = {name: value for name, value in project.settings.items() if name != "IMAGE"}
    return {
        **ENVIRONMENT,
        **offline,
        "DOCKERFILE": "Dockerfile",
        "BUILD_CONTEXT": ".",
        "GUIX_PACKAGES": "greet",
        "TASKS_PACKAGE": "guix-tasks",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
    }


def inspect_index(docker: Docker, program: str, image: str, enter: Sequence[str] = ()) -> Index:
    """Look up the index of an image in its registry."""
    env = {**docker.environment, "DOCKER_CONFIG": str(docker.directory)}
    raw = call([*enter, program, "imagetools", "inspect", "--raw", image], env, 60)
    assert raw.returncode == 0, raw.stderr
    digest = f"sha256:{hashlib.sha256(raw.stdout.encode()).hexdigest()}"
    return Index(digest, [part["digest"] for part in json.loads(raw.stdout)["manifests"]])


@dataclass(frozen=True)
class Index:
    """An index in a registry."""

    digest: str
    parts: list[str]


def check_hello(docker: Docker, reference: str) -> None:
    """Pull an image by its digest and run the installed program."""
    result = docker.run(reference, "hello")
    assert "Hello, world!" in result.stdout, result.stderr
    docker.ok("rmi", reference)


def clear_engine(project: Project) -> None:
    """Remove the images and volumes of a project from the engine, as on a fresh machine."""
    for tag in project.tags():
        project.docker.ok("rmi", f"{project.repository}:{tag}")
    for volume in project.volumes():
        project.docker.ok("volume", "rm", volume)


# --- GitHub Actions -------------------------------------------------------------------------


@pytest.mark.parametrize("file", [GITHUB, EXAMPLES / "github-platforms.yml"])
def test_github_needs_no_variables_and_secrets(repository: Path, file: str | Path) -> None:
    contexts = {
        "vars": {},
        "secrets": {"GITHUB_TOKEN": "a-token"},
        "github": {"repository": "me/it", "actor": "me"},
    }
    workflow = Workflow.read(repository / file)
    assert workflow.environment(contexts, workflow.file["env"]) == {
        "IMAGE": "ghcr.io/me/it",
        "CACHE_IMAGE": "ghcr.io/me/it-cache",
    }
    for job in workflow.file["jobs"].values():
        (env,) = (step["env"] for step in job["steps"] if step.get("run", "").startswith("inv "))
        assert workflow.environment(contexts, env) == {
            "DOCKER_USERNAME": "me",
            "DOCKER_PASSWORD": "a-token",
        }


def write_gh(directory: Path) -> Path:
    """Write a `gh` that records its arguments, because the tests cannot reach GitHub."""
    programs = directory / "programs"
    programs.mkdir()
    (programs / "gh").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >{directory}/gh.arguments\n')
    (programs / "gh").chmod(0o755)
    return programs


@pytest.mark.engine
def test_github_workflow_builds_joins_and_releases(
    new_project: NewProject,
    repository: Path,
    registry: LocalRegistry,
    wheels: Path,
    docker: Docker,
    plugin: str,
    python: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Run one job, then on fresh machines the jobs of a platform, a release and a failure."""
    project = new_project()
    account = log_in(docker, registry)
    PLANTED_SECRETS.add(account.password)
    cache = f"{project.repository}-cache"
    workflow = Workflow.read(
        repository / GITHUB,
        vars={
            "IMAGE": project.image,
            "CACHE_IMAGE": cache,
            "DOCKER_USERNAME": account.username,
            "TASKS_PACKAGE": "guix-tasks",
        },
        secrets={"DOCKER_PASSWORD": account.password},
        github={"repository": "Me/It", "actor": "me", "ref_name": "v1.0", "token": "a-token"},
    )
    github = {"GITHUB_ACTIONS": "true", "GITHUB_REF_NAME": "v1.0", "DOCKER_HOST": docker.host}
    machine = {**settings(project, wheels), **github}

    def new_runner(name: str) -> Runner:
        return Runner(tmp_path / name, repository, python, machine, plugin)

    runner = new_runner("first")
    first = workflow.run(runner, "image")
    project._record_images()
    (digest,) = re.findall(rf"^{project.image}@(\S+)$", runner.outputs[-1], re.MULTILINE)
    check_hello(docker, f"{project.repository}@{digest}")
    assert not runner.artifact("").exists()
    # --- with the lock in Git a fresh machine uses the cache; the platforms are joined
    shutil.copy(first / LOCK, repository)
    clear_engine(project)
    runner = new_runner("second")
    platforms = Workflow.read(EXAMPLES / "github-platforms.yml", **workflow.contexts)
    platforms.run(runner, "image")
    for stage in STAGES:
        assert f"{stage}: taken from {cache}:{stage}-" in runner.outputs[-1]
    pushed = json.loads((runner.artifact("digests-0") / "linux-amd64.json").read_text())
    platforms.run(runner, "manifest")
    index = inspect_index(docker, plugin, project.image)
    assert f"{project.image}@{index.digest}" in runner.outputs[-1]
    assert index.parts == [pushed["digest"]]
    check_hello(docker, f"{project.repository}@{index.digest}")
    # --- a release contains its packed files
    runner = new_runner("packs")
    release = Workflow.read(EXAMPLES / "github-release.yml", **workflow.contexts)
    release.run(runner, "pack")
    monkeypatch.setenv("PATH", f"{write_gh(tmp_path)}:{os.environ['PATH']}")
    directory = release.run(runner, "release")
    (pack,) = (directory / "out").glob("*.tar.gz")
    assert (tmp_path / "gh.arguments").read_text().splitlines() == [
        "release", "create", "v1.0", "--verify-tag", "--generate-notes",
        f"out/{pack.name}", f"out/{pack.name}.sha256", "out/build.json",
    ]  # fmt: skip
    entry = json.loads((directory / "out/build.json").read_text())["x86_64-linux"]
    assert entry["url"] == f"https://github.com/Me/It/releases/download/v1.0/{pack.name}"
    assert entry["sha256"] == hashlib.sha256(pack.read_bytes()).hexdigest()
    # --- the diagnostics of a failed stage are kept
    machine["GUIX_PACKAGES"] = "no-such-package"
    runner = new_runner("third")
    with pytest.raises(FailedJobError, match="no-such-package: unknown package"):
        workflow.run(runner, "image")
    (diagnostics,) = runner.artifact("failed").iterdir()
    assert "no-such-package: unknown package" in (diagnostics / "log").read_text()


# --- GitLab CI ------------------------------------------------------------------------------


def test_gitlab_needs_no_variables(repository: Path) -> None:
    predefined = {
        "CI_REGISTRY_IMAGE": "registry.example.org/me/it",
        "CI_REGISTRY_USER": "gitlab-ci-token",
        "CI_REGISTRY_PASSWORD": "a-token",
    }
    variables = Pipeline.read(repository / GITLAB, predefined, {}).variables("build")
    of_platform = {"PLATFORMS": "linux/arm64", "RUNNER": "saas-linux-small-arm64"}
    platforms = Pipeline.read(EXAMPLES / "gitlab-platforms.yml", predefined, {})
    assert platforms.variables("platform", 1) == variables | of_platform
    assert variables == predefined | {
        "IMAGE": "registry.example.org/me/it",
        "CACHE_IMAGE": "registry.example.org/me/it/cache",
        "DOCKER_USERNAME": "gitlab-ci-token",
        "DOCKER_PASSWORD": "a-token",
        # Required by docker:dind; see its entry point and the GitLab documentation.
        "DOCKER_HOST": "tcp://docker:2376",
        "DOCKER_TLS_CERTDIR": "/certs",
        "DOCKER_TLS_VERIFY": "1",
        "DOCKER_CERT_PATH": "/certs/client",
    }


def make_certificates(directory: Path) -> None:
    """Make the certificates of docker:dind's entry point: authority, server and client."""
    (directory / "client").mkdir(parents=True)
    (directory / "server").mkdir()
    kinds = {
        "server": "subjectAltName=DNS:docker,IP:127.0.0.1",
        "client": "extendedKeyUsage=clientAuth",
    }
    _openssl(
        directory, "req", "-x509", "-new", "-nodes", "-newkey=rsa:2048", "-days=1",
        "-subj=/CN=authority", "-keyout=ca-key.pem", "-out=ca.pem",
    )  # fmt: skip
    for kind, extension in kinds.items():
        (directory / "extension").write_text(f"{extension}\n")
        _openssl(
            directory, "req", "-new", "-nodes", "-newkey=rsa:2048", f"-subj=/CN={kind}",
            f"-keyout={kind}/key.pem", "-out=request",
        )  # fmt: skip
        _openssl(
            directory, "x509", "-req", "-days=1", "-CA=ca.pem", "-CAkey=ca-key.pem",
            "-CAcreateserial", "-extfile=extension", "-in=request", f"-out={kind}/cert.pem",
        )  # fmt: skip
        shutil.copy(directory / "ca.pem", directory / kind)


def _openssl(directory: Path, *options: str) -> None:
    arguments = [word for option in options for word in option.split("=", 1)]
    result = call(["openssl", *arguments], dict(os.environ), 60, directory)
    assert result.returncode == 0, result.stderr


def embed_channels(offline: Path, repository: Path) -> None:
    """Copy channels and substitutes into the base stage, because the engine cannot mount them."""
    shutil.copytree(offline, repository / "offline", symlinks=True)
    with (repository / "Dockerfile").open("a") as file:
        file.write("COPY offline /offline\n")
    with (repository / ".dockerignore").open("a") as file:
        file.write("!offline\n")


@contextmanager
def docker_in_docker(host: IsolatedHost, certificates: Path) -> Iterator[None]:
    """Run an engine like docker:dind, at docker:2376 for clients with a certificate."""
    make_certificates(certificates)
    hosts = host.directory / "hosts"
    hosts.write_text("127.0.0.1 localhost docker\n")
    host.run("mount", "--bind", str(hosts), "/etc/hosts")
    engine = host.engine
    server = certificates / "server"
    configuration = engine.directory / "dind.json"
    configuration.write_text(
        json.dumps(
            engine._configure(None)
            | {
                # Only the test uses the socket.
                "hosts": [engine.url, "tcp://127.0.0.1:2376"],
                "tlsverify": True,
                "tlscacert": str(server / "ca.pem"),
                "tlscert": str(server / "cert.pem"),
                "tlskey": str(server / "key.pem"),
            }
        )
    )
    programs = [str(engine.directory / "root/usr" / name) for name in ("bin", "sbin")]
    path = os.pathsep.join([*programs, os.environ["PATH"]])
    with (host.directory / "log").open("wb") as log:
        daemon = subprocess.Popen(
            [*host.prefix, f"{programs[1]}/dockerd", f"--config-file={configuration}"],
            env={"PATH": path, "HOME": str(host.directory)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        wait_until(lambda: host.docker("version").returncode == 0, "an engine that answers")
        yield
    finally:
        daemon.terminate()
        daemon.wait(timeout=60)


@pytest.mark.engine
def test_gitlab_pipeline_builds_and_joins(
    host: IsolatedHost,
    factory: ProjectFactory,
    registry: LocalRegistry,
    repository: Path,
    wheels: Path,
    plugin: str,
    python: Path,
    tmp_path: Path,
) -> None:
    """The engine is behind TLS and empty for each job; the last job has no engine."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the certificates, is not on this machine")
    certificates = tmp_path / "certificates"
    with docker_in_docker(host, certificates):
        host_factory = add_registry_and_base(host, registry.directory / "root", factory)
        project = host_factory.create(tmp_path / "project")
        account = log_in(host.docker, host.registry)
        PLANTED_SECRETS.add(account.password)
        predefined = {
            "CI_REGISTRY_IMAGE": project.repository,
            "CI_REGISTRY_USER": account.username,
            "CI_REGISTRY_PASSWORD": account.password,
        }
        variables = {
            "DOCKER_TLS_CERTDIR": str(certificates),
            # The jobs can only reach the registry.
            "BUILDX_URL": f"file://{plugin}",
            "BUILDX_SHA256": hashlib.sha256(Path(plugin).read_bytes()).hexdigest(),
        }
        embed_channels(factory.offline, repository)
        machine = {**settings(project, wheels), "MOUNTS": "", "GITLAB_CI": "true"}

        def new_runner(name: str) -> Runner:
            return Runner(tmp_path / name, repository, python, machine, prefix=host.prefix)

        runner = new_runner("first")
        first = Pipeline.read(repository / GITLAB, predefined, variables).run(runner, "build")
        assert "at tcp://docker:2376" in runner.outputs[-1]
        latest = f"{project.repository}:latest"
        (digest,) = re.findall(rf"^{latest}@(\S+)$", runner.outputs[-1], re.MULTILINE)
        check_hello(host.docker, f"{project.repository}@{digest}")
        # --- with the lock in Git the next empty engine uses the cache
        shutil.copy(first / LOCK, repository)
        clear_engine(project)
        runner = new_runner("second")
        pipeline = Pipeline.read(EXAMPLES / "gitlab-platforms.yml", predefined, variables)
        pipeline.run(runner, "platform")
        for stage in STAGES:
            assert f"{stage}: taken from {project.repository}/cache:{stage}-" in runner.outputs[-1]
        pushed = json.loads((runner.artifact("out/digests") / "linux-amd64.json").read_text())
        last = pipeline.run(runner, "manifest")
        assert (last.parent / ".docker/cli-plugins/docker-buildx").is_file()
        index = inspect_index(host.docker, plugin, project.repository, host.prefix)
        assert f"{latest}@{index.digest}" in runner.outputs[-1]
        assert index.parts == [pushed["digest"]]
        check_hello(host.docker, f"{project.repository}@{index.digest}")
