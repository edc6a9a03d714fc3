"""The commands in the README of the example that distributes a tarball."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from harness import ROOT, call, expect_error
from planted_secrets import PLANTED_SECRETS

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import NewProject
    from harness import Docker, Project, Result

pytestmark = pytest.mark.engine

EXAMPLE = ROOT / "examples" / "distributable"
WELCOME = "Please welcome Ada!\nPlease welcome Grace!\n"


def read_commands() -> str:
    return "\n".join(
        re.findall(
            r"^```sh\n(.*?)^```$", (EXAMPLE / "README.md").read_text(), re.MULTILINE | re.DOTALL
        )
    )


@dataclass
class Announce:
    """A copy of the example, with a project for its images."""

    project: Project
    programs: Path
    image: str
    """An image of Debian without Guix."""

    @property
    def directory(self) -> Path:
        return self.project.directory / "announce"

    def run(self, script: str, directory: Path | None = None, **variables: str) -> Result:
        """Run shell commands in the activated virtual environment."""
        settings = {name: self.project.settings[name] for name in ("IMAGE", "CACHE_VOLUME")}
        environment = {**self.project.environment, **settings, **variables}
        environment["PATH"] = f"{self.programs}:{environment['PATH']}"
        self.project._record_images()
        result = call(["sh", "-euc", script], environment, 300, directory or self.directory)
        self.project._record_images()
        PLANTED_SECRETS.check_output(script, result.stdout, result.stderr)
        return result

    def inv(self, arguments: str, **variables: str) -> Result:
        variables = {"ENV_FILE": "offline.env", "CHECK_IMAGE": self.image, **variables}
        return self.run(f"inv {arguments}", None, **variables)

    def ok(self, arguments: str, **variables: str) -> str:
        result = self.inv(arguments, **variables)
        assert result.returncode == 0, result.stderr
        return result.stderr

    def edit(self, name: str, old: str, new: str) -> None:
        path = self.directory / name
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))


@pytest.fixture
def announce(
    new_project: NewProject, wheel_programs: Path, plain_image: str, tmp_path: Path
) -> Announce:
    if not shutil.which("gpg"):
        pytest.skip("make-channel.sh signs with gpg, which is not on this machine")
    return Announce(new_project(), wheel_programs, plain_image)


def run_in_tarball(docker: Docker, tarball: Path, name: str, *command: str) -> str:
    """Run a command in an image that contains only a tarball, and return its output."""
    docker.ok("import", str(tarball), name)
    try:
        return docker.run(name, *command).stdout
    finally:
        docker("rmi", name)


def test_readme_builds_a_tested_tarball(announce: Announce, docker: Docker) -> None:
    project, directory = announce.project, announce.directory
    cache = f"{project.repository}-cache"
    result = announce.run(
        read_commands(),
        project.directory,
        GUIX_TASKS=str(ROOT),
        CACHE_IMAGE=cache,
        ENV_FILE="",
    )
    assert result.returncode == 0, result.stderr
    # --- the files in out/
    (tarball,) = (directory / "out").glob("*.tar.gz")
    assert re.fullmatch(r"announce-1\.0-\w+-linux\.tar\.gz", tarball.name)
    digest = hashlib.sha256(tarball.read_bytes()).hexdigest()
    assert (directory / f"out/{tarball.name}.sha256").read_text() == f"{digest}  {tarball.name}\n"
    PLANTED_SECRETS.check_file(tarball)
    # --- the tarball was tested in an image without Guix
    assert result.stderr.count(": passed") == 2
    assert WELCOME in result.stdout
    assert docker.run(announce.image, "ls", "/gnu").returncode != 0
    name = f"{project.repository}:packed"
    assert run_in_tarball(docker, tarball, name, "/opt/announce/bin/announce") == ""
    # --- the release
    (entry,) = json.loads((directory / "out/build.json").read_text()).values()
    assert entry["url"] == f"https://example.org/announce/1.0/{tarball.name}"
    assert entry["sha256"] == digest
    assert [channel["name"] for channel in entry["channels"]] == ["guix", "offline", "example"]
    lock = (directory / "channels.lock.scm").read_text()
    assert all(channel["commit"] in lock for channel in entry["channels"])
    # --- without changes, the stages are up to date
    assert announce.ok("pull deps build").count(": up to date") == 3
    # --- changed sources leave the dependencies up to date
    announce.edit("src/announce.scm", "(display (greeting name))", '(display "Hear, hear! ")')
    assert "stale: src/announce.scm changed" in announce.inv("status").stdout
    assert "build is stale" in expect_error(announce.inv("pack"), 2)
    output = announce.ok("deps build", CACHE_IMAGE=cache)
    assert "deps: up to date" in output
    assert "build: up to date" not in output
    # --- a package of the project's channel is packed like any other
    announce.ok("pack --package=phrases")
    assert [*(directory / "out").glob("phrases-0.1-*.tar.gz")]
    # --- a changed dependency
    announce.edit("guix.scm", "phrases))\n  (home", "phrases hello))\n  (home")
    announce.edit("guix.scm", "(gnu packages guile)", "(gnu packages base) (gnu packages guile)")
    assert "deps is stale (guix.scm changed)" in expect_error(announce.inv("build"), 2)
    assert "deps: up to date" not in announce.ok("deps build", CACHE_IMAGE=cache)
    # --- an empty engine runs only the stages that are not in the cache
    announce.ok("clean")
    assert project.tags() == {}
    announce.edit("src/announce.scm", "Hear, hear! ", "Silence! ")
    output = announce.ok("build", CACHE_IMAGE=cache)
    assert f"deps: taken from {cache}:deps-" in output
    assert "pull: in a " not in output
    assert "build: in a " in output


def test_errors_of_tests_are_reported(announce: Announce, base_image: str, offline: Path) -> None:
    project, directory = announce.project, announce.directory
    shutil.copytree(EXAMPLE, directory)
    (directory / "offline").symlink_to(offline)
    (directory / "channel.git").mkdir()
    assert "run `inv pack` first" in expect_error(announce.inv("bare"), 2)
    system = {"x86_64": "x86_64-linux", "aarch64": "aarch64-linux"}[os.uname().machine]
    out = directory / "out"
    out.mkdir()
    (out / "a.tar.gz").write_bytes(empty_tarball())
    packed = {
        "system": system,
        "format": "tarball",
        "file": "a.tar.gz",
        "sha256": hashlib.sha256(empty_tarball()).hexdigest(),
        "channels": [],
    }
    (out / f"build-{system}.json").write_text(json.dumps(packed))
    with project.assert_unchanged():
        error = expect_error(announce.inv(f"check --image={base_image}"), 2)
        assert f"{base_image} contains /gnu" in error
        error = expect_error(announce.inv("check"), 1)
        assert f"ended with status 127 in a container of {announce.image}" in error
        # Without the command, the container does not start.
        assert announce.inv("bare").returncode in (1, 3)
    (out / "a.tar.gz").write_bytes(b"another")
    assert "differs from the packed file" in expect_error(announce.inv("bare"), 2)


def empty_tarball() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("empty"))
    return buffer.getvalue()


def test_channel_is_created_once_and_then_updated(announce: Announce) -> None:
    directory = announce.directory
    shutil.copytree(EXAMPLE, directory)
    result = announce.run("sh make-channel.sh && sh make-channel.sh")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("added the channel to channels.scm") == 1
    assert result.stdout.count("channel.git is at commit") == 2
    channels = (directory / "channels.scm").read_text()
    assert channels.count("(name 'example)") == 1
    assert channels.count("(") == channels.count(")")
    commits = "git -C channel.git log --format=%G?%s master"
    assert len(announce.run(commits).stdout.splitlines()) == 2
    announce.edit("channel/example/packages.scm", '(version "0.1")', '(version "0.2")')
    assert announce.run("sh make-channel.sh").returncode == 0
    assert len(announce.run(commits).stdout.splitlines()) == 3
    signed = announce.run("git -C channel.git cat-file commit master").stdout
    assert "-----BEGIN PGP SIGNATURE-----" in signed
    assert (directory / "channels.scm").read_text() == channels
    assert (directory / "channel.key").stat().st_mode & 0o077 == 0
