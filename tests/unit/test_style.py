"""Names and language: the words that this project does not use, and how docstrings begin."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

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
    code = [*(ROOT / "guix_tasks").rglob("*"), *(ROOT / "dev").rglob("*.py")]
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
    kinds = (".py", ".sh", ".scm", ".md", ".yml", ".txt")
    return [each for each in (*code, *pages) if each.suffix in kinds and "/out/" not in str(each)]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_text_has_no_word_of_the_list(path: Path) -> None:
    lines = enumerate(path.read_text().splitlines(), 1)
    found = [
        f"{path.relative_to(ROOT)}:{n}: {m[0]}" for n, line in lines if (m := WORDS.search(line))
    ]
    assert found == []


@pytest.mark.parametrize(
    "path",
    [each for each in sources() if each.suffix == ".py"],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_docstrings_begin_with_a_noun_or_a_verb(path: Path) -> None:
    kinds = (ast.FunctionDef, ast.ClassDef, ast.Module)
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]
    texts = [text for node in nodes if (text := ast.get_docstring(node))]
    assert [text.splitlines()[0] for text in texts if text.split()[0] in FIRST_WORDS] == []
