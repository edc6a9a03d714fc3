"""How GitHub Actions and GitLab CI run a file, as far as the files of ``init`` ask for it.

Each job has a fresh checkout and a fresh home; what goes from one to another goes as an artifact.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml
from harness import call, new_python
from planted import PLANTED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from harness import Result

_SECONDS = 300


@dataclass
class Runner:
    """A machine for the jobs of a run, and the artifacts of these."""

    directory: Path
    project: Path
    """What is in the repository."""
    python: Path
    """The Python that is set up for jobs; made where there is none yet."""
    environment: Mapping[str, str]
    plugin: str = ""
    """The buildx plugin, where the machine comes with it."""
    enter: Sequence[str] = ()
    """What brings a command onto the machine, where it is not this one."""
    jobs: int = 0
    said: list[str] = field(default_factory=list)
    """The output of each step."""

    def start_job(self) -> Path:
        """A fresh home, with a fresh checkout in it."""
        self.jobs += 1
        home = self.directory / f"job{self.jobs}"
        plugins = home / ".docker/cli-plugins"
        plugins.mkdir(parents=True)
        if self.plugin:
            (plugins / "docker-buildx").symlink_to(self.plugin)
        shutil.copytree(self.project, home / "work")
        return home / "work"

    def run(self, shell: Sequence[str], script: str, place: Path, env: Mapping[str, str]) -> Result:
        if not self.python.exists():
            new_python(self.python)
        own = {
            "PATH": os.pathsep.join([str(self.python / "bin"), os.environ["PATH"]]),
            "HOME": str(place.parent),
            "LANG": "C.UTF-8",
            "CI": "true",
        }
        file = place.parent / "script"
        file.write_text(f"cd '{place}'\n{script}\n")
        environment = {**own, **self.environment, **env}
        result = call([*self.enter, *shell, str(file)], environment, _SECONDS, place)
        self.said.append(result.stdout + result.stderr)
        PLANTED.look_at_output(f"the step {script!r}", result.stdout, result.stderr)
        return result

    def artifact(self, name: str) -> Path:
        return self.directory / "artifacts" / name


class FailedJobError(Exception):
    """A job of which a step failed; the output of that step."""


# --- GitHub Actions -------------------------------------------------------------------------


@dataclass(frozen=True)
class Workflow:
    """A file of GitHub Actions, with what its expressions may ask for."""

    file: Mapping[str, Any]
    contexts: Mapping[str, Mapping[str, str]]
    """``vars``, ``secrets`` and ``github``."""

    @classmethod
    def read(cls, path: Path, **contexts: Mapping[str, str]) -> Workflow:
        return cls(yaml.safe_load(path.read_text()), contexts)

    def run(self, runner: Runner, job: str, row: int = 0) -> Path:
        """Run one job, of a matrix that of one row; its checkout.  ``FailedJobError``."""
        said = self.file["jobs"][job]
        matrix = said.get("strategy", {}).get("matrix", {}).get("include", [{}])[row]
        contexts = {**self.contexts, "matrix": matrix, "strategy": {"job-index": str(row)}}
        env = self.environment(contexts, self.file.get("env", {}), said.get("env", {}))
        place, failed = runner.start_job(), ""
        for step in said["steps"]:
            if bool(failed) != (step.get("if") == "failure()"):
                continue
            if "run" in step:
                own = {**env, **self.environment(contexts, step.get("env", {}))}
                # What GitHub runs where a step names no shell.
                result = runner.run(["bash", "-e"], step["run"], place, own)
                failed = result.stdout + result.stderr if result.returncode else ""
            else:
                action = re.split("[/@]", step["uses"])[1]
                options = self.environment(contexts, step.get("with", {}))
                ACTIONS[action](runner, place, options)
        if failed:
            raise FailedJobError(failed)
        return place

    def environment(
        self, contexts: Mapping[str, Mapping[str, str]], *said: Mapping[str, Any]
    ) -> dict[str, str]:
        """Variables, or options of an action, with their expressions resolved."""
        both = {name: str(value) for each in said for name, value in each.items()}
        return {name: resolved(value, contexts) for name, value in both.items()}


def resolved(text: str, contexts: Mapping[str, Mapping[str, str]]) -> str:
    """A text with the values of its expressions."""
    return re.sub(r"\$\{\{(.*?)\}\}", lambda found: _value(found[1].strip(), contexts), text)


def _value(expression: str, contexts: Mapping[str, Mapping[str, str]]) -> str:
    """The value of ``CONTEXT.NAME``, ``'text'``, ``format(text, value)`` or ``A || B``."""
    if " || " in expression:
        either = (_value(each, contexts) for each in expression.split(" || "))
        return next((value for value in either if value), "")
    if call_ := re.fullmatch(r"format\('([^']*)', ([\w.]+)\)", expression):
        return call_[1].replace("{0}", _value(call_[2], contexts))
    name = re.fullmatch(r"(\w+)\.([\w-]+)", expression)
    assert name, f"an expression that this does not know: {expression}"
    return str(contexts[name[1]].get(name[2], ""))


def _upload(runner: Runner, place: Path, options: Mapping[str, str]) -> None:
    there = [each for each in (place / options["path"]).rglob("*") if each.is_file()]
    assert there or options.get("if-no-files-found") != "error", options
    if there:
        shutil.copytree(place / options["path"], runner.artifact(options["name"]))


def _download(runner: Runner, place: Path, options: Mapping[str, str]) -> None:
    assert options["merge-multiple"] == "True"
    for each in sorted(runner.artifact("").iterdir()):
        if fnmatch.fnmatch(each.name, options["pattern"]):
            shutil.copytree(each, place / options["path"], dirs_exist_ok=True)


def _nothing(_runner: Runner, _place: Path, _options: Mapping[str, str]) -> None:
    """The checkout and the Python are there already."""


ACTIONS = {
    "checkout": _nothing,
    "setup-python": _nothing,
    "upload-artifact": _upload,
    "download-artifact": _download,
}


# --- GitLab CI ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pipeline:
    """A file of GitLab CI, with the variables that GitLab predefines and those of the project."""

    file: Mapping[str, Any]
    predefined: Mapping[str, str]
    project: Mapping[str, str]

    @classmethod
    def read(
        cls, path: Path, predefined: Mapping[str, str], project: Mapping[str, str]
    ) -> Pipeline:
        return cls(yaml.safe_load(path.read_text()), predefined, project)

    def variables(self, job: str, row: int = 0) -> dict[str, str]:
        """Those of one job: what is nearer to it comes before, and the project's before all."""
        said = self.file[job]
        matrix = said.get("parallel", {}).get("matrix", [{}])[row]
        both = {
            **self.predefined, **self.file["variables"], **said.get("variables", {}), **matrix,
            **self.project,
        }  # fmt: skip
        return {name: _expanded(str(value), both) for name, value in both.items()}

    def run(self, runner: Runner, job: str, row: int = 0) -> Path:
        """Run one job with the artifacts of those before it; its checkout.  ``FailedJobError``."""
        said = {**self.file.get("default", {}), **self.file[job]}
        place = runner.start_job()
        if runner.artifact("").exists():
            shutil.copytree(runner.artifact(""), place, dirs_exist_ok=True)
        script = "\n".join([*said.get("before_script", []), *said["script"]])
        # As the runner does where the job's image has bash.
        result = runner.run(["bash", "-eo", "pipefail"], script, place, self.variables(job, row))
        kept = said.get("artifacts", {})
        for path in kept.get("paths", []):
            wanted = {"always", "on_failure" if result.returncode else "on_success"}
            if (place / path).exists() and kept["when"] in wanted:
                shutil.copytree(place / path, runner.artifact(path), dirs_exist_ok=True)
        if result.returncode:
            raise FailedJobError(result.stdout + result.stderr)
        return place


def _expanded(text: str, variables: Mapping[str, str]) -> str:
    """A text with variables in the places of their names, and so on in what these say."""
    return re.sub(
        r"\$\{?(\w+)\}?",
        lambda found: _expanded(str(variables.get(found[1], "")), variables),
        text,
    )
