"""Session of one task: settings, engine and console."""

from __future__ import annotations

import os
import re
import shutil
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from guix_tasks.bootstrap import registry
from guix_tasks.bootstrap.buildx_plugin import install_plugin
from guix_tasks.bootstrap.engine import private_engine
from guix_tasks.buildkit.buildx import build, find_buildx, plugin_path
from guix_tasks.cli.custom import custom_stages
from guix_tasks.commands.init import project_directory
from guix_tasks.engine import podman
from guix_tasks.engine.api import NoEngine
from guix_tasks.engine.discovery import find_engine
from guix_tasks.engine.docker import Helpers
from guix_tasks.engine.dry_run import TracedEngine
from guix_tasks.errors import BuilderError, NoEngineError, UsageError
from guix_tasks.settings import load_settings
from guix_tasks.stages.project import Project
from guix_tasks.ui.console import Console, resolve_display

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from invoke.context import Context

    from guix_tasks.buildkit.buildx import Buildx
    from guix_tasks.engine.api import Engine
    from guix_tasks.engine.discovery import Address
    from guix_tasks.engine.docker import Build
    from guix_tasks.settings import Settings
    from guix_tasks.ui.console import Display

    Overrides = Mapping[str, str | Sequence[str]] | None
    """Values of task options by the names of the settings that they override."""

_printed_notes: set[str] = set()
"""Notes on settings that this process has printed."""

_engines: dict[tuple[str, bool, bool], Engine] = {}
"""Engines that this process has opened; `inv pull install push` opens one."""


class Session:
    """Settings, engine and console of one task; each is opened when the task asks for it."""

    def __init__(self, c: Context, *, quiet: bool = False, verbose: bool = False) -> None:
        if quiet and verbose:
            raise UsageError("--quiet and --verbose exclude each other; use one of them")
        self.output = "quiet" if quiet else "verbose" if verbose else ""
        """Value of ``OUTPUT`` that an option of the task sets; empty without such an option."""
        self.is_dry = bool(c.config.run.dry)
        self.console = Console()
        # Where Invoke has found the collection; None if a program brought its own.
        loaded = getattr(c.config, "_project_prefix", None)
        self._directory = Path(loaded) if loaded else project_directory(Path.cwd())
        self._echo = bool(c.config.run.echo)

    def load(self, overrides: Overrides = None) -> Settings:
        """Load the settings of the project whose tasks Invoke runs."""
        options = {**(overrides or {}), "OUTPUT": self.output}
        return load_settings(self._directory, Path.cwd(), os.environ, options)

    def use(self, settings: Settings) -> Settings:
        """Set up the console, print each note on the settings once, and resolve ``OUTPUT``."""
        self.display(settings.output)
        notes = list(settings.notes)
        if (encoding := sys.getfilesystemencoding()) != "utf-8":
            notes.append(
                f"the locale has the encoding {encoding}, and the engine reads names of files as "
                "UTF-8; set PYTHONUTF8=1"
            )
        for note in notes:
            if note not in _printed_notes:
                self.console.print(f"note: {note}")
                _printed_notes.add(note)
        return replace(settings, output=self.console.display)

    def display(self, output: Display) -> None:
        """Set up the console for a value of ``OUTPUT``."""
        self.console = Console(display=resolve_display(output, sys.stderr, os.environ))

    def project(self, overrides: Overrides = None, *, one_platform: bool = False) -> Project:
        """Open the project whose tasks Invoke runs.

        Raise ``UsageError`` if ``one_platform`` is true and ``PLATFORMS`` has several.
        """
        settings = self.load(overrides)
        project = self.open(settings)
        if one_platform and settings.platforms[1:]:
            raise UsageError(
                "PLATFORMS has several platforms; choose one, as in "
                f"PLATFORMS={settings.platforms[0]} inv ..."
            )
        return project

    @contextmanager
    def locked_project(
        self, task: str, overrides: Overrides = None, *, one_platform: bool = False
    ) -> Iterator[Project]:
        """Open the project, and lock its image until the block ends."""
        project = self.project(overrides, one_platform=one_platform)
        with project.lock(task):
            yield project

    def open(self, settings: Settings, *, needs_engine: bool = True) -> Project:
        """Open a project on the engine of its settings or of this machine."""
        settings = self.use(settings)
        for stage in custom_stages:
            _check_tag(settings, stage.name)
        try:
            engine = self.engine(settings.docker_environment)
        except NoEngineError as error:
            if needs_engine:
                raise
            engine = cast("Engine", NoEngine(error))
        return Project(settings, engine, self.console, tuple(custom_stages))

    def reopen(self, settings: Settings) -> Project:
        """Open a project without the engine's answers to earlier tasks, above all its time.

        The notes on its settings are not printed.
        """
        _engines.clear()
        _printed_notes.update(settings.notes)
        return self.open(settings)

    def engine(self, settings: Mapping[str, str]) -> Engine:
        """Open the engine that Docker's variables select, in settings and environment."""
        environment = engine_environment(settings)
        address = find_engine(environment, private_engine().socket)
        key = (address.url, self.is_dry, self._echo)
        if key not in _engines:
            opened = podman.open_engine(address, helpers(environment))
            info = opened.info()
            self.console.print(f"engine: {info.name} at {info.url} ({info.origin}), {info.kind}")
            traced = TracedEngine(opened, self.console, perform=not self.is_dry)
            _engines[key] = traced if self.is_dry or self._echo else opened
        return _engines[key]

    def buildx(self, *, needs_engine: bool = True, install: bool = False) -> tuple[Project, Buildx]:
        """Open the project and the buildx program for its engine.

        The machine may lack an engine if ``needs_engine`` is false or if BuildKit does not run on
        the engine.  Raise ``BuilderError`` if there is no buildx.
        """
        settings = self.load()
        needs_engine = needs_engine and settings.builds_on_engine_host
        project = self.open(settings, needs_engine=needs_engine)
        buildx = self.find_buildx(project, install=install)
        if buildx is None:
            raise BuilderError(
                "buildx is not installed; `inv buildx.setup` installs it for your user"
            )
        shown_on = self.console if self.is_dry or self._echo else None
        return project, replace(buildx, shown_on=shown_on, perform=not self.is_dry)

    def find_buildx(self, project: Project, *, install: bool = False) -> Buildx | None:
        """Return buildx for the project's engine, installed for the user if ``install`` is true."""
        settings = project.settings
        environment = engine_environment(settings.docker_environment)
        try:
            address = find_engine(environment, private_engine().socket)
        except NoEngineError:
            address = None
        buildx = local_buildx(environment, address)
        if buildx is None and install and not self.is_dry:
            target = plugin_path(environment)
            install_plugin(target, settings.buildx_url, settings.buildx_sha256, self.console)
            buildx = local_buildx(environment, address)
        return buildx

    def docker_command(self, project: Project) -> tuple[list[str], dict[str, str]]:
        """Return the ``docker`` command and the environment that selects the project's engine.

        Raise ``UsageError`` if there is no ``docker`` command.  Only a terminal needs it.
        """
        program = shutil.which("docker") or private_engine().docker_path()
        if program is None:
            raise UsageError(
                "cannot open a terminal: it needs the docker command line, which is not installed"
            )
        info = project.engine.info()
        environment = engine_environment(project.settings.docker_environment)
        selected = {"DOCKER_HOST": info.url}
        if info.context:  # a context may also have certificates
            selected = {"DOCKER_CONTEXT": info.context, "DOCKER_HOST": ""}
        return [str(program)], {**environment, **selected}

    def skips(self, task: str, *options: str) -> bool:
        """Return True in a dry run, and print the task; for tasks without calls of an engine."""
        if self.is_dry:
            self.console.command(("inv", task, *options))
        return self.is_dry


def local_buildx(environment: Mapping[str, str], address: Address | None) -> Buildx | None:
    """Return buildx for an engine, from this machine or from the private engine."""
    return find_buildx(environment, address, private=private_engine().buildx_path())


def helpers(environment: Mapping[str, str]) -> Helpers:
    """Return the local services of an engine: accounts of local registries, and buildx."""

    def find_build(address: Address) -> Build | None:
        buildx = local_buildx(environment, address)
        return partial(build, buildx) if buildx else None

    return Helpers(registry.accounts, find_build)


def _check_tag(settings: Settings, stage: str) -> None:
    """Raise ``UsageError`` if the tags of a custom stage would be too long."""
    platforms = [f"-{platform.tag_suffix}" for platform in settings.platforms]
    suffix = f"-{stage}{max(platforms, key=len, default='')}"
    try:
        settings.image.with_tag(f"{settings.image.tag}{suffix}")
    except ValueError:
        raise UsageError(
            f"{settings.origin('IMAGE')}: the tag with the suffix {suffix} has more than 128 "
            "characters; shorten the tag, or the name of the stage in tasks.py"
        ) from None


_DROPPED = re.compile(
    r"DOCKER_(API_VERSION|DEFAULT_PLATFORM)|SOURCE_DATE_EPOCH|GIT_.*|"
    r"BUILDX_(?!CONFIG|DEFAULT_POLICY).*"
)
"""Variables with which buildx would build another image than that of the settings, or would use
another builder, and the version of the API, which ``docker.Client`` negotiates."""


def engine_environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of Docker's programs.

    Docker's variables of the environment override those of the settings.
    """
    kept = {name: value for name, value in os.environ.items() if not _DROPPED.fullmatch(name)}
    # As in env files, an empty value means that the variable is unset.
    not_empty = {name: value for name, value in kept.items() if value}
    return {**kept, **settings, **not_empty}
