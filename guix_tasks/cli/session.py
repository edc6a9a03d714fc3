"""The session of one task: settings, engine and console.

All but Invoke is imported when a task runs, so that ``inv --list`` costs next to nothing and works
where a package is missing.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from invoke.exceptions import Exit

from guix_tasks.cli.errors import guarded

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from invoke.context import Context

    from guix_tasks.buildkit.buildx import Buildx
    from guix_tasks.commands.doctor import Finding
    from guix_tasks.engine.api import Engine
    from guix_tasks.engine.discovery import Address
    from guix_tasks.engine.docker import Build, Helpers
    from guix_tasks.settings import Settings
    from guix_tasks.stages.declarations import OwnStage
    from guix_tasks.stages.project import Project
    from guix_tasks.ui.console import Console


_told: set[str] = set()
"""The notes on settings that this process has shown."""

_display = ""
"""How much the running task is to show, where an option of it says so."""

_engines: dict[tuple[str, bool, bool], Engine] = {}
"""The engines that this process has opened: `inv pull install push` opens one."""

custom_stages: list[OwnStage] = []
"""The stages that the project's ``tasks.py`` has added."""


@contextmanager
def opened(
    c: Context, overrides: Mapping[str, str | Sequence[str]] | None = None
) -> Iterator[Project]:
    """The project in the current directory, for one task."""
    with guarded():
        yield open_project(c, _settings(overrides))


def _settings(overrides: Mapping[str, str | Sequence[str]] | None = None) -> Settings:
    from guix_tasks.settings import load_settings

    chosen = {**(overrides or {}), "OUTPUT": _display}
    return load_settings(project_folder(Path.cwd()), Path.cwd(), os.environ, chosen)


@contextmanager
def displayed(*, quiet: bool, verbose: bool) -> Iterator[None]:
    """Let a task show as much as its options ask for."""
    global _display  # noqa: PLW0603 -- of the one task that runs
    if quiet and verbose:
        raise Exit("error: --quiet and --verbose: say one of them", code=2)
    _display = "quiet" if quiet else "verbose" if verbose else ""
    try:
        yield
    finally:
        _display = ""


@contextmanager
def opened_settings(
    overrides: Mapping[str, str | Sequence[str]],
) -> Iterator[tuple[Settings, Console]]:
    """The settings, for a task that needs no engine."""
    with guarded():
        settings = _settings(overrides)
        console = _console(settings)
        _tell(settings, console)
        yield settings, console


def chosen_display() -> str:
    """How much the running task is to show by its options; empty where none says so."""
    return _display


def _console(settings: Settings) -> Console:
    from guix_tasks.ui.console import Console, settled_display

    return Console(display=settled_display(settings.output, sys.stderr, os.environ))


def _tell(settings: Settings, console: Console) -> None:
    """Show the notes on settings, each of them once."""
    for note in settings.notes:
        if note not in _told:
            console.say(f"note: {note}")
            _told.add(note)


@contextmanager
def opened_single(
    c: Context, overrides: Mapping[str, str | Sequence[str]] | None = None
) -> Iterator[Project]:
    """The project for a task that is for one platform at a time."""
    with opened(c, overrides) as project:
        from guix_tasks.errors import UsageError

        if len(project.settings.platforms) > 1:
            first = project.settings.platforms[0]
            raise UsageError(
                f"PLATFORMS names several; say which it is to be, as PLATFORMS={first} inv ..."
            )
        yield project


@contextmanager
def opened_with_buildx(
    c: Context, *, needs_engine: bool = True, install: bool = False
) -> Iterator[tuple[Project, Buildx]]:
    """The project, and the buildx program set to its engine.

    Where BuildKit is not on the engine, or ``needs_engine`` is false, a machine may have none.
    """
    with guarded():
        from guix_tasks.errors import BuilderError

        settings = _settings()
        needs_engine = needs_engine and settings.builds_beside_engine
        project = open_project(c, settings, needs_engine=needs_engine)
        dry, echo = bool(c.config.run.dry), bool(c.config.run.echo)
        found = _find_buildx(project, install=install and not dry)
        if found is None:
            raise BuilderError(
                "buildx is not on this machine; `inv buildx.setup` installs it for you"
            )
        shown_on = project.console if dry or echo else None
        yield project, replace(found, shown_on=shown_on, perform=not dry)


def examine(c: Context) -> list[Finding]:
    """What ``doctor`` finds; settings or an engine that fail are findings, too."""
    from guix_tasks.commands.doctor import Finding as Found
    from guix_tasks.commands.doctor import Patient, State, failed
    from guix_tasks.commands.doctor import examine as look
    from guix_tasks.errors import GuixTasksError, SettingsError

    try:
        settings = _settings()
    except SettingsError as error:
        return [Found("settings", State.FAILED, problem) for problem in error.problems]
    notes = [Found("settings", State.NOTE, note) for note in settings.notes]
    _told.update(settings.notes)
    _engines.clear()  # what an earlier task was told is old, its time above all
    try:
        project = open_project(c, settings)
    except GuixTasksError as error:
        return [*notes, failed("engine", error)]
    patient = Patient(project, lambda: _find_buildx(project, install=False))
    return [*notes, Found("settings", State.OK, "read"), *look(patient)]


def open_project(c: Context, settings: Settings, *, needs_engine: bool = True) -> Project:
    """Settings with the engine that they, or this machine, name."""
    from guix_tasks.engine.api import NoEngine
    from guix_tasks.errors import NoEngineError
    from guix_tasks.stages.project import Project

    console = _console(settings)
    settings = replace(settings, output=console.display)
    _tell(settings, console)
    try:
        engine = open_engine_for(c, settings.docker_environment, console)
    except NoEngineError as error:
        if needs_engine:
            raise
        engine = cast("Engine", NoEngine(error))
    return Project(settings, engine, console, tuple(custom_stages))


def project_folder(start: Path) -> Path:
    """The nearest folder upwards with a ``tasks.py``: the one whose tasks Invoke runs."""
    return next((each for each in (start, *start.parents) if (each / "tasks.py").exists()), start)


def left_at_showing(c: Context, task: str) -> bool:
    """Whether this is a dry run of a task that speaks to no engine; if so, say what it would do."""
    from guix_tasks.ui.console import Console

    if c.config.run.dry:
        Console().command(("inv", task))
    return bool(c.config.run.dry)


def docker_command(project: Project) -> tuple[list[str], dict[str, str]]:
    """The ``docker`` command line, and the environment in which it finds the project's engine.

    Raises ``UsageError`` where there is none: only a terminal needs it.
    """
    import shutil

    from guix_tasks.bootstrap.engine import private_engine
    from guix_tasks.errors import UsageError

    program = shutil.which("docker") or private_engine().docker_path()
    if program is None:
        raise UsageError("a terminal needs the docker command line, which is not on this machine")
    info, environment = (
        project.engine.info(),
        _engine_variables(project.settings.docker_environment),
    )
    environment = {**os.environ, **environment}
    if info.context:  # which may have certificates, too
        return [str(program)], {**environment, "DOCKER_CONTEXT": info.context, "DOCKER_HOST": ""}
    return [str(program)], {**environment, "DOCKER_HOST": info.url}


def _find_buildx(project: Project, *, install: bool) -> Buildx | None:
    """The buildx program, set to the project's engine; installed for the user if need be."""
    from guix_tasks.bootstrap.buildx_plugin import install_plugin
    from guix_tasks.bootstrap.engine import private_engine
    from guix_tasks.buildkit.buildx import plugin_path
    from guix_tasks.engine.discovery import find_engine
    from guix_tasks.errors import NoEngineError

    settings = project.settings
    environment = {**os.environ, **_engine_variables(settings.docker_environment)}
    try:
        address = find_engine(environment, private_engine().socket)
    except NoEngineError:
        address = None
    found = local_buildx(environment, address)
    if found is None and install:
        target = plugin_path(environment)
        install_plugin(target, settings.buildx_url, settings.buildx_sha256, project.console)
        found = local_buildx(environment, address)
    return found


def local_buildx(environment: Mapping[str, str], address: Address | None) -> Buildx | None:
    """The buildx program of this machine, the private engine's included, set to an engine."""
    from guix_tasks.bootstrap.engine import private_engine
    from guix_tasks.buildkit.buildx import find_buildx

    private = private_engine().buildx_path()
    return find_buildx(environment, address, private=private)


def helpers(environment: Mapping[str, str]) -> Helpers:
    """What an engine uses of this machine: local registries' accounts, and buildx."""
    from guix_tasks.bootstrap.registry import accounts
    from guix_tasks.buildkit.buildx import build
    from guix_tasks.engine.docker import Helpers

    def find_build(address: Address) -> Build | None:
        found = local_buildx(environment, address)
        return partial(build, found) if found else None

    return Helpers(accounts, find_build)


def _engine_variables(of_settings: Mapping[str, str]) -> dict[str, str]:
    """Docker's own variables; those of the process's environment come first."""
    return {**of_settings, **docker_variables(os.environ)}


def open_engine_for(c: Context, of_settings: Mapping[str, str], console: Console) -> Engine:
    from guix_tasks.bootstrap.engine import private_engine
    from guix_tasks.engine.discovery import find_engine
    from guix_tasks.engine.dry_run import TracedEngine
    from guix_tasks.engine.podman import open_engine

    environment = _engine_variables(of_settings)
    address = find_engine(environment, private_engine().socket)
    dry, echo = bool(c.config.run.dry), bool(c.config.run.echo)
    key = (address.url, dry, echo)
    if key not in _engines:
        engine: Engine = open_engine(address, helpers({**os.environ, **environment}))
        info = engine.info()
        console.say(f"engine: {info.name} at {info.url} ({info.origin}), {info.kind}")
        _engines[key] = TracedEngine(engine, console, perform=not dry) if dry or echo else engine
    return _engines[key]


def docker_variables(environment: Mapping[str, str]) -> dict[str, str]:
    # An empty value counts as unset, as everywhere.
    return {
        name: value for name, value in environment.items() if name.startswith("DOCKER_") and value
    }
