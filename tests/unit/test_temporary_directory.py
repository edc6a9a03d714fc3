"""Temporary directories, which contain secrets, and their removal."""

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

USE_DIRECTORY = """
import sys, time
from guix_tasks.files import temporary_directory
with temporary_directory() as directory:
    (directory / "secret").write_text("hunter2")
    print(directory, flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_directory_is_private_and_removed_at_the_end(parent: Path) -> None:
    with temporary_directory() as directory:
        assert directory.parent == parent
        assert directory.stat().st_mode & 0o777 == 0o700
        (directory / "x" / "y").mkdir(parents=True)
        (directory / "x").chmod(0o500)
    assert list(parent.iterdir()) == []


def test_directory_is_removed_after_an_error(parent: Path) -> None:
    def interrupted() -> None:
        with temporary_directory():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(parent.iterdir()) == []


def test_directory_is_removed_after_a_kill(parent: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", USE_DIRECTORY],
        stdout=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(parent), "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert process.stdout
    with process:
        directory = Path(process.stdout.readline().strip())
        assert (directory / "secret").exists()
        process.send_signal(signal.SIGKILL)
        end = time.monotonic() + 20
        while directory.exists():
            assert time.monotonic() < end, "the directory still exists"
            time.sleep(0.02)
    assert list(parent.iterdir()) == []


def test_leftover_directory_is_removed_by_the_next_call(
    parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example after a power failure. A new directory may be about to be locked."""
    leftover = parent / f"{files._PREFIX}leftover"
    (leftover / "deep").mkdir(parents=True)
    (leftover / "deep" / "secret").write_text("hunter2")
    (parent / f"{files._PREFIX}file").touch()
    (parent / f"{files._PREFIX}link").symlink_to(parent / "other")
    (parent / "other").mkdir()
    with temporary_directory():
        assert leftover.exists()
    monkeypatch.setattr(files, "_UNLOCKED_TIME", 0)
    with temporary_directory() as first, temporary_directory() as second:
        assert first.exists()
        assert second.exists()
        assert not leftover.exists()
    assert sorted(path.name for path in parent.iterdir()) == [
        f"{files._PREFIX}file", f"{files._PREFIX}link", "other",
    ]  # fmt: skip


def test_directory_of_the_user_is_kept(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("guix-tasks", "guix-tasks-clone", ".guix-tasks-notes")
    for name in names:
        (parent / name).mkdir()
    monkeypatch.setattr(files, "_UNLOCKED_TIME", 0)
    with temporary_directory():
        assert all((parent / name).exists() for name in names)
