"""The command ``guix-tasks``: ``inv``, also where no ``tasks.py`` has these tasks yet."""

from __future__ import annotations

from pathlib import Path

from invoke.program import Program

from guix_tasks.boundary import project_folder
from guix_tasks.starter import has_these_tasks
from guix_tasks.tasks import ns


def main() -> None:
    """Run Invoke, with the project's own ``tasks.py`` where that has these tasks."""
    own = has_these_tasks(project_folder(Path.cwd()))
    Program(namespace=None if own else ns, name="guix-tasks", binary="guix-tasks").run()


if __name__ == "__main__":
    main()
