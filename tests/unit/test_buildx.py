"""The buildx command line, tried with a program that takes down how it is called."""

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
from fake_engine import STEADY, Heard
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


def spec(**more: object) -> BuildSpec:
    values: dict[str, object] = {"context": Path("/c d"), "dockerfile": Path("/d"), **more}
    return BuildSpec(**values)  # type: ignore[arg-type]


def build(stub: Path, spec: BuildSpec, status: str = "") -> tuple[str, list[bytes]]:
    log: list[bytes] = []
    environment = {"STUB": str(stub.parent), "STATUS": status, "PATH": os.environ["PATH"]}
    return buildx.build(Buildx(str(stub), environment), spec, log.append), log


def argv(stub: Path) -> list[str]:
    return (stub.parent / "argv").read_text().split("\0")[:-1]


def test_a_build_answers_the_image_and_shows_its_log(stub: Path) -> None:
    image, log = build(stub, spec(args={"A": "1 $x"}, platform="linux/arm64"))
    assert image == "sha256:abc"
    assert b"".join(log) == b"#1 one\n#2 two\n"
    words = argv(stub)
    output = "--output=type=docker,oci-mediatypes=true"
    assert words[:3] == ["build", "--builder=default", "--progress=plain"]
    assert words[3:5] == [output, "--provenance=false"]
    assert words[-4:] == ["--file=/d", "--build-arg=A=1 $x", "--platform=linux/arm64", "/c d"]
    assert not [word for word in words if word.startswith("--allow")]


def test_an_image_is_the_one_that_its_store_knows_not_its_configuration(stub: Path) -> None:
    known = {"containerimage.config.digest": "sha256:c", "containerimage.digest": "sha256:m"}
    (stub.parent / "metadata").write_text(json.dumps(known))
    assert build(stub, spec())[0] == "sha256:m"
    (stub.parent / "metadata").write_text("{}")
    with pytest.raises(BuilderError, match="the builder reported no image"):
        build(stub, spec())


def test_layers_are_compressed_if_the_base_is_not(stub: Path) -> None:
    environment = {"STUB": str(stub.parent), "PATH": os.environ["PATH"]}
    buildx.build(Buildx(str(stub), environment), spec(), print, compress=True)
    assert (
        "--output=type=docker,oci-mediatypes=true,compression=gzip,force-compression=true"
        in argv(stub)
    )


def test_the_hosts_network_is_allowed_where_it_is_asked_for(stub: Path) -> None:
    build(stub, spec(network="host"))
    assert "--allow=network.host" in argv(stub)
    build(stub, spec(network="none"))
    assert "--allow=network.host" not in argv(stub)


def test_secrets_are_named_and_not_shown(stub: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hunter2")
    build(stub, spec(secrets={"token": tmp_path / "token"}))
    assert f"--secret=id=token,src={tmp_path}/token" in argv(stub)
    assert "hunter2" not in "".join(argv(stub)) + (tmp_path / "env").read_text()


def test_an_argument_that_is_secret_is_not_on_the_command_line(stub: Path) -> None:
    """Every user of the machine sees those."""
    arguments = {"TOKEN": "hunter2 x", "https_proxy": "http://me:hunter2@proxy.test", "A": "1"}
    build(stub, spec(args=arguments))
    assert "hunter2" not in "".join(argv(stub))
    assert {"--build-arg=TOKEN", "--build-arg=https_proxy", "--build-arg=A=1"} < set(argv(stub))
    environment = (stub.parent / "env").read_text()
    assert "TOKEN=hunter2 x\n" in environment
    assert "https_proxy=http://me:hunter2@proxy.test\n" in environment


def test_proxies_are_arguments_whose_values_are_in_the_environment(stub: Path) -> None:
    proxies = {"http_proxy": "http://proxy.test", "no_proxy": "a,b"}
    build(stub, spec(proxies=proxies))
    assert {"--build-arg=http_proxy", "--build-arg=no_proxy"} < set(argv(stub))
    assert "http_proxy=http://proxy.test\n" in (stub.parent / "env").read_text()


def test_it_has_the_environment_that_it_is_given(
    stub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUILDX_BUILDER", "mine")
    build(stub, spec())
    assert "BUILDX_BUILDER" not in (stub.parent / "env").read_text()


def test_a_build_that_fails_says_why(stub: Path) -> None:
    (stub.parent / "log").write_text(
        "#5 ERROR: process did not complete\n------\n"
        'ERROR: failed to build: failed to solve: process "/bin/sh" did not complete: exit code 3\n'
    )
    with pytest.raises(BuilderError) as caught:
        build(stub, spec(), status="1")
    assert str(caught.value) == (
        'cannot build /d: process "/bin/sh" did not complete: exit code 3; see the output above'
    )


def test_a_build_on_a_full_disk_has_a_hint(stub: Path) -> None:
    (stub.parent / "log").write_text("ERROR: failed to solve: x: no space left on device\n")
    with pytest.raises(BuilderError) as caught:
        build(stub, spec(), status="1")
    assert str(caught.value) == f"cannot build /d: x: no space left on device; {FULL_DISK}"


@pytest.mark.parametrize(
    "why",
    ["x: failed to resolve source metadata for docker.io/a/b:1", "pull access denied for a/b"],
)
def test_unavailable_base_image_is_named(stub: Path, why: str) -> None:
    (stub.parent / "log").write_text(f"ERROR: failed to solve: {why}\n")
    with pytest.raises(BuilderError) as caught:
        build(stub, spec(args={"BASE_IMAGE": "a/b:1"}), status="1")
    assert str(caught.value).startswith(f"cannot get the base image a/b:1: {why}; set BASE_IMAGE")
    assert "\n" not in str(caught.value)


def test_name_that_is_not_utf8_is_explained(stub: Path) -> None:
    why = "grpc: failed to unmarshal the received message: string field contains invalid UTF-8"
    (stub.parent / "log").write_text(f"ERROR: failed to solve: Internal: {why}\n")
    with pytest.raises(BuilderError, match=r"^a name in BUILD_CONTEXT is not UTF-8, ") as caught:
        build(stub, spec(), status="1")
    assert str(caught.value).endswith("; rename the file, or list it in .dockerignore")


def test_a_build_that_is_interrupted_is_stopped(stub: Path) -> None:
    stub.write_text("#!/bin/sh\necho $$ >&2\nexec sleep 60\n")
    seen: list[int] = []

    def output(line: bytes) -> None:
        seen.append(int(line))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        buildx.build(Buildx(str(stub), dict(os.environ)), spec(), output)
    end = time.monotonic() + 5
    while is_alive(seen[0]) and time.monotonic() < end:
        time.sleep(0.01)
    assert not is_alive(seen[0])


def is_alive(pid: int) -> bool:
    """Whether a process is there, and not only waited for by nobody."""
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_build_without_an_answer_is_an_error(stub: Path) -> None:
    stub.write_text("#!/bin/sh\nexit 0\n")
    with pytest.raises(BuilderError):
        build(stub, spec())


@pytest.mark.parametrize(
    ("log", "cause"),
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
def test_the_cause_is_one_line(log: str, cause: str) -> None:
    assert diagnose.cause(log) == cause


# --- The program ----------------------------------------------------------------------------


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without buildx."""
    monkeypatch.setattr(buildx, "SYSTEM_PLUGINS", (str(tmp_path / "system"),))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


def place(directory: Path, mode: int = 0o755) -> str:
    directory.mkdir(parents=True)
    program = directory / "docker-buildx"
    program.write_text("#!/bin/sh\n")
    program.chmod(mode)
    return str(program)


def test_there_is_none(bare: Path) -> None:
    assert buildx.find_program({}) is None


def test_it_is_where_the_docker_command_finds_it(bare: Path) -> None:
    """In this order: the user's directory, the system's, the private engine's, the path."""
    on_path = place(bare / "bin")
    assert buildx.find_program({}) == on_path
    system = place(bare / "system")
    assert buildx.find_program({}) == system
    home = place(bare / "home" / ".docker" / "cli-plugins")
    assert buildx.find_program({}) == home
    own = place(bare / "config" / "cli-plugins")
    assert buildx.find_program({"DOCKER_CONFIG": str(bare / "config")}) == own
    assert buildx.find_program({"DOCKER_CONFIG": ""}) == home


def test_the_private_engines_comes_before_the_path(bare: Path) -> None:
    place(bare / "bin")
    assert buildx.find_program({}, bare / "own") == str(bare / "own")


def test_what_is_no_program_is_passed_over(bare: Path) -> None:
    place(bare / "system", mode=0o644)
    (bare / "home" / ".docker" / "cli-plugins").mkdir(parents=True)
    assert buildx.find_program({}) is None


# --- Calls ----------------------------------------------------------------------------------

CALLED = """#!/bin/sh
printf '%s\\0' "$@" >"$STUB/argv"
env >"$STUB/env"
cat >"$STUB/input"
printf 'an \\377 answer\\n'
cat "$STUB/log" >&2
exit "${STATUS:-0}"
"""


@pytest.fixture
def program(stub: Path) -> Buildx:
    stub.write_text(CALLED)
    return Buildx(str(stub), {"STUB": str(stub.parent), "PATH": os.environ["PATH"]})


def failing(program: Buildx, log: str) -> Buildx:
    Path(program.environment["STUB"], "log").write_text(log)
    return replace(program, environment={**program.environment, "STATUS": "1"})


def saying(stub: Path, script: str) -> Buildx:
    """A program that does what a script says."""
    stub.write_text(f"#!/bin/sh\n{script}\n")
    return Buildx(str(stub), {"PATH": os.environ["PATH"]})


def test_what_is_asked_is_answered_by_standard_output_alone(program: Buildx, stub: Path) -> None:
    words = ["inspect", "a b", "", "ü", "$x", "--", "a\nb"]
    assert program.ask(*words, text="FROM x\n") == "an \ufffd answer\n"
    assert argv(stub) == words
    assert (stub.parent / "input").read_text() == "FROM x\n"
    assert program.ask("ls")
    assert (stub.parent / "input").read_text() == ""


def test_a_call_has_no_environment_but_its_own(
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


def test_a_call_that_fails_says_why(program: Buildx) -> None:
    broken = failing(program, "WARNING: x\nERROR: unknown flag: --wat\n")
    log: list[bytes] = []
    for call in (
        lambda: broken.ask("ls"),
        lambda: broken.change("use", "x"),
        lambda: broken.stream("bake", output=log.append),
    ):
        with pytest.raises(BuilderError) as caught:
            call()
        assert str(caught.value) == "unknown flag: --wat"
    assert b"".join(log) == b"WARNING: x\nERROR: unknown flag: --wat\n"


def test_what_changes_something_is_shown_and_what_asks_is_not(program: Buildx) -> None:
    shown = replace(program, shown_on=Heard())
    shown.ask("inspect", "x")
    assert heard(shown) == ""
    assert shown.change("create", "--name=a b") == "an \ufffd answer\n"
    shown.stream("bake", "--file=x", output=print)
    assert "docker buildx create '--name=a b'\n" in heard(shown)
    assert "docker buildx bake --file=x\n" in heard(shown)


def test_a_dry_run_shows_and_does_not_do(program: Buildx, stub: Path) -> None:
    dry = replace(failing(program, "ERROR: x\n"), shown_on=Heard(), perform=False)
    assert dry.change("rm", "x") == ""
    dry.stream("bake", output=print, seconds=0.001)
    assert not (stub.parent / "argv").exists()
    assert heard(dry).count("docker buildx ") == 2
    with pytest.raises(BuilderError):
        dry.ask("inspect")  # nothing but what changes something is left out


def heard(program: Buildx) -> str:
    assert isinstance(program.shown_on, Heard)
    return program.shown_on.text


def test_the_program_draws_on_no_terminal(stub: Path) -> None:
    log: list[bytes] = []
    script = "[ -t 2 ] && echo terminal >&2 || echo none >&2; [ -t 1 ] && echo out >&2; exit 3"
    with pytest.raises(BuilderError, match="none"):
        saying(stub, script).stream("bake", output=log.append)
    assert b"".join(log).split() == [b"none"]


def test_what_is_drawn_is_also_looked_at_for_the_error(stub: Path) -> None:
    script = (
        r"printf '\033[1A\033[K => one\n\033[31mERROR: target image: failed to solve: x: y\n' >&2"
    )
    with pytest.raises(BuilderError) as caught:
        saying(stub, f"{script}; exit 1").stream("bake", output=lambda _: None)
    assert str(caught.value) == "x: y"


def test_a_long_log_is_shown_whole_and_ends_in_its_error(stub: Path) -> None:
    log: list[bytes] = []
    script = "yes 'a line of a log, a line of a log' | head -n 40000 >&2; echo 'ERROR: x' >&2"
    with pytest.raises(BuilderError, match=r"\Ax\Z"):
        saying(stub, f"{script}; exit 1").stream("bake", output=log.append)
    assert b"".join(log).count(b"\n") == 40_001


def test_only_the_log_is_shown(stub: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log: list[bytes] = []
    saying(stub, "echo an answer; echo a log >&2").stream("bake", output=log.append)
    assert log == [b"a log\n"]
    assert capfd.readouterr() == ("", "")


def test_a_program_that_is_killed_has_not_succeeded(stub: Path) -> None:
    with pytest.raises(BuilderError, match="buildx gave no reason"):
        saying(stub, "kill -9 $$").stream("bake", output=print)


def test_what_takes_too_long_is_stopped(stub: Path) -> None:
    seen: list[bytes] = []
    program = saying(stub, "echo $$ >&2; exec sleep 60")
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        program.stream("bake", output=seen.append, seconds=0.2)
    assert time.monotonic() - started < 10
    assert not is_alive(int(b"".join(seen)))


def test_what_does_not_let_itself_be_stopped_is_killed(
    stub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buildx, "_GRACE", 0.1)
    program = saying(stub, "trap '' TERM; while :; do sleep 0.05; done")
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        program.stream("bake", output=print, seconds=0.1)
    assert time.monotonic() - started < 10


def test_what_is_done_in_time_is_no_failure(stub: Path) -> None:
    saying(stub, "exit 0").stream("bake", output=print, seconds=60)
    with pytest.raises(BuilderError, match="why"):
        saying(stub, "echo why >&2; exit 1").stream("bake", output=print, seconds=60)


def test_a_program_that_is_not_there_is_an_error_of_the_system(tmp_path: Path) -> None:
    gone = Buildx(str(tmp_path / "none"), {})
    for call in (
        lambda: gone.ask("ls"),
        lambda: gone.stream("bake", output=print),
    ):
        before = open_files()
        with pytest.raises(FileNotFoundError):
            call()
        assert open_files() == before


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
def test_a_field_is_quoted_where_it_must_be(field: str, expected: str) -> None:
    assert csv_field(field) == expected


@STEADY
@given(st.lists(st.text("a,\"\n\r' =é", min_size=1), min_size=1, max_size=4))
def test_fields_are_read_as_they_were_written(fields: list[str]) -> None:
    line = ",".join(map(csv_field, fields))
    assert next(csv.reader(io.StringIO(line, newline=""), strict=True)) == fields


# --- Accounts -------------------------------------------------------------------------------

ACCOUNT = Credentials("me", "hunter2-€:x")
CODED = base64.b64encode("me:hunter2-€:x".encode()).decode()
VERSION = "github.com/docker/buildx v{} 0123456"


def accounts(tmp_path: Path, **given: Credentials) -> Accounts:
    return Accounts({"DOCKER_CONFIG": str(tmp_path / "docker"), "PATH": os.environ["PATH"]}, given)


def test_an_account_is_in_the_environment_and_in_no_file(
    stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "tmp"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    given = accounts(tmp_path, **{"a.example:5000": ACCOUNT, "docker.io": ACCOUNT})
    monkeypatch.setattr(buildx, "_run", partial(ran, buildx._run, place))
    build(stub, spec(accounts=given))
    environment = (stub.parent / "env").read_text()
    (line,) = [each for each in environment.splitlines() if each.startswith("DOCKER_AUTH_CONFIG=")]
    assert json.loads(line.partition("=")[2]) == {
        "auths": {
            "a.example:5000": {"auth": CODED},
            "https://index.docker.io/v1/": {"auth": CODED},
        }
    }
    assert "hunter2" not in "".join(argv(stub))
    assert CODED not in "".join(argv(stub))
    assert not (tmp_path / "docker").exists()


def ran(
    run: Callable[..., str | None], place: Path, *arguments: object, **options: float
) -> str | None:
    """Run the program, and see that no file of ours holds a password meanwhile."""
    answer = run(*arguments, **options)
    files = [each for each in place.rglob("*") if each.is_file()]
    assert files
    for file in files:
        assert CODED not in file.read_text()
        assert "hunter2" not in file.read_text()
    return answer


def test_without_an_account_the_environment_is_left_as_it_is(stub: Path, tmp_path: Path) -> None:
    program = Buildx(str(stub), {"DOCKER_AUTH_CONFIG": "{odd"})
    assert with_accounts(program, accounts(tmp_path)) is program


def answering(stub: Path, version: str, build_fails: str = "") -> Buildx:
    """A program of a version."""
    stub.write_text(
        f'#!/bin/sh\n[ "$1" = version ] && echo "{VERSION.format(version)}" && exit\n'
        f'echo "{build_fails}" >&2\nexit 1\n'
    )
    return Buildx(str(stub), {"PATH": os.environ["PATH"]})


@pytest.mark.parametrize(
    "version", ["0.26.0", "0.29.1+ds1", "1.0.0", "1.2.3-dev", f"0.{'9' * 5000}.0"]
)
def test_a_program_that_reads_accounts_is_not_refused(
    stub: Path, tmp_path: Path, version: str
) -> None:
    given = accounts(tmp_path, **{"a.example": ACCOUNT})
    with_accounts(answering(stub, version), given, "a.example")


def test_a_program_that_reads_no_accounts_is_refused_where_one_is_needed(
    stub: Path, tmp_path: Path
) -> None:
    given, old = accounts(tmp_path, **{"a.example": ACCOUNT}), answering(stub, "0.13.1+ds1")
    with pytest.raises(BuilderError) as caught:
        with_accounts(old, given, "a.example")
    assert str(caught.value).startswith("cannot give buildx the account of a.example: buildx ")
    assert "`docker login`" in str(caught.value)
    with_accounts(old, given, "b.example")
    # `docker login` has written one where every version reads it.
    (tmp_path / "docker").mkdir()
    config = {"auths": {"a.example": {"auth": CODED}}}
    (tmp_path / "docker" / "config.json").write_text(json.dumps(config))
    with_accounts(old, given, "a.example")


def test_a_build_that_fails_names_the_account_that_an_old_program_did_not_get(
    stub: Path, tmp_path: Path
) -> None:
    given = spec(accounts=accounts(tmp_path, **{"a.example": ACCOUNT}))
    for version, told in (("0.13.1", True), ("0.26.0", False)):
        program = answering(stub, version, "ERROR: pull access denied")
        with pytest.raises(BuilderError) as caught:
            buildx.build(program, given, print)
        assert ("does not read DOCKER_AUTH_CONFIG" in str(caught.value)) is told


def test_program_without_a_version_is_not_refused(stub: Path, tmp_path: Path) -> None:
    program = saying(stub, "echo 'ERROR: unknown command: version' >&2; exit 1")
    with_accounts(program, accounts(tmp_path, **{"a.example": ACCOUNT}), "a.example")


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


def test_each_node_of_a_builder_is_read() -> None:
    found = parse_builder(TWO_NODES)
    assert (found.name, found.driver) == ("insecure-builder", "docker-container")
    assert found.nodes == (
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
def test_odd_answers_are_read_too(text: str, nodes: int) -> None:
    found = parse_builder(text)
    assert len(found.nodes) == nodes
    assert not [node for node in found.nodes if node.platforms or node.flags]


def test_error_of_a_builder_is_raised() -> None:
    with pytest.raises(BuilderError, match=r"^no daemon$"):
        parse_builder("Name: a\nDriver: b\nError: no daemon\n")


def test_a_builder_is_looked_up_by_name(stub: Path) -> None:
    (stub.parent / "answer").write_text(TWO_NODES)
    found = buildx.inspect(saying(stub, f"cat '{stub.parent}/answer'"), "insecure-builder")
    assert found
    assert len(found.nodes) == 2


def test_a_builder_that_is_not_there_is_none_and_any_other_error_is_one(program: Buildx) -> None:
    none = failing(program, 'ERROR: no builder "Mine" found\n')
    assert buildx.inspect(none, "Mine") is None
    for log in ('ERROR: no builder "other" found\n', "ERROR: permission denied\n"):
        with pytest.raises(BuilderError):
            buildx.inspect(failing(program, log), "Mine")


def test_a_builder_is_asked_for_insecure_steps_without_a_build(program: Buildx, stub: Path) -> None:
    buildx.probe(program, "b", None)
    *words, directory = argv(stub)
    assert words == [
        "build", "--builder=b", "--call=check", "--allow=security.insecure", "--file=-",
    ]  # fmt: skip
    assert not Path(directory).exists()
    assert (stub.parent / "input").read_text() == buildx.PROBE
    buildx.probe(program, "b", "docker/dockerfile:1")
    assert "--build-arg=BUILDKIT_SYNTAX=docker/dockerfile:1" in argv(stub)


# --- What goes wrong ------------------------------------------------------------------------

FOLDER = "/var/guix/guix-tasks"
STEP = f'process "{FOLDER}/entry-point.sh {FOLDER}/stage install" did not complete'


@pytest.mark.parametrize(
    ("why", "kind", "hint"),
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
    why: str, kind: type[GuixTasksError], hint: str
) -> None:
    for given_spec in (None, spec()):
        told = diagnose.failure(f"#1 x\n\x1b[31mERROR: failed to solve: {why}\x1b[0m\n", given_spec)
        assert type(told) is kind
        assert str(told).startswith(f"{why}; ")
        assert hint in str(told)
        assert str(told).isprintable()


def test_every_row_of_the_table_has_been_tried() -> None:
    marks = test_known_error_is_reported_with_a_hint.pytestmark  # type: ignore[attr-defined]
    tried = "\n".join(f"{each}" for mark in marks for each, _, _ in mark.args[1])
    for pattern, hint in diagnose._HINTS.items():
        assert re.search(pattern, tried, re.IGNORECASE), hint


def test_a_command_of_guix_that_fails_is_the_stages_error() -> None:
    for before in ("target reports: failed to solve: ", "failed to build: failed to solve: "):
        told = diagnose.failure(f"ERROR: {before}{STEP} successfully: exit code: 137\n", spec())
        assert type(told) is StageError
        assert str(told).startswith("install: the command failed with exit status 137, and nothing")


def test_a_step_of_the_users_dockerfile_is_not_a_stage() -> None:
    why = 'process "/bin/sh -c ./stage install" did not complete successfully: exit code: 2'
    told = diagnose.failure(f"ERROR: failed to solve: {why}\n", spec())
    assert type(told) is BuilderError
    assert str(told) == f"cannot build /d: {why}; see the output above"


def test_an_unknown_fault_is_told_as_it_is() -> None:
    assert str(diagnose.failure("ERROR: a; b\n")) == "a; b"
    assert str(diagnose.failure("", spec())).startswith("cannot build /d: buildx gave no reason; ")


@pytest.mark.parametrize("words", diagnose.NO_BASE)
def test_a_base_image_out_of_reach_comes_before_its_cause(words: str) -> None:
    why = f"a/b:1: {words}: failed to do request: dial tcp: connection refused"
    told = diagnose.failure(f"ERROR: {why}\n", spec(args={"BASE_IMAGE": "a/b:1"}))
    assert type(told) is BuilderError
    why = why.removeprefix("a/b:1: ")
    assert str(told).startswith(f"cannot get the base image a/b:1: {why}; set BASE_IMAGE")


def test_why_a_base_image_is_out_of_reach_is_told_once_and_short() -> None:
    why = "dial tcp: lookup registry-1.docker.io on 127.0.0.53:53: no such host"
    log = (
        "ERROR: failed to solve: a/b:1: failed to resolve source metadata for docker.io/a/b:1: "
        f'failed to do request: Head "https://registry-1.docker.io/v2/a/b/manifests/1": {why}\n'
    )
    told = diagnose.failure(log, spec(args={"BASE_IMAGE": "a/b:1"}))
    assert str(told).startswith(f"cannot get the base image a/b:1: {why}; set BASE_IMAGE")


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
    ],
)
def test_messages_of_the_containerd_store_about_a_base_image(
    message: str, short: str, is_transient: bool
) -> None:
    error = diagnose.build_error(spec(args={"BASE_IMAGE": "a:503"}), message)
    assert str(error).startswith(f"cannot get the base image a:503: {short}; set BASE_IMAGE")
    assert error.is_transient == is_transient


def test_an_image_that_no_builder_can_be_handed_is_to_be_pushed() -> None:
    told = diagnose.failure("ERROR: unknown scheme oci-layout\n", spec(args={"BASE_IMAGE": "a:1"}))
    assert str(told).startswith("only the engine has a:1, and this builder cannot read an image")
