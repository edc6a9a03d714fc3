"""Lists, help and errors of the commands `./inv` and `guix-tasks`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from invoke.exceptions import Exit
from invoke.program import Program
from invoke.tasks import task

from guix_tasks.cli.program import GroupedProgram, main
from guix_tasks.cli.tasks import GROUPS, grouped
from guix_tasks.tasks import ns

if TYPE_CHECKING:
    from pathlib import Path

    from invoke.context import Context

WIDTH = 80
SUMMARY_WIDTH = 55  # the rest of a line of 80 columns after the longest name


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("invoke.program.pty_size", lambda: (WIDTH, 24))


Call = Callable[..., tuple[object, str, str]]


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Call:
    """Function that runs ``guix-tasks`` in a directory and returns exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def call(*arguments: str) -> tuple[object, str, str]:
        monkeypatch.setitem(sys.modules, "tasks", None)
        monkeypatch.setattr(sys, "argv", ["guix-tasks", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code, *capsys.readouterr()

    return call


def test_deleted_current_directory_is_an_error(call: Call, tmp_path: Path) -> None:
    tmp_path.rmdir()
    code, _, error = call("--list")
    tmp_path.mkdir()
    assert code == 2
    assert error == "error: the current directory was deleted; change to another one\n"


def run_program(capsys: pytest.CaptureFixture[str], *arguments: str, kind: type[Program]) -> str:
    kind(namespace=ns).run(["inv", *arguments], exit=False)
    return capsys.readouterr().out


def test_list_has_the_groups_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    output = run_program(capsys, "--list", kind=GroupedProgram)
    titles = re.findall(r"^(\w.*[^:\n])$", output, re.MULTILINE)
    assert titles == [*GROUPS]
    names = re.findall(r"^  (\S+)", output, re.MULTILINE)
    assert names == " ".join(GROUPS.values()).split()


@pytest.mark.parametrize("kind", [Program, GroupedProgram])
def test_lines_of_the_list_are_not_wrapped(
    capsys: pytest.CaptureFixture[str], kind: type[Program]
) -> None:
    """The list of Invoke's own `inv` is not wrapped either."""
    output = run_program(capsys, "--list", kind=kind)
    rows = [line for line in output.splitlines() if line.startswith(" ")]
    assert len(rows) == len(ns.task_names)
    assert max(map(len, rows)) <= WIDTH


def test_summaries_are_short() -> None:
    long = {n: len(s) for n in ns.task_names if len(s := _summary(n)) > SUMMARY_WIDTH}
    assert long == {}


def _summary(name: str) -> str:
    return (ns[name].__doc__ or "").strip().splitlines()[0]


@pytest.mark.parametrize("name", sorted(ns.task_names))
def test_help_of_a_task_fits_on_a_terminal(capsys: pytest.CaptureFixture[str], name: str) -> None:
    output = run_program(capsys, "--help", name, kind=GroupedProgram)
    assert _summary(name) in output
    assert max(map(len, output.splitlines())) <= WIDTH


def test_part_of_the_list_is_that_of_invoke(capsys: pytest.CaptureFixture[str]) -> None:
    output = run_program(capsys, "--list", "buildx", kind=GroupedProgram)
    assert "Build an image" not in output
    assert ".setup" in output


def test_tasks_of_the_project_are_last() -> None:
    @task
    def deps(c: Context) -> None: ...

    groups = grouped([*ns.task_names, "deps"])
    assert groups[-1] == ("Tasks of this project", ["deps"])
    assert grouped(["push", "deps", "base"]) == [
        ("Build an image", ["base", "push"]),
        ("Tasks of this project", ["deps"]),
    ]


def test_completion_script_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Exit):
        GroupedProgram(namespace=ns).parse_core(["inv", "--print-completion-script=zsh"])
    assert "compdef _guix_tasks inv" in capsys.readouterr().out


def test_version_names_guix_tasks_and_invoke(capsys: pytest.CaptureFixture[str]) -> None:
    output = run_program(capsys, "--version", kind=GroupedProgram)
    assert re.fullmatch(r"guix-tasks\b.*\bInvoke 3\.\d+\.\d+\n", output)


def run_failing(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str]:
    """Return the exit status and the standard error of a call."""
    with pytest.raises(SystemExit) as caught:
        GroupedProgram(namespace=ns, binary="inv").run(["inv", *arguments])
    return caught.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("pack --max-layers=many", "--max-layers: 'many' is not a whole number"),
        ("registry.up --port abc", "--port: 'abc' is not a whole number"),
        ("--command-timeout=soon status", "--command-timeout: 'soon' is not a whole number"),
        ("instal", "there is no task 'instal'; did you mean install? `inv --list` lists all"),
        ("--help instal", "there is no task 'instal'; did you mean install? `inv --list` "),
        ("xyzzy", "there is no task 'xyzzy'; `inv --list` lists all"),
        ("install --forse", "install has no option --forse; did you mean --force? `inv --help i"),
        ("install --packag=x", "install has no option --packag; did you mean --package? "),
        ("--dri install", "there is no option --dri; did you mean --dry? `inv --help` lists all"),
        ("run hello", "write the command after two dashes: `inv run -- hello`"),
        ("run --keep hello --traditional", "two dashes: `inv run -- hello`"),
        ("run --kep", "run has no option --kep; did you mean --keep? "),
        ("push --stage", "--stage needs a value"),
        ("install --package", "--package needs a value"),
        ("install --package=tar pull --package", "pull has no option --package;"),
        ("install --package=tar --package", "--package needs a value"),
        ("pack --max-layers", "--max-layers needs a value"),
        ("--list nope", "'nope' not found"),
        ("--print-completion-script=csh", "no completion for csh; use one of: bash, fish, zsh"),
    ],
)  # fmt: skip
def test_invalid_arguments_are_reported_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: str, words: str
) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///no/engine.sock")  # no call connects to an engine
    code, errors = run_failing(capsys, *arguments.split())
    assert code == 2
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert words in errors


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("from guix_tasks.tasks import ns\nx = (\n", "tasks.py, line 2"),
        ("from guix_tasks.tasks import nss\n", "cannot import name 'nss'"),
        ("from guix_tasks.tasks import ns\nns.add_collection(ns, 'pack')\n", "'pack'"),
        ("import nowhere_at_all  # and guix_tasks\n", "No module named 'nowhere_at_all'"),
    ],
)
def test_error_in_tasks_py_is_reported_in_one_line(
    call: Call, tmp_path: Path, text: str, words: str
) -> None:
    (tmp_path / "tasks.py").write_text(text)
    code, _, errors = call("status")
    assert code == 2
    assert errors.startswith("error: tasks.py: ")
    assert errors.count("\n") == 1
    assert words in errors


def test_missing_collection_has_a_hint(call: Call, tmp_path: Path) -> None:
    (tmp_path / "tasks.py").write_text("from guix_tasks.tasks import ns\n")
    code, _, errors = call("--collection=nope", "status")
    assert code == 2
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert "`guix-tasks init`" in errors


def test_directory_without_a_project_has_tasks_and_a_hint(call: Call, tmp_path: Path) -> None:
    assert "Build an image" in call("--list")[1]
    hint = "note: this directory has no project; `guix-tasks init` creates one\n"
    code, _, errors = call("pull", "--quiet", "--verbose")
    assert code == 2
    assert hint in errors
    (tmp_path / ".env").touch()
    assert hint not in call("pull", "--quiet", "--verbose")[2]


def test_closed_pipe_is_not_an_error(tmp_path: Path) -> None:
    """The program ``head`` closes the pipe after its last line."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = subprocess.run(
            [sys.executable, "-m", "guix_tasks", "--list"],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
        )  # fmt: skip
    finally:
        os.close(writer)
    assert (result.returncode, result.stderr) == (141, "")


def test_help_shows_the_options_with_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    output = run_program(capsys, "--help", "pack", kind=GroupedProgram)
    options = re.findall(r"^  (--\S+)", output, re.MULTILINE)
    expected = {"--package=STRING", "--symlink=STRING", "--relocatable", "--max-layers=INT"}
    assert expected <= set(options)


def test_call_without_a_task_lists_the_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    output = run_program(capsys, kind=GroupedProgram)
    assert output.startswith(run_program(capsys, "--list", kind=GroupedProgram))
    assert "--help" in output
    assert "Core options" not in output


def test_bytecode_setting_of_python_is_kept(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in (False, True):
        monkeypatch.setattr(sys, "dont_write_bytecode", setting)
        call("--list")
        assert sys.dont_write_bytecode is setting
