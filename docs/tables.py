"""Writes the README's tables of tasks and settings, which are made from the code.

``python docs/tables.py`` brings README.md up to date; a test holds it against the code.
"""

from __future__ import annotations

import re
from pathlib import Path

from guix_tasks.settings import settings_reference
from guix_tasks.tasks import ns

README = Path(__file__).parent.parent / "README.md"


def task_table() -> str:
    rows = sorted((name, _first_line(ns[name].__doc__)) for name in ns.task_names)
    # The tasks of the root come before those of a namespace, as in `inv --list`.
    rows.sort(key=lambda row: "." in row[0])
    return "\n".join(
        ["| task | what it does |", "|---|---|"] + [f"| `{n}` | {d} |" for n, d in rows]
    )


def settings_table() -> str:
    rows = (
        f"| `{name}` | {f'`{default}`' if default else ''} | {doc} |"
        for name, default, doc in settings_reference()
    )
    return "\n".join(["| setting | default | what it does |", "|---|---|---|", *rows])


def filled(readme: str) -> str:
    """The README with its tables as they should be."""
    for name, table in (("tasks", task_table()), ("settings", settings_table())):
        pattern = f"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        readme = re.sub(pattern, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", readme, flags=re.DOTALL)
    return readme


def _first_line(docstring: str | None) -> str:
    return (docstring or "").strip().splitlines()[0].rstrip(".")


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
