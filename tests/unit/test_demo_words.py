"""Last lines of the demo."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from fake_engine import Site, heard

from dev import demo
from guix_tasks.bootstrap.engine import PrivateEngine

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("private", [True, False])
def test_next_steps_explain_how_to_reach_the_private_engine(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, private: bool
) -> None:
    engine = PrivateEngine(tmp_path / "engine")
    monkeypatch.setattr(demo, "private_engine", lambda: engine)
    project = site.project()
    if private:
        monkeypatch.setattr(engine, "url", project.engine.info().url)
    demo.print_next_steps(project)
    assert (engine.shell_hint() in heard(project)) is private
