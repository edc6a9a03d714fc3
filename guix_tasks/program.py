"""Invoke's program, with the tasks listed by what they are for, and completion for each name."""

from __future__ import annotations

from pathlib import Path

import invoke
from invoke.exceptions import Exit, ParseError
from invoke.program import Program
from invoke.util import helpline

from guix_tasks.boundary import project_folder
from guix_tasks.starter import has_these_tasks
from guix_tasks.tasks import grouped, ns

COMPLETION = Path(__file__).with_name("completion")


def main(name: str = "guix-tasks") -> None:
    """Run Invoke, with the project's own ``tasks.py`` where that has these tasks."""
    own = has_these_tasks(project_folder(Path.cwd()))
    GroupedProgram(namespace=None if own else ns, name=name, binary=name).run()


class GroupedProgram(Program):
    """What ``./inv`` and ``guix-tasks`` run; an ``inv`` of Invoke's own works, too."""

    def list_flat(self) -> None:
        """Print the tasks in their groups; a part of them, asked for, as Invoke does."""
        if self.list_root or self.list_depth:
            super().list_flat()
            return
        names = list(self.collection.task_names)
        width = max(map(len, names))
        print(f"{self.task_list_opener()}:\n")
        for title, group in grouped(names):
            print(title)
            self.print_columns(
                [(name.ljust(width), helpline(self.collection[name])) for name in group]
            )

    def parse_core_args(self) -> None:
        """Print our own completion script where one is asked for.

        Invoke's calls a program of one name; ours calls the one that is typed, as ``./inv``.
        """
        super().parse_core_args()
        if shell := self.args["print-completion-script"].value:
            print(completion_script(shell), end="")
            raise Exit

    def print_version(self) -> None:
        """Print the version of this package, and that of Invoke."""
        from importlib.metadata import PackageNotFoundError, version  # slow, and seldom needed

        try:
            print(f"guix-tasks {version('guix-tasks')}, Invoke {invoke.__version__}")
        except PackageNotFoundError:
            print(f"guix-tasks, a checkout; Invoke {invoke.__version__}")


def completion_script(shell: str) -> str:
    """What a shell is to read, so that Tab completes tasks and options.

    Raises ``ParseError`` for a shell that there is none for.
    """
    scripts = {path.stem: path for path in sorted(COMPLETION.iterdir())}
    if shell not in scripts:
        raise ParseError(f"there is no completion for {shell}; write one of: {', '.join(scripts)}")
    return scripts[shell].read_text(encoding="utf-8")
