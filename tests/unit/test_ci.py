"""Foldable groups in the log of a CI job, which a build can neither close nor misuse."""

from __future__ import annotations

import io
import re
from contextlib import suppress

import pytest

from guix_tasks.errors import EngineError, StageError
from guix_tasks.ui import redact
from guix_tasks.ui.console import Console, Display

GITHUB = {"GITHUB_ACTIONS": "true", "CI": "true"}
GITLAB = {"GITLAB_CI": "true", "CI": "true"}


@pytest.fixture
def err() -> io.StringIO:
    return io.StringIO()


def enter_job(monkeypatch: pytest.MonkeyPatch, job: dict[str, str]) -> None:
    for name, value in job.items():
        monkeypatch.setenv(name, value)


def test_group_disables_commands_of_github(
    monkeypatch: pytest.MonkeyPatch, err: io.StringIO
) -> None:
    enter_job(monkeypatch, GITHUB)
    console = Console(err=err)
    with console.step("install") as step:
        step.log([b"::set-env name=PATH::/evil", b"::endgroup::", b"##[add-path]/evil"])
    console.print("install: done")
    start, stop, *lines, resume, end, message = err.getvalue().splitlines()
    token = stop.removeprefix("::stop-commands::")
    assert re.fullmatch("[0-9a-f]{32}", token)
    assert (start, resume, end, message) == (
        "::group::install", f"::{token}::", "::endgroup::", "install: done",
    )  # fmt: skip
    assert lines == ["::set-env name=PATH::/evil", "::endgroup::", "##[add-path]/evil"]


def test_each_group_has_a_unique_token(monkeypatch: pytest.MonkeyPatch, err: io.StringIO) -> None:
    enter_job(monkeypatch, GITHUB)
    for _ in range(2):
        with Console(err=err).step("x"):
            pass
    tokens = re.findall("::stop-commands::(.*)", err.getvalue())
    assert len({*tokens}) == 2


def test_gitlab_section_is_collapsed(monkeypatch: pytest.MonkeyPatch, err: io.StringIO) -> None:
    enter_job(monkeypatch, GITLAB)
    with Console(err=err).step("a stage/x") as step:
        step.log([b"a line"])
    match = re.fullmatch(
        r"section_start:(\d+):(a_stage_x_[0-9a-f]{8})\[collapsed=true\]\r\x1b\[0Ka stage/x\n"
        r"a line\n"
        r"section_end:(\d+):(\S+)\r\x1b\[0K\n",
        err.getvalue(),
    )
    assert match
    assert match[2] == match[4]
    assert int(match[3]) >= int(match[1])


@pytest.mark.parametrize("job", [GITHUB, GITLAB])
@pytest.mark.parametrize("error", [StageError("no\n::warning::x"), KeyboardInterrupt()])
def test_group_is_closed_before_the_error(
    monkeypatch: pytest.MonkeyPatch,
    err: io.StringIO,
    job: dict[str, str],
    error: BaseException,
) -> None:
    enter_job(monkeypatch, job)
    console = Console(err=err)
    with suppress(type(error)), console.step("install") as step:
        step.log([b"a line"])
        console.stream(b"no end")
        raise error
    assert re.search(r"no end\n(::[0-9a-f]{32}::\n::endgroup::\n|section_end\S+\r\x1b\[0K\n)\Z",
                     err.getvalue())  # fmt: skip
    console.error(str(error) or "stopped")
    lines = err.getvalue().splitlines()
    assert [line for line in lines if line.startswith("error: ")] == [
        f"error: {str(error) or 'stopped'}".replace("\n", r"\n")
    ]
    assert [line for line in lines if line.startswith("::error::")] == (
        [f"::error::{str(error) or 'stopped'}".replace("\n", r"\n")] if job is GITHUB else []
    )
    assert not any(line.startswith("::warning") for line in lines)


def test_annotation_is_redacted(monkeypatch: pytest.MonkeyPatch, err: io.StringIO) -> None:
    enter_job(monkeypatch, GITHUB)
    redact.add("hunter2")
    Console(err=err).error("100% of hunter2")
    assert err.getvalue() == "error: 100% of ***\n::error::100%25 of ***\n"


@pytest.mark.parametrize("display", [Display.QUIET, Display.LIVE])
def test_hidden_log_has_no_group(
    monkeypatch: pytest.MonkeyPatch, err: io.StringIO, display: Display
) -> None:
    enter_job(monkeypatch, GITHUB)
    with Console(err=err, display=display).step("x") as step:
        step.log([b"a line"])
    assert err.getvalue() == ""


def test_nested_step_has_no_group(monkeypatch: pytest.MonkeyPatch, err: io.StringIO) -> None:
    enter_job(monkeypatch, GITHUB)
    console = Console(err=err)
    with console.step("install") as outer, console.step("install") as inner:
        assert inner is outer
    assert err.getvalue().count("::group::") == 1


def test_group_is_only_used_in_a_job(err: io.StringIO) -> None:
    console = Console(err=err)
    with suppress(EngineError), console.step("x") as step:
        step.log([b"a line"])
        raise EngineError("gone")
    assert err.getvalue() == "a line\n"
