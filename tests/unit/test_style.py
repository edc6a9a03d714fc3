"""Names and language: the words that this project does not use, and how docstrings begin."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

WORDS = re.compile(
    r"\b((?<!\")mends?(?!\")|mended|anew|whom|near by|be had|told|wishes|but for|beside|folders?)\b"
    r"|, too\b(?! long| large| small| many)",
    re.IGNORECASE,
)
"""Words that read like a translation."""

FIRST_WORDS = ("What", "Where", "Those", "Let", "That", "Whose")
"""How a docstring does not begin: a relative clause stands for no noun."""


def sources() -> list[Path]:
    code = [
        *(ROOT / "guix_tasks").rglob("*"),
        *(ROOT / "dev").rglob("*.py"),
        *(path for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__)),
    ]
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
    kinds = (".py", ".sh", ".scm", ".md", ".yml", ".txt")
    return [each for each in (*code, *pages) if each.suffix in kinds and "/out/" not in str(each)]


def test_text_has_no_word_of_the_list() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]}"
        for path in sources()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if (match := WORDS.search(line))
    ]
    assert found == []


def test_docstrings_begin_with_a_noun_or_a_verb() -> None:
    kinds = (ast.FunctionDef, ast.ClassDef, ast.Module)
    found = [
        f"{path.relative_to(ROOT)}: {text.splitlines()[0]}"
        for path in sources()
        if path.suffix == ".py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, kinds) and (text := ast.get_docstring(node))
        if text.split()[0] in FIRST_WORDS
    ]
    assert found == []


def test_text_of_files_and_programs_does_not_depend_on_the_locale() -> None:
    """A call without an encoding uses that of ``LC_ALL``."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources()
        if path.suffix == ".py" and not path.is_relative_to(ROOT / "tests")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and _uses_locale(node)
    ]
    assert found == []


def _uses_locale(call: ast.Call) -> bool:
    options = {option.arg: ast.unparse(option.value) for option in call.keywords}
    name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    # The function `files.read_text` has UTF-8 as its default; `universal_newlines` is not used.
    is_text = name in ("read_text", "write_text") or options.get("text") == "True"
    return is_text and "encoding" not in options
