"""The start of a project of one's own: commented files for an empty folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from guix_tasks.console import Console

START = Path(__file__).parent / "start"

# Here their names are plain ones: what begins with a dot is easily left out of a package.
FILES = {
    "tasks.py": "tasks.txt",
    ".env": "env",
    "Dockerfile": "Dockerfile",
    ".dockerignore": "dockerignore",
    "channels.scm": "channels.scm",
    "manifest.scm": "manifest.scm",
    ".gitignore": "gitignore",
    ".github/workflows/image.yml": "github.yml",
}

NAME = "my-image"
"""What the files call the image; the folder's name takes its place."""


def write_start(folder: Path, console: Console, *, dry: bool = False) -> None:
    """Write the files that are not there yet, and say which those are and what comes next.

    Raises ``OSError`` where one cannot be written.
    """
    name = image_name(folder)
    for target, source in FILES.items():
        content = (START / source).read_text(encoding="utf-8").replace(NAME, name)
        is_new = _is_missing(folder / target) if dry else _write_new(folder / target, content)
        verb = "would write" if dry else "wrote"
        console.say(f"init: {verb} {target}" if is_new else f"init: {target} is there, left alone")
    if not (dry or has_these_tasks(folder)):
        console.say("init: let your tasks.py say `from guix_tasks.tasks import ns`")
    console.say("init: next: look into .env, then `inv base pull install verify push`")


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
