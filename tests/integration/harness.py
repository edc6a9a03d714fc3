"""The real command line in a directory of its own, and what the tests look at an engine with."""

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

import engines
import planted
import pytest
from planted import PLANTED

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

# Of the fixture `locked`.
USER = "somebody"
PASSWORD = "right"  # noqa: S105
# That password, as `htpasswd -B` writes it.
HTPASSWD = f"{USER}:$2b$04$w.r4zYKSBsKgHr.tBB3X3uMaOFQ7ox0KPMyBmQqiWqZ2vZmQJhjaa\n"

Result = subprocess.CompletedProcess[str]


@dataclass(frozen=True)
class Docker:
    """The docker command line on one engine, with accounts of the tests' own."""

    host: str
    directory: Path
    """The command line's own, where its accounts are."""

    @property
    def environment(self) -> dict[str, str]:
        ours = {name: value for name, value in os.environ.items() if not name.startswith("DOCKER_")}
        return {**ours, "DOCKER_HOST": self.host, "DOCKER_CONFIG": str(self.directory)}

    def __call__(self, *arguments: str, timeout: float = 240) -> Result:
        return call(self.argv(*arguments), self.environment, timeout)

    def argv(self, *arguments: str) -> list[str]:
        return ["docker", f"--host={self.host}", f"--config={self.directory}", *arguments]

    def ok(self, *arguments: str) -> str:
        """Standard output of a call that has to succeed."""
        result = self(*arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def run(self, image: str, *command: str, options: Sequence[str] = ()) -> Result:
        """``docker run``, as anybody would who has the image."""
        return self("run", "--rm", "--network=none", *options, image, *command)

    def id(self, image: str) -> str:
        return self.ok("image", "inspect", "--format={{.Id}}", image)

    def config(self, image: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(
            self.ok("image", "inspect", "--format={{json .Config}}", image)
        )
        return found

    def labels(self, image: str) -> dict[str, str]:
        return self.config(image).get("Labels") or {}


@dataclass
class Project:
    """An env file in a directory, and everything on the engine that has its name."""

    directory: Path
    image: str
    docker: Docker
    settings: dict[str, str]
    data: Path
    """What is to last between its calls: the local registry's account above all."""
    program: Sequence[str] = field(default_factory=lambda: [*inv_argv()])
    """The command line, of this checkout where no other is installed."""
    containers_by_hand: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        (self.directory / "home").mkdir(parents=True)
        planted.write_account(self.directory / "home")
        self.set(IMAGE=self.image)

    def set(self, **settings: str) -> None:
        """Write the env file, with these settings changed."""
        self.settings |= settings
        lines = (f"{name}={value}\n" for name, value in self.settings.items())
        (self.directory / "project.env").write_text("".join(lines))

    def dockerfile(self, text: str) -> None:
        """Build from a Dockerfile of one's own, in a context that has nothing else."""
        context = self.directory / "context"
        context.mkdir(exist_ok=True)
        (context / "Dockerfile").write_text(text)
        self.set(BUILD_CONTEXT="context", DOCKERFILE="context/Dockerfile")

    @property
    def environment(self) -> dict[str, str]:
        """Nothing of the person's own settings."""
        return {
            **planted.ENVIRONMENT,
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
        """Run the real command line to its end."""
        self._look()
        result = call(
            [*self.program, *arguments],
            {**self.environment, **(env or {})},
            timeout,
            self.directory,
        )
        self._look()
        PLANTED.look_at_output(f"inv {arguments}", result.stdout, result.stderr)
        if result.returncode == 0:
            engines.record(self.docker.host, arguments)
        return result

    def ok(self, *arguments: str, timeout: float = 360) -> Result:
        """Run the real command line, which has to succeed."""
        result = self.inv(*arguments, timeout=timeout)
        assert result.returncode == 0, result.stderr
        return result

    def start(self, *arguments: str, env: dict[str, str] | None = None) -> Running:
        """Run the real command line beside the test."""
        log = self.directory / "log"
        with log.open("wb") as output:
            started = subprocess.Popen(
                inv_argv(*arguments),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self.directory,
                env={**self.environment, **(env or {})},
                start_new_session=True,
            )
        return Running(started, log)

    def tag(self, name: str = "") -> str:
        """The tag of a stage, or of the image."""
        return f"{self.image}-{name}" if name else self.image

    @property
    def repository(self) -> str:
        return self.image.rpartition(":")[0]

    def take(self, stage: str, model: Project) -> None:
        """Have a finished stage of another project, as if it had been run here."""
        for tag in (self.tag(stage), self.tag()):
            self.docker.ok("tag", model.tag(stage), tag)
        if stage == "pull":
            shutil.copy(model.directory / LOCK, self.directory)

    def tags(self) -> dict[str, str]:
        """Every local tag of the repository, with the image that it stands for."""
        listing = self.docker.ok(
            "image", "ls", "--no-trunc", "--format={{.Tag}} {{.ID}}", self.repository
        )
        pairs = (line.split() for line in listing.splitlines())
        return {tag: image for tag, image in pairs if tag != "<none>"}

    def id(self, name: str = "") -> str | None:
        """What a stage's tag stands for, or the image's."""
        return self.tags().get(self.tag(name).rpartition(":")[2])

    def containers(self) -> list[str]:
        """The names of our own containers."""
        only = f"--filter=label={PROJECT_LABEL}={self.image}"
        return self.docker.ok("container", "ls", "--all", only, "--format={{.Names}}").split()

    def volumes(self) -> list[str]:
        """The names of our own volumes."""
        only = f"--filter=name={self.settings['CACHE_VOLUME']}"
        return self.docker.ok("volume", "ls", "--quiet", only).split()

    def container_name(self) -> str:
        """A name for a container that is removed with the project."""
        self.containers_by_hand.append(f"guix-tasks-test-{secrets.token_hex(6)}")
        return self.containers_by_hand[-1]

    @contextmanager
    def unharmed(self) -> Iterator[None]:
        """What is done inside moves no tag and leaves no container."""
        before = self.tags()
        yield
        assert self.tags() == before
        assert self.containers() == []

    def remove(self) -> None:
        """Remove all of it from the engine, as far as nobody else holds it.

        Fails where a planted secret is in something that it has left.
        """
        self._look()
        try:
            self.look_for_secrets()
        finally:
            self._remove()

    def look_for_secrets(self) -> None:
        """Look into all that it has made: files, containers, images and their histories."""
        for place in ("out", LOCK, "log"):
            path = self.directory / place
            for file in [path, *path.rglob("*")]:
                if file.is_file():
                    PLANTED.look_at_file(file)
        containers = {*self.containers(), *self.containers_by_hand}
        images = self.seen - PLANTED.images
        # One that is gone is not shown, and the others are.
        PLANTED.look("a container", self.docker("inspect", *containers, "none").stdout)
        PLANTED.look("an image", self.docker("image", "inspect", *images, "none").stdout)
        for image in images:
            history = self.docker("history", "--no-trunc", "--format=json", image)
            if history.returncode == 0:
                PLANTED.look("the history of an image", history.stdout)
                PLANTED.images.add(image)
        PLANTED.containers |= containers

    def _remove(self) -> None:
        for name in [*self.containers(), *self.containers_by_hand]:
            self.docker("rm", "--force", "--volumes", name)
        for tag in self.tags():
            self.docker("rmi", "--force", f"{self.repository}:{tag}")
        for image in self.seen:
            # Whatever has a tag still is somebody else's: the base image may be one of them.
            tags = self.docker("image", "inspect", "--format={{len .RepoTags}}", image)
            if tags.stdout.strip() == "0":
                self.docker("rmi", image)
        for volume in self.volumes():
            self.docker("volume", "rm", volume)

    def _look(self) -> None:
        # An image that a tag has left is known by nothing but its ID.
        self.seen |= set(self.tags().values())


@dataclass(frozen=True)
class Running:
    """A command line that was started, and what it says."""

    inv: subprocess.Popen[bytes]
    log: Path

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def await_output(self, text: str) -> None:
        eventually(lambda: text in self.said() or self.has_ended(), f"{text!r} in the output")
        assert text in self.said(), self.said()

    def signal(self, number: int) -> int:
        """Send a signal, and wait for the end; the exit status."""
        self.inv.send_signal(number)
        status = self.inv.wait(timeout=120)
        PLANTED.look_at_output("what was stopped", self.log.read_bytes())
        return status

    def goes_on(self, seconds: float) -> bool:
        """Wait; whether it has not ended by then."""
        with suppress(subprocess.TimeoutExpired):
            self.inv.wait(timeout=seconds)
        return not self.has_ended()

    def has_ended(self) -> bool:
        return self.inv.poll() is not None


class Terminal:
    """A command line with a person before it."""

    def __init__(self, project: Project, *arguments: str) -> None:
        self._ours, theirs = os.openpty()
        self._process = subprocess.Popen(
            inv_argv(*arguments),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=project.directory,
            env={**project.environment, "TERM": "dumb"},
            start_new_session=True,
        )
        os.close(theirs)
        self.said = ""

    def type(self, line: str) -> None:
        os.write(self._ours, f"{line}\n".encode())

    def expect(self, text: str, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while text not in self.said:
            assert time.monotonic() < end, self.said
            assert self._read(), self.said

    def end(self) -> int:
        """Wait until it ends; the exit status."""
        while self._read():
            pass
        os.close(self._ours)
        PLANTED.look_at_output("a terminal", self.said)
        return self._process.wait(timeout=120)

    def _read(self) -> bool:
        if not select.select([self._ours], [], [], 30)[0]:
            self._process.kill()
        try:
            data = os.read(self._ours, 4096)
        except OSError:  # how Linux says that the other side is closed
            return False
        self.said += data.decode(errors="replace")
        return bool(data)


class Witness:
    """A socket before the engine's that takes down every request that passes."""

    def __init__(self, host: str) -> None:
        self._engine = host.removeprefix("unix://")
        self.requests: list[str] = []

    @contextmanager
    def listening(self) -> Iterator[str]:
        """Listen while the block runs; the address."""
        witness = self

        class Relay(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                witness.relay(self.request)

        # Not in the directory of the test: the path of a socket has to be short.
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
            _copy(client, engine, self._note)
            back.join(timeout=5)

    def _note(self, data: bytes) -> None:
        lines = re.findall(rb"^([A-Z]+ /\S*) HTTP/1\.1\r$", data, re.MULTILINE)
        self.requests += [line.decode() for line in lines]


def _copy(
    source: socket.socket, target: socket.socket, note: Callable[[bytes], None] | None = None
) -> None:
    while data := source.recv(1 << 16):
        if note:
            note(data)
        target.sendall(data)
    with suppress(OSError):  # who was spoken to has gone
        target.shutdown(socket.SHUT_WR)


@dataclass(frozen=True)
class Workshop:
    """What every project of the tests is made with."""

    docker: Docker
    registry: str
    offline: Path
    data: Path
    token: str = field(default_factory=lambda: secrets.token_hex(4))

    def project(self, directory: Path, repository: str = "", **settings: str) -> Project:
        """The offline example, under a name that no other project has."""
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

    def commit_of(self, channel: str) -> str:
        """The commit that a channel of the offline example is at."""
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
class Made:
    """The offline example, made by one call for each task."""

    project: Project
    calls: dict[str, Result]


def contents(docker: Docker, image: str) -> str:
    """What is in an image, store items and all, as far as it must not depend on how it was made."""
    said = docker.run(image, "sh", "-c", CONTENTS, options=("--entrypoint=/entry-point.sh",))
    assert said.returncode == 0, said.stderr
    assert "Hello, world!" in said.stdout
    return said.stdout


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
    """Check that an image has exactly the items that its database knows and its roots need."""
    done = docker.run(
        image,
        "sh",
        "-c",
        CHECK_STORE,
        options=["--privileged", "--entrypoint=/entry-point.sh"],
    )
    assert done.returncode == 0, done.stderr
    assert "not in the database: \n" in done.stdout
    assert "not in the store: \n" in done.stdout
    assert "dead: \n" in done.stdout
    for trouble in ("disappeared", "modified", "not valid", "error"):
        assert trouble not in done.stdout


INV = """
import sys
sys.path[0] = sys.argv.pop(1)
from guix_tasks.cli.program import main
main("inv")
"""


def inv_argv(*arguments: str) -> list[str]:
    """The command line of this Python with the tasks of this checkout, as ``./inv`` has it."""
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
    """Let a docker command line have the account of a registry of ours; that account."""
    account = registry.account.credentials()
    assert account
    pair = base64.b64encode(f"{account.username}:{account.password}".encode()).decode()
    auths = {"auths": {f"localhost:{registry.port}": {"auth": pair}}}
    docker.directory.mkdir(exist_ok=True)
    (docker.directory / "config.json").write_text(json.dumps(auths))
    return account


def new_python(directory: Path) -> Path:
    """A virtual environment of this Python's; the directory of its programs."""
    made = call([sys.executable, "-m", "venv", str(directory)], dict(os.environ), 120)
    assert made.returncode == 0, made.stderr
    return directory / "bin"


def pip(python: str, *arguments: str) -> None:
    argv = [python, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    result = call(argv, dict(os.environ), 300)
    # Here pip fetches what builds a wheel; that there is no index is no fault of the wheel.
    if "Could not find a version" in result.stderr:
        pytest.skip(f"pip {arguments[0]}: no index of packages is in reach: {result.stderr[-300:]}")
    assert result.returncode == 0, result.stderr


def running(*argv: str) -> list[int]:
    """The processes of this machine, those in containers too, that run a command."""
    command = "\0".join((*argv, "")).encode()
    return [pid for pid in service.processes() if _command_of(pid) == command]


def _command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def eventually(condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.05)


@contextmanager
def repeated(action: Callable[[], object], seconds: float) -> Iterator[None]:
    """Call a function again and again while the block runs, with a pause of ``seconds``."""
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


def one_error(result: Result, status: int) -> str:
    """The one line of a failure that says what it was."""
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    found = errors(result.stderr)
    assert len(found) == 1, result.stderr
    return found[0]


def errors(output: str) -> list[str]:
    """The lines that say what went wrong; a progress bar of Guix may stand before one."""
    return re.findall(r"^(?:.*\x1b\[K.*?)?(error: .*)$", output, re.MULTILINE)


def builder_environment(name: str) -> dict[str, str]:
    """The environment in which inv finds buildx, or does not; skips where that cannot be had."""
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


def without(packages: str, directory: Path) -> dict[str, str]:
    """The environment of a Python that lacks some packages."""
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
    """A handler without TLS, which answers a client that tries TLS first as a server in Go does.

    The containerd image store then continues without TLS.
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
