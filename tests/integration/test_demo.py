"""The demo, as whoever has a fresh checkout runs it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from harness import ROOT, call
from island import settle

if TYPE_CHECKING:
    from pathlib import Path

    from harness import Workshop
    from island import Island

    from guix_tasks.bootstrap.registry import LocalRegistry

pytestmark = pytest.mark.engine


def checkout(directory: Path, material: Path) -> Path:
    """What Git has, or will have, and the channels, which it would take the network to make."""
    files = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(files, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, found.split("\0")):
        if (ROOT / name).exists():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, directory / name)
    others = shutil.ignore_patterns("logs", "failed", "digests")
    place = directory / material.relative_to(ROOT)
    shutil.copytree(material, place, symlinks=True, ignore=others)
    return directory


@pytest.mark.both_stores
def test_the_demo_in_a_fresh_checkout(
    island: Island, registry: LocalRegistry, workshop: Workshop, tmp_path: Path
) -> None:
    settle(island, registry.directory / "root", workshop)
    directory = checkout(tmp_path / "checkout", workshop.offline)
    inv = [
        "sh",
        "-c",
        'cd "$0" && exec "$@"',
        str(directory),
        sys.executable,
        "-m",
        "invoke",
        "demo",
    ]
    made = call([*island.enter, *inv], island.environment, 480)
    assert made.returncode == 0, made.stderr
    image, _, digest = made.stdout.strip().splitlines()[-1].partition("@")
    assert (image, digest[:7]) == ("localhost:5055/guix-tasks-demo", "sha256:")
    assert "Hello, world!" in made.stdout + made.stderr
