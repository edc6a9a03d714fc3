"""Session of one task: settings, engine and console.

Only Invoke is imported at the top.  Other packages are imported when a task runs, so that
``inv --list`` is fast and works if a package is missing.
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

from guix_tasks.cli.errors import report_errors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from invoke.context import Context

    from guix_tasks.buildkit.buildx import Buildx
    from guix_tasks.commands.doctor.finding import Finding
    from guix_tasks.engine.api import Engine
    from guix_tasks.engine.discovery import Address
    from guix_tasks.engine.docker import Build, Helpers
    from guix_tasks.settings import Settings
    from guix_tasks.stages.declarations import CustomStage
    from guix_tasks.stages.project import Project
    from guix_tasks.ui.console import Console


_printed_notes: set[str] = set()
"""Notes on settings that this process has printed."""

_display = ""
"""Display mode that an option of the running task sets; empty without such an option."""

_engines: dict[tuple[str, bool, bool], Engine] = {}
"""Engines that this process has opened; `inv pull install push` opens one."""

custom_stages: list[CustomStage] = []
"""Custom stages of the project's ``tasks.py``."""


@contextmanager
def project_session(
    c: Context, overrides: Mapping[str, str | Sequence[str]] | None = None
) -> Iterator[Project]:
    """Open the project in the current directory for one task."""
    with report_errors():
        yield open_project(c, _settings(overrides))


def _settings(overrides: Mapping[str, str | Sequence[str]] | None = None) -> Settings:
    from guix_tasks.settings import load_settings

    options = {**(overrides or {}), "OUTPUT": _display}
    return load_settings(project_directory(Path.cwd()), Path.cwd(), os.environ, options)


@contextmanager
def set_display(*, quiet: bool, verbose: bool) -> Iterator[None]:
    """Set the display mode of the running task."""
    global _display  # noqa: PLW0603 -- one task runs at a time
    if quiet and verbose:
        raise Exit("error: --quiet and --verbose exclude each other; use one of them", code=2)
    _display = "quiet" if quiet else "verbose" if verbose else ""
    try:
        yield
    finally:
        _display = ""


@contextmanager
def settings_session(
    overrides: Mapping[str, str | Sequence[str]],
) -> Iterator[tuple[Settings, Console]]:
    """Open the settings and a console for a task without an engine."""
    with report_errors():
        settings = _settings(overrides)
        console = _console(settings)
        _print_notes(settings, console)
        yield settings, console


def display_option() -> str:
    """Return the display mode that the task's options set, or an empty string."""
    return _display


def _console(settings: Settings) -> Console:
    from guix_tasks.ui.console import Console, resolve_display

    return Console(display=resolve_display(settings.output, sys.stderr, os.environ))


def _print_notes(settings: Settings, console: Console) -> None:
    """Print every note on the settings once."""
    for note in settings.notes:
        if note not in _printed_notes:
            console.print(f"note: {note}")
            _printed_notes.add(note)


@contextmanager
def single_platform_session(
    c: Context, overrides: Mapping[str, str | Sequence[str]] | None = None
) -> Iterator[Project]:
    """Open the project for a task that supports one platform.

    Raise ``UsageError`` if ``PLATFORMS`` has several.
    """
    with project_session(c, overrides) as project:
        from guix_tasks.errors import UsageError

        if len(project.settings.platforms) > 1:
            first = project.settings.platforms[0]
            raise UsageError(
                f"PLATFORMS has several platforms; choose one, as in PLATFORMS={first} inv ..."
            )
        yield project


@contextmanager
def buildx_session(
    c: Context, *, needs_engine: bool = True, install: bool = False
) -> Iterator[tuple[Project, Buildx]]:
    """Open the project and the buildx program for its engine.

    The machine may lack an engine if ``needs_engine`` is false or if BuildKit does not run on the
    engine.  Raise ``BuilderError`` if there is no buildx.
    """
    with report_errors():
        from guix_tasks.errors import BuilderError

        settings = _settings()
        needs_engine = needs_engine and settings.builds_on_engine_host
        project = open_project(c, settings, needs_engine=needs_engine)
        dry, echo = bool(c.config.run.dry), bool(c.config.run.echo)
        buildx = _find_buildx(project, install=install and not dry)
        if buildx is None:
            raise BuilderError(
                "buildx is not installed; `inv buildx.setup` installs it for your user"
            )
        shown_on = project.console if dry or echo else None
        yield project, replace(buildx, shown_on=shown_on, perform=not dry)


def examine(c: Context) -> list[tuple[str, Finding]]:
    """Return the findings of ``doctor``, including errors of settings and engine."""
    from guix_tasks.commands import doctor
    from guix_tasks.commands.doctor.finding import failed, from_error, note, ok
    from guix_tasks.errors import GuixTasksError, SettingsError

    try:
        settings = _settings()
    except SettingsError as error:
        return [("settings", failed(problem)) for problem in error.problems]
    notes = [("settings", note(text)) for text in settings.notes]
    _printed_notes.update(settings.notes)
    _engines.clear()  # the information of an earlier task is outdated, above all its time
    try:
        project = open_project(c, settings)
    except GuixTasksError as error:
        return [*notes, ("engine", from_error(error))]
    buildx = _find_buildx(project, install=False)
    return [*notes, ("settings", ok("read")), *doctor.examine(project, buildx)]


def open_project(c: Context, settings: Settings, *, needs_engine: bool = True) -> Project:
    """Open a project on the engine of its settings or of this machine."""
    from guix_tasks.engine.api import NoEngine
    from guix_tasks.errors import NoEngineError
    from guix_tasks.stages.project import Project

    console = _console(settings)
    settings = replace(settings, output=console.display)
    _print_notes(settings, console)
    try:
        engine = open_engine_for(c, settings.docker_environment, console)
    except NoEngineError as error:
        if needs_engine:
            raise
        engine = cast("Engine", NoEngine(error))
    return Project(settings, engine, console, tuple(custom_stages))


def project_directory(start: Path) -> Path:
    """Return the nearest directory upwards with a ``tasks.py``, as Invoke does, or ``start``."""
    directories = (start, *start.parents)
    return next((path for path in directories if (path / "tasks.py").exists()), start)


def is_dry_run(c: Context, task: str) -> bool:
    """Return True in a dry run, and print the task; for tasks without calls of an engine."""
    from guix_tasks.ui.console import Console

    if c.config.run.dry:
        Console().command(("inv", task))
    return bool(c.config.run.dry)


def docker_command(project: Project) -> tuple[list[str], dict[str, str]]:
    """Return the ``docker`` command and the environment that selects the project's engine.

    Raise ``UsageError`` if there is no ``docker`` command.  Only a terminal needs it.
    """
    import shutil

    from guix_tasks.bootstrap.engine import private_engine
    from guix_tasks.errors import UsageError

    program = shutil.which("docker") or private_engine().docker_path()
    if program is None:
        raise UsageError(
            "cannot open a terminal: it needs the docker command line, which is not installed"
        )
    info = project.engine.info()
    environment = {**os.environ, **_engine_variables(project.settings.docker_environment)}
    if info.context:  # a context may also have certificates
        return [str(program)], {**environment, "DOCKER_CONTEXT": info.context, "DOCKER_HOST": ""}
    return [str(program)], {**environment, "DOCKER_HOST": info.url}


def _find_buildx(project: Project, *, install: bool) -> Buildx | None:
    """Return buildx for the project's engine; install it for the user if ``install`` is true."""
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
    buildx = local_buildx(environment, address)
    if buildx is None and install:
        target = plugin_path(environment)
        install_plugin(target, settings.buildx_url, settings.buildx_sha256, project.console)
        buildx = local_buildx(environment, address)
    return buildx


def local_buildx(environment: Mapping[str, str], address: Address | None) -> Buildx | None:
    """Return buildx for an engine, from this machine or from the private engine."""
    from guix_tasks.bootstrap.engine import private_engine
    from guix_tasks.buildkit.buildx import find_buildx

    private = private_engine().buildx_path()
    return find_buildx(environment, address, private=private)


def helpers(environment: Mapping[str, str]) -> Helpers:
    """Return the local services of an engine: accounts of local registries, and buildx."""
    from guix_tasks.bootstrap.registry import accounts
    from guix_tasks.buildkit.buildx import build
    from guix_tasks.engine.docker import Helpers

    def find_build(address: Address) -> Build | None:
        buildx = local_buildx(environment, address)
        return partial(build, buildx) if buildx else None

    return Helpers(accounts, find_build)


def _engine_variables(settings: Mapping[str, str]) -> dict[str, str]:
    """Return Docker's variables; the process's environment overrides the settings."""
    return {**settings, **docker_variables(os.environ)}


def open_engine_for(c: Context, settings: Mapping[str, str], console: Console) -> Engine:
    from guix_tasks.bootstrap.engine import private_engine
    from guix_tasks.engine.discovery import find_engine
    from guix_tasks.engine.dry_run import TracedEngine
    from guix_tasks.engine.podman import open_engine

    environment = _engine_variables(settings)
    address = find_engine(environment, private_engine().socket)
    dry, echo = bool(c.config.run.dry), bool(c.config.run.echo)
    key = (address.url, dry, echo)
    if key not in _engines:
        engine: Engine = open_engine(address, helpers({**os.environ, **environment}))
        info = engine.info()
        console.print(f"engine: {info.name} at {info.url} ({info.origin}), {info.kind}")
        _engines[key] = TracedEngine(engine, console, perform=not dry) if dry or echo else engine
    return _engines[key]


def docker_variables(environment: Mapping[str, str]) -> dict[str, str]:
    # As in env files, an empty value means that the variable is unset.
    return {
        name: value for name, value in environment.items() if name.startswith("DOCKER_") and value
    }
