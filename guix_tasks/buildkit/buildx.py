"""The buildx program: argument lists in, parsed output out.

The docker SDK does not support BuildKit, so images are built with buildx. The plugin
``docker-buildx`` runs as a program, which needs no ``docker`` command.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from guix_tasks.engine.accounts import AUTH_CONFIG, auth_config, docker_config_directory
from guix_tasks.engine.api import build_options
from guix_tasks.engine.diagnose import build_error, cause, failure
from guix_tasks.errors import BuilderError, GuixTasksError
from guix_tasks.files import temporary_directory
from guix_tasks.ui.redact import holds_secret

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import IO

    from guix_tasks.engine.accounts import Accounts
    from guix_tasks.engine.api import BuildSpec
    from guix_tasks.engine.discovery import Address
    from guix_tasks.ui.console import Console

PROGRAM = "docker-buildx"

SYSTEM_PLUGINS = (
    "/usr/local/lib/docker/cli-plugins",
    "/usr/local/libexec/docker/cli-plugins",
    "/usr/lib/docker/cli-plugins",
    "/usr/libexec/docker/cli-plugins",
    "/opt/homebrew/lib/docker/cli-plugins",
)
"""Directories in which the Docker CLI, or Homebrew, has plugins for all users."""


def plugin_path(environment: Mapping[str, str]) -> Path:
    """Return the path of the plugin in the user's Docker directory."""
    return docker_config_directory(environment) / "cli-plugins" / PROGRAM


def find_program(environment: Mapping[str, str], private: Path | None = None) -> str | None:
    """Return the plugin that the Docker CLI would find, else ``private``, else the one on PATH."""
    for program in (plugin_path(environment), *(Path(d) / PROGRAM for d in SYSTEM_PLUGINS)):
        if os.access(program, os.X_OK):
            return str(program)
    return str(private) if private else shutil.which(PROGRAM)


# --- Program --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Buildx:
    """The buildx program and an environment that selects the project's engine."""

    program: str
    environment: Mapping[str, str]
    own: str = "default"
    """Name of the engine's built-in builder, regardless of the builder that the user selected."""
    shown_on: Console | None = None
    """Console that prints each call that changes state, or None."""
    perform: bool = True
    """False in a dry run: calls that change state are only printed."""

    def ask(self, *arguments: str, text: str = "") -> str:
        """Make a call that only reads and return its standard output.

        Raise the error of ``diagnose.failure`` if it fails. ``text`` is the standard input.
        """
        done = subprocess.run(
            [self.program, *arguments], env=dict(self.environment), input=text,
            capture_output=True, encoding="utf-8", errors="replace", check=False,
        )  # fmt: skip
        if done.returncode:
            raise failure(done.stderr)
        return done.stdout

    def change(self, *arguments: str) -> str:
        """Make a call that changes state and return its standard output; empty in a dry run."""
        return self.ask(*arguments) if self._show(arguments) else ""

    def stream(
        self,
        *arguments: str,
        output: Callable[[bytes], None],
        spec: BuildSpec | None = None,
        seconds: float | None = None,
    ) -> None:
        """Make a long call that changes state, and stream its log to ``output``.

        Raise the error of ``diagnose.failure`` if it fails, and ``TimeoutError`` if it takes more
        than ``seconds``.
        """
        if self._show(arguments):
            argv = [self.program, *arguments]
            log = _run(argv, self.environment, output, seconds=seconds)
            if log is not None:
                raise failure(log, spec)

    def _show(self, arguments: Sequence[str]) -> bool:
        if self.shown_on:
            self.shown_on.command(("docker", "buildx", *arguments))
        return self.perform


def find_buildx(
    environment: Mapping[str, str],
    address: Address | None,
    *,
    private: Path | None = None,
) -> Buildx | None:
    """Return buildx for the engine at an address, or None if buildx is not installed.

    ``private`` is the buildx of the private engine.
    """
    program = find_program(environment, private)
    if program is None:
        return None
    variables = dict(environment)
    if address and address.context:
        variables["DOCKER_CONTEXT"] = address.context
    elif address:
        variables.pop("DOCKER_CONTEXT", None)
        variables["DOCKER_HOST"] = address.url
    context = address.context if address else None
    return Buildx(program, variables, context or "default")


_GRACE = 10.0
"""Seconds between SIGTERM and SIGKILL, in which buildx can cancel the build."""


def _run(
    argv: Sequence[str],
    environment: Mapping[str, str],
    output: Callable[[bytes], None],
    *,
    seconds: float | None = None,
) -> str | None:
    """Run a program and stream its standard error to ``output``.

    Return the end of its standard error if the program fails, else None. Raise ``TimeoutError`` if
    it takes more than ``seconds``.
    """
    tail: deque[bytes] = deque(maxlen=200)
    timed_out = threading.Event()

    def stop() -> None:
        timed_out.set()
        process.terminate()
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            process.kill()

    timer = threading.Timer(seconds or 0, stop)
    timer.daemon = True
    with subprocess.Popen(
        argv, env=dict(environment), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, bufsize=0,
    ) as process:  # fmt: skip
        if seconds:
            timer.start()
        try:
            while data := cast("IO[bytes]", process.stderr).read(1 << 16):
                output(data)
                tail.append(data)
        except BaseException:
            process.terminate()
            raise
        finally:
            timer.cancel()
    if timed_out.is_set():
        raise TimeoutError
    return b"".join(tail).decode(errors="replace") if process.returncode else None


def csv_field(text: str) -> str:
    """Quote a field of comma-separated values, the format of buildx options."""
    return f'"{text.replace(chr(34), chr(34) * 2)}"' if set(text) & set(',"\r\n') else text


def with_accounts(buildx: Buildx, accounts: Accounts, registry: str = "") -> Buildx:
    """Add the accounts that are not in Docker's config.json to the program's environment.

    Other users can read command lines and perhaps files, but not the environment. ``given``
    includes the accounts of ``DOCKER_AUTH_CONFIG``, which this replaces.

    Raise ``BuilderError`` if the program is too old to get the account of ``registry``.
    """
    if not accounts.given:
        return buildx
    is_needed = registry in accounts.given and not accounts.of_docker(registry)
    if is_needed and (reason := _unsupported_accounts(buildx)):
        raise BuilderError(f"cannot give buildx the account of {registry}: {reason}")
    environment = {**buildx.environment, AUTH_CONFIG: auth_config(accounts.given)}
    return replace(buildx, environment=environment)


_FIRST_WITH_ACCOUNTS = (0, 26)
"""First version of buildx whose Docker library (28.3) reads ``DOCKER_AUTH_CONFIG``."""


def _unsupported_accounts(buildx: Buildx) -> str:
    """Return an error with a hint if the program ignores ``DOCKER_AUTH_CONFIG``, else nothing."""
    try:
        answer = buildx.ask("version")
    except GuixTasksError:
        return ""
    version = re.search(r"\bv?(\d{1,4})\.(\d{1,4})\.\d+", answer)
    if version is None or (int(version[1]), int(version[2])) >= _FIRST_WITH_ACCOUNTS:
        return ""
    return (
        f"buildx {version[0]} does not read {AUTH_CONFIG}, as 0.26 and newer do; install a newer "
        "one (BUILDX_URL and `inv buildx.setup`), or run `docker login`"
    )


# --- Builders -------------------------------------------------------------------------------


@dataclass(frozen=True)
class BuilderNode:
    """A node of a builder, as ``buildx inspect`` shows it."""

    name: str
    endpoint: str = ""
    status: str = ""
    version: str = ""
    flags: tuple[str, ...] = ()
    """Flags of the node's ``buildkitd``."""
    options: Mapping[str, str] = field(default_factory=dict)
    platforms: tuple[str, ...] = ()
    """Native platform first."""
    fixed: tuple[str, ...] = ()
    """The platforms that were set with ``buildx create --platform``."""
    error: str = ""


@dataclass(frozen=True)
class Builder:
    """A builder, as ``buildx inspect`` shows it."""

    name: str
    driver: str
    nodes: tuple[BuilderNode, ...]


def inspect(buildx: Buildx, name: str) -> Builder | None:
    """Return the builder with this name, or None."""
    try:
        return parse_builder(buildx.ask("inspect", name))
    except BuilderError as error:
        if f'no builder "{name}" found' in str(error):
            return None
        raise


_FIELD = re.compile(r"^(\S[^:\n]*):(.*)$", re.MULTILINE)
"""Key and value; indented lines belong to lists that are not used here."""


def parse_builder(text: str) -> Builder:
    """Parse the output of ``buildx inspect``: blocks of ``Key: value`` lines, each from Name on.

    ``buildx ls --format=json`` is no replacement: it does not mark the fixed platforms, and it
    waits up to 20 s for every builder and Docker context of the user.
    """
    blocks = re.split(r"^(?=Name:)", text, flags=re.MULTILINE)[1:]
    fields = [{name: value.strip() for name, value in _FIELD.findall(block)} for block in blocks]
    head, *nodes = fields or [{}]
    if "Error" in head:
        raise failure(f"ERROR: {head['Error']}")
    return Builder(head.get("Name", ""), head.get("Driver", ""), tuple(map(_node, nodes)))


def _node(fields: Mapping[str, str]) -> BuilderNode:
    options = re.findall(r'(?<!\S)([^\s=]+)="((?:[^"\\]|\\.)*)"', fields.get("Driver Options", ""))
    platforms = re.findall(r"[^\s,]+", fields.get("Platforms", ""))
    return BuilderNode(
        name=fields["Name"],
        endpoint=fields.get("Endpoint", ""),
        status=fields.get("Status", ""),
        version=fields.get("BuildKit version", ""),
        flags=tuple(fields.get("BuildKit daemon flags", "").split()),
        options={name: re.sub(r"\\(.)", r"\1", value) for name, value in options},
        platforms=tuple(platform.rstrip("*") for platform in platforms),
        fixed=tuple(platform.rstrip("*") for platform in platforms if platform.endswith("*")),
        error=fields.get("Error", ""),
    )


PROBE = "FROM scratch\nRUN --security=insecure true\n"
"""Dockerfile of ``probe``; it is only checked, and no step runs."""


def probe(buildx: Buildx, builder: str, syntax: str | None) -> None:
    """Check that a builder allows insecure steps and that its frontend supports them.

    Nothing is built. Raise ``BuilderError`` with the builder's message if the check fails;
    ``INSECURE_REFUSED`` and ``UNKNOWN_FLAG`` tell the two cases apart.
    """
    with temporary_directory() as empty:
        buildx.ask(
            "build", f"--builder={builder}", "--call=check", "--allow=security.insecure",
            *([f"--build-arg=BUILDKIT_SYNTAX={syntax}"] if syntax else []),
            "--file=-", str(empty), text=PROBE,
        )  # fmt: skip


# --- Build ----------------------------------------------------------------------------------


_LOAD = "type=docker,oci-mediatypes=true"
"""Output to the engine. With the containerd image store, a commit has an OCI manifest and keeps the
media types of the layers below. Buildah refuses an OCI manifest with layers of Docker's types."""

_COMPRESSED = ",compression=gzip,force-compression=true"


def build(
    buildx: Buildx, spec: BuildSpec, output: Callable[[bytes], None], *, compress: bool = False
) -> str:
    """Run ``docker buildx build --load`` on the engine's built-in builder, return the image's ID.

    The ID is the digest of the manifest in the containerd image store, and the digest of the
    configuration in the classic one. ``compress`` also compresses the layers of the base image,
    which the containerd store would otherwise push uncompressed.

    Raise ``BuilderError`` if the build fails.
    """
    program = with_accounts(buildx, spec.accounts) if spec.accounts else buildx
    with temporary_directory() as directory:
        metadata = directory / "metadata.json"
        secret = {name: text for name, text in spec.args.items() if holds_secret(f"{name}={text}")}
        plain = {name: text for name, text in spec.args.items() if name not in secret}
        secret = {**spec.proxies, **secret}
        argv = (
            buildx.program, "build", f"--builder={buildx.own}", "--progress=plain",
            f"--output={_LOAD}{_COMPRESSED if compress else ''}", "--provenance=false",
            f"--metadata-file={metadata}",
            *(["--allow=network.host"] if spec.network == "host" else []),
            *build_options(replace(spec, args=plain)),
            # All users can read command lines. An argument without a value takes it from the
            # environment.
            *(f"--build-arg={name}" for name in secret), str(spec.context),
        )  # fmt: skip
        log = _run(argv, {**program.environment, **secret}, output)
        if log is not None:
            given = spec.accounts and spec.accounts.given
            hint = _unsupported_accounts(buildx) if given else ""
            raise build_error(spec, cause(log) + (hint and f"; {hint}"))
        if digest := built_digest(metadata):
            return digest
        raise build_error(spec, "the builder reported no image")


def built_digest(metadata: Path, target: str = "") -> str:
    """Return the image's digest in a metadata file of a build or of a target of bake, or nothing.

    The file is also empty or missing if the build has no image as its output.
    """
    try:
        results = json.loads(metadata.read_bytes())
        digest = (results[target] if target else results)["containerimage.digest"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return ""
    return digest if isinstance(digest, str) else ""
