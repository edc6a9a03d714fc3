"""The tasks: their names, help, options and arguments."""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from dataclasses import asdict
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from invoke.context import Context
from invoke.exceptions import Exit

from guix_tasks.cli.session import Session
from guix_tasks.cli.task import long_task
from guix_tasks.cli.tasks.lifecycle import _after_dashes
from guix_tasks.stages import lifecycle
from guix_tasks.stages.lifecycle import StageOptions
from guix_tasks.tasks import ns

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from invoke.tasks import Task

NAMES = {
    "base", "pull", "install", "commit", "verify", "push", "run", "shell", "squash", "rollback",
    "status", "clean", "rootfs", "engine.up", "engine.down", "registry.up",
    "registry.down", "manifest", "init", "pack", "release", "buildx.build", "buildx.setup",
    "buildx.status", "buildx.down", "runtime.build", "runtime.push", "runtime.check",
    "substitutes.up", "substitutes.down", "weather", "doctor",
}  # fmt: skip

TASKS: dict[str, Task[Any]] = {name: ns[name] for name in sorted(ns.task_names)}

# Read at import, because Invoke removes the help of a task when it first parses a command line.
HELP = {name: set(task.help or {}) for name, task in TASKS.items()}


def test_task_names_are_complete() -> None:
    assert set(ns.task_names) == NAMES


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_task_has_a_summary(task: Task[Any]) -> None:
    text = inspect.getdoc(task.body)
    assert text
    assert text.splitlines()[0].endswith(".")


@pytest.mark.parametrize("name", TASKS)
def test_option_has_help_and_no_short_name(name: str) -> None:
    task = TASKS[name]
    options = list(inspect.signature(task.body).parameters)[1:]
    assert set(options) == HELP[name]
    names = [name for argument in task.get_arguments() for name in argument.names]
    assert sorted(names) == sorted(option.replace("_", "-") for option in options)


@pytest.mark.parametrize("name", ["pull", "install"])
@pytest.mark.parametrize("option", ["keep_failed", "no_commit", "force", "upstream"])
def test_option_sets_the_stage_option_of_its_name(
    monkeypatch: pytest.MonkeyPatch, name: str, option: str
) -> None:
    """StageOptions are passed by position and are easily confused."""
    calls: list[tuple[str, StageOptions]] = []

    @contextmanager
    def locked_project(*_: object, **__: object) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(settings=SimpleNamespace(guix_packages=()))

    monkeypatch.setattr(Session, "locked_project", locked_project)
    monkeypatch.setattr(
        lifecycle, "make_each", lambda _project, stage, options: calls.append((stage, options))
    )
    TASKS[name].body(Context(), **{option: True})
    field, value = ("commit", False) if option == "no_commit" else (option, True)
    assert [(stage, asdict(options)) for stage, options in calls] == [
        (name, {**asdict(StageOptions()), field: value})
    ]


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_task_has_at_most_nine_lines(task: Task[Any]) -> None:
    source = inspect.getsource(task.body)
    body = source.partition('"""')[2].partition('"""')[2]
    assert len([line for line in body.splitlines() if line.strip()]) <= 9


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["inv", "run"], []),
        (["inv", "run", "--keep"], []),
        (["inv", "run", "--"], []),
        (["inv", "run", "--", "sh", "-c", "a b"], ["sh", "-c", "a b"]),
        (["inv", "run", "--keep", "--", "x", "--", "y"], ["x", "--", "y"]),
        (["inv", "run", "--", "", " ", "*", "--keep"], ["", " ", "*", "--keep"]),
    ],
)
def test_command_follows_the_dashes(argv: list[str], command: list[str]) -> None:
    assert _after_dashes(argv) == command


LONG_TASKS = {"base", "pull", "install", "commit", "squash", "verify", "push", "pack", "rootfs"}
LONG_TASKS |= {"demo", "buildx.build", "buildx.setup"}
LONG_TASKS |= {"runtime.build", "runtime.push", "runtime.check"}


@pytest.mark.parametrize("name", TASKS)
def test_long_task_has_options_of_its_output(name: str) -> None:
    options = {*inspect.signature(TASKS[name].body).parameters}
    assert ({"quiet", "verbose"} <= options) is (name in LONG_TASKS)


@pytest.mark.parametrize(
    ("options", "output"),
    [({}, "plain"), ({"quiet": True}, "quiet"), ({"verbose": True}, "verbose")],
)
def test_option_overrides_the_setting(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: dict[str, bool], output: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OUTPUT", "plain")
    outputs = []
    task = long_task(name="x")(lambda session: outputs.append(session.load().output.value))
    task.body(Context(), **options)
    assert outputs == [output]


def test_quiet_and_verbose_together_are_an_error() -> None:
    with pytest.raises(Exit) as caught:
        long_task()(lambda _: None).body(Context(), quiet=True, verbose=True)
    assert caught.value.code == 2
