"""Other programs read pushed images and run them."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

import pytest
from harness import READER, builder_environment, call, log_in
from isolated_host import create_isolated_host
from parallel import OTHER_STORE
from podman_service import overlay_argv, unpack_packages, write_configuration

from guix_tasks import guix
from guix_tasks.settings.values import ImageStore

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from harness import Docker, Project, ProjectFactory

    from guix_tasks.bootstrap.registry import LocalRegistry

pytestmark = pytest.mark.engine

GREETING = "Hello, world!\n"

REGISTRIES = """
[[registry]]
location = "{host}"
insecure = true
"""


@dataclass(frozen=True)
class Pushed:
    """An image in a registry, and the digest that ``push`` printed."""

    project: Project
    digest: str

    @property
    def reference(self) -> str:
        return f"{self.project.repository}@{self.digest}"


@pytest.fixture(scope="module")
def pushed(factory: ProjectFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pushed]:
    directory = tmp_path_factory.mktemp("others") / "project"
    project = factory.create(directory, GUIX_PACKAGES="hello", GUIX_MANIFEST="manifest.scm")
    (directory / "manifest.scm").write_text(READER)
    try:
        # The classic builder mixes layers of Docker's and of OCI's types, which Buildah rejects.
        result = project.inv("base", "pull", "install", "push", env=builder_environment("buildx"))
        assert result.returncode == 0, result.stderr
        yield Pushed(project, result.stdout.strip().rpartition("@")[2])
    finally:
        project.remove()


# --- Programs that read a registry ------------------------------------------------------------


@dataclass(frozen=True)
class Tools:
    """Skopeo, Podman and Buildah, in the network of an engine, with the account of a registry."""

    prefix: list[str]
    environment: dict[str, str]

    def ok(self, script: str, *arguments: str) -> str:
        """Return the standard output of a shell script, which must succeed."""
        argv = [*self.prefix, "sh", "-ec", script, "sh", *arguments]
        result = call(argv, self.environment, 240)
        assert result.returncode == 0, result.stderr
        return result.stdout


@pytest.fixture(scope="module")
def tools(
    store: str,
    docker: Docker,
    factory: ProjectFactory,
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Tools]:
    directory = tmp_path_factory.mktemp("tools")
    registries = directory / ".config" / "containers" / "registries.conf"
    registries.parent.mkdir(parents=True)
    registries.write_text(REGISTRIES.format(host=factory.registry))
    prefix = overlay_argv(unpack_packages())
    if store == OTHER_STORE:
        pid = request.getfixturevalue("other_store").namespace_pid
        prefix = ["nsenter", f"--target={pid}", "--net", "--", *prefix]
    environment = {
        **docker.environment,
        **write_configuration(directory),
        "REGISTRY_AUTH_FILE": str(docker.directory / "config.json"),
    }
    yield Tools(prefix, environment)
    shutil.rmtree(directory)  # two images


@pytest.mark.both_stores
def test_skopeo_inspects_and_copies_a_pushed_image(
    tools: Tools, pushed: Pushed, tmp_path: Path
) -> None:
    tag = f"docker://{pushed.project.image}"
    assert tools.ok('skopeo inspect --format "{{.Digest}}" $1', tag) == f"{pushed.digest}\n"
    tools.ok("skopeo copy --quiet $1 dir:$2", f"docker://{pushed.reference}", str(tmp_path))
    manifest = (tmp_path / "manifest.json").read_bytes()
    assert f"sha256:{sha256(manifest).hexdigest()}" == pushed.digest
    for path in tmp_path.iterdir():
        if path.name not in ("manifest.json", "version"):
            assert sha256(path.read_bytes()).hexdigest() == path.name
    copy = f"docker://{pushed.project.repository}-copy:1"
    tools.ok("skopeo copy --quiet --preserve-digests $1 $2", tag, copy)
    assert tools.ok('skopeo inspect --format "{{.Digest}}" $1', copy) == f"{pushed.digest}\n"


@pytest.mark.both_stores
def test_podman_pulls_and_runs_a_pushed_image(tools: Tools, pushed: Pushed) -> None:
    script = """
        podman pull --quiet $1 >/dev/null
        podman image inspect --format '{{.Digest}}' $1
        podman run --rm --network=none $1 hello
        podman run --rm --network=none --entrypoint=reader --user=1000 --read-only $1
    """
    output = tools.ok(script, pushed.reference)
    assert output == f"{pushed.digest}\n{GREETING}{guix.PROFILE}/share/greet\n"


@pytest.mark.both_stores
def test_buildah_builds_from_a_pushed_image(tools: Tools, pushed: Pushed) -> None:
    script = """
        container=$(buildah from --quiet $1)
        echo $(buildah inspect --format '{{.FromImageDigest}}' $container)
        buildah run --isolation=chroot $container -- sh -c reader
        buildah rm $container >/dev/null
    """
    output = tools.ok(script, pushed.reference)
    assert output == f"{pushed.digest}\n{guix.PROFILE}/share/greet\n"


@pytest.mark.parametrize("kind", ImageStore)
def test_empty_engine_pulls_and_runs_a_pushed_image(
    kind: ImageStore, pushed: Pushed, registry: LocalRegistry, programs: Path
) -> None:
    with create_isolated_host(programs, kind.value) as host:
        host.ok("engine.up")
        # A second registry with the same data, because the engine has its own network.
        host.registry.directory.mkdir()
        for name in ("root", "data"):
            (host.registry.directory / name).symlink_to(registry.directory / name)
        host.ok("registry.up")
        log_in(host.docker, host.registry)
        path = pushed.reference.partition("/")[2]
        reference = f"localhost:{host.registry.port}/{path}"
        host.docker.ok("pull", "--quiet", reference)
        assert host.docker.run(reference, "hello").stdout == GREETING
        digests = host.docker.ok("image", "inspect", "--format={{.RepoDigests}}", reference)
        assert digests == f"[{reference}]"


def test_buildx_builds_from_a_pushed_image(pushed: Pushed, tmp_path: Path) -> None:
    docker, image = pushed.project.docker, f"{pushed.project.repository}:from"
    text = f"FROM {pushed.reference}\nRUN --network=none hello >/greeting\n"
    (tmp_path / "Dockerfile").write_text(text)
    environment = {**docker.environment, **builder_environment("buildx")}
    build = ("build", "--builder=default", "--load", f"--tag={image}", str(tmp_path))
    result = call(["docker-buildx", *build], environment, 240)
    assert result.returncode == 0, result.stderr
    assert docker.run(image, "cat", "/greeting").stdout == GREETING


UPSTREAM = r"""
    commit='s/.*(commit "\(.*\)").*/\1/p'
    grep -q CERTIFICATE /etc/ssl/certs/ca-certificates.crt && echo certificates
    sed -n "$commit" /root/.config/guix/channels.scm | head -n 1
    guix describe --format=channels | sed -n "$commit" | head -n 1
    guix install tar >&2 && tar --version | head -n 1
    guix package --list-installed | cut -f 1 | tr -d ' ' | sort
"""


def test_image_passes_the_tests_of_metacall_guix(pushed: Pushed, factory: ProjectFactory) -> None:
    """The image has certificates and the Guix of its channels file, and can install packages."""
    project, commit = pushed.project, factory.channel_commit("guix")
    mount = f"--volume={factory.offline}:/offline:ro"
    options = ("--privileged", mount, "--env=GUIX_SUBSTITUTE_URLS=file:///offline/substitutes")
    result = project.docker.run(project.image, "sh", "-ec", UPSTREAM, options=options)
    assert result.returncode == 0, result.stderr
    packages = "tar (GNU tar) 1.35\nhello\nreader\ntar\n"
    assert result.stdout == f"certificates\n{commit}\n{commit}\n{packages}"


# --- Containers of jobs -----------------------------------------------------------------------

PROGRAMS = ("hello; reader | sed s/.*://", f"{GREETING}{guix.PROFILE}/share/greet\n")

SHELLS = {
    "entry point of the image": ((), ("sh", "-c")),
    "other entry point": (("--entrypoint=sh",), ("-c",)),
    "login shell": (("--entrypoint=bash",), ("--login", "-c")),
}

JOBS = {
    "default": (),
    "user": ("--user=12345:12345",),
    "init": ("--init",),
    "read-only": ("--read-only",),
    "without capabilities": ("--cap-drop=ALL",),
    "all of these": ("--user=12345", "--init", "--read-only", "--cap-drop=ALL"),
}


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("job", JOBS)
def test_job_runs_the_programs_of_the_profile(pushed: Pushed, job: str, shell: str) -> None:
    options, command = SHELLS[shell]
    docker, image = pushed.project.docker, pushed.project.image
    result = docker.run(image, *command, PROGRAMS[0], options=(*JOBS[job], *options))
    assert (result.returncode, result.stdout, result.stderr) == (0, PROGRAMS[1], "")


@pytest.mark.parametrize("options", [(), ("--cap-drop=ALL",)])
def test_guix_reports_missing_privileges(pushed: Pushed, options: tuple[str, ...]) -> None:
    docker, image = pushed.project.docker, pushed.project.image
    result = docker.run(image, "guix", "remove", "hello", options=options)
    assert result.returncode == 1
    last = "entry-point: this container has no right to build packages: run it with --privileged"
    assert result.stderr.splitlines()[-1] == last
    assert "the last lines of" not in result.stderr


@pytest.mark.parametrize("job", ["user", "read-only"])
def test_guix_without_a_daemon_prints_one_error(pushed: Pushed, job: str) -> None:
    docker, image = pushed.project.docker, pushed.project.image
    result = docker.run(image, "guix", "remove", "hello", options=JOBS[job])
    assert result.returncode == 1
    assert re.fullmatch(r"guix remove: error: [^\n]*daemon-socket[^\n]*\n", result.stderr)
