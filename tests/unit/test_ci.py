"""Parts of a CI job's log that can be folded, and that no build can close or misuse."""

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


def in_job(monkeypatch: pytest.MonkeyPatch, job: dict[str, str]) -> None:
    for name, value in job.items():
        monkeypatch.setenv(name, value)


def test_github_obeys_nothing_in_a_group(monkeypatch: pytest.MonkeyPatch, err: io.StringIO) -> None:
    in_job(monkeypatch, GITHUB)
    console = Console(err=err)
    with console.step("install") as step:
        step.log([b"::set-env name=PATH::/evil", b"::endgroup::", b"##[add-path]/evil"])
    console.print("install: done")
    start, stop, *foreign, go_on, end, said = err.getvalue().splitlines()
    word = stop.removeprefix("::stop-commands::")
    assert re.fullmatch("[0-9a-f]{32}", word)
    assert (start, go_on, end, said) == (
        "::group::install", f"::{word}::", "::endgroup::", "install: done",
    )  # fmt: skip
    assert foreign == ["::set-env name=PATH::/evil", "::endgroup::", "##[add-path]/evil"]


def test_each_group_has_a_word_of_its_own(
    monkeypatch: pytest.MonkeyPatch, err: io.StringIO
) -> None:
    in_job(monkeypatch, GITHUB)
    for _ in range(2):
        with Console(err=err).step("x"):
            pass
    words = re.findall("::stop-commands::(.*)", err.getvalue())
    assert len({*words}) == 2


def test_gitlab_has_a_closed_section(monkeypatch: pytest.MonkeyPatch, err: io.StringIO) -> None:
    in_job(monkeypatch, GITLAB)
    with Console(err=err).step("a stage/x") as step:
        step.log([b"a line"])
    found = re.fullmatch(
        r"section_start:(\d+):(a_stage_x_[0-9a-f]{8})\[collapsed=true\]\r\x1b\[0Ka stage/x\n"
        r"a line\n"
        r"section_end:(\d+):(\S+)\r\x1b\[0K\n",
        err.getvalue(),
    )
    assert found
    assert found[2] == found[4]
    assert int(found[3]) >= int(found[1])


@pytest.mark.parametrize("job", [GITHUB, GITLAB])
@pytest.mark.parametrize("error", [StageError("no\n::warning::x"), KeyboardInterrupt()])
def test_a_group_is_closed_before_the_error(
    monkeypatch: pytest.MonkeyPatch,
    err: io.StringIO,
    job: dict[str, str],
    error: BaseException,
) -> None:
    in_job(monkeypatch, job)
    console = Console(err=err)
    with suppress(type(error)), console.step("install") as step:
        step.log([b"a line"])
        console.stream(b"no end")
        raise error
    assert re.search(r"no end\n(::[0-9a-f]{32}::\n::endgroup::\n|section_end\S+\r\x1b\[0K\n)\Z",
                     err.getvalue())  # fmt: skip
    console.error(str(error) or "stopped")
    said = err.getvalue().splitlines()
    assert [each for each in said if each.startswith("error: ")] == [
        f"error: {str(error) or 'stopped'}".replace("\n", r"\n")
    ]
    assert [each for each in said if each.startswith("::error::")] == (
        [f"::error::{str(error) or 'stopped'}".replace("\n", r"\n")] if job is GITHUB else []
    )
    assert not any(each.startswith("::warning") for each in said)


def test_an_annotation_has_no_secret_and_no_escape(
    monkeypatch: pytest.MonkeyPatch, err: io.StringIO
) -> None:
    in_job(monkeypatch, GITHUB)
    redact.add("hunter2")
    Console(err=err).error("100% of hunter2")
    assert err.getvalue() == "error: 100% of ***\n::error::100%25 of ***\n"


@pytest.mark.parametrize("display", [Display.QUIET, Display.LIVE])
def test_where_no_log_is_shown_nothing_is_folded(
    monkeypatch: pytest.MonkeyPatch, err: io.StringIO, display: Display
) -> None:
    in_job(monkeypatch, GITHUB)
    with Console(err=err, display=display).step("x") as step:
        step.log([b"a line"])
    assert err.getvalue() == ""


def test_a_part_of_a_step_is_no_group_of_its_own(
    monkeypatch: pytest.MonkeyPatch, err: io.StringIO
) -> None:
    in_job(monkeypatch, GITHUB)
    console = Console(err=err)
    with console.step("install") as whole, console.step("install") as part:
        assert part is whole
    assert err.getvalue().count("::group::") == 1


def test_no_fold_outside_of_a_job(err: io.StringIO) -> None:
    console = Console(err=err)
    with suppress(EngineError), console.step("x") as step:
        step.log([b"a line"])
        raise EngineError("gone")
    assert err.getvalue() == "a line\n"
