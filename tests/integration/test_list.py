"""``inv --list`` imports few packages and works in every directory."""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING

from harness import ROOT, call, hide_packages, inv_argv

if TYPE_CHECKING:
    from pathlib import Path


def test_list_imports_neither_the_sdk_nor_dotenv(tmp_path: Path) -> None:
    argv = [sys.executable, "-X", "importtime", *inv_argv("--list")[1:]]
    result = call(argv, {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}, 60, tmp_path)
    assert result.returncode == 0, result.stderr
    packages = set(re.findall(r"\|\s*(\w+)[\w.]*$", result.stderr, re.MULTILINE))
    assert {"invoke", "guix_tasks"} <= packages
    assert packages.isdisjoint({"docker", "requests", "urllib3", "dotenv"})


def test_list_works_without_the_sdk_and_dotenv(tmp_path: Path) -> None:
    hidden = hide_packages("docker dotenv", tmp_path)
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **hidden}
    result = call(inv_argv("--list"), env, 60, tmp_path)
    assert result.returncode == 0, result.stderr
    for name in ("base", "pull", "install", "push", "engine.up", "registry.up"):
        assert re.search(rf"^  {re.escape(name)} ", result.stdout, re.MULTILINE)


def test_list_works_in_a_checkout_with_invalid_settings(tmp_path: Path) -> None:
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "IMAGE": "Not An Image"}
    assert call([*inv_argv("--list")], env, 60, ROOT).returncode == 0


def test_demo_and_test_are_listed_only_in_a_checkout(tmp_path: Path) -> None:
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    for directory, expected in ((ROOT, {"demo", "test"}), (tmp_path, set[str]())):
        argv = [sys.executable, "-m", "guix_tasks", "--list"]
        output = call(argv, {**env, "PYTHONPATH": str(ROOT)}, 60, directory).stdout
        assert re.search("^  init ", output, re.MULTILINE)
        assert set(re.findall(r"^  (demo|test) ", output, re.MULTILINE)) == expected
