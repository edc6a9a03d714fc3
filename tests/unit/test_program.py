"""What `./inv` and `guix-tasks` print of themselves."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from invoke.exceptions import Exit, ParseError
from invoke.program import Program
from invoke.tasks import task

from guix_tasks.program import GroupedProgram, completion_script
from guix_tasks.tasks import GROUPS, grouped, ns

if TYPE_CHECKING:
    from invoke.context import Context

WIDTH = 80
SUMMARY = 55  # what is left of a line of 80 columns beside the longest name


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("invoke.program.pty_size", lambda: (WIDTH, 24))


def said(capsys: pytest.CaptureFixture[str], *arguments: str, kind: type[Program]) -> str:
    kind(namespace=ns).run(["inv", *arguments], exit=False)
    return capsys.readouterr().out


def test_the_list_has_the_groups_in_their_order(capsys: pytest.CaptureFixture[str]) -> None:
    listed = said(capsys, "--list", kind=GroupedProgram)
    titles = re.findall(r"^(\w.*[^:\n])$", listed, re.MULTILINE)
    assert titles == [*GROUPS]
    names = re.findall(r"^  (\S+)", listed, re.MULTILINE)
    assert names == " ".join(GROUPS.values()).split()


@pytest.mark.parametrize("kind", [Program, GroupedProgram])
def test_no_line_of_the_list_is_wrapped(
    capsys: pytest.CaptureFixture[str], kind: type[Program]
) -> None:
    """That of Invoke's own `inv` neither."""
    listed = said(capsys, "--list", kind=kind)
    rows = [line for line in listed.splitlines() if line.startswith(" ")]
    assert len(rows) == len(ns.task_names)
    assert max(map(len, rows)) <= WIDTH


def test_summaries_are_short() -> None:
    long = {n: len(s) for n in ns.task_names if len(s := _summary(n)) > SUMMARY}
    assert long == {}


def _summary(name: str) -> str:
    return (ns[name].__doc__ or "").strip().splitlines()[0]


@pytest.mark.parametrize("name", sorted(ns.task_names))
def test_the_help_of_a_task_fits_on_a_terminal(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    shown = said(capsys, "--help", name, kind=GroupedProgram)
    assert _summary(name) in shown
    assert max(map(len, shown.splitlines())) <= WIDTH


def test_a_part_of_the_list_is_invokes_own(capsys: pytest.CaptureFixture[str]) -> None:
    listed = said(capsys, "--list", "buildx", kind=GroupedProgram)
    assert "Make an image" not in listed
    assert ".setup" in listed


def test_what_a_project_adds_comes_last() -> None:
    @task
    def deps(c: Context) -> None: ...

    groups = grouped([*ns.task_names, "deps"])
    assert groups[-1] == ("Of this project", ["deps"])
    assert grouped(["push", "deps", "base"]) == [
        ("Make an image", ["base", "push"]),
        ("Of this project", ["deps"]),
    ]


def test_a_completion_script_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ParseError, match="write one of: bash, fish, zsh"):
        completion_script("csh")
    with pytest.raises(Exit):
        GroupedProgram(namespace=ns).parse_core(["inv", "--print-completion-script=zsh"])
    assert "compdef _guix_tasks inv" in capsys.readouterr().out


def test_the_version_names_both(capsys: pytest.CaptureFixture[str]) -> None:
    shown = said(capsys, "--version", kind=GroupedProgram)
    assert re.fullmatch(r"guix-tasks\b.*\bInvoke 3\.\d+\.\d+\n", shown)
