"""The buildx command line: argument lists in, parsed answers out.

The docker SDK cannot speak to BuildKit, so images are built through buildx's own program.  It is
run as what it is, a program of its own: that needs no ``docker`` command beside it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from guix_tasks.engine import build_options
from guix_tasks.errors import BuilderError
from guix_tasks.local.engine import private_engine

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from guix_tasks.engine import BuildSpec

PROGRAM = "docker-buildx"

SYSTEM_PLUGINS = (
    "/usr/local/lib/docker/cli-plugins",
    "/usr/local/libexec/docker/cli-plugins",
    "/usr/lib/docker/cli-plugins",
    "/usr/libexec/docker/cli-plugins",
    "/opt/homebrew/lib/docker/cli-plugins",
)
"""Where the Docker CLI looks for plugins of all users, and Homebrew puts them."""


def find_program(environment: Mapping[str, str]) -> str | None:
    """The plugin, where the Docker CLI would find it, or the private engine's."""
    home = environment.get("DOCKER_CONFIG") or str(Path.home() / ".docker")
    for folder in (f"{home}/cli-plugins", *SYSTEM_PLUGINS):
        program = Path(folder) / PROGRAM
        if os.access(program, os.X_OK):
            return str(program)
    private = private_engine().buildx_path()
    return str(private) if private else shutil.which(PROGRAM)


def build(
    program: str,
    builder: str,
    spec: BuildSpec,
    environment: Mapping[str, str],
    output: Callable[[bytes], None],
) -> str:
    """``docker buildx build --load``; the ID of the image.  Raises ``BuilderError``."""
    with tempfile.TemporaryDirectory(prefix="guix-tasks-") as folder:
        answer = Path(folder) / "iid"
        argv = (
            program, "build", f"--builder={builder}", "--load", "--progress=plain",
            "--provenance=false", f"--iidfile={answer}",
            *(["--allow=network.host"] if spec.network == "host" else []),
            *build_options(spec), str(spec.context),
        )  # fmt: skip
        tail: deque[bytes] = deque(maxlen=40)
        with subprocess.Popen(
            argv, env=dict(environment), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
        ) as process:  # fmt: skip
            try:
                for line in process.stderr or ():
                    output(line)
                    tail.append(line)
            except BaseException:
                process.terminate()
                raise
        if process.returncode:
            raise build_error(spec, cause(b"".join(tail).decode(errors="replace")))
        if not answer.exists():
            raise build_error(spec, "the builder ended without naming an image")
        return answer.read_text().strip()


def cause(log: str) -> str:
    """The line of a build's log that says why it failed."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR: ")]
    text = errors[-1] if errors else (lines[-1] if lines else "buildx gave no reason")
    for wrapper in ("ERROR: ", "failed to build: ", "failed to solve: "):
        text = text.removeprefix(wrapper)
    return text


NO_BASE = (
    "failed to resolve source metadata",
    "pull access denied",
    "manifest unknown",
    "manifest for",
)
"""What builders say where the image that a Dockerfile begins from cannot be had."""


def build_error(spec: BuildSpec, why: str) -> BuilderError:
    """The failure of a build in one line, with what mends it where that is known."""
    base = spec.args.get("BASE_IMAGE", "")
    if any(word in why for word in NO_BASE):
        return BuilderError(
            f"cannot get the base image {base}: {why}; set BASE_IMAGE to one that the engine has "
            "or can pull (`inv rootfs` makes one from Debian's packages)"
        )
    return BuilderError(f"{spec.dockerfile} does not build: {why}; the output above says more")
