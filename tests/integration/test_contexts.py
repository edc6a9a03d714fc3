"""Engines selected by a context, behind TLS, and reached by ssh."""

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
from harness import Docker, RecordingProxy, Result, call, expect_error, free_port, inv_argv
from podman_service import overlay_argv, unpack_packages

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
    """An engine on a socket of this machine, to which the tests connect in other ways."""
    if not docker.host.startswith("unix://"):
        pytest.skip("the engine of this machine has no socket")
    return docker


@dataclass(frozen=True)
class User:
    """A user with a Docker configuration and environment variables that select an engine."""

    directory: Path
    environment: dict[str, str]

    def use_context(self, name: str, host: str, **tls: Path) -> None:
        """Write the files of ``docker context create`` and ``docker context use``."""
        key = sha256(name.encode()).hexdigest()
        meta, material = (self.directory / "contexts" / kind / key for kind in ("meta", "tls"))
        meta.mkdir(parents=True)
        endpoint = {"Host": host, "SkipTLSVerify": False}
        text = {"Name": name, "Metadata": {}, "Endpoints": {"docker": endpoint}}
        (meta / "meta.json").write_text(json.dumps(text))
        for file, source in tls.items():
            (material / "docker").mkdir(parents=True, exist_ok=True)
            shutil.copy(source, material / "docker" / f"{file}.pem")
        (self.directory / "config.json").write_text(json.dumps({"currentContext": name}))

    def inv(self, *arguments: str, **variables: str) -> Result:
        (self.directory / "Dockerfile").write_text("FROM scratch\n")
        home = dict.fromkeys(("DOCKER_CONFIG", "HOME", "XDG_DATA_HOME"), str(self.directory))
        base = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", **home}
        return call(
            inv_argv(*arguments), {**base, **self.environment, **variables}, 60, self.directory
        )

    def engine(self, **variables: str) -> dict[str, Any]:
        """Return the engine as reported by ``inv status``."""
        result = self.inv("status", "--json", **variables)
        assert result.returncode == 0, result.stderr
        engine: dict[str, Any] = json.loads(result.stdout)["engine"]
        return engine


@pytest.fixture
def user(tmp_path: Path) -> User:
    return User(tmp_path, {})


# --- contexts


def test_context_with_a_socket_is_used(local: Docker, user: User) -> None:
    """Docker Desktop, Colima and rootless engines create such contexts."""
    user.use_context("colima", local.host)
    engine = user.engine()
    assert (engine["url"], engine["origin"]) == (local.host, "context colima")
    assert engine["product"] == "Docker"
    assert engine["version"] == local.ok("version", "--format={{.Server.Version}}")
    first = user.inv("status").stderr.splitlines()[0]
    assert first.endswith(f"at {local.host} (context colima), Docker {engine['version']}")


def test_docker_host_and_docker_context_override_the_selected_context(
    local: Docker, user: User
) -> None:
    user.use_context("broken", "unix:///nowhere.sock")
    assert user.engine(DOCKER_HOST=local.host)["origin"] == "DOCKER_HOST"
    error = expect_error(user.inv("status"), 3)
    assert "(context broken) does not answer: no such file or directory" in error
    user.use_context("desktop-linux", local.host)
    error = expect_error(user.inv("status", DOCKER_CONTEXT="broken"), 3)
    assert "(context broken)" in error
    assert user.engine(DOCKER_CONTEXT="desktop-linux")["origin"] == "context desktop-linux"


# --- TLS


@dataclass(frozen=True)
class TlsEngine:
    """The engine behind TLS, and the certificates for it."""

    host: str
    directory: Path

    @property
    def material(self) -> dict[str, Path]:
        return {name: self.directory / f"{name}.pem" for name in ("ca", "cert", "key")}


@pytest.fixture
def tls_engine(local: Docker, tmp_path: Path) -> Iterator[TlsEngine]:
    if not shutil.which("openssl"):
        pytest.skip("openssl, which makes the certificates, is not on this machine")
    directory = tmp_path / "certificates"
    directory.mkdir()
    subprocess.run(["sh", "-c", CERTIFICATES], cwd=directory, check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=directory / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(directory / "server.pem", directory / "server-key.pem")
    with _serve_tls(context, local.host) as port:
        yield TlsEngine(f"tcp://127.0.0.1:{port}", directory)


@contextmanager
def _serve_tls(context: ssl.SSLContext, host: str) -> Iterator[int]:
    """Serve an engine's socket with TLS."""
    relay = RecordingProxy(host)

    class Handler(BaseRequestHandler):
        def handle(self) -> None:
            try:
                client = context.wrap_socket(self.request, server_side=True)
            except (ssl.SSLError, OSError):
                return  # the client has no certificate
            relay.relay(client)

    with ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_certificates_of_a_context_are_used(tls_engine: TlsEngine, user: User) -> None:
    user.use_context("far", tls_engine.host, **tls_engine.material)
    engine = user.engine()
    assert (engine["url"], engine["origin"]) == (tls_engine.host, "context far")


def test_certificates_of_the_environment_are_used(tls_engine: TlsEngine, user: User) -> None:
    variables = {"DOCKER_HOST": tls_engine.host, "DOCKER_TLS_VERIFY": "1"}
    engine = user.engine(**variables, DOCKER_CERT_PATH=str(tls_engine.directory))
    assert engine["url"] == tls_engine.host


def test_output_over_tls_is_shown_immediately(tls_engine: TlsEngine, project: Project) -> None:
    """Standard input also reaches the command."""
    project.set(MOUNTS="")
    tls = {"DOCKER_HOST": tls_engine.host, "DOCKER_TLS_VERIFY": "1"}
    started = subprocess.Popen(
        inv_argv("run", "--", "sh"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=project.directory,
        env={**project.environment, **tls, "DOCKER_CERT_PATH": str(tls_engine.directory)},
    )
    assert started.stdin
    assert started.stdout
    with started:
        started.stdin.write(b"echo A; sleep 6; echo B\n")
        started.stdin.close()
        assert started.stdout.readline() == b"A\n"
        first_line = time.monotonic()
        assert started.stdout.readline() == b"B\n"
        assert time.monotonic() - first_line > 3
    assert started.returncode == 0


def test_wrong_certificates_are_reported(tls_engine: TlsEngine, user: User) -> None:
    user.use_context("bare", tls_engine.host)
    assert "(context bare)" in expect_error(user.inv("status"), 3)
    material = {**tls_engine.material, "ca": tls_engine.directory / "cert.pem"}
    user.use_context("stranger", tls_engine.host, **material)
    error = expect_error(user.inv("status"), 3)
    assert "CERTIFICATE_VERIFY_FAILED" in error
    assert "\n" not in error


# --- ssh


@dataclass(frozen=True)
class SshEngine:
    """The engine behind an sshd, and the keys of both sides."""

    port: int
    directory: Path

    @property
    def host(self) -> str:
        return f"ssh://root@127.0.0.1:{self.port}"

    def user(self, directory: Path, *, key: str = "key", hosts: str = "hosts") -> User:
        """Create a user whose ssh has this key and these known hosts."""
        programs = directory / "bin"
        programs.mkdir(parents=True)
        (programs / "config").write_text(
            CLIENT.format(directory=self.directory, key=key, hosts=hosts)
        )
        client = shutil.which("ssh") or unpack_packages() / "usr/bin/ssh"
        text = f'#!/bin/sh\nexec {client} -F {programs}/config "$@"\n'
        (programs / "ssh").write_text(text)
        (programs / "ssh").chmod(0o755)
        return User(directory, {"PATH": f"{programs}:{os.environ['PATH']}"})


@contextmanager
def _run_sshd(directory: Path, engine: str, path: str) -> Iterator[SshEngine]:
    root, port = unpack_packages(), free_port()
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
    # Debian's sshd requires an account and an empty directory.
    mount = f'mount --bind "{accounts}" /etc/passwd && exec "$@"'
    empty = Path("/run/sshd")
    existed = empty.exists()
    empty.mkdir(exist_ok=True)
    serve = ("/usr/sbin/sshd", "-D", "-e", "-f", str(directory / "configuration"))
    started = subprocess.Popen(
        overlay_argv(root, "sh", "-c", mount, "sh", *serve),
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=(directory / "log").open("wb"),
    )  # fmt: skip
    try:
        log = directory / "log"
        assert service.wait_until(lambda: "listening" in log.read_text(), 20), log.read_text()
        yield SshEngine(port, directory)
    finally:
        started.terminate()
        started.wait(timeout=20)
        if not existed:
            empty.rmdir()


@pytest.fixture
def ssh_engine(local: Docker, tmp_path: Path) -> Iterator[SshEngine]:
    programs = Path(shutil.which("docker") or "").parent
    with _run_sshd(tmp_path / "far", local.host, f"{programs}:/usr/bin:/bin") as ssh_engine:
        yield ssh_engine


def test_engine_by_ssh_is_like_a_local_engine(
    ssh_engine: SshEngine, tmp_path: Path, new_project: NewProject
) -> None:
    """Stages run, and the output and the exit status of commands arrive complete."""
    project = new_project(MOUNTS="", GUIX_SANDBOX="privileged")
    project.write_dockerfile("ARG BASE_IMAGE\nFROM ${BASE_IMAGE}\nRUN touch /made\n")
    env = {"DOCKER_HOST": ssh_engine.host, **ssh_engine.user(tmp_path / "user").environment}
    base = project.inv("base", env=env)
    assert base.returncode == 0, base.stderr
    assert f"at {ssh_engine.host} (DOCKER_HOST), Docker " in base.stderr.splitlines()[0]
    lines = "".join(f"{number}\n" for number in range(20_000))
    script = "ls /made; seq 0 19999; echo late >&2; exit 3"
    result = project.inv("run", "--", "sh", "-c", script, env=env)
    assert (result.returncode, result.stdout) == (3, f"/made\n{lines}")
    assert "late" in result.stderr
    assert project.containers() == []
    error = expect_error(
        project.inv("run", "--", "true", env={**env, "MOUNTS": f"{tmp_path}:/x"}), 2
    )
    assert "is on another machine and cannot see files of this one" in error


def test_context_with_ssh_is_used(ssh_engine: SshEngine, tmp_path: Path) -> None:
    user = ssh_engine.user(tmp_path / "user")
    user.use_context("far", ssh_engine.host)
    engine = user.engine()
    assert (engine["url"], engine["origin"]) == (ssh_engine.host, "context far")


def test_ctrl_c_stops_a_command_over_ssh(
    ssh_engine: SshEngine, tmp_path: Path, new_project: NewProject
) -> None:
    project = new_project(MOUNTS="", GUIX_SANDBOX="privileged")
    project.docker.ok("tag", project.settings["BASE_IMAGE"], project.image)
    env = {"DOCKER_HOST": ssh_engine.host, **ssh_engine.user(tmp_path / "user").environment}
    running = project.start("run", "--", "sh", "-c", "echo begun; sleep 300", env=env)
    running.wait_for_output("begun")
    # Like a terminal, send it to each process of the group.
    os.killpg(running.process.pid, 2)
    assert running.process.wait(timeout=30) == 130
    assert (
        project.docker.ok(
            "ps", "--all", "--quiet", f"--filter=label={PROJECT_LABEL}={project.image}"
        )
        == ""
    )


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"hosts": "nobody"}, "know the host's key: run `ssh -p {port} root@127.0.0.1` once"),
        ({"key": "other"}, "Permission denied (publickey).; ssh cannot log in without a prompt"),
    ],
)
def test_ssh_never_prompts(
    ssh_engine: SshEngine, tmp_path: Path, fault: dict[str, str], message: str
) -> None:
    error = expect_error(
        ssh_engine.user(tmp_path / "user", **fault).inv("status", DOCKER_HOST=ssh_engine.host), 3
    )
    assert f"{ssh_engine.host} (DOCKER_HOST) cannot be reached: " in error
    assert message.format(port=ssh_engine.port) in error


def test_unreachable_host_or_engine_is_reported(ssh_engine: SshEngine, tmp_path: Path) -> None:
    user = ssh_engine.user(tmp_path / "user")
    error = expect_error(user.inv("status", DOCKER_HOST=f"{ssh_engine.host}/nowhere.sock"), 3)
    assert error.endswith("no such file or directory; no engine listens there: start it")
    error = expect_error(user.inv("status", DOCKER_HOST=f"ssh://127.0.0.1:{free_port()}"), 3)
    assert "Connection refused; nothing answers there: start sshd" in error


def test_missing_docker_command_of_the_host_is_reported(local: Docker, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with _run_sshd(tmp_path / "far", local.host, str(empty)) as ssh_engine:
        error = expect_error(
            ssh_engine.user(tmp_path / "user").inv("status", DOCKER_HOST=ssh_engine.host), 3
        )
    assert "the docker command is missing on the host, or not on the PATH" in error
