"""Invoke's program: tasks listed by what they are for, completion, and errors of one line."""

from __future__ import annotations

import difflib
import os
import re
import sys
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import invoke
from invoke.exceptions import CollectionNotFound, Exit, ParseError
from invoke.program import Program
from invoke.util import helpline

from guix_tasks.cli.session import project_folder
from guix_tasks.cli.tasks import grouped, ns
from guix_tasks.commands.init import has_these_tasks
from guix_tasks.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

COMPLETION = Path(__file__).with_name("completion")

READER_GONE = 141
"""The status with which a shell tells of a program whose output nobody reads any more."""


def main(name: str = "guix-tasks") -> None:
    """Run Invoke, with the project's own ``tasks.py`` where that has these tasks."""
    own = has_these_tasks(project_folder(Path.cwd()))
    GroupedProgram(namespace=None if own else ns, name=name, binary=name).run()


def in_one_line(step: Callable[..., None]) -> Callable[..., None]:
    """A step of the program; where it fails by what a user wrote, ``inv`` ends with one line."""

    @wraps(step)
    def told(program: GroupedProgram, *arguments: object) -> None:
        try:
            step(program, *arguments)
        except ParseError as error:
            fail(program.advice(error))
        except ValueError as error:
            fail(bad_number(error, program.argv))
        except Exit as error:
            if error.message and error.code == 1:  # in Invoke's words
                fail(error.message)
            raise

    return told


def fail(message: str) -> NoReturn:
    raise Exit(f"error: {message}", UsageError.exit_code) from None


class GroupedProgram(Program):
    """What ``./inv`` and ``guix-tasks`` run; an ``inv`` of Invoke's own works, too."""

    parse_core = in_one_line(Program.parse_core)
    parse_collection = in_one_line(Program.parse_collection)
    parse_tasks = in_one_line(Program.parse_tasks)
    parse_cleanup = in_one_line(Program.parse_cleanup)

    def run(self, argv: list[str] | None = None, exit: bool = True) -> None:  # noqa: A002 -- Invoke's
        """Run what is asked for; where nobody reads the output any more, end in silence."""
        try:
            try:
                super().run(argv, exit)
            finally:
                print(end="", flush=True)
        except BrokenPipeError:
            # Python writes what is left once more when it ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(READER_GONE)

    def advice(self, error: ParseError) -> str:
        """What is wrong with the command line, and what may be meant."""
        lacking = re.match(r"Flag <Argument: ([\w-]+).*> needed value", str(error))
        if lacking:
            return f"--{lacking[1].replace('_', '-')} needs a value"
        unknown = re.fullmatch("No idea what (.+) is!", str(error), re.DOTALL)
        if not unknown:
            return str(error)
        word = unknown[1][1:-1]
        context = error.context or self.initial_context
        task = context.name
        if word.startswith("-"):
            flags = [*context.flags, *self.initial_context.flags]
            said = f"{task} has no option {word}" if task else f"there is no option {word}"
            shown = f"--help {task}" if task else "--help"
            return f"{said};{meant(word, flags)} `{self.binary} {shown}` shows all"
        if task == "run":
            return f"a command comes after two dashes, as in `{self.binary} run -- {word}`"
        said = f"there is no task '{word}'"
        return f"{said};{meant(word, self.parser.contexts)} `{self.binary} --list` shows all"

    def load_collection(self) -> None:
        """Load the project's own tasks; where there are none, say how to begin."""
        try:
            super().load_collection()
        except (SyntaxError, ImportError, ValueError) as error:
            fail(f"tasks.py: {error}")
        except Exit as error:
            if isinstance(error.__context__, CollectionNotFound):
                fail(f"{error.message} `{self.binary} init` writes the start of a project")
            raise

    def execute(self) -> None:
        """Run the tasks; where one fails in a folder that is no project, say how to begin."""
        try:
            super().execute()
        except Exit as error:
            here = project_folder(Path.cwd())
            is_project = any((here / name).exists() for name in ("tasks.py", ".env"))
            if error.code == UsageError.exit_code and not is_project:
                hint = f"there is no project here; `{self.binary} init` writes the start of one"
                print(f"note: {hint}", file=sys.stderr)
            raise

    def no_tasks_given(self) -> None:
        """List the tasks, rather than Invoke's own options."""
        self.list_tasks()
        print(f"Options of a task: `{self.binary} --help TASK`; of all: `{self.binary} --help`.")
        raise Exit

    def print_task_help(self, name: str) -> None:
        """Print the help of a task; Invoke knows no value of a list, and shows one of a counter."""
        for argument in self.parser.contexts[name].args.values():
            if argument.kind is list:
                argument.kind = str
            elif argument.incrementable:
                argument.kind = bool
        super().print_task_help(name)

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


def meant(word: str, known: Iterable[str]) -> str:
    """A question for the nearest of the known words, if one is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" did you mean {near[0]}?" if near else ""


def bad_number(error: ValueError, argv: list[str]) -> str:
    """Which option was to be a number; Python names the value alone."""
    value = str(error).rpartition(": ")[2]
    option = re.search(rf"(\S+)[= ]{re.escape(value[1:-1])}( |$)", " ".join(argv))
    return f"{option[1]}: {value} is not a whole number" if option else str(error)


def completion_script(shell: str) -> str:
    """What a shell is to read, so that Tab completes tasks and options.

    Raises ``ParseError`` for a shell that there is none for.
    """
    scripts = {path.stem: path for path in sorted(COMPLETION.iterdir())}
    if shell not in scripts:
        raise ParseError(f"there is no completion for {shell}; write one of: {', '.join(scripts)}")
    return scripts[shell].read_text(encoding="utf-8")
