"""``.env.example`` agrees with the definitions of settings."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from guix_tasks.settings import example_text, load_settings, settings_reference

ROOT = Path(__file__).parents[2]
HOW = "run: python -m guix_tasks.settings > .env.example"


def test_env_example_is_up_to_date() -> None:
    assert (ROOT / ".env.example").read_text(encoding="utf-8") == example_text(), HOW


def test_the_module_prints_it() -> None:
    command = [sys.executable, "-m", "guix_tasks.settings"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "IMAGE": "Not An Image"}
    printed = subprocess.run(command, env=environ, check=True, capture_output=True, text=True)
    assert printed.stdout == example_text()


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
    for name, default, doc in settings_reference():
        key = f"{name}={default}" if default else f"#{name}="
        assert f"\n# {doc}\n{key}\n" in example_text()
        assert doc.endswith(".")
        assert len(doc) < 100


def test_no_key_is_missing() -> None:
    names = [name for name, _, _ in settings_reference()]
    assert len(names) == len(set(names))
    assert {"IMAGE", "GUIX_PACKAGES", "DOCKER_PASSWORD", "DOCKER_PASSWORD_FILE", "DOCKER_HOST"} < {
        *names
    }
