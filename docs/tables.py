"""Generate the reference of tasks, settings, exit codes and ``tasks.py``, and ``.env.example``.

``python -m docs.tables`` updates docs/ and .env.example.  With ``--check`` it
only reports outdated files.  A unit test compares them with the code.
"""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import fields
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from guix_tasks import errors
from guix_tasks.cli.tasks import grouped
from guix_tasks.settings import DECLARATIONS, Settings, values
from guix_tasks.tasks import add_stage, add_test, ns
from guix_tasks.ui.console import Display

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from invoke.parser.argument import Argument

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))


KINDS = {
    "str": "text",
    "int": "whole number",
    "bool": "`yes` or `no`",
    "Path": "path",
    "ImageReference": "image",
    "Secret": "text, secret",
    "Mount": "`SOURCE:TARGET[:ro]`",
    "Listen": "`ADDRESS:PORT`",
    "Node": "`ENDPOINT[,NAME=VALUE]`",
    "Platform": "platform",
    **{
        name: ", ".join(f"`{word.value}`" for word in kind)
        for name, kind in {**vars(values), "Display": Display}.items()
        if isinstance(kind, type) and issubclass(kind, Enum) and kind is not Enum
    },
    "Mapping[str, str]": "`NAME=VALUE`, any number",
    "Mapping[str, Path]": "`NAME=PATH`, any number",
}
"""Names of types in the documentation, by type of a field of ``Settings``."""


def task_table() -> str:
    rows = []
    for title, names in grouped(ns.task_names):
        rows += [(f"*{title}*", ""), *((f"`{name}`", _summary(name)) for name in names)]
    return _table(("task", "description"), rows)


def task_reference() -> str:
    parts = []
    for title, names in grouped(ns.task_names):
        parts += [f"## {title}", *map(_one_task, names)]
    return "\n\n".join(parts)


def example_text() -> str:
    """Return the content of ``.env.example``."""
    lines = [
        "# Settings of guix-tasks with their defaults. Copy this file to .env.",
        "#",
        "# Precedence, lowest first: .env, .env.local, the files listed in the variable ENV_FILE",
        "# (separated by commas), the environment, the options of a task.",
        "#",
        "# Relative paths start from the directory of the file in which they are written. List",
        "# items are separated by spaces; quote an item that contains spaces. ${NAME} expands to",
        "# a variable or to a setting further up.",
    ]
    for name, setting in DECLARATIONS.items():
        if setting.section:
            lines += ["", f"# --- {setting.section} ---"]
        key = f"{name}={setting.default}" if setting.default else f"#{name}="
        lines += ["", f"# {setting.doc}", key]
    return "\n".join(lines) + "\n"


def exit_codes() -> str:
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    codes = {
        error.__dict__["exit_code"]: (error.__doc__ or "").splitlines()[0].rstrip(".")
        for error in classes
        if "exit_code" in error.__dict__ and error is not errors.GuixTasksError
    }
    rows = [("0", "Done"), *((str(code), doc) for code, doc in sorted(codes.items()))]
    return _table(("exit code", "meaning"), rows)


def settings_reference_table() -> str:
    types = {field.name.upper(): str(field.type) for field in fields(Settings)}
    header = ("setting", "type", "default", "description", "example", "used by")
    sections: list[str] = []
    rows: list[tuple[str, ...]] = []
    for name, setting in DECLARATIONS.items():
        if setting.section:
            sections += [_table(header, rows)] if rows else []
            sections.append(f"## {setting.section}")
            rows = []
        kind = setting.kind or _kind(types.get(name, "str"))
        default, example = _code(setting.default), _code(setting.example)
        rows.append((_code(name), kind, default, setting.doc, example, setting.used_by))
    return "\n\n".join([*sections, _table(header, rows)])


def function_reference(function: Callable[..., None]) -> str:
    """Return the signature and the documentation of a function for ``tasks.py``."""
    parameters = inspect.signature(function).parameters.values()
    names = [str(item.replace(annotation=inspect.Parameter.empty)) for item in parameters]
    first = next(n for n, item in enumerate(parameters) if item.kind is item.KEYWORD_ONLY)
    signature = ", ".join([*names[:first], "*", *names[first:]])
    text = (inspect.getdoc(function) or "").replace("``", "`")
    return f"```python\n{function.__name__}({signature})\n```\n\n{text}"


def fill_tables(page: str) -> str:
    """Return a page with up-to-date tables."""
    for name, make in TABLES.items():
        marks = (f"<!-- {name} -->\n", f"<!-- /{name} -->")
        if all(mark in page for mark in marks):
            start, end = page.index(marks[0]) + len(marks[0]), page.index(marks[1])
            page = f"{page[:start]}{make()}\n{page[end:]}"
    return page


TABLES: dict[str, Callable[[], str]] = {
    "tasks": task_table,
    "task-reference": task_reference,
    "settings-reference": settings_reference_table,
    "exit-codes": exit_codes,
    "add-stage": partial(function_reference, add_stage),
    "add-test": partial(function_reference, add_test),
}


def _one_task(name: str) -> str:
    # The first call of get_arguments removes the help from a task, so call it only once.
    arguments = ns[name].get_arguments()
    lines = [f"### `{name}`", inspect.getdoc(ns[name].body) or ""]
    if arguments:
        rows = [(f"`{_option(item)}`", _default(item), str(item.help)) for item in arguments]
        lines.append(_table(("option", "default", "meaning"), rows))
    return "\n\n".join(lines)


def _option(argument: Argument) -> str:
    value = {str: "=TEXT", int: "=NUMBER", list: "=VALUE"}.get(argument.kind, "")
    return f"--{argument.names[0]}{'' if argument.incrementable else value}"


def _default(argument: Argument) -> str:
    return _code(str(argument.default)) if argument.default else ""


def _kind(declared: str) -> str:
    declared = declared.removesuffix(" | None")
    if item := re.fullmatch(r"tuple\[(\w+), \.\.\.\]", declared):
        return f"list of {KINDS[item[1]]}"
    return KINDS[declared]


def _summary(name: str) -> str:
    return (ns[name].__doc__ or "").strip().splitlines()[0].rstrip(".")


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *(list(row) for row in rows)]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines
    )


def main() -> None:
    pages = {page: fill_tables(page.read_text(encoding="utf-8")) for page in PAGES}
    pages[ROOT / ".env.example"] = example_text()
    stale = {page: text for page, text in pages.items() if page.read_text("utf-8") != text}
    if "--check" in sys.argv:
        names = ", ".join(str(page.relative_to(ROOT)) for page in stale)
        sys.exit(f"outdated: {names}; run python -m docs.tables" if stale else None)
    for page, text in stale.items():
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
