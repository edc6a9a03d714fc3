"""A buildx that builds nothing: it takes down how it is called, and answers as buildx does.

It is a program (``buildx_stub.py``), since that is how buildx is spoken to.  It knows builders,
which it makes and forgets, and what a bake would leave behind: a log, reports, an archive, the
file with the digest.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guix_tasks.buildkit.buildx import Buildx

if TYPE_CHECKING:
    from guix_tasks.ui.console import Console

NAME = "insecure-builder"
SOCKET = "unix:///fake.sock"
DIGEST = f"sha256:{'d' * 64}"
FLAGS = "--allow-insecure-entitlement=security.insecure --allow-insecure-entitlement=network.host"
OPTIONS = {
    "env.BUILDKIT_STEP_LOG_MAX_SIZE": "-1",
    "env.BUILDKIT_STEP_LOG_MAX_SPEED": "-1",
    "network": "host",
}

UNKNOWN_FLAG = "ERROR: failed to solve: dockerfile parse error on line 2: unknown flag: --security"
REFUSED = "ERROR: failed to solve: granting entitlement security.insecure is not allowed"
NO_IMAGE = "ERROR: failed to solve: docker/dockerfile:1: failed to resolve source metadata for x"

STUB = Path(__file__).with_name("buildx_stub.py")


@dataclass(frozen=True)
class Call:
    """A call of buildx, and what it found."""

    argv: list[str]
    env: dict[str, str]
    stdin: str
    files: dict[str, str]
    """The directory of a bake, by path."""
    config: str
    """Docker's own configuration file."""

    @property
    def text(self) -> str:
        return " ".join(self.argv)

    @property
    def target(self) -> dict[str, Any]:
        """What is asked of the target that is baked."""
        found = json.loads(self.files["bake.json"])["target"][self.argv[-1]]
        assert isinstance(found, dict)
        return found

    @property
    def base(self) -> dict[str, Any]:
        found = json.loads(self.files["bake.json"])["target"]["base"]
        assert isinstance(found, dict)
        return found


@dataclass
class FakeBuildx:
    """The program, what it knows, and what it was asked."""

    directory: Path
    platforms: tuple[str, ...] = ("linux/amd64", "linux/386")
    """Of the nodes that it makes."""
    answers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True)
        (self.directory / "calls").touch()
        answers = {"user": "0", "name": "root", **self.answers}
        self._write(
            builders={}, rules=[], selected="mine", digest=DIGEST, answers=answers,
            platforms=self.platforms,
        )  # fmt: skip
        argv = shlex.join([sys.executable, "-SE", str(STUB), str(self.directory)])
        self.path.write_text(f'#!/bin/sh\nexec {argv} "$@"\n')
        self.path.chmod(0o755)

    @property
    def path(self) -> Path:
        return self.directory / "docker-buildx"

    @property
    def state(self) -> dict[str, Any]:
        found = json.loads((self.directory / "state.json").read_text())
        assert isinstance(found, dict)
        return found

    def _write(self, **state: object) -> None:
        (self.directory / "state.json").write_text(json.dumps(state))

    def change(self, **state: object) -> None:
        self._write(**{**self.state, **state})

    def answer(self, **answers: str) -> None:
        self.change(answers={**self.state["answers"], **answers})

    def fail(
        self,
        says: str,
        *has: str,
        without: tuple[str, ...] = (),
        once: bool = False,
        sleeps: float = 0,
    ) -> None:
        """Let a call with these words fail."""
        rule = {"says": says, "has": has, "without": without, "once": once, "sleeps": sleeps}
        self.change(rules=[*self.state["rules"], rule])

    def add(self, name: str = NAME, driver: str = "docker-container", **more: object) -> None:
        """Let there be one more node of a builder, as ``buildx.setup`` would have made it."""
        builders = self.state["builders"]
        builder = builders.setdefault(name, {"name": name, "driver": driver, "nodes": []})
        node: dict[str, object] = {
            "name": f"{name}{len(builder['nodes'])}",
            "endpoint": SOCKET,
            "status": "running",
            "flags": FLAGS if driver == "docker-container" else "",
            "options": OPTIONS if driver == "docker-container" else {},
            "platforms": self.platforms,
            "fixed": (),
            **more,
        }
        builder["nodes"].append(node)
        self.change(builders=builders)

    def program(
        self, console: Console | None = None, *, perform: bool = True, own: str = "default"
    ) -> Buildx:
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.directory / "home"),
            "DOCKER_CONFIG": str(self.directory / "config"),
        }
        return Buildx(str(self.path), environment, own, console, perform)

    def calls(self, verb: str = "") -> list[Call]:
        lines = (self.directory / "calls").read_text().splitlines()
        calls = [Call(**json.loads(line)) for line in lines]
        return [call for call in calls if not verb or call.argv[0] == verb]

    def verbs(self) -> list[str]:
        return [call.argv[0] for call in self.calls()]

    def changes(self) -> list[str]:
        """The calls that changed something."""
        changing = [c for c in self.calls() if c.argv[0] in ("create", "rm", "use", "bake")]
        boots = [call for call in self.calls("inspect") if "--bootstrap" in call.argv]
        return [call.text for call in self.calls() if call in changing + boots]
