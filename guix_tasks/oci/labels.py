"""Labels of images with the keys of OCI annotations.

The keys are defined in github.com/opencontainers/image-spec/blob/main/annotations.md.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections import defaultdict
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_PREFIX = "org.opencontainers.image."

CREATED = f"{_PREFIX}created"
REVISION = f"{_PREFIX}revision"
SOURCE = f"{_PREFIX}source"
BASE_NAME = f"{_PREFIX}base.name"
BASE_DIGEST = f"{_PREFIX}base.digest"


_CI = (
    ("GITHUB_WORKSPACE", "GITHUB_SHA", "{GITHUB_SERVER_URL}/{GITHUB_REPOSITORY}"),
    ("CI_PROJECT_DIR", "CI_COMMIT_SHA", "{CI_PROJECT_URL}"),
    ("WORKSPACE", "GIT_COMMIT", "{GIT_URL}"),
)
"""Variables of GitHub (also Forgejo and Gitea), GitLab and Jenkins: the directory of the checkout,
its revision, and its address."""

_reported: set[Path] = set()
"""Repositories about which this process has printed that git cannot read them."""


def oci_annotations(
    project: Path, environment: Mapping[str, str], report: Callable[[str], None]
) -> dict[str, str]:
    """Return the time, and the revision and address of the git repository of a project directory.

    If git cannot read the repository, they come from the variables of a CI job. Without these,
    ``report`` gets one line, once for each repository, and they are omitted.
    """
    revision, address, error = "", "", ""
    repository = _repository(project)
    if repository:
        try:
            revision = _git(repository, project, "rev-parse", "--verify", "HEAD")
            options = ("--porcelain", "--untracked-files=no")
            # Without an optional lock, git writes no file that would get the owner of this process.
            if _git(repository, project, "--no-optional-locks", "status", *options):
                revision += "-dirty"
            remote = _git(repository, project, "config", "--default=", "--get", "remote.origin.url")
            address = web_address(remote)
        except FileNotFoundError:
            error = "git is not installed"
        except OSError as failure:
            error = f"git: {failure.strerror}"
    if not revision:
        revision, address = _of_ci(project, environment)
    if repository and not revision and repository not in _reported:
        _reported.add(repository)
        report(f"note: the image gets no label with the revision of {repository}: {error}")
    annotations = {
        CREATED: datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z"),
        REVISION: revision,
        SOURCE: address,
    }
    return {name: text for name, text in annotations.items() if text}


def web_address(remote: str) -> str:
    """Return the web address of a git remote, or nothing if it is a local path."""
    address = remote.rstrip("/").removesuffix(".git")
    http = re.fullmatch(r"(https?)://(?:[^/]*@)?(.+)", address)
    if http:
        return f"{http[1]}://{http[2]}"
    ssh = re.fullmatch(r"(?:ssh://)?[\w.-]+@([\w.-]+)(?::\d+)?[:/](.+)", address)
    return f"https://{ssh[1]}/{ssh[2].lstrip('/')}" if ssh else ""


def _repository(project: Path) -> Path | None:
    """Return the nearest directory upwards with a git repository."""
    real = project.resolve()
    places = (real, *real.parents)
    return next((place for place in places if os.path.exists(place / ".git")), None)  # noqa: PTH110


def _git(repository: Path, project: Path, *arguments: str) -> str:
    """Run git in a repository, whatever repository the environment names.

    Raise ``OSError`` with the first line of git's error if it fails.
    """
    environment = {name: v for name, v in os.environ.items() if not name.startswith("GIT_")}
    environment |= {"LC_ALL": "C", "LANGUAGE": ""}
    # Git refuses the repository of another user, whose hooks it would run. The owner of tasks.py,
    # which runs already, is no other user.
    owners = {path.stat().st_uid for path in (project, repository, repository / ".git")}
    trust = ("-c", f"safe.directory={repository}") if len(owners) == 1 else ()
    result = subprocess.run(
        ["git", *trust, "-C", str(repository), *arguments], env=environment,
        stdin=subprocess.DEVNULL, capture_output=True, check=False,
    )  # fmt: skip
    if result.returncode:
        lines = result.stderr.decode(errors="replace").splitlines()
        raise OSError(0, next(iter(lines), f"exit status {result.returncode}"))
    return result.stdout.decode(errors="replace").strip()


def _of_ci(project: Path, environment: Mapping[str, str]) -> tuple[str, str]:
    """Return the revision and the address in the variables of the CI job of a project."""
    for directory, revision, address in _CI:
        checkout = environment.get(directory)
        is_checkout = not checkout or project.resolve().is_relative_to(Path(checkout).resolve())
        if is_checkout and environment.get(revision):
            variables = defaultdict(str, environment)
            return environment[revision], web_address(address.format_map(variables))
    return "", ""
