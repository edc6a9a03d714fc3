"""A buildx that builds nothing: it records its calls and answers as buildx does.

It creates and removes builders, and a bake writes the log, the reports, the archive and the
metadata file. ``Program`` runs it in the process of the tests.
"""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from guix_tasks.buildkit.buildx import Buildx

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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
VERSION = "github.com/docker/buildx v0.26.1 0123abc\n"
DISK_USAGE = (
    "ID  RECLAIMABLE  SIZE  LAST ACCESSED\nx  true  8.2kB\nReclaimable:\t1GB\nTotal:\t\t1.23GB\n"
)


class Program(subprocess.Popen[Any]):
    """Replacement of ``Popen``: a fake program is a function, and a shell prints its outcome.

    A Python interpreter for each call would take most of the time of the tests.
    """

    FAKES: ClassVar[dict[str, FakeBuildx]] = {}

    def __init__(self, argv: Any, *positional: Any, **options: Any) -> None:
        fake = None if isinstance(argv, (str, os.PathLike)) else self.FAKES.get(argv[0])
        if fake:
            argv = fake.run(argv[1:], options.get("env") or os.environ)
        super().__init__(argv, *positional, **options)


PRINT = """
[ -z "$1" ] || cat >"$1"
[ "$2" = 0 ] || exec sleep "$2"
printf %s "$3"
printf %s "$4" >&2
exit "$5"
"""


@dataclass(frozen=True)
class Outcome:
    """Output and exit status of a call."""

    out: str = ""
    err: str = ""
    status: int = 0
    seconds: float = 0
    stdin: Path | None = None
    """File for the standard input, or None if it is not read."""

    def argv(self) -> list[str]:
        words = (self.stdin or "", self.seconds, self.out, self.err, self.status)
        return ["/bin/sh", "-c", PRINT, "docker-buildx", *map(str, words)]


@dataclass(frozen=True)
class Rule:
    """Outcome of the calls that have certain words."""

    outcome: Outcome
    required: tuple[str, ...]
    excluded: tuple[str, ...]
    once: bool

    def matches(self, argv: Sequence[str]) -> bool:
        def contains(word: str) -> bool:
            is_verb = word.isalpha() and word.islower()
            return word in argv if is_verb else word in " ".join(argv)

        return all(map(contains, self.required)) and not any(map(contains, self.excluded))


@dataclass(frozen=True)
class Call:
    """A call of buildx, with the content of its files."""

    argv: list[str]
    env: dict[str, str]
    files: dict[str, str]
    """Files in the directory of a bake, by path."""
    config: str
    """Docker's configuration file."""
    input: Path | None

    @property
    def text(self) -> str:
        return " ".join(self.argv)

    @property
    def stdin(self) -> str:
        return self.input.read_text() if self.input else ""

    @property
    def target(self) -> dict[str, Any]:
        """The definition of the baked target."""
        target = json.loads(self.files["bake.json"])["target"][self.argv[-1]]
        assert isinstance(target, dict)
        return target

    @property
    def base(self) -> dict[str, Any]:
        target = json.loads(self.files["bake.json"])["target"]["base"]
        assert isinstance(target, dict)
        return target


@dataclass
class FakeBuildx:
    """The program, its builders, and its recorded calls."""

    directory: Path
    platforms: tuple[str, ...] = ("linux/amd64", "linux/386")
    """Platforms of the nodes that ``create`` adds."""
    answers: dict[str, str] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    rules: list[Rule] = field(default_factory=list)
    recorded_calls: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True)
        self.answers = {"user": "0", "name": "root", **self.answers}
        self.state = {"builders": {}, "selected": "mine"}
        Program.FAKES[self.path] = self

    @property
    def path(self) -> str:
        return str(self.directory / "docker-buildx")

    def change(self, **state: object) -> None:
        self.state |= state

    def answer(self, **answers: str) -> None:
        self.answers |= answers

    def fail(
        self,
        error: str,
        *required: str,
        without: tuple[str, ...] = (),
        once: bool = False,
        sleeps: float = 0,
    ) -> None:
        """Make calls with these words fail."""
        outcome = Outcome(err=f"{error}\n", status=1, seconds=sleeps)
        self.rules.append(Rule(outcome, required, without, once))

    def print(self, out: str, *required: str) -> None:
        """Make calls with these words print a text."""
        self.rules.append(Rule(Outcome(out), required, (), once=False))

    def add(self, name: str = NAME, driver: str = "docker-container", **fields: object) -> None:
        """Add a node to a builder, as ``buildx.setup`` does."""
        builder = self._builder(name, driver)
        node: dict[str, object] = {
            "name": f"{name}{len(builder['nodes'])}",
            "endpoint": SOCKET,
            "status": "running",
            "flags": FLAGS if driver == "docker-container" else "",
            "options": OPTIONS if driver == "docker-container" else {},
            "platforms": list(self.platforms),
            "fixed": (),
            **fields,
        }
        builder["nodes"].append(node)

    def _builder(self, name: str, driver: str) -> dict[str, Any]:
        new = {"name": name, "driver": driver, "nodes": []}
        builder = self.state["builders"].setdefault(name, new)
        assert isinstance(builder, dict)
        return builder

    def program(
        self, console: Console | None = None, *, perform: bool = True, builder: str = "default"
    ) -> Buildx:
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.directory / "home"),
            "DOCKER_CONFIG": str(self.directory / "config"),
        }
        return Buildx(self.path, environment, builder, console, perform)

    def calls(self, verb: str = "") -> list[Call]:
        return [call for call in self.recorded_calls if not verb or call.argv[0] == verb]

    def verbs(self) -> list[str]:
        return [call.argv[0] for call in self.recorded_calls]

    def changes(self) -> list[str]:
        """The calls that changed the state of buildx."""
        changing = [c for c in self.calls() if c.argv[0] in ("create", "rm", "use", "bake")]
        boots = [call for call in self.calls("inspect") if "--bootstrap" in call.argv]
        return [call.text for call in self.calls() if call in changing + boots]

    # --- Calls ---

    def run(self, argv: list[str], environment: Mapping[str, str]) -> list[str]:
        """Perform a call and return the command that prints its outcome."""
        options = dict(word[2:].split("=", 1) for word in argv if re.match("--.*=", word))
        stdin = self.directory / f"stdin-{len(self.recorded_calls)}" if argv[0] == "build" else None
        self._record(argv, environment, options, stdin)
        outcome = self._outcome(argv, options)
        return replace(outcome, stdin=stdin).argv()

    def _record(
        self,
        argv: list[str],
        environment: Mapping[str, str],
        options: Mapping[str, str],
        stdin: Path | None,
    ) -> None:
        config = Path(environment.get("DOCKER_CONFIG", "/none")) / "config.json"
        files = {}
        if argv[0] == "bake":
            directory = Path(options["file"]).parent
            paths = [path for path in sorted(directory.rglob("*")) if path.is_file()]
            files = {
                str(path.relative_to(directory)): path.read_text(errors="replace") for path in paths
            }
        text = config.read_text() if config.exists() else ""
        self.recorded_calls.append(Call(argv, dict(environment), files, text, stdin))

    def _outcome(self, argv: list[str], options: Mapping[str, str]) -> Outcome:
        for rule in self.rules:
            if rule.matches(argv):
                if rule.once:
                    self.rules.remove(rule)
                return rule.outcome
        verb, last = argv[0], argv[-1]
        if verb in ("inspect", "rm") and last not in self.state["builders"]:
            return Outcome(err=f'ERROR: no builder "{last}" found\n', status=1)
        if verb == "inspect":
            return self._inspect(last, bootstrap="--bootstrap" in argv)
        if verb == "create":
            self._create(argv, options)
        elif verb == "rm":
            del self.state["builders"][last]
        elif verb == "use":
            self.change(selected=last)
        elif verb == "bake":
            self._bake(last, options)
            return Outcome(err=f"#1 baking {last}\n")
        return Outcome({"du": DISK_USAGE, "version": VERSION}.get(verb, ""))

    def _inspect(self, name: str, *, bootstrap: bool) -> Outcome:
        builder = self.state["builders"][name]
        if bootstrap:
            for node in builder["nodes"]:
                node["status"] = "running"
        head = f"Name:   {builder['name']}\nDriver: {builder['driver']}\n\nNodes:\n"
        out = head + "".join(map(self._node_text, builder["nodes"]))
        return Outcome(out, "#1 booting buildkit\n" * bootstrap)

    @staticmethod
    def _node_text(node: dict[str, Any]) -> str:
        platforms = [f"{platform}*" for platform in node["fixed"]]
        platforms += [name for name in node["platforms"] if name not in node["fixed"]]
        options = " ".join(f'{name}="{value}"' for name, value in node["options"].items())
        running = node["status"] == "running"
        fields = {
            "Name": node["name"],
            "Endpoint": node["endpoint"],
            "Driver Options": options,
            "Status": node["status"],
            "BuildKit daemon flags": node["flags"],
            "BuildKit version": "v0.26.2" if running else "",
            "Platforms": ", ".join(platforms) if running else "",
        }
        lines = [f"{name}: {value}" for name, value in fields.items() if value]
        return "\n".join([*lines, "Labels:", " org.mobyproject.buildkit.worker: oci", ""])

    def _create(self, argv: list[str], options: Mapping[str, str]) -> None:
        driver_options = [w.partition("=")[2] for w in argv if w.startswith("--driver-opt=")]
        name = options["name"]
        nodes = self._builder(name, options["driver"])["nodes"]
        platforms = options.get("platform", "").split(",")
        nodes.append(
            {
                "name": options.get("node", f"{name}{len(nodes)}"),
                "endpoint": argv[argv.index("--") + 1] if "--" in argv else "of-the-driver",
                "status": "inactive",
                "flags": options.get("buildkitd-flags", ""),
                "options": dict(next(csv.reader([o]))[0].split("=", 1) for o in driver_options),
                "platforms": list(self.platforms),
                "fixed": [platform for platform in platforms if platform],
            }
        )

    def _bake(self, target: str, options: Mapping[str, str]) -> None:
        file = Path(options["file"])
        definition = json.loads(file.read_text())["target"][target]
        for output in definition["output"]:
            words = next(csv.reader([output]))
            fields = dict(word.split("=", 1) for word in words)
            if fields["type"] == "local":
                self._report(
                    Path(fields["dest"]), definition, file.with_name("Dockerfile").read_text()
                )
            elif "dest" in fields:
                Path(fields["dest"]).write_text("an archive")
        result = {target: {"containerimage.digest": DIGEST}}
        Path(options["metadata-file"]).write_text(json.dumps(result))

    def _report(self, directory: Path, definition: dict[str, Any], dockerfile: str) -> None:
        stages = ("pull", "install")
        names = ["created", *(stage for stage in stages if f" AS {stage}\n" in dockerfile)]
        if definition["target"] == "asked":
            names = ["user", "name", "environment", "keys"] + ["resolved"] * (
                " AS resolving\n" in dockerfile
            )
        for platform in definition["platforms"]:
            platform_name = platform.replace("/", "_")
            reports = directory / platform_name if len(definition["platforms"]) > 1 else directory
            reports.mkdir(parents=True, exist_ok=True)
            for name in names:
                answer = self.answers.get(f"{platform_name}/{name}", self.answers.get(name, ""))
                (reports / name).write_text(f"{answer}\n")
