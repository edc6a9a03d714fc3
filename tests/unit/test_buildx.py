"""The buildx command line, tried with a program that takes down how it is called."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

import pytest

from guix_tasks import buildx
from guix_tasks.engine import BuildSpec
from guix_tasks.errors import BuilderError

STUB = """#!/bin/sh
printf '%s\\0' "$@" >"$STUB/argv"
env >"$STUB/env"
for word; do case $word in --iidfile=*) answer=${word#*=} ;; esac; done
cat "$STUB/log" >&2
echo "not shown"
[ -n "$STATUS" ] && exit "$STATUS"
echo sha256:abc >"$answer"
"""


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    program = tmp_path / "docker-buildx"
    program.write_text(STUB)
    program.chmod(0o755)
    (tmp_path / "log").write_text("#1 one\n#2 two\n")
    return program


def spec(**more: object) -> BuildSpec:
    values: dict[str, object] = {"context": Path("/c d"), "dockerfile": Path("/d"), **more}
    return BuildSpec(**values)  # type: ignore[arg-type]


def build(stub: Path, spec: BuildSpec, status: str = "") -> tuple[str, list[bytes]]:
    log: list[bytes] = []
    environment = {"STUB": str(stub.parent), "STATUS": status, "PATH": os.environ["PATH"]}
    return buildx.build(str(stub), "default", spec, environment, log.append), log


def argv(stub: Path) -> list[str]:
    return (stub.parent / "argv").read_text().split("\0")[:-1]


def test_a_build_answers_the_image_and_shows_its_log(stub: Path) -> None:
    image, log = build(stub, spec(args={"A": "1 $x"}, platform="linux/arm64"))
    assert image == "sha256:abc"
    assert b"".join(log) == b"#1 one\n#2 two\n"
    words = argv(stub)
    assert words[:5] == ["build", "--builder=default", "--load", "--progress=plain",
                         "--provenance=false"]  # fmt: skip
    assert words[-4:] == ["--file=/d", "--build-arg=A=1 $x", "--platform=linux/arm64", "/c d"]
    assert not [word for word in words if word.startswith("--allow")]


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
        '/d does not build: process "/bin/sh" did not complete: exit code 3; '
        "the output above says more"
    )


@pytest.mark.parametrize(
    "why",
    ["x: failed to resolve source metadata for docker.io/a/b:1", "pull access denied for a/b"],
)
def test_a_base_image_that_is_not_to_be_had_is_named(stub: Path, why: str) -> None:
    (stub.parent / "log").write_text(f"ERROR: failed to solve: {why}\n")
    with pytest.raises(BuilderError) as caught:
        build(stub, spec(args={"BASE_IMAGE": "a/b:1"}), status="1")
    assert str(caught.value).startswith(f"cannot get the base image a/b:1: {why}; set BASE_IMAGE")
    assert "\n" not in str(caught.value)


def test_a_build_that_is_interrupted_is_stopped(stub: Path) -> None:
    stub.write_text("#!/bin/sh\necho $$ >&2\nexec sleep 60\n")
    seen: list[int] = []

    def output(line: bytes) -> None:
        seen.append(int(line))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        buildx.build(str(stub), "default", spec(), dict(os.environ), output)
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
    ],
)
def test_the_cause_is_one_line(log: str, cause: str) -> None:
    assert buildx.cause(log) == cause


# --- The program ----------------------------------------------------------------------------


class NoEngine:
    @staticmethod
    def buildx_path() -> Path | None:
        return None


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without buildx."""
    monkeypatch.setattr(buildx, "SYSTEM_PLUGINS", (str(tmp_path / "system"),))
    monkeypatch.setattr(buildx, "private_engine", NoEngine)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


def place(folder: Path, mode: int = 0o755) -> str:
    folder.mkdir(parents=True)
    program = folder / "docker-buildx"
    program.write_text("#!/bin/sh\n")
    program.chmod(mode)
    return str(program)


def test_there_is_none(bare: Path) -> None:
    assert buildx.find_program({}) is None


def test_it_is_where_the_docker_command_finds_it(bare: Path) -> None:
    """In this order: the user's folder, the system's, the private engine's, the path."""
    on_path = place(bare / "bin")
    assert buildx.find_program({}) == on_path
    system = place(bare / "system")
    assert buildx.find_program({}) == system
    home = place(bare / "home" / ".docker" / "cli-plugins")
    assert buildx.find_program({}) == home
    own = place(bare / "config" / "cli-plugins")
    assert buildx.find_program({"DOCKER_CONFIG": str(bare / "config")}) == own
    assert buildx.find_program({"DOCKER_CONFIG": ""}) == home


def test_the_private_engines_comes_before_the_path(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(bare / "bin")
    monkeypatch.setattr(NoEngine, "buildx_path", staticmethod(lambda: bare / "own"))
    assert buildx.find_program({}) == str(bare / "own")


def test_what_is_no_program_is_passed_over(bare: Path) -> None:
    place(bare / "system", mode=0o644)
    (bare / "home" / ".docker" / "cli-plugins").mkdir(parents=True)
    assert buildx.find_program({}) is None
