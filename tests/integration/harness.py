"""Test projects that run the real command line, and helpers to inspect an engine."""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import select
import shutil
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

import planted_secrets
import pytest
import task_counts
from planted_secrets import PLANTED_SECRETS

from guix_tasks.bootstrap import service
from guix_tasks.bootstrap.base_image import BASE_TAG
from guix_tasks.bootstrap.engine import private_engine
from guix_tasks.buildkit import buildx
from guix_tasks.stages.container import PROJECT_LABEL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from guix_tasks.bootstrap.registry import LocalRegistry
    from guix_tasks.engine.accounts import Credentials

ROOT = Path(__file__).resolve().parents[2]
OFFLINE = ROOT / "examples" / "offline"
LOCK = "channels.lock.scm"

# The account of the fixture `private_registry`, and its password as `htpasswd -B` writes it.
USER = "somebody"
PASSWORD = "right"  # noqa: S105
HTPASSWD = f"{USER}:$2b$04$w.r4zYKSBsKgHr.tBB3X3uMaOFQ7ox0KPMyBmQqiWqZ2vZmQJhjaa\n"

Result = subprocess.CompletedProcess[str]


@dataclass(frozen=True)
class Docker:
    """The docker command line on one engine, with the accounts in a directory."""

    host: str
    directory: Path

    @property
    def environment(self) -> dict[str, str]:
        other = {key: value for key, value in os.environ.items() if not key.startswith("DOCKER_")}
        return {**other, "DOCKER_HOST": self.host, "DOCKER_CONFIG": str(self.directory)}

    def __call__(self, *arguments: str, timeout: float = 240) -> Result:
        return call(self.argv(*arguments), self.environment, timeout)

    def argv(self, *arguments: str) -> list[str]:
        return ["docker", f"--host={self.host}", f"--config={self.directory}", *arguments]

    def ok(self, *arguments: str) -> str:
        """Return the standard output of a call, which must succeed."""
        result = self(*arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def run(self, image: str, *command: str, options: Sequence[str] = ()) -> Result:
        return self("run", "--rm", "--network=none", *options, image, *command)

    def id(self, image: str) -> str:
        return self.ok("image", "inspect", "--format={{.Id}}", image)

    def config(self, image: str) -> dict[str, Any]:
        config: dict[str, Any] = json.loads(
            self.ok("image", "inspect", "--format={{json .Config}}", image)
        )
        return config

    def labels(self, image: str) -> dict[str, str]:
        return self.config(image).get("Labels") or {}


@dataclass
class Project:
    """A directory with an env file, and the images, containers and volumes of the project."""

    directory: Path
    image: str
    docker: Docker
    settings: dict[str, str]
    data: Path
    """``XDG_DATA_HOME``, which has the account of the local registry."""
    program: Sequence[str] = field(default_factory=lambda: [*inv_argv()])
    """The command line (default: that of this checkout)."""
    extra_containers: list[str] = field(default_factory=list)
    image_ids: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        (self.directory / "home").mkdir(parents=True)
        planted_secrets.write_account(self.directory / "home")
        self.set(IMAGE=self.image)

    def set(self, **settings: str) -> None:
        """Change settings in the env file."""
        self.settings |= settings
        lines = (f"{name}={value}\n" for name, value in self.settings.items())
        (self.directory / "project.env").write_text("".join(lines))

    def write_dockerfile(self, text: str) -> None:
        """Use a custom Dockerfile, in a build context that contains only this file.

        The comment keeps equal images of parallel tests apart: otherwise one test removes the
        image from the engine while the build of another takes it from the build cache.
        """
        context = self.directory / "context"
        context.mkdir(exist_ok=True)
        (context / "Dockerfile").write_text(f"{text.rstrip()}\n# {self.repository}\n")
        self.set(BUILD_CONTEXT="context", DOCKERFILE="context/Dockerfile")

    @property
    def environment(self) -> dict[str, str]:
        """Environment of the command line, without the settings of the developer."""
        return {
            **planted_secrets.ENVIRONMENT,
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "HOME": str(self.directory / "home"),
            "XDG_DATA_HOME": str(self.data),
            "DOCKER_HOST": self.docker.host,
            "ENV_FILE": "project.env",
        }

    def inv(
        self, *arguments: str, env: dict[str, str] | None = None, timeout: float = 360
    ) -> Result:
        """Run the command line until it ends."""
        self._record_images()
        result = call(
            [*self.program, *arguments],
            {**self.environment, **(env or {})},
            timeout,
            self.directory,
        )
        self._record_images()
        PLANTED_SECRETS.check_output(f"inv {arguments}", result.stdout, result.stderr)
        if result.returncode == 0:
            task_counts.record_call(self.docker.host, arguments)
        return result

    def ok(self, *arguments: str, timeout: float = 360) -> Result:
        """Run the command line, which must succeed."""
        result = self.inv(*arguments, timeout=timeout)
        assert result.returncode == 0, result.stderr
        return result

    def start(self, *arguments: str, env: dict[str, str] | None = None) -> RunningTask:
        """Start the command line in the background."""
        log = self.directory / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                inv_argv(*arguments),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self.directory,
                env={**self.environment, **(env or {})},
                start_new_session=True,
            )
        return RunningTask(process, log)

    def tag(self, name: str = "") -> str:
        """Return the tag of a stage, or ``IMAGE``."""
        return f"{self.image}-{name}" if name else self.image

    @property
    def repository(self) -> str:
        return self.image.rpartition(":")[0]

    def copy_stage(self, stage: str, source: Project) -> None:
        """Copy a finished stage of another project, as if it had been run in this project."""
        for tag in (self.tag(stage), self.tag()):
            self.docker.ok("tag", source.tag(stage), tag)
        if stage == "pull":
            shutil.copy(source.directory / LOCK, self.directory)

    def tags(self) -> dict[str, str]:
        """Return the ID of the image of each local tag of the repository."""
        listing = self.docker.ok(
            "image", "ls", "--no-trunc", "--format={{.Tag}} {{.ID}}", self.repository
        )
        pairs = (line.split() for line in listing.splitlines())
        return {tag: image for tag, image in pairs if tag != "<none>"}

    def id(self, name: str = "") -> str | None:
        """Return the ID of the image of a stage, or of ``IMAGE``."""
        return self.tags().get(self.tag(name).rpartition(":")[2])

    def containers(self) -> list[str]:
        """Return the names of the project's containers."""
        option = f"--filter=label={PROJECT_LABEL}={self.image}"
        return self.docker.ok("container", "ls", "--all", option, "--format={{.Names}}").split()

    def volumes(self) -> list[str]:
        """Return the names of the project's volumes."""
        option = f"--filter=name={self.settings['CACHE_VOLUME']}"
        return self.docker.ok("volume", "ls", "--quiet", option).split()

    def container_name(self) -> str:
        """Return a new name for a container that ``remove`` removes."""
        self.extra_containers.append(f"guix-tasks-test-{secrets.token_hex(6)}")
        return self.extra_containers[-1]

    @contextmanager
    def assert_unchanged(self) -> Iterator[None]:
        """Check that the block changes no tag and leaves no container."""
        tags = self.tags()
        yield
        assert self.tags() == tags
        assert self.containers() == []

    def remove(self) -> None:
        """Remove the project's containers, volumes and unused images from the engine.

        Fail if one of them, or a file of the project, contains a planted secret.
        """
        self._record_images()
        try:
            self.check_secrets()
        finally:
            self._remove()

    def check_secrets(self) -> None:
        """Search files, containers, images and their histories for planted secrets."""
        for name in ("out", LOCK, "log"):
            path = self.directory / name
            for file in [path, *path.rglob("*")]:
                if file.is_file():
                    PLANTED_SECRETS.check_file(file)
        containers = {*self.containers(), *self.extra_containers}
        images = self.image_ids - PLANTED_SECRETS.images
        # Docker prints the existing ones even if another one is missing.
        PLANTED_SECRETS.check("a container", self.docker("inspect", *containers, "none").stdout)
        PLANTED_SECRETS.check("an image", self.docker("image", "inspect", *images, "none").stdout)
        for image in images:
            history = self.docker("history", "--no-trunc", "--format=json", image)
            if history.returncode == 0:
                PLANTED_SECRETS.check("the history of an image", history.stdout)
                PLANTED_SECRETS.images.add(image)
        PLANTED_SECRETS.containers |= containers

    def _remove(self) -> None:
        for name in [*self.containers(), *self.extra_containers]:
            self.docker("rm", "--force", "--volumes", name)
        for tag in self.tags():
            self.docker("rmi", "--force", f"{self.repository}:{tag}")
        for image in self.image_ids:
            # An image that still has a tag belongs to others; it can be the base image.
            tags = self.docker("image", "inspect", "--format={{len .RepoTags}}", image)
            if tags.stdout.strip() == "0":
                self.docker("rmi", image)
        for volume in self.volumes():
            self.docker("volume", "rm", volume)

    def _record_images(self) -> None:
        # An image that lost its tags can be removed only by its ID.
        self.image_ids |= set(self.tags().values())


@dataclass(frozen=True)
class RunningTask:
    """A command line in the background, and its output."""

    process: subprocess.Popen[bytes]
    log: Path

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for_output(self, text: str) -> None:
        wait_until(lambda: text in self.output() or self.has_ended(), f"{text!r} in the output")
        assert text in self.output(), self.output()

    def signal(self, number: int) -> int:
        """Send a signal, wait for the end, and return the exit status."""
        self.process.send_signal(number)
        status = self.process.wait(timeout=120)
        PLANTED_SECRETS.check_output("an interrupted task", self.log.read_bytes())
        return status

    def is_running_after(self, seconds: float) -> bool:
        """Wait, and return whether the command line is still running."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=seconds)
        return not self.has_ended()

    def has_ended(self) -> bool:
        return self.process.poll() is not None


class Terminal:
    """A command line on a terminal."""

    def __init__(self, project: Project, *arguments: str) -> None:
        self._master, terminal = os.openpty()
        self._process = subprocess.Popen(
            inv_argv(*arguments),
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            cwd=project.directory,
            env={**project.environment, "TERM": "dumb"},
            start_new_session=True,
        )
        os.close(terminal)
        self.output = ""

    def type(self, line: str) -> None:
        os.write(self._master, f"{line}\n".encode())

    def expect(self, text: str, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while text not in self.output:
            assert time.monotonic() < end, self.output
            assert self._read(), self.output

    def end(self) -> int:
        """Wait for the end, and return the exit status."""
        while self._read():
            pass
        os.close(self._master)
        PLANTED_SECRETS.check_output("a terminal", self.output)
        return self._process.wait(timeout=120)

    def _read(self) -> bool:
        if not select.select([self._master], [], [], 30)[0]:
            self._process.kill()
        try:
            data = os.read(self._master, 4096)
        except OSError:  # the other side is closed
            return False
        self.output += data.decode(errors="replace")
        return bool(data)


class RecordingProxy:
    """A proxy of the engine's socket that records every request."""

    def __init__(self, host: str) -> None:
        self._engine = host.removeprefix("unix://")
        self.requests: list[str] = []

    @contextmanager
    def listen(self) -> Iterator[str]:
        """Listen while the block runs, and yield the address."""
        proxy = self

        class Relay(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                proxy.relay(self.request)

        # The path of a socket must be short, so it is not in the directory of the test.
        with tempfile.TemporaryDirectory() as directory:
            path = f"{directory}/docker.sock"
            with socketserver.ThreadingUnixStreamServer(path, Relay) as server:
                server.daemon_threads = True
                threading.Thread(target=server.serve_forever, daemon=True).start()
                yield f"unix://{path}"
                server.shutdown()

    def relay(self, client: socket.socket) -> None:
        with socket.socket(socket.AF_UNIX) as engine:
            engine.connect(self._engine)
            back = threading.Thread(target=_copy, args=(engine, client), daemon=True)
            back.start()
            _copy(client, engine, self._record)
            back.join(timeout=5)

    def _record(self, data: bytes) -> None:
        lines = re.findall(rb"^([A-Z]+ /\S*) HTTP/1\.1\r$", data, re.MULTILINE)
        self.requests += [line.decode() for line in lines]


def _copy(
    source: socket.socket, target: socket.socket, record: Callable[[bytes], None] | None = None
) -> None:
    while data := source.recv(1 << 16):
        if record:
            record(data)
        target.sendall(data)
    with suppress(OSError):  # the target has closed the connection
        target.shutdown(socket.SHUT_WR)


@dataclass(frozen=True)
class ProjectFactory:
    """Engine, registry address and offline example of test projects."""

    docker: Docker
    registry: str
    offline: Path
    data: Path
    token: str = field(default_factory=lambda: secrets.token_hex(4))

    def create(self, directory: Path, repository: str = "", **settings: str) -> Project:
        """Create a project with the offline example and a unique name."""
        name = f"{self.registry}/guix-tasks-test-{self.token}/{secrets.token_hex(4)}"
        defaults = {
            "BASE_IMAGE": BASE_TAG,
            "DOCKERFILE": str(ROOT / "Dockerfile"),
            "BUILD_CONTEXT": str(ROOT),
            "MOUNTS": f"{self.offline}:/offline:ro",
            "NETWORK": "none",
            "GUIX_CHANNELS": str(self.offline / "channels.scm"),
            "GUIX_SUBSTITUTE_URLS": "file:///offline/substitutes",
            "GUIX_SUBSTITUTE_KEYS": str(self.offline / "substitutes.pub"),
            "GUIX_PACKAGES": "hello greet",
            "CACHE_VOLUME": f"guix-tasks-test-{secrets.token_hex(4)}",
        }
        image = f"{repository or name}:t"
        return Project(directory, image, self.docker, {**defaults, **settings}, self.data)

    def channel_commit(self, channel: str) -> str:
        """Return the newest commit of a channel of the offline example."""
        branch = self.offline / "channels" / channel / ".git" / "refs" / "heads" / "master"
        return branch.read_text().strip()


READER = """
(use-modules (guix build-system trivial) (guix gexp) (guix packages) (guix profiles)
             (guix search-paths) ((guix licenses) #:prefix license:))
(packages->manifest
 (list
  (package
    (name "reader")
    (version "1.0")
    (source #f)
    (build-system trivial-build-system)
    (arguments
     (list #:builder
           #~(let ((program (string-append #$output "/bin/reader")))
               (for-each (lambda (directory) (mkdir (string-append #$output directory)))
                         '("" "/bin" "/share" "/share/greet"))
               (call-with-output-file program
                 (lambda (port) (display "#!/bin/sh\\necho \\"$GREET_PATH\\"\\n" port)))
               (chmod program #o755))))
    (native-search-paths
     (list (search-path-specification (variable "GREET_PATH") (files '("share/greet")))))
    (home-page "https://example.org")
    (synopsis "Program with a search path")
    (description "This package prints its search path.")
    (license license:gpl3+))))
"""
"""A manifest with the package ``reader``, which prints its search path ``GREET_PATH``."""


CONTENTS = """
    profile=$(readlink -f /var/guix/profiles/per-user/root/guix-profile)
    echo $profile
    guix package --list-installed
    guix describe --format=channels
    guix gc --references $profile | sort
    sha256sum /entry-point.sh /root/.config/guix/channels.scm
    hello
"""


@dataclass(frozen=True)
class BuiltProject:
    """The offline example with finished stages, and the result of each task by its name."""

    project: Project
    calls: dict[str, Result]


def read_contents(docker: Docker, image: str) -> str:
    """Describe the content of an image that must not depend on how the image was made."""
    result = docker.run(image, "sh", "-c", CONTENTS, options=("--entrypoint=/entry-point.sh",))
    assert result.returncode == 0, result.stderr
    assert "Hello, world!" in result.stdout
    return result.stdout


def check_cache_is_shared(project: Project, other: Project, *, can_take: bool = True) -> None:
    """Check that each of two engines takes stages that the other one pushed to ``CACHE_IMAGE``.

    ``project`` has all its stages, ``other`` has none. The engines have one registry, perhaps under
    different names. Without ``can_take`` the engine of ``other`` cannot use what it pulls, and has
    to make the stages.
    """
    path = project.repository.partition("/")[2]

    def share(name: str) -> None:
        for each in (project, other):
            registry = each.image.partition("/")[0]
            # A changed argument of the build makes all stages stale.
            each.set(CACHE_IMAGE=f"{registry}/{path}-{name}", BUILD_ARGS="CACHED=yes")

    def make(maker: Project, *arguments: str) -> None:
        assert "was not pushed to CACHE_IMAGE" not in maker.ok(*arguments).stderr

    def take(taker: Project, *stages: str, line: str = "taken from") -> None:
        log = taker.ok(*stages).stderr
        assert all(f"{stage}: {line}" in log for stage in stages), log
        assert taker.docker.run(taker.image, "hello").stdout == "Hello, world!\n"

    share("first")
    make(project, "base", "pull", "install")
    shutil.copy(project.directory / LOCK, other.directory)
    take(other, "base", "pull", "install", line="taken from" if can_take else "cannot use")

    share("second")
    make(other, "install", "--force")
    for tag in (project.tag("install"), project.image):
        project.docker.ok("rmi", "--force", tag)
    take(project, "install")


CHECK_STORE = """
set -e
cat >/tmp/paths.scm <<'SCHEME'
(use-modules (sqlite3))
(define db (sqlite-open "/var/guix/db/db.sqlite"))
(for-each (lambda (row) (format #t "~a~%" (vector-ref row 0)))
          (sqlite-map identity (sqlite-prepare db "select path from ValidPaths order by path")))
SCHEME
guix repl -- /tmp/paths.scm | sort >/tmp/database
find /gnu/store -mindepth 1 -maxdepth 1 ! -name .links | sort >/tmp/store
echo "not in the database: $(comm -13 /tmp/database /tmp/store | tr '\\n' ' ')"
echo "not in the store: $(comm -23 /tmp/database /tmp/store | tr '\\n' ' ')"
guix gc --verify=contents 2>&1
echo "dead: $(guix gc --list-dead 2>/dev/null | tr '\\n' ' ')"
"""


def check_store(docker: Docker, image: str) -> None:
    """Check that an image has exactly the items of its database, and that all are needed."""
    result = docker.run(
        image,
        "sh",
        "-c",
        CHECK_STORE,
        options=["--privileged", "--entrypoint=/entry-point.sh"],
    )
    assert result.returncode == 0, result.stderr
    assert "not in the database: \n" in result.stdout
    assert "not in the store: \n" in result.stdout
    assert "dead: \n" in result.stdout
    for message in ("disappeared", "modified", "not valid", "error"):
        assert message not in result.stdout


INV = """
import sys
sys.path[0] = sys.argv.pop(1)
from guix_tasks.cli.program import main
main("inv")
"""


def inv_argv(*arguments: str) -> list[str]:
    """Return a command that runs the tasks of this checkout with this Python, as ``./inv`` does."""
    return [sys.executable, "-c", INV, str(ROOT), *arguments]


def call(
    argv: Sequence[str], env: dict[str, str], timeout: float, cwd: Path | None = None
) -> Result:
    return subprocess.run(
        argv,
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
        check=False,
    )


def log_in(docker: Docker, registry: LocalRegistry) -> Credentials:
    """Write the account of a registry for a docker command line, and return it."""
    account = registry.account.credentials()
    assert account
    pair = base64.b64encode(f"{account.username}:{account.password}".encode()).decode()
    auths = {"auths": {f"localhost:{registry.port}": {"auth": pair}}}
    docker.directory.mkdir(exist_ok=True)
    (docker.directory / "config.json").write_text(json.dumps(auths))
    return account


def create_venv(directory: Path) -> Path:
    """Create a virtual environment, and return the directory of its programs."""
    result = call([sys.executable, "-m", "venv", str(directory)], dict(os.environ), 120)
    assert result.returncode == 0, result.stderr
    return directory / "bin"


def pip(python: str, *arguments: str) -> None:
    argv = [python, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    result = call(argv, dict(os.environ), 300)
    # pip downloads the build backend of a wheel, which needs a package index.
    if "Could not find a version" in result.stderr:
        pytest.skip(f"pip {arguments[0]}: no package index is reachable: {result.stderr[-300:]}")
    assert result.returncode == 0, result.stderr


def find_processes(*argv: str) -> list[int]:
    """Return the processes of this machine and its containers that run a command."""
    command = "\0".join((*argv, "")).encode()
    return [pid for pid in service.processes() if _read_command(pid) == command]


def _read_command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def wait_until(condition: Callable[[], bool], description: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {description}"
        time.sleep(0.05)


@contextmanager
def repeat_action(action: Callable[[], object], seconds: float) -> Iterator[None]:
    """Call a function repeatedly while the block runs, with a pause of ``seconds``."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.is_set():
            action()
            ended.wait(seconds)

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def expect_error(result: Result, status: int) -> str:
    """Check that a call failed with exactly one error line, and return the line."""
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    lines = error_lines(result.stderr)
    assert len(lines) == 1, result.stderr
    return lines[0]


def error_lines(output: str) -> list[str]:
    """Return the error messages of an output; a progress bar of Guix may precede them."""
    return re.findall(r"^(?:.*\x1b\[K.*?)?(error: .*)$", output, re.MULTILINE)


def builder_environment(name: str) -> dict[str, str]:
    """Return the environment in which `inv` uses a builder, ``buildx`` or ``classic``.

    Skip the test if this machine cannot provide the builder.
    """
    program = buildx.find_program(os.environ, private_engine().buildx_path())
    directories = os.environ["PATH"].split(os.pathsep)
    if name == "buildx":
        if program is None:
            pytest.skip("buildx is not on this machine")
        return {"PATH": os.pathsep.join([str(Path(program).parent), *directories])}
    if program and str(Path(program).parent) in buildx.SYSTEM_PLUGINS:
        pytest.skip("buildx is installed on this machine, and would be used")
    return {
        "PATH": os.pathsep.join(f for f in directories if not shutil.which(buildx.PROGRAM, path=f))
    }


def hide_packages(packages: str, directory: Path) -> dict[str, str]:
    """Return the environment of a Python that cannot import some packages."""
    (directory / "sitecustomize.py").write_text(
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name in {packages.split()}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
    )
    return {"PYTHONPATH": str(directory)}


class HttpHandler(BaseHTTPRequestHandler):
    """A handler without TLS that answers TLS clients as a server in Go does.

    The containerd image store then retries without TLS.
    """

    def handle(self) -> None:
        if self.rfile.peek(1)[:1] == b"\x16":  # type: ignore[attr-defined]
            self.wfile.write(b"HTTP/1.0 400 Bad Request\r\n\r\n")
        else:
            super().handle()

    def log_message(self, *_: object) -> None: ...


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
