"""The tasks: that they are there, say what they do, and take arguments as they are."""

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
    "buildx.status", "buildx.down", "substitutes.up", "substitutes.down", "weather", "doctor",
}  # fmt: skip

TASKS: dict[str, Task[Any]] = {name: ns[name] for name in sorted(ns.task_names)}

# Taken now, since Invoke takes them out of the task when it first parses a command line.
HELP = {name: set(task.help or {}) for name, task in TASKS.items()}


def test_the_tasks_are_those_of_the_design() -> None:
    assert set(ns.task_names) == NAMES


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_task_says_what_it_does(task: Task[Any]) -> None:
    text = inspect.getdoc(task.body)
    assert text
    assert text.splitlines()[0].endswith(".")


@pytest.mark.parametrize("name", TASKS)
def test_every_option_is_explained_and_none_is_short(name: str) -> None:
    task = TASKS[name]
    options = list(inspect.signature(task.body).parameters)[1:]
    assert set(options) == HELP[name]
    names = [name for argument in task.get_arguments() for name in argument.names]
    assert sorted(names) == sorted(option.replace("_", "-") for option in options)


@pytest.mark.parametrize("name", ["pull", "install"])
@pytest.mark.parametrize("option", ["keep_failed", "no_commit", "force", "upstream"])
def test_an_option_of_a_stage_is_the_wish_of_its_name(
    monkeypatch: pytest.MonkeyPatch, name: str, option: str
) -> None:
    """StageOptions are given by their places, which are easily mixed up."""
    wished: list[tuple[str, StageOptions]] = []

    @contextmanager
    def locked_project(*_: object, **__: object) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(settings=SimpleNamespace(guix_packages=()))

    monkeypatch.setattr(Session, "locked_project", locked_project)
    monkeypatch.setattr(
        lifecycle, "make_each", lambda _project, name, wishes: wished.append((name, wishes))
    )
    TASKS[name].body(Context(), **{option: True})
    field, value = ("commit", False) if option == "no_commit" else (option, True)
    assert [(each, asdict(wishes)) for each, wishes in wished] == [
        (name, {**asdict(StageOptions()), field: value})
    ]


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_task_is_thin(task: Task[Any]) -> None:
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
def test_what_comes_after_the_dashes(argv: list[str], command: list[str]) -> None:
    assert _after_dashes(argv) == command


LONG = {"base", "pull", "install", "commit", "squash", "verify", "push", "pack", "rootfs", "demo"}
LONG |= {"buildx.build", "buildx.setup"}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_that_takes_its_time_can_say_less_or_more(name: str) -> None:
    options = {*inspect.signature(TASKS[name].body).parameters}
    assert ({"quiet", "verbose"} <= options) is (name in LONG)


@pytest.mark.parametrize(
    ("options", "shown"),
    [({}, "plain"), ({"quiet": True}, "quiet"), ({"verbose": True}, "verbose")],
)
def test_an_option_comes_before_the_setting(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: dict[str, bool], shown: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OUTPUT", "plain")
    seen = []
    made = long_task(name="x")(lambda session: seen.append(session.load().output.value))
    made.body(Context(), **options)
    assert seen == [shown]


def test_less_and_more_is_refused() -> None:
    with pytest.raises(Exit) as caught:
        long_task()(lambda _: None).body(Context(), quiet=True, verbose=True)
    assert caught.value.code == 2
