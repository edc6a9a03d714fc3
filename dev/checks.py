"""``inv test``: the linters, the type checker and the tests of guix-tasks itself."""

from __future__ import annotations

import filecmp
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from dev import CHECKOUT
from guix_tasks.errors import CheckError
from guix_tasks.ui.console import Console

if TYPE_CHECKING:
    from collections.abc import Collection

LOCK = "requirements-dev.txt"

# Files to lint with format-specific linters: the CI templates of `init`, the CI examples, and the
# files of this repository for GitHub.
GITHUB = (
    "guix_tasks/commands/templates/github.yml",
    "examples/ci/github-platforms.yml",
    "examples/ci/github-release.yml",
    "examples/ci/github-update.yml",
)
GITLAB = (
    "guix_tasks/commands/templates/gitlab.yml",
    "examples/ci/gitlab-platforms.yml",
    "examples/ci/gitlab-update.yml",
)
DEPENDABOT = ".github/dependabot.yml"
ISSUE_FORMS = (".github/ISSUE_TEMPLATE/bug.yml", ".github/ISSUE_TEMPLATE/idea.yml")

LINTERS = (
    ("ruff", "check", "."),
    ("ruff", "format", "--check", "."),
    ("mypy",),
    ("lint-imports",),
    ("yamllint", "--strict", *GITHUB, *GITLAB, ".github", "mkdocs.yml"),
    ("zizmor", "--offline", "--persona=pedantic", "--quiet", *GITHUB, DEPENDABOT),
    ("check-jsonschema", "--builtin-schema=vendor.github-workflows", *GITHUB),
    (
        "check-jsonschema",
        "--builtin-schema=vendor.gitlab-ci",
        "--data-transform=gitlab-ci",
        *GITLAB,
    ),
    ("check-jsonschema", "--builtin-schema=vendor.dependabot", DEPENDABOT),
    ("check-jsonschema", "--builtin-schema=vendor.github-issue-forms", *ISSUE_FORMS),
)


REMOTE = re.compile(
    r"<(?:script|link|img|source|iframe)\b[^>]*\s(?:src|href|srcset)=[\"']?(?:https?:)?//[^\s>]*"
    r"|url\([\"']?(?:https?:)?//[^)]*|@import[^;]*//[^;]*",
    re.IGNORECASE,
)
"""Reference by which a page or a style sheet loads a file from another server."""

PROCESSES = 4
"""Maximum parallel test processes, which share one engine."""

NO_TESTS = 5
"""Exit status of pytest if no test matches."""


def run_checks(*, unit_only: bool, only: str, soak: bool, durations: int) -> None:
    """Run the linters and the tests.

    ``soak`` runs only the repeated random tests, for an hour.  ``durations`` is the number of slow
    tests to list.  Raise ``CheckError`` for the first command that fails.
    """
    _install_tools()
    if not only and not soak:
        for command in (*LINTERS, ("shellcheck", *_shell_scripts())):
            _call(*command)
        check_site()
        check_package()
    directories = ["tests/unit"] if unit_only else ["tests/unit", "tests/integration"]
    selection = [
        *(["-k", only] if only else []),
        *(["-m", "soak or only_soak", "--soak"] if soak else []),
    ]
    parallel = ["-n", "auto", f"--maxprocesses={PROCESSES}", "--no-loadscope-reorder"]
    slowest = [f"--durations={durations}", "--durations-min=1"]
    good = (0, NO_TESTS) if selection else (0,)
    options = [*selection, *slowest, *([] if soak else parallel)]
    statuses = {_call("pytest", directory, *options, good=good) for directory in directories}
    if statuses == {NO_TESTS}:
        raise CheckError(f"test: no test matches {only!r}")


def check_package() -> None:
    """Build and check the sdist and the wheel, and build them again from the unpacked sdist.

    Raise ``CheckError`` if a tool fails, or if the second build differs from the first.
    """
    with TemporaryDirectory() as directory:
        first, second = Path(directory, "first"), Path(directory, "second")
        _call("hatchling", "build", "--directory", str(first))
        (wheel,), (sdist,) = first.glob("*.whl"), first.glob("*.tar.gz")
        _call("twine", "check", "--strict", str(sdist), str(wheel))
        _call("check-wheel-contents", str(wheel))
        shutil.unpack_archive(sdist, directory)
        unpacked = Path(directory, sdist.name.removesuffix(".tar.gz"))
        _call("hatchling", "build", "--directory", str(second), cwd=unpacked)
        names = [sdist.name, wheel.name]
        _, different, missing = filecmp.cmpfiles(first, second, names, shallow=False)
        if different or missing:
            raise CheckError(f"test: a second build differs: {', '.join(different + missing)}")


def check_site() -> None:
    """Build the documentation as a site.

    Raise ``CheckError`` for a broken link or anchor, for a page that is not in the navigation, and
    for a script, style, font or picture from another server.
    """
    with TemporaryDirectory() as directory:
        _call("mkdocs", "build", "--strict", "--site-dir", directory)
        for path in (*Path(directory).rglob("*.html"), *Path(directory).rglob("*.css")):
            if remote := REMOTE.search(path.read_text(encoding="utf-8")):
                name = path.relative_to(directory)
                raise CheckError(f"test: {name} loads a file from another server: {remote[0]}")


def _install_tools() -> None:
    """Install the tools of the lock into this environment if they are missing or outdated."""
    lock, mark = CHECKOUT / LOCK, Path(sys.prefix) / LOCK
    if mark.exists() and lock.read_bytes() == mark.read_bytes():
        return
    Console().print(f"test: installing the tools of {LOCK} into {sys.prefix}")
    _call(
        "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
        "--require-hashes", "--requirement", LOCK,
    )  # fmt: skip
    # Written last, as in ./inv: an interrupted installation runs again.
    mark.write_bytes(lock.read_bytes())


def _shell_scripts() -> list[str]:
    paths = (path for path in CHECKOUT.rglob("*") if path.is_file() and ".venv" not in path.parts)
    candidates = (path for path in paths if path.suffix in ("", ".sh"))
    shebangs = (b"#!/bin/sh", b"#!/bin/bash", b"#!/usr/bin/env bash")
    return sorted(
        str(path.relative_to(CHECKOUT))
        for path in candidates
        if path.read_bytes().startswith(shebangs)
    )


def _call(program: str, *arguments: str, good: Collection[int] = (0,), cwd: Path = CHECKOUT) -> int:
    Console().command((program, *arguments))
    scripts = Path(sys.prefix) / "bin"
    path = os.pathsep.join((str(scripts), os.environ.get("PATH", os.defpath)))
    status = subprocess.call(
        [scripts / program, *arguments], cwd=cwd, env={**os.environ, "PATH": path}
    )
    if status not in good:
        raise CheckError(f"test: {program} failed with status {status}; its output is above")
    return status
