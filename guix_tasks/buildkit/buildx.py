"""The buildx command line: argument lists in, parsed answers out.

The docker SDK cannot speak to BuildKit, so images are built through buildx's own program.  It is
run as what it is, a program of its own: that needs no ``docker`` command beside it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import threading
from collections import deque
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from guix_tasks.engine.accounts import AUTH_CONFIG, auth_config, docker_config_directory
from guix_tasks.engine.api import build_options
from guix_tasks.engine.diagnose import build_error, cause, failure
from guix_tasks.errors import BuilderError, GuixTasksError
from guix_tasks.files import temporary_directory
from guix_tasks.ui.redact import holds_secret

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

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
"""Where the Docker CLI looks for plugins of all users, and Homebrew puts them."""


def plugin_path(environment: Mapping[str, str]) -> Path:
    """Where the Docker CLI looks for a user's own plugin."""
    return docker_config_directory(environment) / "cli-plugins" / PROGRAM


def find_program(environment: Mapping[str, str], private: Path | None = None) -> str | None:
    """The plugin, where the Docker CLI would find it, or the private engine's."""
    for program in (plugin_path(environment), *(Path(f) / PROGRAM for f in SYSTEM_PLUGINS)):
        if os.access(program, os.X_OK):
            return str(program)
    return str(private) if private else shutil.which(PROGRAM)


# --- Running it -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Buildx:
    """The buildx program, in the environment in which it finds the project's engine."""

    program: str
    environment: Mapping[str, str]
    own: str = "default"
    """The builder that is the engine itself, whatever builder the user has selected."""
    shown_on: Console | None = None
    """Where each call that changes something is shown."""
    perform: bool = True
    """Whether such a call is made; a dry run leaves it at showing it."""

    def ask(self, *arguments: str, text: str = "") -> str:
        """Standard output of a call that changes nothing.  Raises what ``failure`` makes of it."""
        done = subprocess.run(
            [self.program, *arguments], env=dict(self.environment), input=text,
            capture_output=True, text=True, errors="replace", check=False,
        )  # fmt: skip
        if done.returncode:
            raise failure(done.stderr)
        return done.stdout

    def change(self, *arguments: str) -> str:
        """Standard output of a call that changes something."""
        return self.ask(*arguments) if self._show(arguments) else ""

    def stream(
        self,
        *arguments: str,
        output: Callable[[bytes], None],
        spec: BuildSpec | None = None,
        seconds: float | None = None,
    ) -> None:
        """A call that takes its time, its log given to ``output`` as it comes.

        Raises what ``failure`` makes of it, and ``TimeoutError`` where it takes longer than it may.
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
    """The buildx program, set to an engine if there is one; None where it is not on this machine.

    Its own builder is the engine itself: any other may not see the engine's images.
    ``private`` is the buildx of the private engine.
    """
    program = find_program(environment, private)
    if program is None:
        return None
    ours = {name: value for name, value in environment.items() if name != "BUILDX_BUILDER"}
    if address and address.context:
        ours["DOCKER_CONTEXT"] = address.context
    elif address:
        ours.pop("DOCKER_CONTEXT", None)
        ours["DOCKER_HOST"] = address.url
    own = address.context if address else None
    return Buildx(program, ours, own or "default")


def _run(
    argv: Sequence[str],
    environment: Mapping[str, str],
    output: Callable[[bytes], None],
    *,
    seconds: float | None = None,
) -> str | None:
    """Run a program, its standard error shown; the end of that where it fails, else None."""
    ends = os.pipe()
    tail: deque[bytes] = deque(maxlen=200)
    late = threading.Event()
    with (
        os.fdopen(ends[0], "rb", 0) as ours,
        os.fdopen(ends[1], "wb", 0) as theirs,
        subprocess.Popen(
            argv, env=dict(environment), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=theirs,
        ) as process,
        _alarm(process, seconds, late),
    ):  # fmt: skip
        theirs.close()
        try:
            for data in _pieces(ours.fileno()):
                output(data)
                tail.append(data)
        except BaseException:
            process.terminate()
            raise
        finally:
            ours.close()
    if late.is_set():
        raise TimeoutError
    return b"".join(tail).decode(errors="replace") if process.returncode else None


_GRACE = 10.0
"""The seconds in which buildx may let go of a build that is stopped."""


@contextmanager
def _alarm(
    process: subprocess.Popen[bytes], seconds: float | None, late: threading.Event
) -> Iterator[None]:
    """Stop a program when its time is up, gently at first; the event says that it was."""

    def stop() -> None:
        late.set()
        process.terminate()
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            process.kill()

    timer = threading.Timer(seconds, stop) if seconds else None
    if timer:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        if timer:
            timer.cancel()


def _pieces(descriptor: int) -> Iterator[bytes]:
    while data := os.read(descriptor, 1 << 16):
        yield data


def csv_field(field: str) -> str:
    """A field of comma-separated values, which is how buildx reads an option."""
    return f'"{field.replace(chr(34), chr(34) * 2)}"' if set(field) & set(',"\r\n') else field


def with_accounts(buildx: Buildx, accounts: Accounts) -> Buildx:
    """Give the program the accounts that Docker's own configuration does not have.

    They are in its environment, which other users cannot read: in no file and on no command line.
    The accounts of ``DOCKER_AUTH_CONFIG`` are among the given ones.
    """
    if not accounts.given:
        return buildx
    environment = {**buildx.environment, AUTH_CONFIG: auth_config(accounts.given)}
    return replace(buildx, environment=environment)


def refuse_without_accounts(buildx: Buildx, accounts: Accounts, host: str) -> None:
    """Raise ``BuilderError`` if the program is too old to get the account of a registry."""
    if host in accounts.given and not accounts.of_docker(host) and (why := _blind(buildx)):
        raise BuilderError(f"cannot give buildx the account of {host}: {why}")


_FIRST_WITH_ACCOUNTS = (0, 26)
"""The version of buildx whose Docker library (28.3) reads ``DOCKER_AUTH_CONFIG``."""


def _blind(buildx: Buildx) -> str:
    """Why the program does not read ``DOCKER_AUTH_CONFIG``, with a hint; empty if it does."""
    try:
        said = buildx.ask("version")
    except GuixTasksError:
        return ""
    version = re.search(r"\bv?(\d+)\.(\d+)\.\d+", said)
    if version is None or (int(version[1]), int(version[2])) >= _FIRST_WITH_ACCOUNTS:
        return ""
    return (
        f"buildx {version[0]} does not read {AUTH_CONFIG}, as 0.26 and newer do; install a newer "
        "one (BUILDX_URL and `inv buildx.setup`), or sign in with `docker login`"
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
    """Of its ``buildkitd``."""
    options: tuple[tuple[str, str], ...] = ()
    platforms: tuple[str, ...] = ()
    """The native one first."""
    fixed: tuple[str, ...] = ()
    """Those of them that somebody said it is for."""
    error: str = ""


@dataclass(frozen=True)
class Builder:
    """A builder, as ``buildx inspect`` shows it."""

    name: str
    driver: str
    nodes: tuple[BuilderNode, ...]


def inspect(buildx: Buildx, name: str) -> Builder | None:
    """The builder of a name; None where there is none."""
    try:
        text = buildx.ask("inspect", name)
    except BuilderError as error:
        if f'no builder "{name}" found' in str(error):
            return None
        raise
    if trouble := _fields(text.partition("\nNodes:\n")[0]).get("Error"):
        raise failure(f"ERROR: {trouble}")
    return parse_builder(text)


def parse_builder(text: str) -> Builder:
    """What ``buildx inspect`` prints: a head, and a block of ``Key: value`` lines for each node."""
    head, _, rest = text.partition("\nNodes:\n")
    blocks = re.split(r"^(?=Name:)", rest, flags=re.MULTILINE)
    about = _fields(head)
    return Builder(
        about.get("Name", ""),
        about.get("Driver", ""),
        tuple(_node(_fields(block)) for block in blocks if block.strip()),
    )


def _fields(block: str) -> dict[str, str]:
    # What is indented belongs to lists that nobody here asks for.
    lines = (line.partition(":") for line in block.splitlines() if not line.startswith(" "))
    return {key: value.strip() for key, colon, value in lines if colon}


def _node(fields: Mapping[str, str]) -> BuilderNode:
    options = (word.partition("=") for word in _words(fields.get("Driver Options", "")))
    platforms = [each.strip() for each in fields.get("Platforms", "").split(",") if each.strip()]
    return BuilderNode(
        name=fields.get("Name", ""),
        endpoint=fields.get("Endpoint", ""),
        status=fields.get("Status", ""),
        version=fields.get("BuildKit version", ""),
        flags=tuple(fields.get("BuildKit daemon flags", "").split()),
        options=tuple((name, value) for name, _, value in options),
        platforms=tuple(each.rstrip("*") for each in platforms),
        fixed=tuple(each.rstrip("*") for each in platforms if each.endswith("*")),
        error=fields.get("Error", ""),
    )


def _words(text: str) -> list[str]:
    with suppress(ValueError):
        return shlex.split(text)
    return text.split()


PROBE = "FROM scratch\nRUN --security=insecure true\n"
"""A Dockerfile that is only parsed: no step of it is run."""


def probe(buildx: Buildx, builder: str, syntax: str | None) -> None:
    """Ask a builder whether it lets a step be insecure and its frontend knows such a step.

    Nothing is built.  Raises ``BuilderError`` for what it lacks; see ``UNKNOWN_FLAG``.
    """
    with temporary_directory() as empty:
        buildx.ask(
            "build", f"--builder={builder}", "--call=check", "--allow=security.insecure",
            *([f"--build-arg=BUILDKIT_SYNTAX={syntax}"] if syntax else []),
            "--file=-", str(empty), text=PROBE,
        )  # fmt: skip


# --- Building -------------------------------------------------------------------------------


_COMPRESSED = ",compression=gzip,force-compression=true"


def build(
    buildx: Buildx, spec: BuildSpec, output: Callable[[bytes], None], *, compress: bool = False
) -> str:
    """Run ``docker buildx build --load`` on the engine itself and return the image's ID.

    The ID is the one by which the engine's image store knows the image: the digest of its
    manifest in the containerd store, of its configuration in the classic one.  ``compress`` packs
    the layers of the base image, too, which the containerd store would push as they are.

    Raise ``BuilderError`` if the build fails.
    """
    program = with_accounts(buildx, spec.accounts) if spec.accounts else buildx
    with temporary_directory() as folder:
        metadata = folder / "metadata.json"
        secret = {name: text for name, text in spec.args.items() if holds_secret(f"{name}={text}")}
        plain = {name: text for name, text in spec.args.items() if name not in secret}
        secret = {**spec.proxies, **secret}
        argv = (
            buildx.program, "build", f"--builder={buildx.own}", "--progress=plain",
            f"--output=type=docker{_COMPRESSED if compress else ''}", "--provenance=false",
            f"--metadata-file={metadata}",
            *(["--allow=network.host"] if spec.network == "host" else []),
            *build_options(replace(spec, args=plain)),
            # Command lines are for all users to see; what has no value there has it from here.
            *(f"--build-arg={name}" for name in secret), str(spec.context),
        )  # fmt: skip
        log = _run(argv, {**program.environment, **secret}, output)
        if log is not None:
            raise build_error(spec, cause(log) + _account_hint(buildx, spec))
        try:
            return str(json.loads(metadata.read_bytes())["containerimage.digest"])
        except (OSError, ValueError, LookupError):
            raise build_error(spec, "the builder ended without naming an image") from None


def _account_hint(buildx: Buildx, spec: BuildSpec) -> str:
    """The hint that an old program did not get the accounts of a build, if so."""
    why = _blind(buildx) if spec.accounts and spec.accounts.given else ""
    return f"; {why}" if why else ""
