"""``inv test``: the linters, the type checker and the tests of guix-tasks itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from guix_tasks.errors import CheckError
from guix_tasks.ui.console import Console

if TYPE_CHECKING:
    from collections.abc import Collection

LOCK = "requirements-dev.txt"

# What `init` writes, and what stands beside it, for the linters of these formats.
GITHUB = ("guix_tasks/commands/templates/github.yml", "examples/ci/github-release.yml")
GITLAB = "guix_tasks/commands/templates/gitlab.yml"

LINTERS = (
    ("ruff", "check", "."),
    ("ruff", "format", "--check", "."),
    ("mypy",),
    ("lint-imports",),
    ("yamllint", "--strict", *GITHUB, GITLAB),
    ("zizmor", "--offline", "--persona=pedantic", "--quiet", *GITHUB),
    ("check-jsonschema", "--builtin-schema=vendor.github-workflows", *GITHUB),
    ("check-jsonschema", "--builtin-schema=vendor.gitlab-ci", "--data-transform=gitlab-ci", GITLAB),
)


PROCESSES = 4
"""At most so many tests at once: all of them use one engine."""

NO_TESTS = 5
"""The exit status of pytest if no test was chosen."""


def run_checks(
    project: Path, *, unit_only: bool, only: str, soak: bool = False, durations: int = 10
) -> None:
    """Run everything, and stop at the first that fails.  Raise ``CheckError`` for it.

    ``soak`` runs only the tests with numbers, and raises those.  ``durations`` is how many of the
    slowest tests are listed.
    """
    console = Console()
    _install_tools(project, console)
    if not only and not soak:
        for command in (*LINTERS, ("shellcheck", *_shell_scripts(project))):
            _call(project, console, command)
    directories = ["tests/unit"] if unit_only else ["tests/unit", "tests/integration"]
    chosen = [*(["-k", only] if only else []), *(["-m", "soak", "--soak"] if soak else [])]
    parallel = ["-n", "auto", f"--maxprocesses={PROCESSES}", "--no-loadscope-reorder"]
    slowest = [f"--durations={durations}", "--durations-min=1"]
    good = (0, NO_TESTS) if chosen else (0,)
    statuses = {
        _call(
            project, console,
            ("pytest", directory, *chosen, *slowest, *([] if soak else parallel)), good,
        )
        for directory in directories
    }  # fmt: skip
    if statuses == {NO_TESTS}:
        raise CheckError(f"test: no test matches {only!r}")


def _install_tools(project: Path, console: Console) -> None:
    """Bring the tools of the lock into this environment, where they are not in it yet."""
    lock, mark = project / LOCK, Path(sys.prefix) / LOCK
    if mark.exists() and lock.read_bytes() == mark.read_bytes():
        return
    console.say(f"test: installing the tools of {LOCK} into {sys.prefix}")
    _call(project, console, (
        "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
        "--require-hashes", "--requirement", LOCK,
    ))  # fmt: skip
    # As the wrapper does with its own lock: written last, and compared at the next call.
    mark.write_bytes(lock.read_bytes())


def _shell_scripts(project: Path) -> list[str]:
    found = (each for each in project.rglob("*") if each.is_file() and ".venv" not in each.parts)
    scripts = (each for each in found if each.suffix in ("", ".sh"))
    starts = (b"#!/bin/sh", b"#!/bin/bash", b"#!/usr/bin/env bash")
    return sorted(
        str(each.relative_to(project)) for each in scripts if each.read_bytes().startswith(starts)
    )


def _call(
    project: Path, console: Console, command: tuple[str, ...], good: Collection[int] = (0,)
) -> int:
    console.command(command)
    scripts = Path(sys.prefix) / "bin"
    path = os.pathsep.join((str(scripts), os.environ.get("PATH", os.defpath)))
    program, *arguments = command
    status = subprocess.call(
        [scripts / program, *arguments], cwd=project, env={**os.environ, "PATH": path}
    )
    if status not in good:
        raise CheckError(f"test: {program} failed with status {status}; its output is above")
    return status
