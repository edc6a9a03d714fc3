"""The lock of an image: one `inv` at a time changes the image."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest
from fake_engine import BufferConsole

from guix_tasks import files
from guix_tasks.files import image_lock

if TYPE_CHECKING:
    from pathlib import Path

HOLD = """
import sys
from guix_tasks.ui.console import Console
from guix_tasks.files import image_lock
with image_lock(Console().print, "engine", "image:t", "pull"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def holder() -> subprocess.Popen[str]:
    """Another process that holds the lock until its input ends."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdin=pipe, stdout=pipe, text=True)
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    return process


def start_second_run(console: BufferConsole, image: str = "image:t") -> threading.Thread:
    def work() -> None:
        with image_lock(console.print, "engine", image, "install"):
            console.print("at work")

    second = threading.Thread(target=work)
    second.start()
    return second


def test_second_run_waits_and_names_the_first(holder: subprocess.Popen[str]) -> None:
    console = BufferConsole()
    second = start_second_run(console)
    second.join(timeout=0.3)
    first_run = f"`inv pull` (process {holder.pid})"
    assert console.text == f"install: waiting for {first_run}, which uses image:t\n"
    holder.communicate("")
    second.join(timeout=10)
    assert console.text.endswith("at work\n")


def test_killed_run_releases_the_lock(holder: subprocess.Popen[str]) -> None:
    console = BufferConsole()
    second = start_second_run(console)
    holder.kill()
    holder.communicate()
    second.join(timeout=10)
    assert console.text.endswith("at work\n")


def test_run_on_another_image_does_not_wait(holder: subprocess.Popen[str]) -> None:
    console = BufferConsole()
    start_second_run(console, "image:other").join(timeout=10)
    assert console.text == "at work\n"
    holder.communicate("")


def test_error_releases_the_lock() -> None:
    with (
        pytest.raises(ValueError, match="x"),
        image_lock(BufferConsole().print, "engine", "image:t", "pull"),
    ):
        raise ValueError("x")
    console = BufferConsole()
    start_second_run(console).join(timeout=10)
    assert console.text == "at work\n"


def test_unavailable_lock_is_ignored(cache: Path) -> None:
    files.cache_home().parent.mkdir(exist_ok=True)
    files.cache_home().write_text("a file")
    console = BufferConsole()
    start_second_run(console).join(timeout=10)
    assert console.text == "at work\n"
