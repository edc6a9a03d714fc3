"""The buildx command line: argument lists in, parsed answers out.

The docker SDK cannot speak to BuildKit, so images are built through buildx's own program.  It is
run as what it is, a program of its own: that needs no ``docker`` command beside it.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections import deque
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from guix_tasks.engine.api import build_options
from guix_tasks.engine.diagnose import build_error, cause, failure
from guix_tasks.errors import BuilderError
from guix_tasks.ui.redact import holds_secret

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from guix_tasks.engine.api import BuildSpec, Credentials
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


def docker_folder(environment: Mapping[str, str]) -> Path:
    """The Docker CLI's own folder, where a user's plugins, contexts and accounts are."""
    return Path(environment.get("DOCKER_CONFIG") or Path.home() / ".docker")


def plugin_path(environment: Mapping[str, str]) -> Path:
    """Where the Docker CLI looks for a user's own plugin."""
    return docker_folder(environment) / "cli-plugins" / PROGRAM


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
    accounts: Mapping[str, Credentials] = field(default_factory=dict)
    """Accounts besides those of Docker's own configuration, by registry; see ``signed_in``."""

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
    accounts: Callable[[str], Mapping[str, Credentials]] = lambda _url: {},
) -> Buildx | None:
    """The buildx program, set to an engine if there is one; None where it is not on this machine.

    Its own builder is the engine itself: any other may not see the engine's images.
    ``private`` is the buildx of the private engine; ``accounts`` has those of local registries.
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
    known = accounts(address.url) if address else {}
    return Buildx(program, ours, own or "default", accounts=known)


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


@contextmanager
def signed_in(
    buildx: Buildx, registry: str = "", credentials: Credentials | None = None
) -> Iterator[Buildx]:
    """The program with an account for one registry, and with those that it has itself.

    They are in a file that only this user can read and that is gone at the end: never on a
    command line.  The rest of Docker's folder (contexts, builders) is seen through links.
    """
    accounts = {**({registry: credentials} if credentials else {}), **buildx.accounts}
    if not accounts:
        yield buildx
        return
    original = docker_folder(buildx.environment)
    with tempfile.TemporaryDirectory(prefix="guix-tasks-") as place:
        folder = Path(place)
        for each in original.iterdir() if original.is_dir() else ():
            if each.name != "config.json":
                (folder / each.name).symlink_to(each.absolute())
        # buildx would make it here, and so lose what it keeps in it.
        if not (original / "buildx").exists() and not buildx.environment.get("BUILDX_CONFIG"):
            with suppress(OSError):  # a home that cannot be written
                (original / "buildx").mkdir(parents=True, exist_ok=True)
                (folder / "buildx").symlink_to((original / "buildx").absolute())
        # What this variable holds comes before the file, to the Docker CLI.
        environment = {**buildx.environment, "DOCKER_CONFIG": place}
        more = _json_object(environment.pop("DOCKER_AUTH_CONFIG", ""))
        config = _json_object(_text(original / "config.json"))
        auths = {**_object(config.get("auths")), **_object(more.get("auths"))}
        config = {**config, "auths": auths}
        for host, account in accounts.items():
            config = _with_account(config, host, account)
        file = os.open(folder / "config.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(file, "w") as writer:
            json.dump(config, writer)
        yield replace(buildx, environment=environment)


def _with_account(
    config: Mapping[str, object], registry: str, credentials: Credentials
) -> dict[str, object]:
    host = "https://index.docker.io/v1/" if registry == "docker.io" else registry
    pair = f"{credentials.username}:{credentials.password}".encode()
    account = {"auth": base64.b64encode(pair).decode()}
    return {
        **config,
        "auths": {**_object(config.get("auths")), host: account},
        # An empty helper means this file, whatever store there is for all others.
        "credHelpers": {**_object(config.get("credHelpers")), host: ""},
    }


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _json_object(text: str) -> dict[str, object]:
    """The object that a JSON text holds; an empty one where it holds none."""
    try:
        return _object(json.loads(text))
    except (ValueError, RecursionError):
        return {}


def _object(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}


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
    with tempfile.TemporaryDirectory(prefix="guix-tasks-") as empty:
        buildx.ask(
            "build", f"--builder={builder}", "--call=check", "--allow=security.insecure",
            *([f"--build-arg=BUILDKIT_SYNTAX={syntax}"] if syntax else []),
            "--file=-", empty, text=PROBE,
        )  # fmt: skip


# --- Building -------------------------------------------------------------------------------


def build(buildx: Buildx, spec: BuildSpec, output: Callable[[bytes], None]) -> str:
    """``docker buildx build --load`` by the engine itself; the ID of the image.

    Raises ``BuilderError``.
    """
    with (
        tempfile.TemporaryDirectory(prefix="guix-tasks-") as folder,
        signed_in(buildx) as program,
    ):
        answer = Path(folder) / "iid"
        secret = {name: text for name, text in spec.args.items() if holds_secret(f"{name}={text}")}
        plain = {name: text for name, text in spec.args.items() if name not in secret}
        secret = {**spec.proxies, **secret}
        argv = (
            buildx.program, "build", f"--builder={buildx.own}", "--load", "--progress=plain",
            "--provenance=false", f"--iidfile={answer}",
            *(["--allow=network.host"] if spec.network == "host" else []),
            *build_options(replace(spec, args=plain)),
            # Command lines are for all users to see; what has no value there has it from here.
            *(f"--build-arg={name}" for name in secret), str(spec.context),
        )  # fmt: skip
        log = _run(argv, {**program.environment, **secret}, output)
        if log is not None:
            raise build_error(spec, cause(log))
        if not answer.exists():
            raise build_error(spec, "the builder ended without naming an image")
        return answer.read_text().strip()


# --- What goes wrong ------------------------------------------------------------------------
