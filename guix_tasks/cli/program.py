"""Invoke's program with a grouped task list, completion and one-line errors."""

from __future__ import annotations

import difflib
import re
import sys
from collections import Counter
from functools import wraps
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import invoke
from invoke.exceptions import CollectionNotFound, Exit, ParseError
from invoke.program import Program
from invoke.util import helpline

from guix_tasks.cli.tasks import grouped, ns
from guix_tasks.commands.init import mentions_guix_tasks, project_directory
from guix_tasks.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

COMPLETION = Path(__file__).with_name("completion")


def main(name: str = "guix-tasks") -> None:
    """Run Invoke with the project's ``tasks.py``, or with these tasks if it lacks them."""
    try:
        custom = mentions_guix_tasks(project_directory(Path.cwd()))
    except FileNotFoundError:
        print("error: the current directory was deleted; change to another one", file=sys.stderr)
        sys.exit(UsageError.exit_code)
    GroupedProgram(namespace=None if custom else ns, name=name, binary=name).run()


def one_line_errors(step: Callable[..., None]) -> Callable[..., None]:
    """Wrap a step of the program so that an error of the user exits with one line."""

    @wraps(step)
    def wrapper(program: GroupedProgram, *arguments: object) -> None:
        try:
            step(program, *arguments)
        except ParseError as error:
            fail(program.advice(error))
        except ValueError as error:
            fail(bad_number(error, program.argv))
        except Exit as error:
            if error.message and error.code == 1:  # raised by Invoke
                fail(error.message)
            raise

    return wrapper


def fail(message: str) -> NoReturn:
    raise Exit(f"error: {message}", UsageError.exit_code) from None


class GroupedProgram(Program):
    """Program of ``./inv`` and ``guix-tasks``; Invoke's ``inv`` also works."""

    parse_collection = one_line_errors(Program.parse_collection)
    parse_cleanup = one_line_errors(Program.parse_cleanup)

    @one_line_errors
    def parse_core(self, argv: list[str] | None) -> None:
        """Parse Invoke's options; let Python write bytecode where it does so by default.

        Invoke turns that off, so that each call of a checkout would compile all modules.
        """
        setting = sys.dont_write_bytecode
        super().parse_core(argv)
        sys.dont_write_bytecode = setting

    @one_line_errors
    def parse_tasks(self) -> None:
        """Parse the tasks; to Invoke, a list option without a value is an empty list."""
        super().parse_tasks()
        lists = [argument for task in self.tasks for argument in task.args.values()
                 if argument.kind is list]  # fmt: skip
        words = takewhile(lambda word: word != "--", self.argv)
        given = Counter(word.partition("=")[0] for word in words)
        for name in {argument.name for argument in lists}:
            values = sum(len(argument.value) for argument in lists if argument.name == name)
            if given[f"--{name}"] > values:
                fail(f"--{name} needs a value")

    def run(self, argv: list[str] | None = None, exit: bool = True) -> None:  # noqa: A002 -- Invoke's
        """Run a command line; exit silently if the reader of the output has ended."""
        try:
            try:
                super().run(argv, exit)
            finally:
                print(end="", flush=True)
        except BrokenPipeError:
            from guix_tasks.cli.errors import end_output

            sys.exit(end_output())

    def advice(self, error: ParseError) -> str:
        """Return the error of a command line and the most similar valid word."""
        no_value = re.match(r"Flag <Argument: ([\w-]+).*> needed value", str(error))
        if no_value:
            return f"--{no_value[1].replace('_', '-')} needs a value"
        unknown = re.fullmatch("No idea what (.+) is!", str(error), re.DOTALL)
        if not unknown:
            return str(error)
        word = unknown[1][1:-1]
        context = error.context or self.initial_context
        task = context.name
        if word.startswith("-"):
            flags = [*context.flags, *self.initial_context.flags]
            message = f"{task} has no option {word}" if task else f"there is no option {word}"
            option = f"--help {task}" if task else "--help"
            return f"{message};{suggestion(word, flags)} `{self.binary} {option}` lists all"
        if task == "run":
            return f"write the command after two dashes: `{self.binary} run -- {word}`"
        hint = suggestion(word, self.parser.contexts)
        return f"there is no task '{word}';{hint} `{self.binary} --list` lists all"

    def load_collection(self) -> None:
        """Load the tasks of the project, or print how to create one."""
        try:
            super().load_collection()
        except (SyntaxError, ImportError, ValueError) as error:
            fail(f"tasks.py: {error}")
        except Exit as error:
            if isinstance(error.__context__, CollectionNotFound):
                fail(f"{error.message} `{self.binary} init` creates a project")
            raise

    def execute(self) -> None:
        """Run the tasks; after a failure outside of a project, print how to create one."""
        try:
            super().execute()
        except Exit as error:
            directory = project_directory(Path.cwd())
            is_project = any((directory / name).exists() for name in ("tasks.py", "tasks", ".env"))
            if error.code == UsageError.exit_code and not is_project:
                hint = f"this directory has no project; `{self.binary} init` creates one"
                print(f"note: {hint}", file=sys.stderr)
            raise

    def no_tasks_given(self) -> None:
        """List the tasks instead of Invoke's options."""
        self.list_tasks()
        print(f"Options of a task: `{self.binary} --help TASK`; of all: `{self.binary} --help`.")
        raise Exit

    def print_task_help(self, name: str) -> None:
        """Print the help of a task; fix Invoke's values of list and counter options."""
        for argument in self.parser.contexts[name].args.values():
            if argument.kind is list:
                argument.kind = str
            elif argument.incrementable:
                argument.kind = bool
        super().print_task_help(name)

    def list_flat(self) -> None:
        """Print the tasks in groups, or a requested part of them like Invoke."""
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
        """Print a completion script if requested.

        Invoke's scripts call a program of a fixed name; these call the one that was typed, for
        example ``./inv``.
        """
        super().parse_core_args()
        if shell := self.args["print-completion-script"].value:
            print(completion_script(shell), end="")
            raise Exit

    def print_version(self) -> None:
        """Print the versions of this package and of Invoke."""
        from importlib.metadata import PackageNotFoundError, version  # slow and rarely needed

        try:
            print(f"guix-tasks {version('guix-tasks')}, Invoke {invoke.__version__}")
        except PackageNotFoundError:
            print(f"guix-tasks, a checkout; Invoke {invoke.__version__}")


def suggestion(word: str, words: Iterable[str]) -> str:
    """Return a question for the most similar of ``words``, or an empty string."""
    matches = difflib.get_close_matches(word, list(words), n=1)
    return f" did you mean {matches[0]}?" if matches else ""


def bad_number(error: ValueError, argv: list[str]) -> str:
    """Return an error that names the option; Python's has only the value."""
    value = str(error).rpartition(": ")[2]
    option = re.search(rf"(\S+)[= ]{re.escape(value[1:-1])}( |$)", " ".join(argv))
    return f"{option[1]}: {value} is not a whole number" if option else str(error)


def completion_script(shell: str) -> str:
    """Return the script with which a shell completes tasks and options.

    Raise ``ParseError`` if the shell is not supported.
    """
    scripts = {path.stem: path for path in sorted(COMPLETION.iterdir())}
    if shell not in scripts:
        raise ParseError(f"there is no completion for {shell}; use one of: {', '.join(scripts)}")
    return scripts[shell].read_text(encoding="utf-8")
