"""The README's tables are those of the code."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_tables_are_up_to_date() -> None:
    tables = runpy.run_path(str(ROOT / "docs" / "tables.py"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tables["filled"](readme) == readme, "run: python docs/tables.py"
