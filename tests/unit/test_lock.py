"""One `inv` at a time changes an image."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest
from fake_engine import Heard

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
    """Another process, that works on the image until its input ends."""
    pipe = subprocess.PIPE
    started = subprocess.Popen([sys.executable, "-c", HOLD], stdin=pipe, stdout=pipe, text=True)
    assert started.stdout
    assert started.stdout.readline() == "held\n"
    return started


def come_second(console: Heard, image: str = "image:t") -> threading.Thread:
    def work() -> None:
        with image_lock(console.print, "engine", image, "install"):
            console.print("at work")

    second = threading.Thread(target=work)
    second.start()
    return second


def test_second_run_waits_and_names_the_first(holder: subprocess.Popen[str]) -> None:
    console = Heard()
    second = come_second(console)
    second.join(timeout=0.3)
    who = f"`inv pull` (process {holder.pid})"
    assert console.text == f"install: waiting for {who}, which uses image:t\n"
    holder.communicate("")
    second.join(timeout=10)
    assert console.text.endswith("at work\n")


def test_one_that_is_killed_is_waited_for_no_longer(holder: subprocess.Popen[str]) -> None:
    console = Heard()
    second = come_second(console)
    holder.kill()
    holder.communicate()
    second.join(timeout=10)
    assert console.text.endswith("at work\n")


def test_another_image_is_not_waited_for(holder: subprocess.Popen[str]) -> None:
    console = Heard()
    come_second(console, "image:other").join(timeout=10)
    assert console.text == "at work\n"
    holder.communicate("")


def test_an_error_lets_go_of_it() -> None:
    with (
        pytest.raises(ValueError, match="x"),
        image_lock(Heard().print, "engine", "image:t", "pull"),
    ):
        raise ValueError("x")
    console = Heard()
    come_second(console).join(timeout=10)
    assert console.text == "at work\n"


def test_where_no_lock_can_be_made_the_work_goes_on(cache: Path) -> None:
    files.cache_home().parent.mkdir(exist_ok=True)
    files.cache_home().write_text("in its place")
    console = Heard()
    come_second(console).join(timeout=10)
    assert console.text == "at work\n"
