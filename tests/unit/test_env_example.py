"""Agreement of ``.env.example`` with the definitions of settings."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from docs.tables import example_text
from guix_tasks.settings import DECLARATIONS, load_settings

if TYPE_CHECKING:
    from pathlib import Path


def test_example_file_changes_no_setting(tmp_path: Path) -> None:
    defaults = load_settings(tmp_path, tmp_path, {})
    (tmp_path / ".env").write_text(example_text())
    settings = load_settings(tmp_path, tmp_path, {})
    assert settings == defaults
    assert settings.notes == ()


def test_example_file_with_every_line_enabled_is_valid(tmp_path: Path) -> None:
    defaults = load_settings(tmp_path, tmp_path, {})
    (tmp_path / ".env").write_text(re.sub(r"(?m)^#([A-Z])", r"\1", example_text()))
    assert load_settings(tmp_path, tmp_path, {}) == defaults


def test_key_follows_its_documentation() -> None:
    for name, setting in DECLARATIONS.items():
        key = f"{name}={setting.default}" if setting.default else f"#{name}="
        assert f"\n# {setting.doc}\n{key}\n" in example_text()
        assert setting.doc.endswith(".")
        assert len(setting.doc) < 100


def test_common_settings_are_declared() -> None:
    common = {"IMAGE", "GUIX_PACKAGES", "DOCKER_PASSWORD", "DOCKER_PASSWORD_FILE", "DOCKER_HOST"}
    assert common < set(DECLARATIONS)
