"""Write the files of a new project."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from guix_tasks.errors import UsageError
from guix_tasks.files import write_whole

if TYPE_CHECKING:
    from guix_tasks.ui.console import Console

TEMPLATES = Path(__file__).parent / "templates"

# The templates have no leading dots, because packaging tools often omit hidden files.
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
NO_CI = "none"
CI = (*CI_FILES, NO_CI)
"""Values of ``--ci``."""

NAME = "my-image"
"""Name of the image in the templates; the name of the project directory replaces it."""


def write_start(directory: Path, console: Console, *, ci: str = NO_CI, dry: bool = False) -> None:
    """Write the files that do not exist yet, and print their names and the next steps.

    Raise ``UsageError`` if ``ci`` is not in ``CI``, and ``OSError`` if a file cannot be written.
    """
    if ci not in CI:
        raise UsageError(f"--ci: {ci!r} is not one of {', '.join(CI)}")
    files = {**FILES, **dict(pair for name, pair in CI_FILES.items() if name == ci)}
    name = image_name(directory)
    for target, source in files.items():
        path = directory / target
        is_new = not os.path.lexists(path)
        if is_new and not dry:
            text = (TEMPLATES / source).read_text(encoding="utf-8").replace(NAME, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, text.encode())
        verb = "would write" if dry else "wrote"
        console.print(f"init: {verb} {target}" if is_new else f"init: {target} exists, unchanged")
    if not (dry or mentions_guix_tasks(directory)):
        console.print("init: add `from guix_tasks.tasks import ns` to your tasks.py")
    console.print("init: next: edit .env, then run `inv base pull install verify push`")
    if ci != NO_CI:
        console.print(f"init: set the variable TASKS_PACKAGE of the CI, see {CI_FILES[ci][0]}")


def project_directory(start: Path) -> Path:
    """Return the nearest directory upwards with a collection of tasks, as Invoke, or ``start``."""
    directories = (start, *start.parents)
    return next((path for path in directories if _collection(path)), start)


def _collection(directory: Path) -> Path | None:
    paths = (directory / "tasks.py", directory / "tasks" / "__init__.py")
    return next((path for path in paths if os.path.exists(path)), None)  # noqa: PTH110


def mentions_guix_tasks(directory: Path) -> bool:
    """Check whether the collection of tasks of a project mentions this package."""
    path = _collection(directory)
    try:
        return path is not None and b"guix_tasks" in path.read_bytes()
    except OSError:
        return False


def image_name(directory: Path) -> str:
    """Convert the directory's name to a repository name in lower case."""
    words = re.findall(r"[a-z0-9]+", directory.resolve().name.lower())
    return "-".join(words) or NAME
