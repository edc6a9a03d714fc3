"""Engines that are found by a context, behind TLS, and by ssh."""

from __future__ import annotations

import json
import os
import shutil
import ssl
import subprocess
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer
from typing import TYPE_CHECKING, Any

import pytest
from harness import Docker, Result, Witness, call, free_port, inv_argv, one_error
from podmen import as_installed, unpacked

from guix_tasks.bootstrap import service
from guix_tasks.stages.container import PROJECT_LABEL

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import NewProject
    from harness import Project

pytestmark = pytest.mark.engine

CERTIFICATES = """
set -e
subject() { openssl req -newkey rsa:2048 -nodes -keyout $1.pem -out $1.csr -subj /CN=$1; }
openssl req -x509 -newkey rsa:2048 -nodes -keyout ca-key.pem -out ca.pem -subj /CN=tests -days 2
subject server-key; subject key
echo subjectAltName=IP:127.0.0.1 >names
sign() { openssl x509 -req -CA ca.pem -CAkey ca-key.pem -CAcreateserial -days 2 "$@"; }
sign -in server-key.csr -extfile names -out server.pem
sign -in key.csr -out cert.pem
"""

SSHD = """
Port {port}
ListenAddress 127.0.0.1
HostKey {directory}/host
AuthorizedKeysFile {directory}/key.pub
StrictModes no
PidFile none
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin yes
MaxStartups 100
SetEnv PATH={path} DOCKER_HOST={engine}
"""

CLIENT = """
IdentityFile {directory}/{key}
IdentitiesOnly yes
UserKnownHostsFile {directory}/{hosts}
GlobalKnownHostsFile /dev/null
"""


@pytest.fixture
def local(docker: Docker) -> Docker:
    """An engine on a socket of this machine, which what is tested here leads to."""
    if not docker.host.startswith("unix://"):
        pytest.skip("the engine of this machine has no socket to lead to")
    return docker


@dataclass(frozen=True)
class User:
    """Somebody with a Docker configuration, and with what else an engine is found by."""

    directory: Path
    environment: dict[str, str]

    def context(self, name: str, host: str, **tls: Path) -> None:
        """What ``docker context create`` writes, and ``docker context use``."""
        place = sha256(name.encode()).hexdigest()
        meta, material = (self.directory / "contexts" / each / place for each in ("meta", "tls"))
        meta.mkdir(parents=True)
        endpoint = {"Host": host, "SkipTLSVerify": False}
        text = {"Name": name, "Metadata": {}, "Endpoints": {"docker": endpoint}}
        (meta / "meta.json").write_text(json.dumps(text))
        for file, source in tls.items():
            (material / "docker").mkdir(parents=True, exist_ok=True)
            shutil.copy(source, material / "docker" / f"{file}.pem")
        (self.directory / "config.json").write_text(json.dumps({"currentContext": name}))

    def inv(self, *arguments: str, **more: str) -> Result:
        (self.directory / "Dockerfile").write_text("FROM scratch\n")
        own = {"DOCKER_CONFIG": str(self.directory), "HOME": str(self.directory)}
        base = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "XDG_DATA_HOME": str(self.directory)}
        return call(
            inv_argv(*arguments), {**base, **own, **self.environment, **more}, 60, self.directory
        )

    def engine(self, **more: str) -> dict[str, Any]:
        """What ``inv status`` says of the engine that it finds."""
        done = self.inv("status", "--json", **more)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)["engine"]
        return found


@pytest.fixture
def user(tmp_path: Path) -> User:
    return User(tmp_path, {})


# --- contexts


def test_a_context_on_a_socket(local: Docker, user: User) -> None:
    """As Docker Desktop, Colima and a rootless engine make them."""
    user.context("colima", local.host)
    found = user.engine()
    assert (found["url"], found["origin"]) == (local.host, "context colima")
    assert found["product"] == "Docker"
    assert found["version"] == local.ok("version", "--format={{.Server.Version}}")
    first = user.inv("status").stderr.splitlines()[0]
    assert first.endswith(f"at {local.host} (context colima), Docker {found['version']}")


def test_docker_host_and_docker_context_come_first(local: Docker, user: User) -> None:
    user.context("broken", "unix:///nowhere.sock")
    assert user.engine(DOCKER_HOST=local.host)["origin"] == "DOCKER_HOST"
    error = one_error(user.inv("status"), 3)
    assert "(context broken) does not answer: no such file or directory" in error
    user.context("desktop-linux", local.host)
    error = one_error(user.inv("status", DOCKER_CONTEXT="broken"), 3)
    assert "(context broken)" in error
    assert user.engine(DOCKER_CONTEXT="desktop-linux")["origin"] == "context desktop-linux"


# --- TLS


@dataclass(frozen=True)
class Guarded:
    """The engine behind TLS, and what it takes to get in."""

    host: str
    directory: Path

    @property
    def material(self) -> dict[str, Path]:
        return {name: self.directory / f"{name}.pem" for name in ("ca", "cert", "key")}


@pytest.fixture
def guarded(local: Docker, tmp_path: Path) -> Iterator[Guarded]:
    if not shutil.which("openssl"):
        pytest.skip("openssl, which makes the certificates, is not on this machine")
    directory = tmp_path / "certificates"
    directory.mkdir()
    subprocess.run(["sh", "-c", CERTIFICATES], cwd=directory, check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=directory / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(directory / "server.pem", directory / "server-key.pem")
    with _wrapped(context, local.host) as port:
        yield Guarded(f"tcp://127.0.0.1:{port}", directory)


@contextmanager
def _wrapped(context: ssl.SSLContext, host: str) -> Iterator[int]:
    """TLS before an engine's socket."""
    relay = Witness(host)

    class Guard(BaseRequestHandler):
        def handle(self) -> None:
            try:
                client = context.wrap_socket(self.request, server_side=True)
            except (ssl.SSLError, OSError):
                return  # who has no certificate
            relay.relay(client)

    with ThreadingTCPServer(("127.0.0.1", 0), Guard) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_a_context_with_certificates(guarded: Guarded, user: User) -> None:
    user.context("far", guarded.host, **guarded.material)
    found = user.engine()
    assert (found["url"], found["origin"]) == (guarded.host, "context far")


def test_certificates_of_the_environment(guarded: Guarded, user: User) -> None:
    variables = {"DOCKER_HOST": guarded.host, "DOCKER_TLS_VERIFY": "1"}
    assert user.engine(**variables, DOCKER_CERT_PATH=str(guarded.directory))["url"] == guarded.host
    error = one_error(user.inv("status", **variables, DOCKER_CERT_PATH=str(user.directory)), 3)
    assert "DOCKER_CERT_PATH has no certificates" in error


def test_over_tls_a_line_comes_when_it_is_written(guarded: Guarded, project: Project) -> None:
    """And what is piped in reaches the command."""
    project.set(MOUNTS="")
    tls = {"DOCKER_HOST": guarded.host, "DOCKER_TLS_VERIFY": "1"}
    started = subprocess.Popen(
        inv_argv("run", "--", "sh"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=project.directory,
        env={**project.environment, **tls, "DOCKER_CERT_PATH": str(guarded.directory)},
    )
    assert started.stdin
    assert started.stdout
    with started:
        started.stdin.write(b"echo A; sleep 6; echo B\n")
        started.stdin.close()
        assert started.stdout.readline() == b"A\n"
        early = time.monotonic()
        assert started.stdout.readline() == b"B\n"
        assert time.monotonic() - early > 3
    assert started.returncode == 0


def test_without_certificates_nobody_gets_in(guarded: Guarded, user: User) -> None:
    user.context("bare", guarded.host)
    assert "(context bare)" in one_error(user.inv("status"), 3)
    material = {**guarded.material, "ca": guarded.directory / "cert.pem"}
    user.context("stranger", guarded.host, **material)
    error = one_error(user.inv("status"), 3)
    assert "CERTIFICATE_VERIFY_FAILED" in error
    assert "\n" not in error


# --- ssh


@dataclass(frozen=True)
class Far:
    """An sshd with keys of its own, and the engine behind it."""

    port: int
    directory: Path

    @property
    def host(self) -> str:
        return f"ssh://root@127.0.0.1:{self.port}"

    def user(self, directory: Path, *, key: str = "key", hosts: str = "hosts") -> User:
        """Somebody whose ssh has this key and knows these hosts."""
        programs = directory / "bin"
        programs.mkdir(parents=True)
        (programs / "config").write_text(
            CLIENT.format(directory=self.directory, key=key, hosts=hosts)
        )
        client = shutil.which("ssh") or unpacked() / "usr/bin/ssh"
        text = f'#!/bin/sh\nexec {client} -F {programs}/config "$@"\n'
        (programs / "ssh").write_text(text)
        (programs / "ssh").chmod(0o755)
        return User(directory, {"PATH": f"{programs}:{os.environ['PATH']}"})


@contextmanager
def _sshd(directory: Path, engine: str, path: str) -> Iterator[Far]:
    root, port = unpacked(), free_port()
    directory.mkdir()
    for name in ("host", "key", "other"):
        key = [str(root / "usr/bin/ssh-keygen"), "-qt", "ed25519", "-N", "", "-f", name]
        subprocess.run(key, cwd=directory, check=True, capture_output=True)
    public = " ".join((directory / "host.pub").read_text().split()[:2])
    (directory / "hosts").write_text(f"[127.0.0.1]:{port} {public}\n")
    text = SSHD.format(port=port, directory=directory, path=path, engine=engine)
    (directory / "configuration").write_text(text)
    accounts = directory / "passwd"
    shutil.copy("/etc/passwd", accounts)
    if "\nsshd:" not in accounts.read_text():
        with accounts.open("a") as file:
            file.write("sshd:x:65533:65534::/run/sshd:/usr/sbin/nologin\n")
    # Debian's sshd wants an account, and an empty directory.
    own = f'mount --bind "{accounts}" /etc/passwd && exec "$@"'
    empty = Path("/run/sshd")
    was_there = empty.exists()
    empty.mkdir(exist_ok=True)
    serve = ("/usr/sbin/sshd", "-D", "-e", "-f", str(directory / "configuration"))
    started = subprocess.Popen(
        as_installed(root, "sh", "-c", own, "sh", *serve),
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=(directory / "log").open("wb"),
    )  # fmt: skip
    try:
        log = directory / "log"
        assert service.wait_until(lambda: "listening" in log.read_text(), 20), log.read_text()
        yield Far(port, directory)
    finally:
        started.terminate()
        started.wait(timeout=20)
        if not was_there:
            empty.rmdir()


@pytest.fixture
def far(local: Docker, tmp_path: Path) -> Iterator[Far]:
    programs = Path(shutil.which("docker") or "").parent
    with _sshd(tmp_path / "far", local.host, f"{programs}:/usr/bin:/bin") as found:
        yield found


def test_an_engine_by_ssh(far: Far, tmp_path: Path, new_project: NewProject) -> None:
    """Stages, output and exit statuses, as with an engine that is here."""
    project = new_project(MOUNTS="", GUIX_SANDBOX="privileged")
    project.dockerfile("ARG BASE_IMAGE\nFROM ${BASE_IMAGE}\nRUN touch /made\n")
    over = {"DOCKER_HOST": far.host, **far.user(tmp_path / "user").environment}

    def inv(*arguments: str) -> Result:
        return project.inv(*arguments, env=over)

    done = inv("base")
    assert done.returncode == 0, done.stderr
    assert f"at {far.host} (DOCKER_HOST), Docker " in done.stderr.splitlines()[0]
    lines = "".join(f"{number}\n" for number in range(20_000))
    many = inv("run", "--", "sh", "-c", "ls /made; seq 0 19999; echo late >&2; exit 3")
    assert (many.returncode, many.stdout) == (3, f"/made\n{lines}")
    assert "late" in many.stderr
    assert project.containers() == []
    error = one_error(project.inv("run", "--", "true", env={**over, "MOUNTS": f"{tmp_path}:/x"}), 2)
    assert "is on another machine and cannot see files of this one" in error


def test_a_context_by_ssh(far: Far, tmp_path: Path) -> None:
    somebody = far.user(tmp_path / "user")
    somebody.context("far", far.host)
    found = somebody.engine()
    assert (found["url"], found["origin"]) == (far.host, "context far")


def test_ctrl_c_ends_what_runs_behind_ssh(
    far: Far, tmp_path: Path, new_project: NewProject
) -> None:
    project = new_project(MOUNTS="", GUIX_SANDBOX="privileged")
    project.docker.ok("tag", project.settings["BASE_IMAGE"], project.image)
    over = {"DOCKER_HOST": far.host, **far.user(tmp_path / "user").environment}
    running = project.start("run", "--", "sh", "-c", "echo begun; sleep 300", env=over)
    running.await_output("begun")
    # As the terminal sends it: to each process of the group.
    os.killpg(running.inv.pid, 2)
    assert running.inv.wait(timeout=30) == 130
    assert (
        project.docker.ok(
            "ps", "--all", "--quiet", f"--filter=label={PROJECT_LABEL}={project.image}"
        )
        == ""
    )


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"hosts": "nobody"}, "know the host's key: run `ssh -p {port} root@127.0.0.1` once"),
        ({"key": "other"}, "Permission denied (publickey).; ssh cannot log in without a prompt"),
    ],
)
def test_ssh_never_asks(far: Far, tmp_path: Path, wrong: dict[str, str], said: str) -> None:
    error = one_error(far.user(tmp_path / "user", **wrong).inv("status", DOCKER_HOST=far.host), 3)
    assert f"{far.host} (DOCKER_HOST) cannot be reached: " in error
    assert said.format(port=far.port) in error


def test_nobody_answers_behind_ssh(far: Far, tmp_path: Path) -> None:
    somebody = far.user(tmp_path / "user")
    error = one_error(somebody.inv("status", DOCKER_HOST=f"{far.host}/nowhere.sock"), 3)
    assert error.endswith("no such file or directory; no engine listens there: start it")
    error = one_error(somebody.inv("status", DOCKER_HOST=f"ssh://127.0.0.1:{free_port()}"), 3)
    assert "Connection refused; nothing answers there: start sshd" in error


def test_there_is_no_docker_behind_ssh(local: Docker, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with _sshd(tmp_path / "far", local.host, str(empty)) as far:
        error = one_error(far.user(tmp_path / "user").inv("status", DOCKER_HOST=far.host), 3)
    assert "the docker command is missing on the host, or not on the PATH" in error


def test_there_is_no_ssh_here(user: User) -> None:
    error = one_error(user.inv("status", DOCKER_HOST="ssh://far.test", PATH=str(user.directory)), 3)
    assert "ssh://far.test needs the program ssh: " in error
    assert error.endswith("; install openssh-client")
