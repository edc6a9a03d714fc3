"""`inv pack` and `inv release`: packed files run on machines without Guix."""

from __future__ import annotations

import hashlib
import json
import subprocess
from typing import TYPE_CHECKING

import pytest
from harness import expect_error
from planted_secrets import PLANTED_SECRETS

if TYPE_CHECKING:
    from pathlib import Path

    from harness import Docker, Project


pytestmark = pytest.mark.engine

GREETING = "Hello, world!\n"
SYSTEMS = {"amd64": "x86_64-linux", "arm64": "aarch64-linux"}


def system(project: Project) -> str:
    architecture = project.docker.ok(
        "image", "inspect", "--format={{.Architecture}}", project.image
    )
    return SYSTEMS[architecture]


def pack(project: Project, *options: str) -> Path:
    """Run `inv pack`, check its file and checksum, and return the file."""
    with project.assert_unchanged():
        (line,) = project.ok("pack", *options).stdout.splitlines()
    path = project.directory / "out" / line.rpartition("/")[2]
    assert str(path) == line
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.with_name(f"{path.name}.sha256").read_text() == f"{digest}  {path.name}\n"
    check = ["sha256sum", "--check", "--quiet", f"{path.name}.sha256"]
    assert subprocess.run(check, cwd=path.parent, check=False).returncode == 0
    PLANTED_SECRETS.check_file(path)
    return path


def run_from(docker: Docker, tarball: Path, name: str, *command: str) -> str:
    """Return the output of a command in a container that has only the files of a tarball."""
    docker.ok("import", str(tarball), name)
    try:
        return docker.run(name, *command).stdout
    finally:
        docker("rmi", name)


def test_tarball_runs_without_guix(project: Project) -> None:
    path = pack(project, "--symlink=/bin=bin", "--symlink=/words=share")
    assert path.name == f"{project.repository.rpartition('/')[2]}-t-{system(project)}.tar.gz"
    name = f"{project.repository}:packed"
    assert run_from(project.docker, path, name, "/bin/hello") == GREETING


def test_pack_is_reproducible(project: Project) -> None:
    first = pack(project, "--package=hello")
    assert first.name == f"hello-2.12.2-{system(project)}.tar.gz"
    digest = hashlib.sha256(first.read_bytes()).hexdigest()
    first.unlink()
    project.ok("clean", "--work")
    second = pack(project, "--package=hello")
    assert hashlib.sha256(second.read_bytes()).hexdigest() == digest
    project.set(GUIX_SANDBOX="privileged")
    assert hashlib.sha256(pack(project, "--package=hello").read_bytes()).hexdigest() == digest


def test_manifest_is_packed_with_the_packages(project: Project) -> None:
    (project.directory / "manifest.scm").write_text('(specifications->manifest (list "greet"))\n')
    project.set(GUIX_MANIFEST="manifest.scm", GUIX_PACKAGES="hello")
    project.ok("install")
    path = pack(project, "--compression=none", "--name=both", "--symlink=/bin=bin")
    assert path.name == f"both-t-{system(project)}.tar"
    listing = subprocess.run(["tar", "tf", path], capture_output=True, text=True, check=True).stdout
    assert "-greet-1.0/" in listing
    name = f"{project.repository}:packed"
    assert run_from(project.docker, path, name, "/bin/hello") == GREETING


def test_failed_pack_leaves_no_file(project: Project) -> None:
    with project.assert_unchanged():
        error = expect_error(project.inv("pack", "--package=no-such-package"), 4)
    assert error.startswith("error: pack: no-such-package: unknown package, ")
    names = sorted(path.name for path in (project.directory / "out").iterdir())
    assert names == ["failed", "logs"]


def test_release_index_has_address_digest_and_channels(project: Project) -> None:
    path = pack(project, "--package=hello")
    output = project.ok("release", "--url=https://example.org/v1/").stdout
    assert output == f"{path.parent / 'build.json'}\n"
    entry = json.loads((path.parent / "build.json").read_text())[system(project)]
    assert entry["url"] == f"https://example.org/v1/{path.name}"
    assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [channel["name"] for channel in entry["channels"]] == ["guix", "offline"]
    assert all(len(channel["commit"]) == 40 for channel in entry["channels"])
    project.ok("release", "--url=https://example.org/v2/")
    assert json.loads((path.parent / "build.json").read_text())[system(project)] == entry


def test_docker_archive_runs_without_guix(project: Project) -> None:
    # Two packages, because a test of docs/how-to/small-image.md can load hello:latest meanwhile.
    path = pack(project, "--format=docker", "--max-layers=3")
    assert path.name.endswith(f"-t-{system(project)}.docker.tar.gz")
    loaded = project.docker.ok("load", f"--input={path}").removeprefix("Loaded image: ")
    name = f"{project.repository}:packed"
    project.docker.ok("tag", loaded, name)
    project.docker.ok("rmi", loaded)
    layers = project.docker.ok("image", "inspect", "--format={{len .RootFS.Layers}}", name)
    assert 1 < int(layers) <= 3
    assert project.docker.run(name, "hello").stdout == GREETING
