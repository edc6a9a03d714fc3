"""The buildx command line, run with a program that records its calls."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import re
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fake_engine import DETERMINISTIC, BufferConsole
from hypothesis import given
from hypothesis import strategies as st

from guix_tasks.buildkit import buildx
from guix_tasks.buildkit.buildx import (
    BuilderNode,
    Buildx,
    csv_field,
    parse_builder,
    with_accounts,
)
from guix_tasks.engine import diagnose
from guix_tasks.engine.accounts import Accounts, Credentials
from guix_tasks.engine.api import BuildSpec
from guix_tasks.errors import FULL_DISK, BuilderError, GuixTasksError, RegistryError, StageError

if TYPE_CHECKING:
    from collections.abc import Callable

STUB = """#!/bin/sh
printf '%s\\0' "$@" >"$STUB/argv"
env >"$STUB/env"
for word; do case $word in --metadata-file=*) answer=${word#*=} ;; esac; done
cat "$STUB/log" >&2
echo "not shown"
[ -n "$STATUS" ] && exit "$STATUS"
cat "$STUB/metadata" >"$answer"
"""


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    program = tmp_path / "docker-buildx"
    program.write_text(STUB)
    program.chmod(0o755)
    (tmp_path / "log").write_text("#1 one\n#2 two\n")
    (tmp_path / "metadata").write_text('{"containerimage.digest": "sha256:abc"}')
    return program


def spec(**options: object) -> BuildSpec:
    values: dict[str, object] = {"context": Path("/c d"), "dockerfile": Path("/d"), **options}
    return BuildSpec(**values)  # type: ignore[arg-type]


def build(stub: Path, spec: BuildSpec, status: str = "") -> tuple[str, list[bytes]]:
    log: list[bytes] = []
    environment = {"STUB": str(stub.parent), "STATUS": status, "PATH": os.environ["PATH"]}
    return buildx.build(Buildx(str(stub), environment), spec, log.append), log


def argv(stub: Path) -> list[str]:
    return (stub.parent / "argv").read_text().split("\0")[:-1]


def test_build_returns_the_image_and_streams_the_log(stub: Path) -> None:
    image, log = build(stub, spec(args={"A": "1 $x"}, platform="linux/arm64"))
    assert image == "sha256:abc"
    assert b"".join(log) == b"#1 one\n#2 two\n"
    words = argv(stub)
    output = "--output=type=docker,oci-mediatypes=true"
    assert words[:3] == ["build", "--builder=default", "--progress=plain"]
    assert words[3:5] == [output, "--provenance=false"]
    assert words[-4:] == ["--file=/d", "--build-arg=A=1 $x", "--platform=linux/arm64", "/c d"]
    assert not [word for word in words if word.startswith("--allow")]


def test_image_is_the_digest_of_the_store(stub: Path) -> None:
    digests = {"containerimage.config.digest": "sha256:c", "containerimage.digest": "sha256:m"}
    (stub.parent / "metadata").write_text(json.dumps(digests))
    assert build(stub, spec())[0] == "sha256:m"
    (stub.parent / "metadata").write_text("{}")
    with pytest.raises(BuilderError, match="the builder reported no image"):
        build(stub, spec())


def test_layers_are_compressed_on_request(stub: Path) -> None:
    environment = {"STUB": str(stub.parent), "PATH": os.environ["PATH"]}
    buildx.build(Buildx(str(stub), environment), spec(), print, compress=True)
    assert (
        "--output=type=docker,oci-mediatypes=true,compression=gzip,force-compression=true"
        in argv(stub)
    )


def test_host_network_is_allowed_if_configured(stub: Path) -> None:
    build(stub, spec(network="host"))
    assert "--allow=network.host" in argv(stub)
    build(stub, spec(network="none"))
    assert "--allow=network.host" not in argv(stub)


def test_secret_is_passed_as_a_file(stub: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hunter2")
    build(stub, spec(secrets={"token": tmp_path / "token"}))
    assert f"--secret=id=token,src={tmp_path}/token" in argv(stub)
    assert "hunter2" not in "".join(argv(stub)) + (tmp_path / "env").read_text()


def test_secret_build_argument_is_not_on_the_command_line(stub: Path) -> None:
    """Every user of the machine can read command lines."""
    arguments = {"TOKEN": "hunter2 x", "https_proxy": "http://me:hunter2@proxy.test", "A": "1"}
    build(stub, spec(args=arguments))
    assert "hunter2" not in "".join(argv(stub))
    assert {"--build-arg=TOKEN", "--build-arg=https_proxy", "--build-arg=A=1"} < set(argv(stub))
    environment = (stub.parent / "env").read_text()
    assert "TOKEN=hunter2 x\n" in environment
    assert "https_proxy=http://me:hunter2@proxy.test\n" in environment


def test_values_of_proxies_are_in_the_environment(stub: Path) -> None:
    proxies = {"http_proxy": "http://proxy.test", "no_proxy": "a,b"}
    build(stub, spec(proxies=proxies))
    assert {"--build-arg=http_proxy", "--build-arg=no_proxy"} < set(argv(stub))
    assert "http_proxy=http://proxy.test\n" in (stub.parent / "env").read_text()


def test_build_uses_only_the_given_environment(stub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUILDX_BUILDER", "mine")
    build(stub, spec())
    assert "BUILDX_BUILDER" not in (stub.parent / "env").read_text()


def test_failed_build_reports_its_error(stub: Path) -> None:
    (stub.parent / "log").write_text(
        "#5 ERROR: process did not complete\n------\n"
        'ERROR: failed to build: failed to solve: process "/bin/sh" did not complete: exit code 3\n'
    )
    with pytest.raises(BuilderError) as error:
        build(stub, spec(), status="1")
    assert str(error.value) == (
        'cannot build /d: process "/bin/sh" did not complete: exit code 3; see the output above'
    )


def test_build_on_a_full_disk_has_a_hint(stub: Path) -> None:
    (stub.parent / "log").write_text("ERROR: failed to solve: x: no space left on device\n")
    with pytest.raises(BuilderError) as error:
        build(stub, spec(), status="1")
    assert str(error.value) == f"cannot build /d: x: no space left on device; {FULL_DISK}"


def test_file_name_without_utf8_is_reported_with_a_hint(stub: Path) -> None:
    message = "grpc: failed to unmarshal the received message: string field contains invalid UTF-8"
    (stub.parent / "log").write_text(f"ERROR: failed to solve: Internal: {message}\n")
    with pytest.raises(BuilderError, match=r"^a name in BUILD_CONTEXT is not UTF-8, ") as error:
        build(stub, spec(), status="1")
    assert str(error.value).endswith("; rename the file, or list it in .dockerignore")


def test_interrupted_build_is_stopped(stub: Path) -> None:
    stub.write_text("#!/bin/sh\necho $$ >&2\nexec sleep 60\n")
    pids: list[int] = []

    def output(line: bytes) -> None:
        pids.append(int(line))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        buildx.build(Buildx(str(stub), dict(os.environ)), spec(), output)
    end = time.monotonic() + 5
    while is_alive(pids[0]) and time.monotonic() < end:
        time.sleep(0.01)
    assert not is_alive(pids[0])


def is_alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_build_without_metadata_is_an_error(stub: Path) -> None:
    stub.write_text("#!/bin/sh\nexit 0\n")
    with pytest.raises(BuilderError):
        build(stub, spec())


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ("", "buildx gave no reason"),
        ("\n  \n", "buildx gave no reason"),
        ("one\nthe last\n\n", "the last"),
        ("ERROR: first\nmore\nERROR: failed to build: second\n", "second"),
        ("ERROR: failed to solve: x: y\n", "x: y"),
        ("ERROR: target image: failed to solve: x\n", "x"),
        ("ERROR: failed to build: target image-2: failed to solve: x\n", "x"),
        ("#7 1.2 ERROR: of a step\nERROR: x\nView build details: y\n", "x"),
        ("\x1b[31mERROR: \x1b[1;31mfailed to solve: x\x1b[0m\r\n", "x"),
        ("\x1b]0;title\x07ERROR: x\x1b(B\n\x1b[?25h", "x"),
        ("\x1b]8;;http://x\x1b\\ERROR: x\x1b]8;;\x1b\\\n", "x"),
        (" => CACHED one\r => two\r\nERROR: x\r\n", "x"),
        ("ERROR: a\x00b\x08c\x7f\x1b\n", "abc"),
        ("ERROR: x\x1b[", "x"),
        ("ERROR: ünknown \ufffd\n", "ünknown \ufffd"),
        ("ERROR:\n", "ERROR:"),
    ],
)
def test_error_of_a_log_is_one_line(log: str, line: str) -> None:
    assert diagnose.cause(log) == line


# --- Search for the program -----------------------------------------------------------------


@pytest.fixture
def empty_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without buildx."""
    monkeypatch.setattr(buildx, "SYSTEM_PLUGINS", (str(tmp_path / "system"),))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


def create_program(directory: Path, mode: int = 0o755) -> str:
    directory.mkdir(parents=True)
    program = directory / "docker-buildx"
    program.write_text("#!/bin/sh\n")
    program.chmod(mode)
    return str(program)


def test_missing_program_is_none(empty_machine: Path) -> None:
    assert buildx.find_program({}) is None


def test_program_is_found_like_the_docker_command_does(empty_machine: Path) -> None:
    """The order: the user's directory, the system's, the private engine's, ``PATH``."""
    on_path = create_program(empty_machine / "bin")
    assert buildx.find_program({}) == on_path
    system = create_program(empty_machine / "system")
    assert buildx.find_program({}) == system
    home = create_program(empty_machine / "home" / ".docker" / "cli-plugins")
    assert buildx.find_program({}) == home
    configured = create_program(empty_machine / "config" / "cli-plugins")
    assert buildx.find_program({"DOCKER_CONFIG": str(empty_machine / "config")}) == configured
    assert buildx.find_program({"DOCKER_CONFIG": ""}) == home


def test_program_of_the_private_engine_precedes_path(empty_machine: Path) -> None:
    create_program(empty_machine / "bin")
    assert buildx.find_program({}, empty_machine / "private") == str(empty_machine / "private")


def test_file_without_execute_permission_is_ignored(empty_machine: Path) -> None:
    create_program(empty_machine / "system", mode=0o644)
    (empty_machine / "home" / ".docker" / "cli-plugins").mkdir(parents=True)
    assert buildx.find_program({}) is None


# --- Calls ----------------------------------------------------------------------------------

RECORDER = """#!/bin/sh
printf '%s\\0' "$@" >"$STUB/argv"
env >"$STUB/env"
cat >"$STUB/input"
printf 'an \\377 answer\\n'
cat "$STUB/log" >&2
exit "${STATUS:-0}"
"""


@pytest.fixture
def program(stub: Path) -> Buildx:
    stub.write_text(RECORDER)
    return Buildx(str(stub), {"STUB": str(stub.parent), "PATH": os.environ["PATH"]})


def failing_program(program: Buildx, log: str) -> Buildx:
    Path(program.environment["STUB"], "log").write_text(log)
    return replace(program, environment={**program.environment, "STATUS": "1"})


def script_program(stub: Path, script: str) -> Buildx:
    """Create a program that runs a script."""
    stub.write_text(f"#!/bin/sh\n{script}\n")
    return Buildx(str(stub), {"PATH": os.environ["PATH"]})


def test_ask_returns_the_standard_output(program: Buildx, stub: Path) -> None:
    words = ["inspect", "a b", "", "ü", "$x", "--", "a\nb"]
    assert program.ask(*words, text="FROM x\n") == "an \ufffd answer\n"
    assert argv(stub) == words
    assert (stub.parent / "input").read_text() == "FROM x\n"
    assert program.ask("ls")
    assert (stub.parent / "input").read_text() == ""


def test_call_uses_only_the_environment_of_the_program(
    program: Buildx, stub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUILDX_BUILDER", "mine")
    for call in (
        lambda: program.ask("ls"),
        lambda: program.change("use", "x"),
        lambda: program.stream("bake", output=print),
    ):
        (stub.parent / "env").unlink(missing_ok=True)
        call()
        assert "BUILDX_BUILDER" not in (stub.parent / "env").read_text()


def test_failed_call_reports_its_error(program: Buildx) -> None:
    broken = failing_program(program, "WARNING: x\nERROR: unknown flag: --wat\n")
    log: list[bytes] = []
    for call in (
        lambda: broken.ask("ls"),
        lambda: broken.change("use", "x"),
        lambda: broken.stream("bake", output=log.append),
    ):
        with pytest.raises(BuilderError) as error:
            call()
        assert str(error.value) == "unknown flag: --wat"
    assert b"".join(log) == b"WARNING: x\nERROR: unknown flag: --wat\n"


def test_only_changing_calls_are_printed(program: Buildx) -> None:
    shown = replace(program, shown_on=BufferConsole())
    shown.ask("inspect", "x")
    assert console_text(shown) == ""
    assert shown.change("create", "--name=a b") == "an \ufffd answer\n"
    shown.stream("bake", "--file=x", output=print)
    assert "docker buildx create '--name=a b'\n" in console_text(shown)
    assert "docker buildx bake --file=x\n" in console_text(shown)


def test_dry_run_only_prints_changing_calls(program: Buildx, stub: Path) -> None:
    dry = replace(failing_program(program, "ERROR: x\n"), shown_on=BufferConsole(), perform=False)
    assert dry.change("rm", "x") == ""
    dry.stream("bake", output=print, seconds=0.001)
    assert not (stub.parent / "argv").exists()
    assert console_text(dry).count("docker buildx ") == 2
    with pytest.raises(BuilderError):
        dry.ask("inspect")  # a call that only reads is made


def console_text(program: Buildx) -> str:
    assert isinstance(program.shown_on, BufferConsole)
    return program.shown_on.text


def test_program_has_no_terminal(stub: Path) -> None:
    log: list[bytes] = []
    script = "[ -t 2 ] && echo terminal >&2 || echo none >&2; [ -t 1 ] && echo out >&2; exit 3"
    with pytest.raises(BuilderError, match="none"):
        script_program(stub, script).stream("bake", output=log.append)
    assert b"".join(log).split() == [b"none"]


def test_error_is_found_among_terminal_sequences(stub: Path) -> None:
    script = (
        r"printf '\033[1A\033[K => one\n\033[31mERROR: target image: failed to solve: x: y\n' >&2"
    )
    with pytest.raises(BuilderError) as error:
        script_program(stub, f"{script}; exit 1").stream("bake", output=lambda _: None)
    assert str(error.value) == "x: y"


def test_long_log_is_streamed_completely(stub: Path) -> None:
    log: list[bytes] = []
    script = "yes 'a line of a log, a line of a log' | head -n 40000 >&2; echo 'ERROR: x' >&2"
    with pytest.raises(BuilderError, match=r"\Ax\Z"):
        script_program(stub, f"{script}; exit 1").stream("bake", output=log.append)
    assert b"".join(log).count(b"\n") == 40_001


def test_only_standard_error_is_streamed(stub: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log: list[bytes] = []
    script_program(stub, "echo an answer; echo a log >&2").stream("bake", output=log.append)
    assert log == [b"a log\n"]
    assert capfd.readouterr() == ("", "")


def test_killed_program_is_an_error(stub: Path) -> None:
    with pytest.raises(BuilderError, match="buildx gave no reason"):
        script_program(stub, "kill -9 $$").stream("bake", output=print)


def test_program_is_stopped_at_the_timeout(stub: Path) -> None:
    log: list[bytes] = []
    program = script_program(stub, "echo $$ >&2; exec sleep 60")
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        program.stream("bake", output=log.append, seconds=0.2)
    assert time.monotonic() - started < 10
    assert not is_alive(int(b"".join(log)))


def test_program_ignoring_the_signal_is_killed(stub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buildx, "_GRACE", 0.1)
    program = script_program(stub, "trap '' TERM; while :; do sleep 0.05; done")
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        program.stream("bake", output=print, seconds=0.1)
    assert time.monotonic() - started < 10


def test_program_within_the_timeout_is_not_stopped(stub: Path) -> None:
    script_program(stub, "exit 0").stream("bake", output=print, seconds=60)
    with pytest.raises(BuilderError, match="why"):
        script_program(stub, "echo why >&2; exit 1").stream("bake", output=print, seconds=60)


def test_missing_program_leaves_no_open_files(tmp_path: Path) -> None:
    missing = Buildx(str(tmp_path / "none"), {})
    for call in (
        lambda: missing.ask("ls"),
        lambda: missing.stream("bake", output=print),
    ):
        count = open_files()
        with pytest.raises(FileNotFoundError):
            call()
        assert open_files() == count


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# --- Comma-separated values -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("dest=/a b", "dest=/a b"),
        ("dest=/a,b", '"dest=/a,b"'),
        ('dest="a"', '"dest=""a"""'),
        ("env.A=1\n", '"env.A=1\n"'),
        ("", ""),
    ],
)
def test_field_is_quoted_if_necessary(field: str, expected: str) -> None:
    assert csv_field(field) == expected


@DETERMINISTIC
@given(st.lists(st.text("a,\"\n\r' =é", min_size=1), min_size=1, max_size=4))
def test_written_fields_are_read_back(fields: list[str]) -> None:
    line = ",".join(map(csv_field, fields))
    assert next(csv.reader(io.StringIO(line, newline=""), strict=True)) == fields


# --- Accounts -------------------------------------------------------------------------------

ACCOUNT = Credentials("me", "hunter2-€:x")
AUTH = base64.b64encode("me:hunter2-€:x".encode()).decode()
VERSION = "github.com/docker/buildx v{} 0123456"


def new_accounts(tmp_path: Path, **credentials: Credentials) -> Accounts:
    environment = {"DOCKER_CONFIG": str(tmp_path / "docker"), "PATH": os.environ["PATH"]}
    return Accounts(environment, credentials)


def test_account_is_in_the_environment_only(
    stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "tmp"
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    accounts = new_accounts(tmp_path, **{"a.example:5000": ACCOUNT, "docker.io": ACCOUNT})
    monkeypatch.setattr(buildx, "_run", partial(check_files_and_run, buildx._run, directory))
    build(stub, spec(accounts=accounts))
    environment = (stub.parent / "env").read_text()
    (line,) = re.findall("^DOCKER_AUTH_CONFIG=.*$", environment, re.MULTILINE)
    assert json.loads(line.partition("=")[2]) == {
        "auths": {
            "a.example:5000": {"auth": AUTH},
            "https://index.docker.io/v1/": {"auth": AUTH},
        }
    }
    assert "hunter2" not in "".join(argv(stub))
    assert AUTH not in "".join(argv(stub))
    assert not (tmp_path / "docker").exists()


def check_files_and_run(
    run: Callable[..., str | None], directory: Path, *arguments: object, **options: float
) -> str | None:
    """Run the program, and check that no temporary file contains a password meanwhile."""
    output = run(*arguments, **options)
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert files
    for file in files:
        assert AUTH not in file.read_text()
        assert "hunter2" not in file.read_text()
    return output


def test_environment_without_an_account_is_unchanged(stub: Path, tmp_path: Path) -> None:
    program = Buildx(str(stub), {"DOCKER_AUTH_CONFIG": "{odd"})
    assert with_accounts(program, new_accounts(tmp_path)) is program


def versioned_program(stub: Path, version: str, build_fails: str = "") -> Buildx:
    """Create a program that reports a version."""
    stub.write_text(
        f'#!/bin/sh\n[ "$1" = version ] && echo "{VERSION.format(version)}" && exit\n'
        f'echo "{build_fails}" >&2\nexit 1\n'
    )
    return Buildx(str(stub), {"PATH": os.environ["PATH"]})


@pytest.mark.parametrize(
    "version", ["0.26.0", "0.29.1+ds1", "1.0.0", "1.2.3-dev", f"0.{'9' * 5000}.0"]
)
def test_program_with_support_for_accounts_is_accepted(
    stub: Path, tmp_path: Path, version: str
) -> None:
    accounts = new_accounts(tmp_path, **{"a.example": ACCOUNT})
    with_accounts(versioned_program(stub, version), accounts, "a.example")


def test_program_without_support_for_accounts_is_rejected(stub: Path, tmp_path: Path) -> None:
    old = versioned_program(stub, "0.13.1+ds1")
    accounts = new_accounts(tmp_path, **{"a.example": ACCOUNT})
    with pytest.raises(BuilderError) as error:
        with_accounts(old, accounts, "a.example")
    assert str(error.value).startswith("cannot give buildx the account of a.example: buildx ")
    assert "`docker login`" in str(error.value)
    with_accounts(old, accounts, "b.example")
    # Every version reads the account that `docker login` writes.
    (tmp_path / "docker").mkdir()
    config = {"auths": {"a.example": {"auth": AUTH}}}
    (tmp_path / "docker" / "config.json").write_text(json.dumps(config))
    with_accounts(old, accounts, "a.example")


def test_failed_build_names_an_account_not_passed_to_buildx(stub: Path, tmp_path: Path) -> None:
    build_spec = spec(accounts=new_accounts(tmp_path, **{"a.example": ACCOUNT}))
    for version, is_named in (("0.13.1", True), ("0.26.0", False)):
        program = versioned_program(stub, version, "ERROR: pull access denied")
        with pytest.raises(BuilderError) as error:
            buildx.build(program, build_spec, print)
        assert ("does not read DOCKER_AUTH_CONFIG" in str(error.value)) is is_named


def test_program_without_a_version_is_accepted(stub: Path, tmp_path: Path) -> None:
    program = script_program(stub, "echo 'ERROR: unknown command: version' >&2; exit 1")
    with_accounts(program, new_accounts(tmp_path, **{"a.example": ACCOUNT}), "a.example")


# --- Builders -------------------------------------------------------------------------------

TWO_NODES = """Name:          insecure-builder
Driver:        docker-container
Last Activity: 2026-01-01 00:00:00 +0000 UTC

Nodes:
Name:                  insecure-builder0
Endpoint:              unix:///var/run/docker.sock
Driver Options:        env.A="say \\"x\\", it's = y" network="host"
Status:                running
BuildKit daemon flags: --allow-insecure-entitlement=security.insecure --debug
BuildKit version:      v0.26.0
Platforms:             linux/amd64*, linux/amd64/v2, linux/386
Features:
 Name:      not a node's
Labels:
 org.mobyproject.buildkit.worker.hostname: x
GC Policy rule#0:
 All:            false
 Keep Duration:  48h0m0s
File#buildkitd.toml:
 > Name: x
 > [worker]

Name:     insecure-builder1
Endpoint: ssh://me@b
Error:    cannot connect: dial tcp: lookup b: no such host
"""


def test_nodes_of_a_builder_are_parsed() -> None:
    builder = parse_builder(TWO_NODES)
    assert (builder.name, builder.driver) == ("insecure-builder", "docker-container")
    assert builder.nodes == (
        BuilderNode(
            name="insecure-builder0",
            endpoint="unix:///var/run/docker.sock",
            status="running",
            version="v0.26.0",
            flags=("--allow-insecure-entitlement=security.insecure", "--debug"),
            options={"env.A": 'say "x", it\'s = y', "network": "host"},
            platforms=("linux/amd64", "linux/amd64/v2", "linux/386"),
            fixed=("linux/amd64",),
        ),
        BuilderNode(
            name="insecure-builder1",
            endpoint="ssh://me@b",
            error="cannot connect: dial tcp: lookup b: no such host",
        ),
    )


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("", 0),
        ("Name: a\n\nNodes:\n", 0),
        ("Name: a\n\nNodes:\n\n\n", 0),
        ("Name: a\n\nNodes:\nName: b\nPlatforms: ,, \nno colon here\n: nothing\n", 1),
        ('Name: a\n\nNodes:\nName: b\nDriver Options: x="not closed\n', 1),
        ("Name: a\n\nNodes:\nName: b\nStatus: inactive\nName:\n", 2),
    ],
)
def test_incomplete_descriptions_are_parsed(text: str, nodes: int) -> None:
    builder = parse_builder(text)
    assert len(builder.nodes) == nodes
    assert not [node for node in builder.nodes if node.platforms or node.flags]


def test_error_of_a_builder_is_raised() -> None:
    with pytest.raises(BuilderError, match=r"^no daemon$"):
        parse_builder("Name: a\nDriver: b\nError: no daemon\n")


def test_builder_is_inspected_by_name(stub: Path) -> None:
    (stub.parent / "answer").write_text(TWO_NODES)
    program = script_program(stub, f"cat '{stub.parent}/answer'")
    builder = buildx.inspect(program, "insecure-builder")
    assert builder
    assert len(builder.nodes) == 2


def test_missing_builder_is_none_and_other_errors_are_raised(program: Buildx) -> None:
    missing = failing_program(program, 'ERROR: no builder "Mine" found\n')
    assert buildx.inspect(missing, "Mine") is None
    for log in ('ERROR: no builder "other" found\n', "ERROR: permission denied\n"):
        with pytest.raises(BuilderError):
            buildx.inspect(failing_program(program, log), "Mine")


def test_probe_checks_insecure_steps_without_a_build(program: Buildx, stub: Path) -> None:
    buildx.probe(program, "b", None)
    *words, directory = argv(stub)
    assert words == [
        "build", "--builder=b", "--call=check", "--allow=security.insecure", "--file=-",
    ]  # fmt: skip
    assert not Path(directory).exists()
    assert (stub.parent / "input").read_text() == buildx.PROBE
    buildx.probe(program, "b", "docker/dockerfile:1")
    assert "--build-arg=BUILDKIT_SYNTAX=docker/dockerfile:1" in argv(stub)


# --- Errors ---------------------------------------------------------------------------------

DIRECTORY = "/var/guix/guix-tasks"
STEP = f'process "{DIRECTORY}/entry-point.sh {DIRECTORY}/stage install" did not complete'


@pytest.mark.parametrize(
    ("message", "kind", "hint"),
    [
        ("granting entitlement security.insecure is not allowed by build daemon configuration",
         BuilderError, "run `inv buildx.setup`, which prints the fix"),
        ("security.insecure is not allowed", BuilderError, "`inv buildx.setup`, which prints"),
        ("granting entitlement network.host is not allowed by build daemon configuration",
         BuilderError, "does not allow steps on the host's network"),
        ("dockerfile parse error on line 2: unknown flag: --security (did you mean network?)",
         BuilderError, "set BUILDKIT_SYNTAX"),
        ('no builder "insecure-builder" found', BuilderError, "`inv buildx.setup` to create it"),
        ("Multi-platform build is not supported for the docker driver.", BuilderError,
         "one platform at a time: use another driver (BUILDX_DRIVER=docker-container)"),
        ("docker exporter does not currently support exporting multiple platforms",
         BuilderError, "one platform at a time"),
        ("Attestation is not supported for the docker driver.", BuilderError, "cannot do that"),
        ("Cache export is not supported for the docker driver.", BuilderError, "cannot do that"),
        ('exporter "oci" could not be found', BuilderError, "cannot do that"),
        ("OCI exporter is not supported for the docker driver.", BuilderError, "cannot do that"),
        ("exec /bin/sh: exec format error", BuilderError, "tonistiigi/binfmt --install ARCH`"),
        ("no match for platform in manifest: not found", BuilderError, "change PLATFORMS"),
        ("invalid driver option memroy for docker-container driver", BuilderError,
         "; correct BUILDX_NODES"),
        ("invalid duplicate endpoint tcp://a:1", BuilderError, "; correct BUILDX_NODES"),
        ("failed to push r/a:1: unexpected status: 403 Forbidden", RegistryError, "may write"),
        ("failed to push r/a:1: unexpected status from PUT: 413 Request Entity Too Large",
         RegistryError, "refuses uploads of this size: raise"),
        ("failed to push localhost:5055/a: dial tcp 127.0.0.1:5055: connect: connection refused",
         RegistryError, "`inv registry.up`"),
        ("failed to authorize: failed to fetch oauth token", RegistryError, "DOCKER_USERNAME"),
        ("server message: insufficient_scope: authorization failed", RegistryError, "`docker log"),
        ("push access denied, repository does not exist", RegistryError, "the registry refuses"),
        ("unexpected status from POST request: 401 Unauthorized", RegistryError, "may write to it"),
        ('failed to do request: Head "https://r/v2/": dial tcp: lookup r: no such host',
         RegistryError, "check that it runs"),
        ("failed to list workers: Unavailable: connection error", BuilderError, "BUILDX_NODES"),
        ("failed to initialize builder b (b0): x", BuilderError, "`inv buildx.status` shows"),
        ("dial tcp 10.0.0.1:1: i/o timeout", BuilderError, "fix BUILDX_DRIVER and"),
        ("Cannot connect to the Docker daemon at unix:///x", BuilderError, "the builder's node"),
        ("context deadline exceeded", BuilderError, "is unreachable"),
        ("local cache importer requires src", BuilderError, "fix BUILDX_CACHE_FROM"),
    ],
)  # fmt: skip
def test_known_error_is_reported_with_a_hint(
    message: str, kind: type[GuixTasksError], hint: str
) -> None:
    for given_spec in (None, spec()):
        log = f"#1 x\n\x1b[31mERROR: failed to solve: {message}\x1b[0m\n"
        error = diagnose.failure(log, given_spec)
        assert type(error) is kind
        assert str(error).startswith(f"{message}; ")
        assert hint in str(error)
        assert str(error).isprintable()


def test_every_hint_has_an_example() -> None:
    marks = test_known_error_is_reported_with_a_hint.pytestmark  # type: ignore[attr-defined]
    examples = "\n".join(message for mark in marks for message, _, _ in mark.args[1])
    for pattern, hint in diagnose._HINTS.items():
        assert re.search(pattern, examples, re.IGNORECASE), hint


def test_failed_command_of_guix_is_an_error_of_the_stage() -> None:
    for prefix in ("target reports: failed to solve: ", "failed to build: failed to solve: "):
        error = diagnose.failure(f"ERROR: {prefix}{STEP} successfully: exit code: 137\n", spec())
        assert type(error) is StageError
        message = "install: the command failed with exit status 137, and nothing"
        assert str(error).startswith(message)


def test_step_of_the_dockerfile_is_not_reported_as_a_stage() -> None:
    message = 'process "/bin/sh -c ./stage install" did not complete successfully: exit code: 2'
    error = diagnose.failure(f"ERROR: failed to solve: {message}\n", spec())
    assert type(error) is BuilderError
    assert str(error) == f"cannot build /d: {message}; see the output above"


def test_unknown_error_is_reported_unchanged() -> None:
    assert str(diagnose.failure("ERROR: a; b\n")) == "a; b"
    assert str(diagnose.failure("", spec())).startswith("cannot build /d: buildx gave no reason; ")


@pytest.mark.parametrize("words", diagnose.NO_BASE)
def test_unavailable_base_image_is_named_before_its_reason(words: str) -> None:
    reason = f"a/b:1: {words}: failed to do request: dial tcp: connection refused"
    error = diagnose.failure(f"ERROR: {reason}\n", spec(args={"BASE_IMAGE": "a/b:1"}))
    assert type(error) is BuilderError
    reason = reason.removeprefix("a/b:1: ")
    assert str(error).startswith(f"cannot get the base image a/b:1: {reason}; set BASE_IMAGE")


def test_reason_of_an_unavailable_base_image_is_short() -> None:
    reason = "dial tcp: lookup registry-1.docker.io on 127.0.0.53:53: no such host"
    log = (
        "ERROR: failed to solve: a/b:1: failed to resolve source metadata for docker.io/a/b:1: "
        f'failed to do request: Head "https://registry-1.docker.io/v2/a/b/manifests/1": {reason}\n'
    )
    error = diagnose.failure(log, spec(args={"BASE_IMAGE": "a/b:1"}))
    assert str(error).startswith(f"cannot get the base image a/b:1: {reason}; set BASE_IMAGE")


@pytest.mark.parametrize(
    ("message", "short", "is_transient"),
    [
        ('failed to resolve reference "a:503": a:503: not found', "not found", False),
        (
            'failed to resolve reference "a:503": failed to do request: Head "http://a": dial: x',
            "dial: x",
            False,
        ),
        (
            'unknown: failed to resolve reference "a:503": unexpected status: 502 Bad Gateway',
            "unexpected status: 502 Bad Gateway",
            True,
        ),
        (
            "failed to copy: httpReadSeeker: failed open: unexpected status: 502 Bad Gateway",
            "failed to copy: httpReadSeeker: failed open: unexpected status: 502 Bad Gateway",
            True,
        ),
        ("error from registry: rate limit", "error from registry: rate limit", True),
        (
            'Get "https://registry.test/v2/": dial tcp: lookup registry.test: no such host',
            'Get "https://registry.test/v2/": dial tcp: lookup registry.test: no such host',
            False,
        ),
    ],
)
def test_message_about_a_base_image_has_a_hint(
    message: str, short: str, is_transient: bool
) -> None:
    error = diagnose.build_error(spec(args={"BASE_IMAGE": "a:503"}), message)
    assert str(error).startswith(f"cannot get the base image a:503: {short}; set BASE_IMAGE")
    assert error.is_transient == is_transient


def test_local_base_image_needs_a_builder_with_oci_layouts() -> None:
    error = diagnose.failure("ERROR: unknown scheme oci-layout\n", spec(args={"BASE_IMAGE": "a:1"}))
    assert str(error).startswith("only the engine has a:1, and this builder cannot read an image")
