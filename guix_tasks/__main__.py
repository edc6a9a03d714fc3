"""The command ``guix-tasks``: ``inv`` as it is, where there is no ``tasks.py`` yet."""

from __future__ import annotations

from pathlib import Path

from invoke.program import Program

from guix_tasks.boundary import project_folder
from guix_tasks.tasks import ns


def main() -> None:
    """Run Invoke, with the project's own ``tasks.py`` if there is one above this folder."""
    has_tasks = (project_folder(Path.cwd()) / "tasks.py").exists()
    Program(namespace=None if has_tasks else ns, name="guix-tasks", binary="guix-tasks").run()


if __name__ == "__main__":
    main()
