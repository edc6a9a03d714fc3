"""Temporary directories, which hold secrets, and what becomes of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from guix_tasks import files
from guix_tasks.files import temporary_directory

HOLD = """
import sys, time
from guix_tasks.files import temporary_directory
with temporary_directory() as place:
    (place / "secret").write_text("hunter2")
    print(place, flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_temporary_directory_is_this_users_alone_and_gone_at_the_end(place: Path) -> None:
    with temporary_directory() as made:
        assert made.parent == place
        assert made.stat().st_mode & 0o777 == 0o700
        (made / "x" / "y").mkdir(parents=True)
        (made / "x").chmod(0o500)
    assert list(place.iterdir()) == []


def test_it_is_gone_after_an_error(place: Path) -> None:
    def interrupted() -> None:
        with temporary_directory():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(place.iterdir()) == []


def test_it_is_gone_after_a_kill(place: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        stdout=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(place), "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert process.stdout
    with process:
        made = Path(process.stdout.readline().strip())
        assert (made / "secret").exists()
        process.send_signal(signal.SIGKILL)
        end = time.monotonic() + 20
        while made.exists():
            assert time.monotonic() < end, "it is still there"
            time.sleep(0.02)
    assert list(place.iterdir()) == []


def test_leftover_directory_is_removed_by_the_next_call(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a power cut; what is fresh may be somebody's who is about to lock it."""
    left = place / f"{files._PREFIX}left"
    (left / "deep").mkdir(parents=True)
    (left / "deep" / "secret").write_text("hunter2")
    (place / f"{files._PREFIX}file").touch()
    (place / f"{files._PREFIX}link").symlink_to(place / "other")
    (place / "other").mkdir()
    with temporary_directory():
        assert left.exists()
    monkeypatch.setattr(files, "_UNLOCKED_TIME", 0)
    with temporary_directory() as first, temporary_directory() as second:
        assert first.exists()
        assert second.exists()
        assert not left.exists()
    assert sorted(each.name for each in place.iterdir()) == [
        f"{files._PREFIX}file", f"{files._PREFIX}link", "other",
    ]  # fmt: skip


def test_a_directory_of_the_user_is_no_leftover(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("guix-tasks", "guix-tasks-clone", ".guix-tasks-notes")
    for name in names:
        (place / name).mkdir()
    monkeypatch.setattr(files, "_UNLOCKED_TIME", 0)
    with temporary_directory():
        assert all((place / name).exists() for name in names)
