"""The start of a project of one's own: commented files for an empty folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from guix_tasks.errors import UsageError

if TYPE_CHECKING:
    from guix_tasks.ui.console import Console

START = Path(__file__).parent / "templates"

# Here their names are plain ones: what begins with a dot is easily left out of a package.
FILES = {
    "tasks.py": "tasks.txt",
    ".env": "env",
    "Dockerfile": "Dockerfile",
    ".dockerignore": "dockerignore",
    "channels.scm": "channels.scm",
    "manifest.scm": "manifest.scm",
    ".gitignore": "gitignore",
}

CI_FILES = {
    "github": (".github/workflows/image.yml", "github.yml"),
    "gitlab": (".gitlab-ci.yml", "gitlab.yml"),
}
CI = ("auto", *CI_FILES, "both", "none")
"""For which CI a file is written; ``auto`` looks at where the folder's Git repository pushes to."""

NAME = "my-image"
"""What the files call the image; the folder's name takes its place."""


def write_start(folder: Path, console: Console, *, ci: str = CI[0], dry: bool = False) -> None:
    """Write the files that are not there yet, and say which those are and what comes next.

    Raises ``UsageError`` for a CI that is none of ``CI``, ``OSError`` where one cannot be written.
    """
    files = {**FILES, **ci_files(folder, ci)}
    name = image_name(folder)
    for target, source in files.items():
        content = (START / source).read_text(encoding="utf-8").replace(NAME, name)
        is_new = _is_missing(folder / target) if dry else _write_new(folder / target, content)
        verb = "would write" if dry else "wrote"
        console.say(f"init: {verb} {target}" if is_new else f"init: {target} is there, left alone")
    if not (dry or has_these_tasks(folder)):
        console.say("init: let your tasks.py say `from guix_tasks.tasks import ns`")
    console.say("init: next: look into .env, then `inv base pull install verify push`")


def ci_files(folder: Path, ci: str) -> dict[str, str]:
    """The files for a CI; for GitHub's where nothing tells which.  Raises ``UsageError``."""
    if ci not in CI:
        raise UsageError(f"--ci: {ci!r} is none of {', '.join(CI)}")
    if ci == "auto":
        ci = "gitlab" if _pushes_to_gitlab(folder) else "github"
    return dict(pair for name, pair in CI_FILES.items() if ci in (name, "both"))


def _pushes_to_gitlab(folder: Path) -> bool:
    """Whether the Git repository of a folder has a remote with ``gitlab`` in its host's name."""
    found = (each / ".git/config" for each in (folder, *folder.parents))
    config = next((each for each in found if each.is_file()), None)
    try:
        text = config.read_text(encoding="utf-8", errors="replace") if config else ""
    except OSError:
        return False
    return bool(re.search(r"^\s*url\s*=\s*(\w+://)?([^/\s]*@)?[^/:\s]*gitlab", text, re.MULTILINE))


def has_these_tasks(folder: Path) -> bool:
    """Whether a project's ``tasks.py`` speaks of this package at all."""
    try:
        return b"guix_tasks" in (folder / "tasks.py").read_bytes()
    except OSError:
        return False


def image_name(folder: Path) -> str:
    """The folder's name as the last part of an image's, which has small letters and digits."""
    words = re.findall(r"[a-z0-9]+", folder.resolve().name.lower())
    return "-".join(words) or NAME


def _is_missing(path: Path) -> bool:
    return not (path.exists() or path.is_symlink())


def _write_new(path: Path, content: str) -> bool:
    """Write a file wholly, unless something has its name already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = path.open("x", encoding="utf-8")
    except FileExistsError:
        return False
    try:
        with file:
            file.write(content)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return True
