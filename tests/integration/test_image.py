"""The image of the top-level Dockerfile and its entry point, on a real engine."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import os
import pty
import shlex
import shutil
import signal
import subprocess
import tarfile
import termios
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from guix_tasks.bootstrap.engine import private_engine
from guix_tasks.buildkit.buildx import find_program

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parents[2]
ENTRY_POINT = ROOT / "guix_tasks" / "stages" / "resources" / "entry-point.sh"
LAB = Path(__file__).resolve().parent / "image"

UNAVAILABLE = 69
CURRENT = "/var/guix/profiles/per-user/root/current-guix"
KEY = (
    "(public-key (ecc (curve Ed25519)"
    " (q #979CCB50AFB321AD18F88DB1706D9A5CD5935A82D06A07367C4E4E7D845DDDB1#)))\n"
)
SIGNALS = [signal.SIGTERM, signal.SIGINT]
BUILD = "guix build --no-substitutes"

# Prints each process of the container on a line, without ps.
PROCESSES = (
    "for p in /proc/[0-9]*; do"
    ' test "$(tr "\\0" " " <$p/cmdline)" && echo "${p#/proc/} $(tr "\\0" " " <$p/cmdline)";'
    " done 2>/dev/null"
)
# Sets `daemon` to the process ID of the daemon.
FIND_DAEMON = (
    "for p in /proc/[0-9]*; do"
    ' if [ "$(cat $p/comm)" = guix-daemon ]; then daemon=${p#/proc/}; fi; done 2>/dev/null'
)


@dataclass
class Result:
    status: int
    out: str
    err: str


@dataclass
class Docker:
    """The docker command line, with the containers and images to remove after the tests."""

    host: str
    containers: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "DOCKER_HOST": self.host}

    def __call__(
        self,
        *arguments: str,
        stdin: bytes | None = None,
        timeout: float = 60,
        **environment: str,
    ) -> Result:
        process = subprocess.run(
            ["docker", *arguments],
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            timeout=timeout,
            check=False,
            env={**self.environment, **environment},
        )
        return Result(process.returncode, process.stdout.decode(), process.stderr.decode())

    def ok(self, *arguments: str, stdin: bytes | None = None) -> str:
        """Run a call that must succeed, and return its standard output."""
        result = self(*arguments, stdin=stdin)
        assert result.status == 0, result
        return result.out.strip()

    def new_name(self, names: list[str]) -> str:
        name = f"guix-tasks-test-{uuid.uuid4().hex[:12]}"
        names.append(name)
        return name

    def create(self, image: str, *command: str, options: Sequence[str] = ()) -> str:
        name = self.new_name(self.containers)
        self.ok(
            "create", "--name", name, "--privileged", "--network=none", *options, image, *command
        )
        return name

    def run(
        self,
        image: str,
        *command: str,
        options: Sequence[str] = (),
        stdin: bytes | None = None,
    ) -> Result:
        """Run a command in a container that is removed afterwards."""
        if stdin is not None:
            options = ("--interactive", *options)
        name = self.new_name(self.containers)  # for removal after a timeout
        argv = ("run", "--rm", "--privileged", "--network=none", f"--name={name}", *options)
        return self(*argv, image, *command, stdin=stdin)

    def start(self, image: str, *command: str, options: Sequence[str] = ()) -> str:
        name = self.create(image, *command, options=options)
        self.ok("start", name)
        return name

    def wait(self, container: str) -> int:
        return int(self.ok("wait", container))

    def await_output(self, container: str, text: str) -> None:
        wait_until(lambda: text in "".join(self.logs(container)), f"{text!r} in the output")

    def logs(self, container: str) -> tuple[str, str]:
        result = self("logs", container)
        return result.out, result.err

    def changes(self, container: str) -> list[str]:
        """Return the paths that a container has added or changed."""
        lines = self.ok("diff", container).splitlines()
        return [line[2:] for line in lines if line[0] in "AC"]

    def deletions(self, container: str) -> list[str]:
        lines = self.ok("diff", container).splitlines()
        return [line[2:] for line in lines if line[0] == "D"]

    def size(self, container: str, path: str) -> int | None:
        """Return the size of a file in a container, or None if it does not exist."""
        copy = subprocess.run(
            ["docker", "cp", f"{container}:{path}", "-"],
            capture_output=True,
            check=False,
            env=self.environment,
        )
        if copy.returncode:
            return None
        with tarfile.open(fileobj=io.BytesIO(copy.stdout)) as tar:
            return tar.getmembers()[0].size

    def write(self, container: str, files: dict[str, str | bytes], mode: int = 0o755) -> None:
        """Write files, by absolute path, into a container."""
        self.ok("cp", "-", f"{container}:/", stdin=make_archive(files, mode))

    def remove_all(self) -> None:
        if self.containers:
            self("rm", "--force", "--volumes", *self.containers)
        if self.images:
            self("rmi", "--force", *self.images)


def make_archive(files: dict[str, str | bytes], mode: int = 0o755) -> bytes:
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w") as tar:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name.lstrip("/"))
            member.size, member.mode = len(data), mode
            tar.addfile(member, io.BytesIO(data))
    return memory.getvalue()


def wait_until(condition: Callable[[], bool], description: str, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {description}"
        time.sleep(0.05)


def build_command(docker: Docker, builder: str) -> list[str]:
    if builder == "classic":
        return ["docker", "build", "--force-rm"]
    program = find_program(docker.environment, private_engine().buildx_path())
    if program is None:
        pytest.skip("this machine has no buildx")
    return [program, "build", "--builder=default", "--load", "--allow=network.host"]


def build(
    docker: Docker,
    builder: str,
    base: str,
    *options: str,
    context: Path = ROOT,
    url: str = "",
    checksum: str = "",
) -> tuple[str, Result]:
    """Build a Dockerfile on a base, and return the name of the image and the result."""
    image = docker.new_name(docker.images)
    arguments = {"BASE_IMAGE": base, "GUIX_BINARY_URL": url, "GUIX_BINARY_SHA256": checksum}
    options = (*options, *(f"--build-arg={k}={v}" for k, v in arguments.items() if v))
    process = subprocess.run(
        [
            *build_command(docker, builder),
            *(f"--tag={image}", "--network=host", *options, str(context)),
        ],
        capture_output=True,
        check=False,
        timeout=300,
        env={**docker.environment, "DOCKER_BUILDKIT": "0", "BUILDKIT_PROGRESS": "plain"},
    )
    return image, Result(process.returncode, process.stdout.decode(), process.stderr.decode())


@pytest.fixture(scope="session")
def docker(engine_host: str) -> Iterator[Docker]:
    client = Docker(engine_host)
    yield client
    client.remove_all()


@pytest.fixture(scope="session")
def image(docker: Docker, base_image: str) -> str:
    """The image of the Dockerfile, on a base that has Guix."""
    name, result = build(docker, "classic", base_image)
    assert result.status == 0, result
    return name


@pytest.fixture(scope="session")
def lab(docker: Docker, image: str) -> str:
    """The image with three derivations to build and a profile."""
    container = docker.create(image, "/lab/make-lab.sh")
    docker.write(container, {f"/lab/{path.name}": path.read_bytes() for path in LAB.iterdir()})
    result = docker("start", "--attach", container)
    assert result.status == 0, result
    name = docker.new_name(docker.images)
    docker.ok("commit", "--change", 'CMD ["bash"]', container, name)
    return name


def sh(docker: Docker, image: str, script: str, *options: str) -> Result:
    """Run a script as process 1 instead of the entry point."""
    return docker.run(image, "-c", script, options=("--entrypoint=sh", *options))


def assert_clean(docker: Docker, container: str) -> None:
    """Check that the database is closed and no files of an unfinished build remain."""
    assert not docker.size(container, "/var/guix/db/db.sqlite-wal")
    leftovers = [
        path
        for path in docker.changes(container)
        if path.endswith(".chroot") or path.startswith(("/tmp/guix-", "/dev/shm/guix-"))  # noqa: S108
    ]
    assert leftovers == []


# --- the Dockerfile


@pytest.mark.parametrize("builder", ["buildkit", "classic"])
def test_image_is_the_same_from_both_builders(
    docker: Docker, base_image: str, builder: str
) -> None:
    image, result = build(docker, builder, base_image)
    assert result.status == 0, result
    template = "{{json .Config.Entrypoint}} {{json .Config.Cmd}} {{json .Config.Env}}"
    config = docker.ok("inspect", "--format", template, image)
    profiles = "/var/guix/profiles/per-user/root"
    path = f"PATH={profiles}/current-guix/bin:{profiles}/guix-profile/bin:/usr/local/sbin:"
    assert config.startswith(f'["/entry-point.sh"] ["bash"] ["{path}')
    assert sh(docker, image, "ls /tmp").out == ""


def test_dockerfile_needs_no_privileges_and_no_frontend() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert "--security" not in text
    assert "# syntax=" not in text
    assert "ARG BASE_IMAGE=metacall/guix:latest\n" in text


def test_build_context_contains_only_the_scripts(docker: Docker, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")
    image, result = build(docker, "classic", "", f"--file={tmp_path / 'Dockerfile'}")
    assert result.status == 0, result
    container = docker.create(image, "none")
    exported = subprocess.run(
        ["docker", "export", container], capture_output=True, check=True, env=docker.environment
    )
    with tarfile.open(fileobj=io.BytesIO(exported.stdout)) as tar:
        names = {member.name for member in tar if member.isfile() and member.size}
    assert names == {
        f"guix_tasks/stages/resources/{name}.sh"
        for name in ("entry-point", "install-guix", "prepare")
    }


def test_image_has_ten_build_users_with_unique_ids(docker: Docker, image: str) -> None:
    groups = sh(docker, image, "cat /etc/group").out.splitlines()
    users = sh(docker, image, "cat /etc/passwd").out.splitlines()
    (group,) = (line.split(":") for line in groups if line.startswith("guixbuild:"))
    builders = [line.split(":") for line in users if line.startswith("guixbuilder")]
    assert group[3].split(",") == [user[0] for user in builders]
    assert len(builders) == 10
    assert {user[3] for user in builders} == {group[2]}
    ids = [line.split(":")[2] for line in users]
    assert len(set(ids)) == len(ids)


def test_second_preparation_changes_nothing(docker: Docker, image: str) -> None:
    container = docker.create(image, "/prepare.sh", options=("--entrypoint=sh",))
    docker.write(container, {"/prepare.sh": (ENTRY_POINT.parent / "prepare.sh").read_bytes()})
    assert docker("start", "--attach", container).status == 0
    assert docker.changes(container) == ["/prepare.sh"]


def test_missing_build_users_are_added_to_their_group(docker: Docker, image: str) -> None:
    container = docker.create(
        image,
        "-c",
        "sed -i 's/^guixbuild:.*/guixbuild:x:4242:/' /etc/group"
        " && sed -i /^guixbuilder/d /etc/passwd"
        " && sh /prepare.sh && id guixbuilder10 && id guixbuilder01",
        options=("--entrypoint=sh",),
    )
    docker.write(container, {"/prepare.sh": (ENTRY_POINT.parent / "prepare.sh").read_bytes()})
    result = docker("start", "--attach", container)
    assert result.status == 0, result
    assert result.out.count("gid=4242(guixbuild)") == 2


# --- the command


@pytest.mark.parametrize("init", [(), ("--init",)], ids=["process-1", "init"])
@pytest.mark.parametrize("status", [0, 3, 127, 137, 255])
def test_status_is_that_of_the_command(
    docker: Docker, image: str, status: int, init: tuple[str, ...]
) -> None:
    result = docker.run(image, "sh", "-c", f"exit {status}", options=init)
    assert (result.status, result.out, result.err) == (status, "", "")


def test_killed_or_missing_command_has_the_status_of_a_shell(docker: Docker, image: str) -> None:
    assert docker.run(image, "sh", "-c", "kill -KILL $$").status == 137
    assert docker.run(image, "no-such-program").status == 127
    assert docker.run(image, "/etc/passwd").status == 126


def test_arguments_are_preserved(docker: Docker, image: str) -> None:
    arguments = [
        "a b", "", '"', "it's", "$HOME", "*", "\\n", "-n", "--", "a=b", "ü", "a\nb", ";", "",
    ]  # fmt: skip
    result = docker.run(image, "printf", "<%s>", *arguments)
    assert result.out == "".join(f"<{argument}>" for argument in arguments)


def test_command_is_not_interpreted_by_shell_or_env(docker: Docker, image: str) -> None:
    assert docker.run(image, "_main").status == 127
    assert docker.run(image, "exit", "3").status == 127
    script = "cp /bin/echo '/tmp/a=b'; exec /entry-point.sh '/tmp/a=b' said"
    assert sh(docker, image, script).out == "said\n"


def test_environment_is_preserved(docker: Docker, image: str) -> None:
    variables = {
        "name": "1",
        "status": "x y",
        "command": "c",
        "line": "l",
        "LC_ALL": "C",
        "tree": "t",
    }
    options = [f"--env={name}={value}" for name, value in variables.items()]
    with_entry_point = docker.run(image, "env", options=options).out
    without = docker.run(image, options=(*options, "--entrypoint=env")).out
    ignored = ("HOSTNAME=", "_=", "PWD=")  # set by each container or by the shell
    actual, expected = (
        sorted(line for line in text.splitlines() if not line.startswith(ignored))
        for text in (with_entry_point, without)
    )
    assert "status=x y" in actual
    assert actual == expected


def test_standard_input_is_passed_on(docker: Docker, image: str) -> None:
    assert docker.run(image, "cat", stdin=b"one\ntwo\n").out == "one\ntwo\n"
    closed = sh(docker, image, "/entry-point.sh sh -c 'cat; echo end' <&-")
    assert (closed.status, closed.out) == (0, "end\n")


def test_default_command_is_a_shell(docker: Docker, image: str) -> None:
    options = ("--entrypoint=/entry-point.sh",)
    result = docker.run(image, options=options, stdin=b'echo "$BASH"; exit 5\n')
    assert (result.status, result.out) == (5, "/usr/bin/bash\n")


def test_profile_is_available_to_every_user(docker: Docker, lab: str) -> None:
    for user in ("0", "1000", "1000:1000"):
        result = docker.run(lab, "hello", options=(f"--user={user}",))
        assert (result.status, result.out, result.err) == (0, "Hello, world!\n", "")


def test_daemon_is_only_started_for_root(docker: Docker, image: str) -> None:
    result = docker.run(image, "sh", "-c", f"id -u; {PROCESSES}", options=("--user=1000",))
    assert result.out.splitlines()[0] == "1000"
    assert "guix-daemon" not in result.out


def test_missing_path_of_the_profiles_is_added(docker: Docker, image: str) -> None:
    result = docker.run(image, "sh", "-c", "echo $PATH", options=("--env=PATH=/usr/bin:/bin",))
    profiles = "/var/guix/profiles/per-user/root"
    assert result.out == f"{profiles}/current-guix/bin:{profiles}/guix-profile/bin:/usr/bin:/bin\n"


def test_entry_point_takes_little_time(docker: Docker, image: str) -> None:
    script = """
        for i in 1 2 3 4 5 6 7 8 9 10; do
            begin=$(date +%s%N); /entry-point.sh true; end=$(date +%s%N)
            echo $(((end - begin) / 1000000))
        done"""
    milliseconds = [int(line) for line in sh(docker, image, script).out.split()]
    assert min(milliseconds) < 60, milliseconds


# --- the daemon


@pytest.mark.parametrize("shell", ["dash", "bash", "busybox"])
def test_entry_point_runs_in_every_shell(docker: Docker, lab: str, shell: str) -> None:
    program, *options = ["busybox", "sh"] if shell == "busybox" else [shell]
    # The find of busybox compares whole seconds, so the log must be a second newer than the start.
    build_both = f"{BUILD} $(cat /lab/ok) && sleep 1 && {BUILD} -v0 $(cat /lab/failing)"
    container = docker.create(
        lab,
        *(*options, "/entry-point.sh", "sh", "-c", build_both),
        options=(f"--entrypoint={program}",),
    )
    if shell == "busybox":
        busybox = shutil.which("busybox")
        if busybox is None:
            pytest.skip("this machine has no busybox to copy into the container")
        docker.write(container, {"/usr/local/bin/busybox": Path(busybox).read_bytes()})
    result = docker("start", "--attach", container)
    assert result.status == 1, result
    assert result.out.endswith("-ok\n")
    assert "entry-point: the last lines of the build log of /gnu/store/" in result.err
    assert "line 60 of the log\n" in result.err
    assert_clean(docker, container)


@pytest.mark.parametrize("init", [(), ("--init",)], ids=["process-1", "init"])
def test_derivation_is_built(docker: Docker, lab: str, init: tuple[str, ...]) -> None:
    container = docker.create(lab, "sh", "-c", f"cat $({BUILD} $(cat /lab/ok))", options=init)
    result = docker("start", "--attach", container)
    assert (result.status, result.out) == (0, "done\n"), result
    assert "entry-point" not in result.err
    assert_clean(docker, container)


def test_entry_point_runs_twice_in_one_container(docker: Docker, lab: str) -> None:
    call = f"/entry-point.sh {BUILD} $(cat /lab/ok)"
    result = sh(docker, lab, f"{call} && {call} --check && cat /proc/[0-9]*/comm && exit 5")
    assert result.status == 5, result
    assert result.out.count("-ok\n") == 2
    assert result.out.endswith("-ok\nsh\n")


@pytest.mark.parametrize("builder", ["buildkit", "classic"])
def test_entry_point_runs_twice_in_one_run_of_a_dockerfile(
    docker: Docker, lab: str, builder: str, tmp_path: Path
) -> None:
    connect = "/entry-point.sh guix gc --references $(cat /lab/ok)"
    (tmp_path / "Dockerfile").write_text(
        "ARG BASE_IMAGE\n"
        "FROM ${BASE_IMAGE}\n"
        f"RUN {connect} >/one && {connect} >/two && /entry-point.sh true\n"
    )
    image, result = build(docker, builder, lab, context=tmp_path)
    assert result.status == 0, result
    script = "cat /one; cmp /one /two; ls /var/guix/db /var/guix/daemon-socket /tmp"
    listing = sh(docker, image, script)
    assert listing.status == 0
    assert "-kit\n" in listing.out
    assert "db.sqlite-wal" not in listing.out
    assert "guix-daemon." not in listing.out
    assert "\nsocket\n" not in listing.out


def test_nested_call_uses_the_running_daemon(docker: Docker, lab: str) -> None:
    script = f"/entry-point.sh {BUILD} $(cat /lab/ok); {PROCESSES}; {BUILD} $(cat /lab/ok)"
    result = docker.run(lab, "sh", "-c", script)
    assert result.status == 0, result
    assert result.out.count("-ok\n") == 2
    daemons = [line for line in result.out.splitlines() if "guix-daemon --" in line]
    assert len(daemons) == 1


def test_daemon_of_the_environment_is_used(docker: Docker, lab: str) -> None:
    options = ("--env=GUIX_DAEMON_SOCKET=/elsewhere/socket",)
    result = docker.run(lab, "sh", "-c", PROCESSES, options=options)
    assert "guix-daemon" not in result.out.replace("GUIX", "")


@pytest.fixture
def volume(docker: Docker) -> Iterator[str]:
    name = docker.ok("volume", "create")
    yield name
    docker("rm", "--force", *docker.containers)
    docker("volume", "rm", name)


def test_daemon_of_a_mounted_socket_is_used(docker: Docker, lab: str, volume: str) -> None:
    mount = (f"--volume={volume}:/var/guix/daemon-socket",)
    server = docker.start(lab, "sh", "-c", "echo ready; sleep 600", options=mount)
    docker.await_output(server, "ready")
    client = docker.run(lab, "sh", "-c", PROCESSES, options=mount)
    assert "guix-daemon --" not in client.out
    docker.ok("kill", server)
    # The socket remains, but the daemon does not answer any more.
    client = docker.run(lab, "sh", "-c", PROCESSES, options=mount)
    assert "guix-daemon --" in client.out


def test_environment_sets_the_options_of_the_daemon(docker: Docker, image: str) -> None:
    variables = {
        "GUIX_SUBSTITUTE_URLS": "https://one.example https://two.example",
        "GUIX_CORES": "3",
        "GUIX_MAX_JOBS": "2",
        "GUIX_SANDBOX": "nochroot",
    }
    script = f"{FIND_DAEMON}; xargs -0 -n 1 </proc/$daemon/cmdline"
    options = [f"--env={name}={value}" for name, value in variables.items()]
    assert docker.run(image, "sh", "-c", script, options=options).out.splitlines()[1:] == [
        "--build-users-group=guixbuild",
        "--substitute-urls=https://one.example https://two.example",
        "--cores=3",
        "--max-jobs=2",
        "--disable-chroot",
        "--no-offload",
    ]
    options = [f"--env={name}=" for name in variables]
    processors = int(docker.run(image, "nproc").out)
    assert docker.run(image, "sh", "-c", script, options=options).out.splitlines()[1:] == [
        "--build-users-group=guixbuild",
        f"--max-jobs={min(processors, 4)}",
        "--no-offload",
    ]
    # An image with build machines uses them.
    machines = "mkdir -p /etc/guix; touch /etc/guix/machines.scm; exec /entry-point.sh sh -c "
    result = sh(docker, image, f"{machines}{shlex.quote(script)}")
    assert "--max-jobs" in result.out
    assert "--no-offload" not in result.out


def with_daemon_script(script: str, command: str) -> str:
    """Return shell lines that install a script as the daemon of the pulled Guix."""
    program = f"{CURRENT}/bin/guix-daemon"
    return (
        f"mkdir -p {CURRENT}/bin; printf '#!/bin/sh\\n%s\\n' {shlex.quote(script)} >{program};"
        f" chmod +x {program}; {command}"
    )


def test_daemon_of_the_pulled_guix_is_used(docker: Docker, lab: str) -> None:
    script = 'touch /pulled; exec /usr/bin/guix-daemon "$@"'
    command = f"exec /entry-point.sh sh -c 'ls /pulled; {BUILD} $(cat /lab/ok)'"
    result = sh(docker, lab, with_daemon_script(script, command))
    assert result.status == 0, result
    assert result.out.startswith("/pulled\n")
    assert result.out.endswith("-ok\n")


def test_daemon_that_a_script_starts_is_stopped(docker: Docker, lab: str) -> None:
    script = '/usr/bin/guix-daemon "$@"; exit'
    command = f"/entry-point.sh {BUILD} $(cat /lab/ok); echo $?; {PROCESSES}"
    result = sh(docker, lab, with_daemon_script(script, command))
    assert "-ok\n0\n" in result.out
    assert "guix-daemon --" not in result.out.split("\n0\n")[1]


def test_daemon_that_ends_at_its_start_is_reported(docker: Docker, image: str) -> None:
    script = with_daemon_script("echo what went wrong >&2; exit 9", "exec /entry-point.sh echo ran")
    result = sh(docker, image, script)
    assert (result.status, result.out) == (UNAVAILABLE, "")
    assert result.err == (
        "entry-point: error: guix-daemon ended with status 9 before its socket answered:\n"
        "what went wrong\n"
    )


def test_daemon_that_never_answers_is_reported(docker: Docker, image: str) -> None:
    script = with_daemon_script("echo waiting; exec sleep 100", "exec /entry-point.sh echo ran")
    start = time.monotonic()
    result = sh(docker, image, script, "--env=GUIX_DAEMON_TIMEOUT=1")
    assert (result.status, result.out) == (UNAVAILABLE, "")
    assert "guix-daemon's socket did not answer within 1 s:\nwaiting\n" in result.err
    assert time.monotonic() - start < 10


def test_missing_daemon_is_reported(docker: Docker, image: str) -> None:
    result = sh(docker, image, "rm /usr/bin/guix-daemon; exec /entry-point.sh echo ran")
    assert (result.status, result.out) == (UNAVAILABLE, "")
    assert "this image has no guix-daemon" in result.err


def test_daemon_that_ends_early_is_reported(docker: Docker, image: str) -> None:
    script = f"{FIND_DAEMON}; kill $daemon; sleep 0.2; exit 4"
    result = docker.run(image, "sh", "-c", script)
    assert result.status == 4
    assert "guix-daemon ended before the command did" in result.err


def test_end_of_the_log_of_a_failed_build_is_shown(docker: Docker, lab: str) -> None:
    script = f"{BUILD} -v0 $(cat /lab/ok); {BUILD} -v0 $(cat /lab/failing) 2>/dev/null"
    result = docker.run(lab, "sh", "-c", script)
    assert result.status == 1
    failing = docker.ok("run", "--rm", "--entrypoint=cat", "--network=none", lab, "/lab/failing")
    lines = [f"line {number} of the log\n" for number in range(21, 61)]
    heading = f"entry-point: the last lines of the build log of {failing}:\n"
    assert result.err == heading + "".join(lines)


def test_logs_of_earlier_failures_are_not_shown(docker: Docker, lab: str) -> None:
    call = f"/entry-point.sh {BUILD} -v0 $(cat /lab/failing) 2>/dev/null"
    result = sh(docker, lab, f"{call}; sleep 0.1; exec /entry-point.sh sh -c 'exit 6'")
    assert (result.status, result.err) == (6, "")


# --- signals


@pytest.mark.parametrize("init", [(), ("--init",)], ids=["process-1", "init"])
@pytest.mark.parametrize("number", [*SIGNALS, signal.SIGHUP], ids=lambda number: number.name)
def test_signal_ends_a_command(
    docker: Docker, image: str, number: signal.Signals, init: tuple[str, ...]
) -> None:
    # The shell waits for its child, so the signal must reach both.
    command = ("sh", "-c", "echo begin; sleep 600; echo end")
    container = docker.start(image, *command, options=init)
    docker.await_output(container, "begin")
    start = time.monotonic()
    docker.ok("kill", f"--signal={number.name}", container)
    assert docker.wait(container) == 128 + number
    assert time.monotonic() - start < 5
    assert docker.logs(container) == ("begin\n", "")
    assert_clean(docker, container)


def test_command_that_handles_a_signal_keeps_its_status(docker: Docker, image: str) -> None:
    script = "trap 'echo bye; exit 7' TERM; echo begin; while :; do sleep 0.05; done"
    container = docker.start(image, "sh", "-c", script)
    docker.await_output(container, "begin")
    docker.ok("kill", "--signal=TERM", container)
    assert docker.wait(container) == 7
    assert docker.logs(container)[0] == "begin\nbye\n"


@pytest.mark.parametrize("init", [(), ("--init",)], ids=["process-1", "init"])
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_signal_ends_a_build(
    docker: Docker, lab: str, number: signal.Signals, init: tuple[str, ...]
) -> None:
    container = docker.start(lab, "sh", "-c", f"exec {BUILD} $(cat /lab/slow)", options=init)
    docker.await_output(container, "started\n")
    docker.ok("kill", f"--signal={number.name}", container)
    assert docker.wait(container) == 128 + number
    assert "entry-point" not in docker.logs(container)[1]
    assert_clean(docker, container)


@pytest.mark.parametrize(
    "client",
    [f"{BUILD} $(cat /lab/slow) &", f"( {BUILD} $(cat /lab/slow) & );"],
    ids=["client-ends", "client-continues"],
)
@pytest.mark.parametrize("shell", ["dash", "bash"])
def test_workers_and_builders_end_before_the_entry_point(
    docker: Docker, lab: str, shell: str, client: str
) -> None:
    # The entry point is not process 1, so remaining processes would be listed. A client without
    # a parent below the command gets no signal and continues.
    script = f"""
        {shell} /entry-point.sh sh -c '{client} sleep 600' &
        entry=$!
        until cat /proc/[0-9]*/comm | grep -qx loader; do sleep 0.05; done 2>/dev/null
        cat /proc/[0-9]*/comm
        kill -TERM $entry; wait $entry; echo status $?
        cat /proc/[0-9]*/comm"""
    result = sh(docker, lab, script)
    before, after = (text.splitlines() for text in result.out.split("status 143\n"))
    assert before.count("guix-daemon") == 2
    assert before.count("loader") >= 1
    assert not {"guix-daemon", "loader"} & set(after)


def test_signal_before_the_daemon_answers_ends_the_entry_point(docker: Docker, image: str) -> None:
    script = with_daemon_script("exec sleep 100", "exec /entry-point.sh echo ran")
    container = docker.start(image, "-c", script, options=("--entrypoint=sh",))
    wait_until(lambda: "sleep 100\n" in docker("top", container).out, "the daemon's start")
    docker.ok("kill", "--signal=TERM", container)
    assert docker.wait(container) == 143
    assert docker.logs(container) == ("", "")


def test_files_of_a_killed_build_are_removed_at_the_next_start(docker: Docker, lab: str) -> None:
    killed = docker.start(lab, "sh", "-c", f"{BUILD} $(cat /lab/slow)")
    docker.await_output(killed, "started\n")
    docker.ok("kill", "--signal=KILL", killed)
    docker.wait(killed)
    changes = docker.changes(killed)
    assert any(path.endswith("-slow.drv.chroot") for path in changes)
    assert "/tmp/guix-build-slow.drv-0" in changes  # noqa: S108
    assert "/var/guix/db/db.sqlite-wal" in changes
    stale = docker.new_name(docker.images)
    docker.ok("commit", killed, stale)

    container = docker.create(stale, "true")
    result = docker("start", "--attach", container)
    assert (result.status, result.err) == (0, "")
    assert "/tmp/guix-build-slow.drv-0" in docker.deletions(container)  # noqa: S108
    assert not docker.size(container, "/var/guix/db/db.sqlite-wal")

    container = docker.create(stale, "sh", "-c", f"{BUILD} $(cat /lab/ok)")
    result = docker("start", "--attach", container)
    assert result.status == 0, result
    assert_clean(docker, container)


def test_write_ahead_log_of_a_killed_container_is_checkpointed(docker: Docker, lab: str) -> None:
    """The container is killed while the database has a write-ahead log with content."""
    script = """
        /usr/bin/guix-daemon >/dev/null 2>&1 &
        until guix gc --references $(cat /lab/ok) >/dev/null 2>&1; do sleep 0.05; done
        echo '(use-modules (guix store)) (with-store store
          (add-text-to-store store "written" "text" (list))
          (display "written") (newline) (force-output) (sleep 600))' >/tmp/write.scm
        exec guix repl /tmp/write.scm"""

    def kill_writer() -> str:
        killed = docker.start(lab, "-c", script, options=("--entrypoint=sh",))
        docker.await_output(killed, "written\n")
        docker.ok("kill", "--signal=KILL", killed)
        docker.wait(killed)
        return killed

    # The log can be empty after a checkpoint, so try several times.
    containers = (kill_writer() for _ in range(5))
    log = "/var/guix/db/db.sqlite-wal"
    killed = next((container for container in containers if docker.size(container, log)), "")
    assert killed, "no container has a log with content"
    stale = docker.new_name(docker.images)
    docker.ok("commit", "--change", 'ENTRYPOINT ["/entry-point.sh"]', killed, stale)

    container = docker.create(stale, "true")
    result = docker("start", "--attach", container)
    assert (result.status, result.err) == (0, "")
    assert not docker.size(container, "/var/guix/db/db.sqlite-wal")


def test_directories_of_keep_failed_are_not_removed(docker: Docker, lab: str) -> None:
    script = f"{BUILD} -K $(cat /lab/failing); ls -d /tmp/guix-build-failing.drv-0"
    result = sh(
        docker, lab, f"/entry-point.sh sh -c '{script}' && ls -d /tmp/guix-build-failing.drv-0"
    )
    assert result.out.count("/tmp/guix-build-failing.drv-0\n") == 2  # noqa: S108


# --- a terminal


class Terminal:
    """`docker run --interactive --tty` in a pseudo-terminal."""

    def __init__(self, docker: Docker, image: str, *command: str, interactive: bool = True) -> None:
        self.docker = docker
        self.container = docker.new_name(docker.containers)
        self.text = ""
        self._master, slave = pty.openpty()
        options = ["--tty", *(["--interactive"] if interactive else [])]
        self.process = subprocess.Popen(
            [
                *("docker", "run", "--privileged", "--network=none", "--name", self.container),
                *(*options, image, *command),
            ],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=docker.environment,
            start_new_session=True,
        )
        os.close(slave)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            while data := os.read(self._master, 4096):
                self.text += data.decode(errors="replace")
        except OSError:  # the other end is closed
            pass

    def type(self, keys: str) -> None:
        # Until docker has set up the terminal, Ctrl-C would stop docker itself.
        wait_until(lambda: not termios.tcgetattr(self._master)[3] & termios.ICANON, "raw mode")
        os.write(self._master, keys.encode())

    def expect(self, text: str) -> None:
        wait_until(lambda: text in self.text, f"{text!r} on the terminal: {self.text!r}")

    def wait(self) -> int:
        try:
            return self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            pytest.fail(
                f"{self.text!r}, and still running: {self.docker.ok('top', self.container)}"
            )


def test_ctrl_c_at_the_terminal_ends_the_command(docker: Docker, image: str) -> None:
    terminal = Terminal(docker, image, "sh", "-c", "echo begin; sleep 600; echo end")
    terminal.expect("begin")
    terminal.type("\x03")
    assert terminal.wait() == 130
    assert "end" not in terminal.text


def test_ctrl_c_at_the_terminal_is_one_signal(docker: Docker, image: str) -> None:
    script = "trap 'n=$((n+1)); echo caught $n' INT; echo begin; while :; do sleep 0.05; done"
    terminal = Terminal(docker, image, "bash", "-c", script)
    terminal.expect("begin")
    for number in (1, 2):
        terminal.type("\x03")
        terminal.expect(f"caught {number}")
        time.sleep(0.3)
    docker.ok("kill", "--signal=INT", terminal.container)
    terminal.expect("caught 3")
    time.sleep(0.3)
    assert "caught 4" not in terminal.text
    docker.ok("kill", "--signal=TERM", terminal.container)
    assert terminal.wait() == 143


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_signal_ends_a_command_with_a_terminal(
    docker: Docker, lab: str, number: signal.Signals
) -> None:
    terminal = Terminal(
        docker, lab, "sh", "-c", f"exec {BUILD} $(cat /lab/slow)", interactive=False
    )
    terminal.expect("started")
    docker.ok("kill", f"--signal={number.name}", terminal.container)
    assert terminal.wait() == 128 + number
    assert_clean(docker, terminal.container)


def test_interactive_shell_has_job_control(docker: Docker, image: str) -> None:
    terminal = Terminal(docker, image)
    terminal.type("echo be''gin; sleep 600\n")
    terminal.expect("begin")
    time.sleep(0.2)
    terminal.type("\x1a")
    terminal.expect("Stopped")
    terminal.type("fg\n")
    time.sleep(0.2)
    terminal.type("\x03")
    terminal.type("echo status $?\n")
    terminal.expect("status 130")
    terminal.type("exit 7\n")
    assert terminal.wait() == 7
    assert "job control" not in terminal.text


def test_docker_stop_ends_an_interactive_shell(docker: Docker, image: str) -> None:
    terminal = Terminal(docker, image)
    terminal.type("echo be''gin\n")
    terminal.expect("begin")
    start = time.monotonic()
    docker.ok("stop", "--time=20", terminal.container)
    assert time.monotonic() - start < 10
    assert terminal.wait() == 129


# --- a work container


def create_work_container(
    docker: Docker, image: str, *command: str, environment: str = "", options: Sequence[str] = ()
) -> str:
    container = docker.create(
        image, *command, options=("--entrypoint=/var/guix/guix-tasks/entry-point.sh", *options)
    )
    docker.write(
        container,
        {
            "/var/guix/guix-tasks/entry-point.sh": ENTRY_POINT.read_bytes(),
            "/var/guix/guix-tasks/environment": environment,
            "/var/guix/guix-tasks/keys/one.pub": KEY,
            "/var/guix/guix-tasks/for-the-command": "text\n",
        },
    )
    return container


def assert_no_work_files(docker: Docker, container: str) -> None:
    assert [
        path for path in docker.changes(container) if path.startswith("/var/guix/guix-tasks")
    ] == []


def test_work_container_uses_its_environment_files_and_keys(
    docker: Docker, base_image: str
) -> None:
    value = 'it\'s a "value" with $HOME\nand two lines'
    command = (
        "sh",
        "-c",
        'cat /var/guix/guix-tasks/for-the-command; printf "<%s>" "$VALUE"; exit 5',
    )
    environment = f"VALUE={shlex.quote(value)}\nGUIX_CORES='3'\n"
    container = create_work_container(docker, base_image, *command, environment=environment)
    result = docker("start", "--attach", container)
    assert (result.status, result.out) == (5, f"text\n<{value}>")
    assert_no_work_files(docker, container)
    assert "/etc/guix/acl" in docker.changes(container)
    acl = subprocess.run(
        ["docker", "cp", f"{container}:/etc/guix/acl", "-"],
        capture_output=True,
        check=True,
        env=docker.environment,
    )
    assert KEY.split("#")[1].encode() in acl.stdout


def test_authorised_key_is_not_added_again(docker: Docker, image: str) -> None:
    authorised = docker.new_name(docker.images)
    first = create_work_container(docker, image, "true")
    docker.ok("start", "--attach", first)
    docker.ok("commit", first, authorised)
    second = create_work_container(docker, authorised, "true")
    docker.ok("start", "--attach", second)
    assert "/etc/guix/acl" not in docker.changes(second)


def test_invalid_key_stops_a_work_container(docker: Docker, image: str) -> None:
    container = create_work_container(docker, image, "echo", "ran")
    docker.write(container, {"/var/guix/guix-tasks/keys/bad.pub": "no key\n"})
    result = docker("start", "--attach", container)
    assert (result.status, result.out) == (UNAVAILABLE, "")
    assert "cannot authorise the substitute key bad.pub" in result.err
    assert_no_work_files(docker, container)


def test_work_files_are_removed_after_a_signal(docker: Docker, image: str) -> None:
    container = create_work_container(docker, image, "sh", "-c", "echo begin; sleep 600")
    docker.ok("start", container)
    docker.await_output(container, "begin")
    docker.ok("kill", "--signal=TERM", container)
    assert docker.wait(container) == 143
    assert_no_work_files(docker, container)


def test_killed_work_container_contains_no_environment(docker: Docker, image: str) -> None:
    """The environment may have the password of a proxy, which a commit would keep."""
    container = create_work_container(
        docker, image, "sh", "-c", "echo begin; sleep 600", environment="VALUE=hunter2\n"
    )
    docker.ok("start", container)
    docker.await_output(container, "begin")
    docker.ok("kill", "--signal=KILL", container)
    assert docker.wait(container) == 137
    assert "/var/guix/guix-tasks/running" in docker.changes(container)
    assert "/var/guix/guix-tasks/environment" not in docker.changes(container)


def test_work_files_are_removed_without_a_daemon(docker: Docker, image: str) -> None:
    script = "exec sleep 100"
    container = create_work_container(
        docker, image, "echo", "ran", options=("--env=GUIX_DAEMON_TIMEOUT=0",)
    )
    docker.write(container, {f"{CURRENT}/bin/guix-daemon": f"#!/bin/sh\n{script}\n"})
    result = docker("start", "--attach", container)
    assert (result.status, result.out) == (UNAVAILABLE, "")
    assert_no_work_files(docker, container)


def test_nested_calls_keep_the_work_files(docker: Docker, image: str) -> None:
    directory = "/var/guix/guix-tasks"
    script = (
        f"{directory}/entry-point.sh true; /entry-point.sh true; cat {directory}/for-the-command"
    )
    container = create_work_container(docker, image, "sh", "-c", script)
    assert docker("start", "--attach", container).out == "text\n"
    assert_no_work_files(docker, container)


# --- the binary tarball


class Server(http.server.ThreadingHTTPServer):
    """Serves one file on loopback."""

    def __init__(self, content: bytes) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # called by http.server
                self.send_response(200 if self.path == "/guix.tar.gz" else 404)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/guix.tar.gz"


TARBALL = gzip.compress(
    make_archive(
        {
            "./gnu/store/00000000000000000000000000000000-guix/bin/guix-daemon": (
                '#!/bin/sh\ntouch /from-the-tarball\nexec /usr/bin/guix-daemon "$@"\n'
            ),
            f".{CURRENT}/bin/guix-daemon": (
                "#!/bin/sh\n"
                'exec /gnu/store/00000000000000000000000000000000-guix/bin/guix-daemon "$@"\n'
            ),
            f".{CURRENT}/bin/guix": '#!/bin/sh\nexec /usr/bin/guix "$@"\n',
            f".{CURRENT}/share/guix/ci.guix.gnu.org.pub": KEY,
        }
    )
)
SUM = hashlib.sha256(TARBALL).hexdigest()


@pytest.fixture(scope="module")
def tarball_url() -> Iterator[str]:
    server = Server(TARBALL)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.url
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("builder", ["buildkit", "classic"])
def test_binary_tarball_is_installed(
    docker: Docker, base_image: str, builder: str, tarball_url: str
) -> None:
    image, result = build(
        docker,
        builder,
        base_image,
        url=tarball_url,
        checksum=SUM.upper(),
    )
    assert result.status == 0, result
    script = (
        "ls /from-the-tarball && guix gc --list-live && readlink /root/.config/guix/current"
        f" && grep -c {KEY.split('#')[1]} /etc/guix/acl && ls /tmp && stat -c %a /tmp /var"
    )
    run = docker.run(image, "sh", "-c", script)
    assert run.status == 0, run
    assert run.out == f"/from-the-tarball\n{CURRENT}\n1\n1777\n755\n"


@pytest.mark.parametrize("builder", ["buildkit", "classic"])
def test_wrong_checksum_stops_the_build(
    docker: Docker, base_image: str, builder: str, tarball_url: str
) -> None:
    wrong = "0123456789abcdef" * 4
    _, result = build(docker, builder, base_image, url=tarball_url, checksum=wrong)
    assert result.status != 0
    assert (
        f"install-guix: error: {tarball_url} has the SHA-256 sum {SUM},"
        f" but GUIX_BINARY_SHA256 is {wrong}\n"
    ) in result.out + result.err


@pytest.mark.parametrize(
    ("url", "checksum", "message"),
    [
        ("{}", "", "GUIX_BINARY_URL is {}, but GUIX_BINARY_SHA256, the sum it must have, is empty"),
        ("", "a" * 64, f"GUIX_BINARY_SHA256 is {'a' * 64}, but GUIX_BINARY_URL is empty"),
        ("{}", "abc", "GUIX_BINARY_SHA256 has 3 digits instead of 64: abc"),
        ("{}", "z" * 64, f"GUIX_BINARY_SHA256 is not a SHA-256 sum in hexadecimal: {'z' * 64}"),
        ("{}/not-there", "a" * 64, "cannot download {}/not-there"),
    ],
    ids=["no-checksum", "no-url", "short", "no-hexadecimal", "not-there"],
)
def test_invalid_arguments_stop_the_build(
    docker: Docker, base_image: str, tarball_url: str, *, url: str, checksum: str, message: str
) -> None:
    url = url.format(tarball_url)
    _, result = build(docker, "classic", base_image, url=url, checksum=checksum)
    assert result.status != 0
    assert f"install-guix: error: {message.format(tarball_url)}\n" in result.out + result.err


def test_base_with_a_store_is_refused(docker: Docker, lab: str, tarball_url: str) -> None:
    _, result = build(docker, "classic", lab, url=tarball_url, checksum=SUM)
    assert result.status != 0
    assert "install-guix: error: the base already has a store of Guix" in result.out + result.err
