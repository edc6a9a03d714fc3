"""The ways to make an image, and the testbed that they have in common."""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from measure import Command, Containers, Meter, SubstituteServer, Wire

from dev.offline import make_material
from guix_tasks import files
from guix_tasks.bootstrap.base_image import BASE_TAG, make_base
from guix_tasks.bootstrap.engine import private_engine
from guix_tasks.bootstrap.registry import LocalRegistry, local_registry
from guix_tasks.buildkit import buildx
from guix_tasks.cli.session import helpers
from guix_tasks.engine.discovery import find_engine
from guix_tasks.engine.docker import DockerEngine
from guix_tasks.guix import channels

if TYPE_CHECKING:
    from collections.abc import Iterator

    from guix_tasks.ui.console import Console

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = "benchmark"
OLD_CHANNELS = "channels-old.scm"
NEW_CHANNELS = "channels.scm"
"""Channels files in the material; the second takes the newest commits."""
_HERE = Path(__file__).parent
_MARK = "benchmark-"


@dataclass(frozen=True)
class Goal:
    """What the image is to be made of."""

    packages: tuple[str, ...]
    channels: str
    """A channels file in the material."""
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    """Packages that the last change added and removed."""
    base: str = ""
    """Content of a file that the base image has in addition."""


class Contestant(Protocol):
    """One way to make an image and push it."""

    name: str
    registry: Registry

    def measures(self, scenario: str) -> bool:
        """Whether what it does in a scenario can be held against the others."""

    def clear(self) -> None:
        """Forget all that was ever made."""

    def move(self) -> None:
        """Remove all that is on the engine, but not in the registry, as on another machine."""

    def command(self, scenario: str, goal: Goal) -> Command: ...


@dataclass(frozen=True)
class Testbed:
    """One engine, the material, and a directory that is deleted at the end."""

    engine: DockerEngine
    docker: str
    directory: Path
    material: Path
    substitutes: SubstituteServer
    meter: Meter
    environment: dict[str, str]
    """For the commands that are measured."""
    direct: dict[str, str]
    """The same, but past the wire."""

    def call(self, *arguments: str) -> str:
        """One call of the docker command line that is not measured; what it printed."""
        done = subprocess.run(
            (self.docker, *arguments), env=self.direct, capture_output=True, text=True, check=False
        )
        return done.stdout if done.returncode == 0 else ""

    def change_base(self, dockerfile: Path, content: str) -> None:
        """Let a Dockerfile write a file, if there is content for it."""
        lines = [line for line in dockerfile.read_text().splitlines() if "/srv/file" not in line]
        more = [f"RUN echo {content} >/srv/file"] if content else []
        dockerfile.write_text("\n".join([*lines, *more]) + "\n")

    def dockerfile(self, name: str) -> Path:
        """Return the project's Dockerfile in words that no builder has in its cache."""
        text = (ROOT / "Dockerfile").read_text()
        path = self.directory / name / "Dockerfile"
        path.parent.mkdir(exist_ok=True)
        mark = f"{_MARK}{self.directory.name}-{secrets.token_hex(4)}"
        path.write_text(text.replace("\nRUN ", f"\nRUN : {mark}; "))
        return path

    def images(self) -> set[str]:
        """Return the images of all contestants that a tag points at."""
        wanted = f"reference=localhost:*/{REPOSITORY}"
        rows = self.call("images", "--no-trunc", "--filter", wanted, "--format", "{{.ID}} {{.Tag}}")
        return {row.split()[0] for row in rows.splitlines() if not row.endswith("<none>")}

    def drop(self, images: set[str]) -> None:
        """Remove images that have lost their tags; those that they were made from go along."""
        for image in images - self.images():
            self.call("rmi", "--force", image)

    def forget(self, repository: str) -> None:
        """Remove all images of a repository, also those that have lost their tags."""
        found = self.call("images", "--no-trunc", "--quiet", repository).split()
        for image in dict.fromkeys(found):  # the newest first, which are made from the others
            self.call("rmi", "--force", image)

    def prune(self) -> None:
        """Remove from the builder's cache the steps that bear our mark, and all that follow."""
        parents, found = {}, set()
        for record in self.call("buildx", "du", "--builder=default", "--verbose").split("\n\n"):
            name = re.search(r"^ID:\s+(\w+)", record, re.MULTILINE)
            if name:
                parents[name[1]] = re.findall(r"^ - (\w+)", record, re.MULTILINE)
                if f"{_MARK}{self.directory.name}" in record:
                    found.add(name[1])
        while more := {name for name, its in parents.items() if found & {*its}} - found:
            found |= more
        if found:
            which = f"--filter=id~=^({'|'.join(sorted(found))})$"
            self.call("buildx", "prune", "--builder=default", "--force", "--all", which)


@contextmanager
def testbed(console: Console) -> Iterator[Testbed]:
    """The engine that guix-tasks would use, with all that is needed on it."""
    address = find_engine(os.environ, private_engine().socket)
    if not address.url.startswith("unix://"):
        raise RuntimeError(f"an engine on this machine is needed; {address.url} is not")
    docker = shutil.which("docker") or private_engine().docker_path()
    if docker is None:
        raise RuntimeError("the shell lines need the docker command line, which is not here")
    engine = DockerEngine(address, helpers(os.environ))
    if engine.image(BASE_TAG) is None:
        make_base(engine, console, BASE_TAG)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gt-")))
        environment = {
            "PATH": os.pathsep.join((str(Path(docker).parent), os.environ.get("PATH", os.defpath))),
            "HOME": str(directory),
            "DOCKER_HOST": f"unix://{directory / 'engine'}",
            "DOCKER_CONFIG": str(directory / "docker"),
            "XDG_CACHE_HOME": str(directory / "cache"),
            "PYTHONPATH": str(ROOT),
        }
        direct = {**environment, "DOCKER_HOST": address.url}
        _link_buildx(directory / "docker")
        wire = Wire(Path(address.url.removeprefix("unix://")), directory / "engine")
        stack.callback(wire.close)
        containers = Containers(str(docker), direct)
        stack.callback(containers.close)
        meter = Meter(wire, containers, directory / "log")
        material = _material(engine, console)
        substitutes = SubstituteServer(material / "substitutes")
        stack.callback(substitutes.close)
        bed = Testbed(
            engine, str(docker), directory, material, substitutes, meter, environment, direct
        )
        stack.callback(bed.prune)
        yield bed


def _link_buildx(configuration: Path) -> None:
    """Give the docker command line the plugin that guix-tasks finds, so that all have the same."""
    program = buildx.find_program(os.environ, private_engine().buildx_path())
    if program:
        plugins = configuration / "cli-plugins"
        plugins.mkdir(parents=True)
        (plugins / buildx.PROGRAM).symlink_to(Path(program).resolve())


def _material(engine: DockerEngine, console: Console) -> Path:
    """Substitutes, and channels with the packages to measure with, in two commits each."""
    directory = files.cache_home() / "benchmark"
    ignore = shutil.ignore_patterns("out", "channels.lock.scm")
    shutil.copytree(ROOT / "examples/offline", directory, ignore=ignore, dirs_exist_ok=True)
    shutil.copy(_HERE / "packages.scm", directory / "channels/offline/offline/benchmark.scm")
    make_material(engine, console, BASE_TAG, directory)
    out = directory / "out"
    text = (out / "channels.scm").read_text()
    for name in channels(text):
        # The first commit is the one that introduces the channel.
        before, _, after = text.partition(f"(name '{name})")
        first = after.partition('make-channel-introduction\n    "')[2].partition('"')[0]
        text = f'{before}(name \'{name})\n  (commit "{first}"){after}'
    (out / OLD_CHANNELS).write_text(text)
    return out


@dataclass
class Registry:
    """A registry of one contestant's own, that has the base image and nothing else."""

    bed: Testbed
    name: str
    port: int = field(init=False)

    def __post_init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    @property
    def image(self) -> str:
        return f"localhost:{self.port}/{REPOSITORY}"

    @property
    def data(self) -> Path:
        return self._local.directory / "data"

    @property
    def _local(self) -> LocalRegistry:
        return LocalRegistry(self.bed.directory / f"registry-{self.name}", self.port)

    @contextmanager
    def running(self, console: Console) -> Iterator[None]:
        """Run it, with the base image in it as in the registry that it was pulled from."""
        self._local.directory.mkdir()
        if local_registry().installed():
            (self._local.directory / "root").symlink_to(local_registry().directory / "root")
        self._local.up(console)
        self._log_in()
        base = f"localhost:{self.port}/base"
        try:
            self.bed.call("tag", BASE_TAG, base)
            if not self.bed.call("push", base):
                raise RuntimeError(f"{base} could not be pushed to a registry of our own")
            self.data.rename(self._seed)
            self.empty()
            yield
        finally:
            self.bed.call("rmi", base)
            self._local.down(console)

    def _log_in(self) -> None:
        """Let docker, and whatever reads its configuration, know the account."""
        account = self._local.account.credentials()
        file = Path(self.bed.environment["DOCKER_CONFIG"]) / "config.json"
        known = json.loads(file.read_text())["auths"] if file.exists() else {}
        if account:
            pair = base64.b64encode(f"{account.username}:{account.password}".encode()).decode()
            known[f"localhost:{self.port}"] = {"auth": pair}
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"auths": known}))

    def empty(self) -> None:
        """Leave nothing in it but the base image."""
        shutil.rmtree(self.data, ignore_errors=True)
        shutil.copytree(self._seed, self.data, copy_function=os.link)

    @property
    def _seed(self) -> Path:
        return self._local.directory / "seed"


@dataclass
class ShellLines:
    """docker build, run, commit, run, commit, push: as everyone writes them."""

    bed: Testbed
    registry: Registry
    name = "shell lines"
    _dockerfile: Path = field(init=False)

    def measures(self, _scenario: str) -> bool:
        return True

    def clear(self) -> None:
        self.move()
        self._dockerfile = self.bed.dockerfile("shell")

    def move(self) -> None:
        self.bed.call("rm", "--force", self._work)
        self.bed.forget(self.registry.image)

    def command(self, scenario: str, goal: Goal) -> Command:
        # They know no way to leave a step out but by hand, on top of what is there.
        by_hand = scenario in ("added", "removed", "change", "fresh")
        added, removed = (goal.added, goal.removed) if by_hand else (goal.packages, ())
        options = [f"--install={package}" for package in added]
        options += [f"--remove={package}" for package in removed]
        self.bed.change_base(self._dockerfile, goal.base and f"{goal.base} shell")
        environment = {
            **self.bed.environment,
            "IMAGE": self.registry.image,
            "BASE_IMAGE": BASE_TAG,
            "DOCKERFILE": str(self._dockerfile),
            "CONTEXT": str(ROOT),
            "MATERIAL": str(self.bed.material),
            "SUBSTITUTE_URLS": self.bed.substitutes.url,
            "CHANNELS": goal.channels,
            "OPTIONS": " ".join(options),
            "WORK": self._work,
        }
        steps = ("install", "push") if by_hand else ("build", "pull", "install", "push")
        if scenario == "fresh":
            steps = ("fetch", *steps)
        return Command((str(_HERE / "shell-lines.sh"), *steps), self.bed.directory, environment)

    @property
    def _work(self) -> str:
        return f"{self.bed.directory.name}-work"


@dataclass
class Inv:
    """guix-tasks."""

    bed: Testbed
    registry: Registry
    name = "inv"
    _dockerfile: Path = field(init=False)

    def measures(self, _scenario: str) -> bool:
        return True

    def clear(self) -> None:
        self.move()
        self._folder.mkdir(exist_ok=True)
        shutil.copy(ROOT / "tasks.py", self._folder)
        # The commits come from a lock; the channels themselves are free to move.
        shutil.copy(self.bed.material / OLD_CHANNELS, self._folder / "channels.lock.scm")
        self._dockerfile = self.bed.dockerfile("inv")

    def move(self) -> None:
        if self._settings.exists():
            self._clean()
        for repository in (self.registry.image, self._cache):
            self.bed.forget(repository)
        shutil.rmtree(self.bed.directory / "cache", ignore_errors=True)

    def _clean(self) -> None:
        clean = self._command("clean")
        done = subprocess.run(
            clean.argv, cwd=clean.directory, env=self.bed.direct, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"inv clean failed: {done.stderr}")

    def command(self, scenario: str, goal: Goal) -> Command:
        material = self.bed.material
        settings = {
            "IMAGE": self.registry.image,
            "BASE_IMAGE": BASE_TAG,
            "DOCKERFILE": self._dockerfile,
            "BUILD_CONTEXT": ROOT,
            "MOUNTS": f"{material}:/offline:ro",
            "NETWORK": "host",
            "GUIX_CHANNELS": material / NEW_CHANNELS,
            "GUIX_SUBSTITUTE_URLS": self.bed.substitutes.url,
            "GUIX_SUBSTITUTE_KEYS": material / "substitutes.pub",
            "GUIX_PACKAGES": " ".join(goal.packages),
            "CACHE_IMAGE": self._cache if scenario in ("shared", "fresh") else "",
        }
        self._settings.write_text("".join(f"{name}={v}\n" for name, v in settings.items()))
        self.bed.change_base(self._dockerfile, goal.base and f"{goal.base} inv")
        if scenario in ("cold", "base", "shared", "fresh"):
            return self._command("base", "pull", "install", "push")
        update = ("--update",) if scenario == "channel" else ()
        return self._command("pull", *update, "install", "push")

    def _command(self, *tasks: str) -> Command:
        return Command((sys.executable, "-m", "invoke", *tasks), self._folder, self.bed.environment)

    @property
    def _cache(self) -> str:
        return f"{self.registry.image}-cache"

    @property
    def _folder(self) -> Path:
        return self.bed.directory / "project"

    @property
    def _settings(self) -> Path:
        return self._folder / ".env"


@dataclass
class Buildx:
    """docker buildx build with insecure steps, where there is a builder that can.

    Where there is none, a plain Dockerfile stands in for a build that is all in the cache.
    """

    bed: Testbed
    registry: Registry
    name = "buildx"
    refusal: str = field(init=False)
    """Why it cannot run Guix in its steps; empty where it can."""
    _syntax: str = field(init=False, default="")
    _base: str = field(init=False)

    # As many layers as the real one has.
    _STAND_IN = "RUN echo pulled >/var/tmp/pull\nRUN echo installed >/var/tmp/install\n"

    def __post_init__(self) -> None:
        """Ask the engine's own builder, with its own frontend and with the newest."""
        newest = "# syntax=docker/dockerfile:1\n"
        self.refusal = self._probe("")
        if self.refusal and not self._probe(newest):
            self.refusal, self._syntax = "", newest

    def _probe(self, syntax: str) -> str:
        """Why the builder refuses an insecure step."""
        directory = str(self.bed.dockerfile("probe").parent)
        mark = f"{_MARK}{self.bed.directory.name}"
        done = subprocess.run(
            (*self._build, "--allow=security.insecure", "--file=-", directory),
            input=f"{syntax}FROM {BASE_TAG}\nRUN --security=insecure : {mark}\n",
            env=self.bed.direct, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.stderr.strip().rpartition("\n")[2] if done.returncode else ""

    @property
    def note(self) -> str:
        """What a reader of the results must know."""
        return self.refusal and (
            f"no insecure step in a Dockerfile here ({self.refusal}); of buildx there is only "
            "a plain Dockerfile of as many layers, all in the cache, built and pushed"
        )

    def measures(self, scenario: str) -> bool:
        return not self.refusal or scenario == "nothing"

    def clear(self) -> None:
        self.move()
        self._base = self._syntax + self.bed.dockerfile("buildx").read_text()

    def move(self) -> None:
        self.bed.forget(self.registry.image)

    def command(self, _scenario: str, goal: Goal) -> Command:
        dockerfile = self.bed.directory / "buildx/Dockerfile"
        dockerfile.write_text(self._base + (self._STAND_IN if self.refusal else self._steps(goal)))
        allow = () if self.refusal else ("--allow=security.insecure",)
        argv = (
            *self._build, *allow, f"--build-arg=BASE_IMAGE={BASE_TAG}", f"--file={dockerfile}",
            f"--build-context=offline={self.bed.material}", f"--tag={self.registry.image}",
            "--push", str(ROOT),
        )  # fmt: skip
        return Command(argv, self.bed.directory, self.bed.environment)

    @property
    def _build(self) -> tuple[str, ...]:
        return (
            self.bed.docker, "buildx", "build", "--builder=default", "--progress=plain",
            "--network=none",
        )  # fmt: skip

    @staticmethod
    def _steps(goal: Goal) -> str:
        run = (
            "RUN --security=insecure --mount=type=bind,from=offline,target=/offline"
            " GUIX_SUBSTITUTE_URLS=file:///offline/substitutes /entry-point.sh"
        )
        return (
            f"{run} sh -c 'guix archive --authorize </offline/substitutes.pub &&"
            f" guix pull --channels=/offline/{goal.channels}'\n"
            f"{run} guix package --install {' '.join(goal.packages)}\n"
        )
