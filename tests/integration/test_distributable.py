"""The example of a project that ships a tarball, by the commands of its README."""

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
from harness import ROOT, call, one_error
from planted import PLANTED

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import NewProject
    from harness import Docker, Project, Result

pytestmark = pytest.mark.engine

EXAMPLE = ROOT / "examples" / "distributable"
WELCOME = "Please welcome Ada!\nPlease welcome Grace!\n"


def commands_of_readme() -> str:
    return "\n".join(
        re.findall(
            r"^```sh\n(.*?)^```$", (EXAMPLE / "README.md").read_text(), re.MULTILINE | re.DOTALL
        )
    )


@dataclass
class Announce:
    """The example in a directory of its own, and what the engine has of it."""

    project: Project
    programs: Path
    image: str
    """A Debian without Guix."""

    @property
    def directory(self) -> Path:
        return self.project.directory / "announce"

    def run(self, script: str, directory: Path | None = None, **more: str) -> Result:
        """Run shell commands as a person would who has activated the virtual environment."""
        settings = {name: self.project.settings[name] for name in ("IMAGE", "CACHE_VOLUME")}
        environment = {**self.project.environment, **settings, **more}
        environment["PATH"] = f"{self.programs}:{environment['PATH']}"
        self.project._look()
        result = call(["sh", "-euc", script], environment, 300, directory or self.directory)
        self.project._look()
        PLANTED.look_at_output(script, result.stdout, result.stderr)
        return result

    def inv(self, arguments: str, **more: str) -> Result:
        more = {"ENV_FILE": "offline.env", "CHECK_IMAGE": self.image, **more}
        return self.run(f"inv {arguments}", None, **more)

    def ok(self, arguments: str, **more: str) -> str:
        result = self.inv(arguments, **more)
        assert result.returncode == 0, result.stderr
        return result.stderr

    def edit(self, name: str, before: str, after: str) -> None:
        path = self.directory / name
        assert before in path.read_text()
        path.write_text(path.read_text().replace(before, after))


@pytest.fixture
def announce(
    new_project: NewProject, programs_of_wheel: Path, plain_image: str, tmp_path: Path
) -> Announce:
    if not shutil.which("gpg"):
        pytest.skip("make-channel.sh signs with gpg, which is not on this machine")
    return Announce(new_project(), programs_of_wheel, plain_image)


def unpacked(docker: Docker, tarball: Path, name: str, *command: str) -> str:
    """What a command says where there is a tarball, and nothing of guix-tasks."""
    docker.ok("import", str(tarball), name)
    try:
        return docker.run(name, *command).stdout
    finally:
        docker("rmi", name)


def test_from_an_empty_folder_to_a_tested_tarball(announce: Announce, docker: Docker) -> None:
    project, directory = announce.project, announce.directory
    cache = f"{project.repository}-cache"
    result = announce.run(
        commands_of_readme(),
        project.directory,
        GUIX_TASKS=str(ROOT),
        CACHE_IMAGE=cache,
        ENV_FILE="",
    )
    assert result.returncode == 0, result.stderr
    # --- what is there
    (tarball,) = (directory / "out").glob("*.tar.gz")
    assert re.fullmatch(r"announce-1\.0-\w+-linux\.tar\.gz", tarball.name)
    digest = hashlib.sha256(tarball.read_bytes()).hexdigest()
    assert (directory / f"out/{tarball.name}.sha256").read_text() == f"{digest}  {tarball.name}\n"
    PLANTED.look_at_file(tarball)
    # --- it was tried where there is no Guix, and really runs there
    assert result.stderr.count(": passed") == 2
    assert WELCOME in result.stdout
    assert docker.run(announce.image, "ls", "/gnu").returncode != 0
    name = f"{project.repository}:packed"
    assert unpacked(docker, tarball, name, "/opt/announce/bin/announce") == ""
    # --- what is released
    (entry,) = json.loads((directory / "out/build.json").read_text()).values()
    assert entry["url"] == f"https://example.org/announce/1.0/{tarball.name}"
    assert entry["sha256"] == digest
    assert [each["name"] for each in entry["channels"]] == ["guix", "offline", "example"]
    lock = (directory / "channels.lock.scm").read_text()
    assert all(each["commit"] in lock for each in entry["channels"])
    # --- nothing changed
    assert announce.ok("pull deps build").count(": up to date") == 3
    # --- the sources change: the dependencies do not
    announce.edit("src/announce.scm", "(display (greeting name))", '(display "Hear, hear! ")')
    assert "stale: src/announce.scm changed" in announce.inv("status").stdout
    assert "build is stale" in one_error(announce.inv("pack"), 2)
    said = announce.ok("deps build", CACHE_IMAGE=cache)
    assert "deps: up to date" in said
    assert "build: up to date" not in said
    # --- a package of the project's own channel, as any other
    announce.ok("pack --package=phrases")
    assert [*(directory / "out").glob("phrases-0.1-*.tar.gz")]
    # --- a dependency changes
    announce.edit("guix.scm", "phrases))\n  (home", "phrases hello))\n  (home")
    announce.edit("guix.scm", "(gnu packages guile)", "(gnu packages base) (gnu packages guile)")
    assert "deps is stale (guix.scm changed)" in one_error(announce.inv("build"), 2)
    assert "deps: up to date" not in announce.ok("deps build", CACHE_IMAGE=cache)
    # --- on an engine that has nothing of it, only what is in no cache is made
    announce.ok("clean")
    assert project.tags() == {}
    announce.edit("src/announce.scm", "Hear, hear! ", "Silence! ")
    said = announce.ok("build", CACHE_IMAGE=cache)
    assert f"deps: taken from {cache}:deps-" in said
    assert "pull: in a " not in said
    assert "build: in a " in said


def test_what_a_test_is_refused_or_fails_with(
    announce: Announce, base_image: str, offline: Path
) -> None:
    project, directory = announce.project, announce.directory
    shutil.copytree(EXAMPLE, directory)
    (directory / "offline").symlink_to(offline)
    (directory / "channel.git").mkdir()
    assert "run `inv pack` first" in one_error(announce.inv("bare"), 2)
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
    with project.unharmed():
        error = one_error(announce.inv(f"check --image={base_image}"), 2)
        assert f"{base_image} contains /gnu" in error
        error = one_error(announce.inv("check"), 1)
        assert f"ended with status 127 in a container of {announce.image}" in error
        # The command is not there, and so the container does not start.
        assert announce.inv("bare").returncode in (1, 3)
    (out / "a.tar.gz").write_bytes(b"another")
    assert "differs from the packed file" in one_error(announce.inv("bare"), 2)


def empty_tarball() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("empty"))
    return buffer.getvalue()


def test_the_channel_is_made_once_and_then_updated(announce: Announce) -> None:
    directory = announce.directory
    shutil.copytree(EXAMPLE, directory)
    made = announce.run("sh make-channel.sh && sh make-channel.sh")
    assert made.returncode == 0, made.stderr
    assert made.stdout.count("added the channel to channels.scm") == 1
    assert made.stdout.count("channel.git is at commit") == 2
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
