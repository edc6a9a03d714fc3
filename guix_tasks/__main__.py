"""The command ``guix-tasks``: ``inv``, also where no ``tasks.py`` has these tasks yet."""

from __future__ import annotations

from guix_tasks.cli.program import main

if __name__ == "__main__":
    main()
