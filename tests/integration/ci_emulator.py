"""Emulation of the parts of GitHub Actions and GitLab CI that the files of ``init`` use.

Each job has a fresh checkout and a fresh home directory; jobs exchange files only as artifacts.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml
from harness import call, create_venv
from planted_secrets import PLANTED_SECRETS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from harness import Result

_SECONDS = 300


@dataclass
class Runner:
    """A machine that runs jobs, and the artifacts of the jobs."""

    directory: Path
    project: Path
    """The content of the repository."""
    python: Path
    """The virtual environment of the jobs; the first job creates it."""
    environment: Mapping[str, str]
    plugin: str = ""
    """The buildx plugin of the machine, if it has one."""
    prefix: Sequence[str] = ()
    """Arguments that run the command after them on another machine."""
    jobs: int = 0
    outputs: list[str] = field(default_factory=list)
    """The output of each step."""

    def start_job(self) -> Path:
        """Create a home directory with a checkout, and return the checkout."""
        self.jobs += 1
        home = self.directory / f"job{self.jobs}"
        plugins = home / ".docker/cli-plugins"
        plugins.mkdir(parents=True)
        if self.plugin:
            (plugins / "docker-buildx").symlink_to(self.plugin)
        shutil.copytree(self.project, home / "work")
        return home / "work"

    def run(
        self, shell: Sequence[str], script: str, checkout: Path, env: Mapping[str, str]
    ) -> Result:
        if not self.python.exists():
            create_venv(self.python)
        environment = {
            "PATH": os.pathsep.join([str(self.python / "bin"), os.environ["PATH"]]),
            "HOME": str(checkout.parent),
            "LANG": "C.UTF-8",
            "CI": "true",
            **self.environment,
            **env,
        }
        file = checkout.parent / "script"
        file.write_text(f"cd '{checkout}'\n{script}\n")
        argv = [*self.prefix, *shell, str(file)]
        result = call(argv, environment, _SECONDS, checkout)
        self.outputs.append(result.stdout + result.stderr)
        PLANTED_SECRETS.check_output(f"the step {script!r}", result.stdout, result.stderr)
        return result

    def artifact(self, name: str) -> Path:
        return self.directory / "artifacts" / name


class FailedJobError(Exception):
    """A step of a job failed; the message is the output of the step."""


# --- GitHub Actions -------------------------------------------------------------------------


@dataclass(frozen=True)
class Workflow:
    """A file of GitHub Actions, with the values of its expressions."""

    file: Mapping[str, Any]
    contexts: Mapping[str, Mapping[str, str]]
    """``vars``, ``secrets`` and ``github``."""

    @classmethod
    def read(cls, path: Path, **contexts: Mapping[str, str]) -> Workflow:
        return cls(yaml.safe_load(path.read_text()), contexts)

    def run(self, runner: Runner, job: str, row: int = 0) -> Path:
        """Run one job, or one row of its matrix, and return the checkout.

        Raise ``FailedJobError`` if a step fails.
        """
        definition = self.file["jobs"][job]
        matrix = definition.get("strategy", {}).get("matrix", {}).get("include", [{}])[row]
        contexts = {**self.contexts, "matrix": matrix, "strategy": {"job-index": str(row)}}
        env = self.environment(contexts, self.file.get("env", {}), definition.get("env", {}))
        checkout, failure = runner.start_job(), ""
        for step in definition["steps"]:
            if bool(failure) != (step.get("if") == "failure()"):
                continue
            if "run" in step:
                variables = {**env, **self.environment(contexts, step.get("env", {}))}
                # The default shell of GitHub.
                result = runner.run(["bash", "-e"], step["run"], checkout, variables)
                failure = result.stdout + result.stderr if result.returncode else ""
            else:
                action = re.split("[/@]", step["uses"])[1]
                options = self.environment(contexts, step.get("with", {}))
                ACTIONS[action](runner, checkout, options)
        if failure:
            raise FailedJobError(failure)
        return checkout

    def environment(
        self, contexts: Mapping[str, Mapping[str, str]], *mappings: Mapping[str, Any]
    ) -> dict[str, str]:
        """Return variables, or options of an action, with the values of their expressions."""
        merged = {name: str(value) for mapping in mappings for name, value in mapping.items()}
        return {name: resolve(value, contexts) for name, value in merged.items()}


def resolve(text: str, contexts: Mapping[str, Mapping[str, str]]) -> str:
    """Replace the expressions in a text by their values."""
    return re.sub(r"\$\{\{(.*?)\}\}", lambda match: _evaluate(match[1].strip(), contexts), text)


def _evaluate(expression: str, contexts: Mapping[str, Mapping[str, str]]) -> str:
    """Return the value of ``CONTEXT.NAME``, ``format(text, value)`` or ``A || B``."""
    if " || " in expression:
        values = (_evaluate(operand, contexts) for operand in expression.split(" || "))
        return next((value for value in values if value), "")
    if match := re.fullmatch(r"format\('([^']*)', ([\w.]+)\)", expression):
        return match[1].replace("{0}", _evaluate(match[2], contexts))
    name = re.fullmatch(r"(\w+)\.([\w-]+)", expression)
    assert name, f"unsupported expression: {expression}"
    return str(contexts[name[1]].get(name[2], ""))


def _upload(runner: Runner, checkout: Path, options: Mapping[str, str]) -> None:
    files = [path for path in (checkout / options["path"]).rglob("*") if path.is_file()]
    assert files or options.get("if-no-files-found") != "error", options
    if files:
        shutil.copytree(checkout / options["path"], runner.artifact(options["name"]))


def _download(runner: Runner, checkout: Path, options: Mapping[str, str]) -> None:
    assert options["merge-multiple"] == "True"
    for artifact in sorted(runner.artifact("").iterdir()):
        if fnmatch.fnmatch(artifact.name, options["pattern"]):
            shutil.copytree(artifact, checkout / options["path"], dirs_exist_ok=True)


def _skip(_runner: Runner, _checkout: Path, _options: Mapping[str, str]) -> None:
    """Do nothing: each job has a checkout and Python."""


ACTIONS = {
    "checkout": _skip,
    "setup-python": _skip,
    "upload-artifact": _upload,
    "download-artifact": _download,
}


# --- GitLab CI ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pipeline:
    """A file of GitLab CI, with the predefined variables and those of the project."""

    file: Mapping[str, Any]
    predefined: Mapping[str, str]
    project: Mapping[str, str]

    @classmethod
    def read(
        cls, path: Path, predefined: Mapping[str, str], project: Mapping[str, str]
    ) -> Pipeline:
        return cls(yaml.safe_load(path.read_text()), predefined, project)

    def variables(self, job: str, row: int = 0) -> dict[str, str]:
        """Return the variables of one job; those of the project have the highest precedence."""
        definition = self.file[job]
        matrix = definition.get("parallel", {}).get("matrix", [{}])[row]
        merged = {
            **self.predefined, **self.file["variables"], **definition.get("variables", {}),
            **matrix, **self.project,
        }  # fmt: skip
        return {name: _expand(str(value), merged) for name, value in merged.items()}

    def run(self, runner: Runner, job: str, row: int = 0) -> Path:
        """Run one job with the artifacts of earlier jobs, and return the checkout.

        Raise ``FailedJobError`` if the script fails.
        """
        definition = {**self.file.get("default", {}), **self.file[job]}
        checkout = runner.start_job()
        if runner.artifact("").exists():
            shutil.copytree(runner.artifact(""), checkout, dirs_exist_ok=True)
        script = "\n".join([*definition.get("before_script", []), *definition["script"]])
        # The shell of GitLab Runner if the image of the job has bash.
        result = runner.run(["bash", "-eo", "pipefail"], script, checkout, self.variables(job, row))
        artifacts = definition.get("artifacts", {})
        for path in artifacts.get("paths", []):
            events = {"always", "on_failure" if result.returncode else "on_success"}
            if (checkout / path).exists() and artifacts["when"] in events:
                shutil.copytree(checkout / path, runner.artifact(path), dirs_exist_ok=True)
        if result.returncode:
            raise FailedJobError(result.stdout + result.stderr)
        return checkout


def _expand(text: str, variables: Mapping[str, str]) -> str:
    """Replace the names of variables by their values, recursively."""
    return re.sub(
        r"\$\{?(\w+)\}?",
        lambda match: _expand(str(variables.get(match[1], "")), variables),
        text,
    )
