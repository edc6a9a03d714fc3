"""The demo in a fresh checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from harness import ROOT, call
from isolated_host import start_engine_and_registry

if TYPE_CHECKING:
    from pathlib import Path

    from harness import ProjectFactory
    from isolated_host import IsolatedHost

    from guix_tasks.bootstrap.registry import LocalRegistry

pytestmark = pytest.mark.engine


def copy_checkout(directory: Path, material: Path) -> Path:
    """Copy the files of the Git repository, and the channels, which the demo would download."""
    argv = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listing.split("\0")):
        if (ROOT / name).exists():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, directory / name)
    ignore = shutil.ignore_patterns("logs", "failed", "digests")
    target = directory / material.relative_to(ROOT)
    shutil.copytree(material, target, symlinks=True, ignore=ignore)
    return directory


@pytest.mark.both_stores
def test_demo_runs_in_a_fresh_checkout(
    host: IsolatedHost, registry: LocalRegistry, factory: ProjectFactory, tmp_path: Path
) -> None:
    start_engine_and_registry(host, registry.directory / "root", factory)
    directory = copy_checkout(tmp_path / "checkout", factory.offline)
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
    result = call([*host.prefix, *inv], host.environment, 480)
    assert result.returncode == 0, result.stderr
    image, _, digest = result.stdout.strip().splitlines()[-1].partition("@")
    assert (image, digest[:7]) == ("localhost:5055/guix-tasks-demo", "sha256:")
    assert "Hello, world!" in result.stdout + result.stderr
