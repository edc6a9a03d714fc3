"""Pack and release: what Guix packs, on machines that have none."""

from __future__ import annotations

import hashlib
import json
import subprocess
from typing import TYPE_CHECKING

import pytest
from harness import one_error
from planted import PLANTED

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import NewProject
    from harness import Docker, Project


pytestmark = pytest.mark.engine

GREETING = "Hello, world!\n"
SYSTEM = {"amd64": "x86_64-linux", "arm64": "aarch64-linux"}


def system(project: Project) -> str:
    architecture = project.docker.ok(
        "image", "inspect", "--format={{.Architecture}}", project.image
    )
    return SYSTEM[architecture]


def packed(project: Project, *options: str) -> Path:
    """The one file that a pack prints."""
    with project.unharmed():
        (line,) = project.ok("pack", *options).stdout.splitlines()
    path = project.directory / "out" / line.rpartition("/")[2]
    assert str(path) == line
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.with_name(f"{path.name}.sha256").read_text() == f"{digest}  {path.name}\n"
    check = ["sha256sum", "--check", "--quiet", f"{path.name}.sha256"]
    assert subprocess.run(check, cwd=path.parent, check=False).returncode == 0
    PLANTED.look_at_file(path)
    return path


def run_from(docker: Docker, tarball: Path, name: str, *command: str) -> str:
    """What a command says in a container that has a tarball and nothing else."""
    docker.ok("import", str(tarball), name)
    try:
        return docker.run(name, *command).stdout
    finally:
        docker("rmi", name)


def test_a_tarball_runs_where_there_is_no_guix(project: Project) -> None:
    path = packed(project, "--symlink=/bin=bin", "--symlink=/words=share")
    assert path.name == f"{project.repository.rpartition('/')[2]}-t-{system(project)}.tar.gz"
    name = f"{project.repository}:packed"
    assert run_from(project.docker, path, name, "/bin/hello") == GREETING


def test_the_same_is_packed_twice(project: Project) -> None:
    once = packed(project, "--package=hello")
    assert once.name == f"hello-2.12.2-{system(project)}.tar.gz"
    digest = hashlib.sha256(once.read_bytes()).hexdigest()
    once.unlink()
    project.ok("clean", "--work")
    again = packed(project, "--package=hello")
    assert hashlib.sha256(again.read_bytes()).hexdigest() == digest
    project.set(GUIX_SANDBOX="privileged")
    assert hashlib.sha256(packed(project, "--package=hello").read_bytes()).hexdigest() == digest


def test_a_manifest_is_packed_with_the_packages(project: Project) -> None:
    (project.directory / "manifest.scm").write_text('(specifications->manifest (list "greet"))\n')
    project.set(GUIX_MANIFEST="manifest.scm", GUIX_PACKAGES="hello")
    project.ok("install")
    path = packed(project, "--compression=none", "--name=both", "--symlink=/bin=bin")
    assert path.name == f"both-t-{system(project)}.tar"
    listing = subprocess.run(["tar", "tf", path], capture_output=True, text=True, check=True).stdout
    assert "-greet-1.0/" in listing
    name = f"{project.repository}:packed"
    assert run_from(project.docker, path, name, "/bin/hello") == GREETING


def test_what_guix_cannot_pack_leaves_nothing(project: Project) -> None:
    with project.unharmed():
        said = one_error(project.inv("pack", "--package=no-such-package"), 4)
    assert said.startswith("error: pack: no-such-package: unknown package, ")
    kept = sorted(each.name for each in (project.directory / "out").iterdir())
    assert kept == ["failed", "logs"]


def test_a_stale_guix_packs_nothing(new_project: NewProject) -> None:
    project = new_project("base", "pull", "install")
    project.set(GUIX_PACKAGES="hello")
    assert "install is stale (packages changed)" in one_error(project.inv("pack"), 2)


def test_a_dry_run_packs_nothing(project: Project) -> None:
    with project.unharmed():
        said = project.ok("--dry", "pack").stderr
    assert "+ guix pack --format=tarball" in said
    assert not (project.directory / "out").exists()


def test_a_release_says_what_was_packed_and_by_which_channels(project: Project) -> None:
    path = packed(project, "--package=hello")
    said = project.ok("release", "--url=https://example.org/v1/").stdout
    assert said == f"{path.parent / 'build.json'}\n"
    entry = json.loads((path.parent / "build.json").read_text())[system(project)]
    assert entry["url"] == f"https://example.org/v1/{path.name}"
    assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [each["name"] for each in entry["channels"]] == ["guix", "offline"]
    assert all(len(each["commit"]) == 40 for each in entry["channels"])
    project.ok("release", "--url=https://example.org/v2/")
    assert json.loads((path.parent / "build.json").read_text())[system(project)] == entry


def test_an_image_runs_where_there_is_no_guix(project: Project) -> None:
    # Two packages: a test of docs/how-to/small-image.md loads hello:latest at the same time.
    path = packed(project, "--format=docker", "--max-layers=3")
    assert path.name.endswith(f"-t-{system(project)}.docker.tar.gz")
    loaded = project.docker.ok("load", f"--input={path}").removeprefix("Loaded image: ")
    name = f"{project.repository}:packed"
    project.docker.ok("tag", loaded, name)
    project.docker.ok("rmi", loaded)
    layers = project.docker.ok("image", "inspect", "--format={{len .RootFS.Layers}}", name)
    assert 1 < int(layers) <= 3
    assert project.docker.run(name, "hello").stdout == GREETING
