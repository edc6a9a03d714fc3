"""``.env.example`` agrees with the definitions of settings."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from docs.tables import example_text
from guix_tasks.settings import DECLARATIONS, load_settings

if TYPE_CHECKING:
    from pathlib import Path


def test_as_an_env_file_it_changes_nothing(tmp_path: Path) -> None:
    defaults = load_settings(tmp_path, tmp_path, {})
    (tmp_path / ".env").write_text(example_text())
    settings = load_settings(tmp_path, tmp_path, {})
    assert settings == defaults
    assert settings.notes == ()


def test_with_every_line_in_use_it_is_still_well_formed(tmp_path: Path) -> None:
    defaults = load_settings(tmp_path, tmp_path, {})
    (tmp_path / ".env").write_text(re.sub(r"(?m)^#([A-Z])", r"\1", example_text()))
    assert load_settings(tmp_path, tmp_path, {}) == defaults


def test_every_key_stands_below_its_documentation() -> None:
    for name, setting in DECLARATIONS.items():
        key = f"{name}={setting.default}" if setting.default else f"#{name}="
        assert f"\n# {setting.doc}\n{key}\n" in example_text()
        assert setting.doc.endswith(".")
        assert len(setting.doc) < 100


def test_no_key_is_missing() -> None:
    some = {"IMAGE", "GUIX_PACKAGES", "DOCKER_PASSWORD", "DOCKER_PASSWORD_FILE", "DOCKER_HOST"}
    assert some < set(DECLARATIONS)
