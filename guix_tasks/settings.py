"""The settings: what they are, where they come from, and what is wrong with them.

Each setting is described once, on its field of ``Settings``: how it is read, its default
as one would write it in an env file, what it does.  ``load_settings``, ``.env.example``
(``python -m guix_tasks.settings`` prints it) and the README's table come from that.

Later wins: defaults, ``.env``, ``.env.local``, the files that ``ENV_FILE`` names, the
process's environment, the task's own options.  The environment is read from the mapping
that is passed in, and never written.
"""

# ruff: noqa: RUF009 -- _setting() makes a dataclass field, as field() does

from __future__ import annotations

import difflib
import io
import re
import shlex
import stat
import sys
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

# dotenv's own functions interpolate from os.environ and keep no line numbers.  So its two
# halves are used: the grammar of a file, and the grammar of ${NAME}.
from dotenv.parser import Binding, parse_stream
from dotenv.variables import Variable, parse_variables

from guix_tasks.errors import SettingsError
from guix_tasks.reference import DEFAULT_TAG, ImageReference, Platform, check_tag, quoted

# --- Values ---------------------------------------------------------------------------------


class Secret:
    """Text that shows itself only when it is asked to: not in a repr, a log, an error."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "Secret(…)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)


class Sandbox(Enum):
    """How a work container is run so that the Guix daemon can isolate its builds."""

    PRIVILEGED = "privileged"


@dataclass(frozen=True)
class Mount:
    """A local file or folder that a work container sees at an absolute path of its own."""

    source: Path
    target: str
    read_only: bool = False


# --- Parsers --------------------------------------------------------------------------------

# Takes the text, and the folder that a relative path starts from.  Raises a ValueError with
# one argument for each problem: what is wrong; what would be right.
Parser = Callable[[str, Path], Any]


def _plain(parse: Callable[[str], object]) -> Parser:
    """Make a parser of a function that needs no folder."""
    return lambda text, _base: parse(text)


def _optional(parse: Parser) -> Parser:
    return lambda text, base: parse(text, base) if text else None


def _list(parse: Parser) -> Parser:
    """A parser of items separated as a shell separates words; one given twice counts once."""

    def parse_all(text: str, base: Path) -> tuple[Any, ...]:
        try:
            words = shlex.split(text)
        except ValueError:
            raise ValueError("a quote is not closed, or a backslash ends it; close it") from None
        values: list[Any] = []
        problems: list[str] = []
        for word in words:
            hint = "; items are separated by spaces, not commas" if "," in word else ""
            problems += [f"{problem}{hint}" for problem in _problems(parse, word, base, values)]
        if problems:
            raise ValueError(*problems)
        return tuple(dict.fromkeys(values))

    return parse_all


def _problems(parse: Parser, text: str, base: Path, values: list[Any]) -> tuple[str, ...]:
    """Add what ``text`` parses to, or return what is wrong with it."""
    try:
        values.append(parse(text, base))
    except ValueError as error:
        return error.args
    return ()


def _mapping(parse: Parser) -> Parser:
    """A parser of a list of pairs, no two of which have the same first half."""

    def parse_all(text: str, base: Path) -> Mapping[str, Any]:
        pairs = _list(parse)(text, base)
        _no_duplicates([name for name, _ in pairs])
        return MappingProxyType(dict(pairs))

    return parse_all


def _no_duplicates(names: Sequence[str]) -> None:
    twice = dict.fromkeys(name for name in names if names.count(name) > 1)
    if twice:
        raise ValueError(*(f"{quoted(name)} is given twice; keep one" for name in twice))


def _encodable(parse: Parser) -> Parser:
    """A parser that refuses what no file name, no command and no engine can take."""

    def parse_text(text: str, base: Path) -> Any:
        if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError("has a NUL or a broken character in it; write UTF-8 text")
        return parse(text, base)

    return parse_text


def _matching(pattern: str, rule: str) -> Parser:
    """A parser that takes text of one form as it is; ``rule`` says what is wrong and right."""
    expression = re.compile(pattern, re.ASCII)

    def parse(text: str, _base: Path) -> str:
        if not expression.fullmatch(text):
            raise ValueError(f"{quoted(text)} {rule}")
        return text

    return parse


def _number(least: int) -> Parser:
    def parse(text: str, _base: Path) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least:
            raise ValueError(f"{quoted(text)} is not a whole number from {least} on; write one")
        return int(text)

    return parse


def _url(*schemes: str) -> Parser:
    """A parser of URLs without what a shell, or Guix's lists of URLs, would take apart."""
    prefixes = tuple(f"{scheme}://" for scheme in schemes)
    right = f"write one that begins with {' or '.join(prefixes)}"

    def parse(text: str, _base: Path) -> str:
        # A password in a URL would be seen on command lines; nor may it be seen in an error.
        if "@" in text:
            raise ValueError("a URL has a user or a password in it; leave out all up to the '@'")
        try:
            parts = urlsplit(text)
            _ = parts.port  # raises where it is not a port
        except ValueError:
            raise ValueError(f"{quoted(text)} is not a URL; {right}") from None
        place = parts.path if parts.scheme == "file" else parts.hostname
        if not text.startswith(prefixes) or not place:
            raise ValueError(f"{quoted(text)} is not a URL for this; {right}")
        if not re.fullmatch(r"[\w%+,\-./:=?&\[\]~]+", text, re.ASCII):
            raise ValueError(f"{quoted(text)} has a character that a URL cannot have; write %XX")
        return text

    return parse


@_plain
def _reference(text: str) -> ImageReference:
    reference = ImageReference.parse(text)
    bare = reference.tag is None and reference.digest is None
    return reference.with_tag(DEFAULT_TAG) if bare else reference


# A stage's tag is this one with "-STAGE-OS-ARCH" behind it, and a tag has 128 characters at most.
_TAG_MAX = 100


def _image(text: str, base: Path) -> ImageReference:
    reference: ImageReference = _reference(text, base)
    if reference.digest is not None:
        raise ValueError("a digest stands for one image for ever, and IMAGE moves; write a tag")
    if len(reference.tag or "") > _TAG_MAX:
        raise ValueError(f"the tag leaves no room for a stage's; write {_TAG_MAX} letters at most")
    return reference


def _cache_image(text: str, base: Path) -> ImageReference:
    reference: ImageReference = _reference(text, base)
    if reference.digest is not None:
        raise ValueError("a digest names no repository; write REGISTRY/REPOSITORY")
    return reference


@_plain
def _tag(text: str) -> str:
    check_tag(text)
    return text


@_plain
def _sandbox(text: str) -> Sandbox:
    try:
        return Sandbox(text)
    except ValueError:
        allowed = ", ".join(sandbox.value for sandbox in Sandbox)
        raise ValueError(f"{quoted(text)} is not a sandbox; write one of: {allowed}") from None


_MEMORY_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_MEMORY_LEAST = 6 << 20  # the Docker Engine refuses less


@_plain
def _memory(text: str) -> int:
    """Bytes, with the binary suffixes of ``docker run --memory``."""
    match = re.fullmatch(r"([0-9]{1,15})([bkmg]?)", text.lower())
    size = int(match[1]) * _MEMORY_UNITS[match[2]] if match else 0
    if size < _MEMORY_LEAST:
        raise ValueError(f"{quoted(text)} is not an amount from 6m on; write one, as 512m or 4g")
    return size


_TIME_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}


@_plain
def _seconds(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,7})([smh]?)", text)
    seconds = int(match[1]) * _TIME_UNITS[match[2]] if match else 0
    if not seconds:
        raise ValueError(f"{quoted(text)} is not a time; write seconds, or as 45s, 90m or 2h")
    return seconds


@_plain
def _build_arg(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        raise ValueError(f"{quoted(name)} is not a build argument; write NAME=VALUE")
    return name, value


def _build_secret(text: str, base: Path) -> tuple[str, Path]:
    name, equals, file = text.partition("=")
    if not equals or not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
        raise ValueError(f"{quoted(text)} is not a secret's ID with its file; write ID=FILE")
    return name, _file(file, base)


def _mount(text: str, base: Path) -> Mount:
    source, _, rest = text.partition(":")
    target, colon, mode = rest.partition(":")
    if not source or not target or (colon and mode not in {"ro", "rw"}):
        raise ValueError(f"{quoted(text)} is not a mount; write SOURCE:TARGET or SOURCE:TARGET:ro")
    place = PurePosixPath(target.lstrip("/"))
    if not target.startswith("/") or ".." in place.parts or not place.parts:
        raise ValueError(f"{quoted(target)} is not a place in a container; write /FOLDER/NAME")
    return Mount(_existing(source, base), f"/{place}", mode == "ro")


def _mounts(text: str, base: Path) -> tuple[Mount, ...]:
    mounts: tuple[Mount, ...] = _list(_mount)(text, base)
    _no_duplicates([mount.target for mount in mounts])
    return mounts


def _path(text: str, base: Path) -> Path:
    if not text:
        raise ValueError("a path is empty; name a file or a folder")
    return base / text


def _existing(text: str, base: Path) -> Path:
    path = _path(text, base)
    _mode(path)
    return path


def _file(text: str, base: Path) -> Path:
    path = _path(text, base)
    if stat.S_ISDIR(_mode(path)):
        raise ValueError(f"{quoted(str(path))} is a folder; name a file")
    return path


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except OSError as error:
        shown = quoted(str(path))
        if "~" in path.parts:
            raise ValueError(
                f"{shown} does not exist; '~' is not known here, write ${{HOME}}"
            ) from None
        raise ValueError(f"{shown}: {error.strerror}; make it, or name another") from None


def _public_key(text: str, base: Path) -> Path:
    # Beside a public key lies the private one, signing-key.sec, which must not reach an image.
    if not text.endswith(".pub"):
        raise ValueError(f"{quoted(text)} is not a public key; name a file that ends in .pub")
    return _file(text, base)


def _secret_file(text: str, base: Path) -> Secret | None:
    """The secret that a file holds, without the newline that an editor puts at its end.

    Its path is not repeated in an error: a password may be there by mistake.
    """
    if not text:
        return None
    try:
        secret = (base / text).read_text(encoding="utf-8-sig").removesuffix("\n")
    except OSError as error:
        raise ValueError(f"the file: {error.strerror}; make it, or name another") from None
    except UnicodeDecodeError:
        raise ValueError("the file is not UTF-8; write the secret in UTF-8") from None
    if not secret or "\0" in secret:
        raise ValueError("the file holds no text; write the secret into it")
    return Secret(secret)


_packages = _list(
    # Strict, so that nothing that looks like an option or a file is ever taken for a package.
    _matching(
        r"[A-Za-z0-9][\w+.-]*(@[A-Za-z0-9][\w+.~^-]*)?(:[A-Za-z0-9][\w.-]*)?",
        "is not a package; write NAME, NAME@VERSION or NAME@VERSION:OUTPUT",
    )
)
_sha256 = _matching("[0-9a-f]{64}", "is not a SHA-256 checksum; write 64 lower case hex digits")
_volume = _matching(
    r"[A-Za-z0-9][\w.-]{,60}", "is not the name of a volume; write letters and digits"
)
_network = _matching(r"[A-Za-z0-9][\w.-]*", "is not a network; write none, host, or a name")


# --- The settings ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Setting:
    """How a setting is read, its default as in an env file, and what it does, in one line."""

    parse: Parser
    default: str
    doc: str
    group: str = ""  # the heading above it, on the first one of a group
    option: str = ""  # the task option that sets it, where that is not its own name
    secret: bool = False


def _setting(parse: Parser, default: str, doc: str, **more: Any) -> Any:
    return field(metadata={"setting": _Setting(parse, default, doc, **more)})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that a user can set, as values; a field is its setting's name in lower case.

    An empty setting is ``None``, or an empty tuple or mapping.  Every path is absolute.
    """

    image: ImageReference = _setting(
        _image,
        "localhost:5055/guix-example",
        "The image to make and push: REGISTRY/REPOSITORY[:TAG]; no tag means latest.",
        group="The image",
    )
    tags: tuple[str, ...] = _setting(
        _list(_tag), "", "More tags of the same repository that push pushes, as: 1.0 stable."
    )
    platforms: tuple[Platform, ...] = _setting(
        _list(_plain(Platform.parse)),
        "",
        "Platforms to make it for, as: linux/amd64 linux/arm64; empty: the engine's own.",
    )

    base_image: ImageReference = _setting(
        _reference,
        "metacall/guix:latest",
        "The image that the Dockerfile begins from.",
        group="The base stage",
    )
    dockerfile: Path = _setting(_path, "Dockerfile", "The Dockerfile of the base stage.")
    build_context: Path = _setting(_path, ".", "The folder that the Dockerfile copies from.")
    build_args: Mapping[str, str] = _setting(
        _mapping(_build_arg), "", "Build arguments: NAME=VALUE ..."
    )
    build_secrets: Mapping[str, Path] = _setting(
        _mapping(_build_secret), "", "Files that RUN --mount=type=secret sees: ID=FILE ..."
    )
    guix_binary_url: str | None = _setting(
        _optional(_url("https", "http")),
        "",
        "The address of GNU's binary tarball, for a base without Guix; needs the checksum too.",
    )
    guix_binary_sha256: str | None = _setting(
        _optional(_sha256), "", "The SHA-256 checksum of that tarball, 64 hex digits."
    )

    guix_channels: Path | None = _setting(
        _optional(_file), "", "The channels.scm that pull pulls.", group="Guix"
    )
    guix_channels_lock: Path | None = _setting(
        _optional(_path),
        "channels.lock.scm",
        "Where pull writes the commits that it got, and pulls again; empty: channels float.",
    )
    guix_manifest: Path | None = _setting(
        _optional(_file), "", "The manifest.scm that install installs."
    )
    guix_packages: tuple[str, ...] = _setting(
        _packages,
        "",
        "Packages that install installs: NAME[@VERSION][:OUTPUT] ...",
        option="package",
    )
    guix_substitute_urls: tuple[str, ...] = _setting(
        _list(_url("https", "http", "file")),
        "",
        "Substitute servers instead of Guix's own, the preferred one first.",
    )
    guix_substitute_keys: tuple[Path, ...] = _setting(
        _list(_public_key), "", "Public keys of substitute servers to trust: .pub files."
    )
    guix_sandbox: Sandbox = _setting(
        _sandbox, "privileged", "How work containers are run, so that Guix can build in them."
    )
    guix_cores: int | None = _setting(
        _optional(_number(0)), "", "Cores that each Guix build may use; 0: all of them."
    )
    guix_max_jobs: int | None = _setting(
        _optional(_number(1)), "", "Guix builds that may run side by side."
    )

    mounts: tuple[Mount, ...] = _setting(
        _mounts,
        "",
        "Local files and folders that stages see: SOURCE:TARGET[:ro] ...",
        group="Work containers",
    )
    network: str | None = _setting(
        _optional(_network), "", "none, host, or a network's name; empty: the engine's default."
    )
    stage_memory: int | None = _setting(
        _optional(_memory), "", "The memory that a stage may use, as 512m or 4g; empty: no limit."
    )
    stage_timeout: int | None = _setting(
        _optional(_seconds),
        "",
        "The time that a stage may take, as 45s, 90m or 2h; empty: no limit.",
    )

    cache_volume: str | None = _setting(
        _optional(_volume),
        "guix-tasks-cache",
        "What the names of the volumes for caches begin with; empty: caches stay in the image.",
        group="Caches",
    )
    cache_image: ImageReference | None = _setting(
        _optional(_cache_image),
        "",
        "A repository, REGISTRY/REPOSITORY, that finished stages are pushed to and taken from.",
    )

    docker_username: Secret | None = _setting(
        _optional(_plain(Secret)),
        "",
        "The user to push as; taken literally, with any ${...} in it.",
        group="The registry's account",
        secret=True,
    )
    docker_password: Secret | None = _setting(
        _optional(_plain(Secret)),
        "",
        "That user's password or token; taken literally, with any ${...} in it.",
        secret=True,
    )

    docker_environment: Mapping[str, str]
    """Docker's own variables that are set (``DOCKER_HOST``, …), for whoever finds the engine."""

    notes: tuple[str, ...] = field(default=(), compare=False)
    """What deserves a warning, a line each."""

    origins: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Where each setting that is not a default comes from; see ``origin``."""

    @property
    def platform(self) -> Platform | None:
        """The platform to build for, where one is asked for."""
        return self.platforms[0] if self.platforms else None

    def origin(self, name: str) -> str:
        """How an error about a setting begins: ``.env:3: IMAGE``, ``option --image``."""
        return self.origins.get(name, f"default: {name}")


_SETTINGS: Mapping[str, _Setting] = {
    entry.name.upper(): entry.metadata["setting"]
    for entry in fields(Settings)
    if "setting" in entry.metadata
}

_SECRETS = tuple(name for name, setting in _SETTINGS.items() if setting.secret)

# docs.docker.com/reference/cli/docker, "Environment variables"
_DOCKER_VARIABLES = {
    "DOCKER_HOST": _Setting(
        _plain(str),
        "",
        "The engine: unix:///SOCKET, tcp://HOST:PORT or ssh://HOST.",
        group="Docker's own variables",
    ),
    "DOCKER_CONTEXT": _Setting(_plain(str), "", "The context of the docker command line."),
    "DOCKER_CONFIG": _Setting(_optional(_path), "", "The docker command line's own folder."),
    "DOCKER_TLS_VERIFY": _Setting(_plain(str), "", "Not empty: verify the engine's certificate."),
    "DOCKER_CERT_PATH": _Setting(_optional(_path), "", "The folder with the TLS certificates."),
}


def _known() -> Iterator[tuple[str, _Setting]]:
    for name, setting in _SETTINGS.items():
        yield name, setting
        if setting.secret:
            doc = f"Instead of {name}: a file that holds it."
            yield f"{name}_FILE", _Setting(_secret_file, "", doc)
    yield from _DOCKER_VARIABLES.items()


_KNOWN = dict(_known())


def settings_reference() -> list[tuple[str, str, str]]:
    """Every key that an env file can have: its name, its default as text, what it does."""
    return [row for _, rows in _groups() for row in rows]


def example_text() -> str:
    """The content of ``.env.example``."""
    lines = [
        "# The settings of guix-tasks, each with its default.  Copy this file to .env.",
        "#",
        "# Later wins: .env, .env.local, the files that the variable ENV_FILE names (separated by",
        "# commas), the environment, the options of a task.  Relative paths start from the folder",
        "# of the file they are in.  Items of a list are separated by spaces; quotes hold an item",
        "# with spaces together.  ${NAME} is the value of a variable or of a setting further up.",
    ]
    for heading, rows in _groups():
        lines += ["", f"# --- {heading} ---"]
        for name, default, doc in rows:
            lines += ["", f"# {doc}", f"{name}={default}" if default else f"#{name}="]
    return "\n".join(lines) + "\n"


def _groups() -> list[tuple[str, list[tuple[str, str, str]]]]:
    groups: list[tuple[str, list[tuple[str, str, str]]]] = []
    for name, setting in _KNOWN.items():
        if setting.group:
            groups.append((setting.group, []))
        groups[-1][1].append((name, setting.default, setting.doc))
    return groups


# --- Loading --------------------------------------------------------------------------------


def load_settings(
    project: Path,
    cwd: Path,
    environ: Mapping[str, str],
    overrides: Mapping[str, str | Sequence[str]] = MappingProxyType({}),
) -> Settings:
    """Read every source; raises ``SettingsError`` with all that is wrong in them.

    Relative paths start from ``project`` in the defaults, and from ``cwd`` in the
    environment and in ``overrides``.  Those are the task's options by the setting's name;
    an empty one counts as not given, and the items of a sequence are taken as they are.
    """
    project, cwd = project.absolute(), cwd.absolute()
    sources = _Sources(project, environ)
    for path in (project / ".env", project / ".env.local"):
        sources.add_file(path, _shown(path, cwd))
    for name in filter(None, map(str.strip, environ.get("ENV_FILE", "").split(","))):
        sources.add_file(cwd / name, _shown(cwd / name, cwd), required="environment: ENV_FILE: ")
    sources.add_environ(environ, cwd)
    sources.add_overrides(overrides, cwd)
    return sources.settings()


def load_isolated(env_file: Path) -> Settings:
    """Read the defaults and one file, and nothing of the environment or of a project.

    For the demo, which must never push to where the user's own settings point.  Relative
    paths start from the file's folder.  Raises ``SettingsError`` with all that is wrong.
    """
    sources = _Sources(env_file.absolute().parent, {})
    sources.add_file(env_file.absolute(), _shown(env_file, Path()), required="")
    return sources.settings()


def _shown(path: Path, cwd: Path) -> str:
    """A file's name for messages: as short as it can be, and always on one line."""
    text = str(path.relative_to(cwd) if path.is_relative_to(cwd) else path)
    return text if text.isprintable() else repr(text)


@dataclass(frozen=True)
class _Given:
    """A value as it was given: how to read it, the folder its paths start from, its place."""

    text: str = field(repr=False)
    parse: Parser
    base: Path
    origin: str


def _given(name: str, text: str, base: Path, origin: str) -> _Given:
    # A space at an end is a slip of the pen, but in a password it may be meant.
    return _Given(text if name in _SECRETS else text.strip(), _KNOWN[name].parse, base, origin)


class _Sources:
    """What the sources say, added from the weakest to the strongest, and what is wrong there."""

    def __init__(self, project: Path, environ: Mapping[str, str]) -> None:
        self._project = project
        self._given: dict[str, _Given] = {}
        self._problems: list[str] = []
        self._notes: list[str] = []
        # What ${NAME} can stand for.  The environment wins here too; secrets take no part.
        self._written: dict[str, str] = {}
        outer = {name: text for name, text in environ.items() if text and name not in _SECRETS}
        self._variables = ChainMap(outer, self._written)

    def add_file(self, path: Path, label: str, *, required: str | None = None) -> None:
        """Add an env file; it may be missing, unless ``required`` by what an error begins with."""
        text = self._read(path, label, required)
        layer: dict[str, _Given] = {}
        first: dict[str, int] = {}
        for line, binding in _bindings(text):
            where, key, value = f"{label}:{line}", binding.key, binding.value
            # What is no known name is not repeated: it may be the second line of a password.
            name = f"{key}: " if key in _KNOWN else ""
            if binding.error:
                self._problems.append(
                    f"{where}: not NAME=VALUE; close each quote, and put quotes around the whole"
                    " of a value that begins with one"
                )
            elif key is None:
                continue  # a comment
            elif value is None:
                self._problems.append(
                    f"{where}: {name}has no '='; write {key if name else 'NAME'}=VALUE"
                )
            elif key in first:
                self._problems.append(f"{where}: {name}is set on line {first[key]} too; keep one")
            else:
                first[key] = line
                self._add_value(layer, key, value, path.parent, where)
        self._add_layer(layer)

    def add_environ(self, environ: Mapping[str, str], cwd: Path) -> None:
        """Add the process's environment, where an empty value counts as not set."""
        given = {
            name: _given(name, environ.get(name, ""), cwd, f"environment: {name}")
            for name in _KNOWN
        }
        self._add_layer({name: each for name, each in given.items() if each.text})

    def add_overrides(self, overrides: Mapping[str, str | Sequence[str]], cwd: Path) -> None:
        """Add a task's options, where an empty value counts as not given."""
        layer = {}
        for name, value in overrides.items():
            setting = _SETTINGS.get(name)
            option = (setting and setting.option) or name.lower().replace("_", "-")
            if name not in _KNOWN:
                self._problems.append(f"option --{option}: is not a setting; see .env.example")
            elif value:
                text = value if isinstance(value, str) else shlex.join(value)
                layer[name] = _given(name, text, cwd, f"option --{option}")
        self._add_layer(layer)

    def settings(self) -> Settings:
        """Parse what the strongest source says of each setting."""
        values = {name.lower(): self._parse(name) for name in _SETTINGS}
        docker = {name: self._parse(name) for name in _DOCKER_VARIABLES}
        self._check_pair("GUIX_BINARY_URL", "GUIX_BINARY_SHA256")
        if self._problems:
            raise SettingsError(list(dict.fromkeys(self._problems)))
        return Settings(
            **values,
            docker_environment=MappingProxyType({k: str(v) for k, v in docker.items() if v}),
            notes=tuple(dict.fromkeys(self._notes)),
            origins=MappingProxyType({k: given.origin for k, given in self._given.items()}),
        )

    def _read(self, path: Path, label: str, required: str | None) -> str:
        """The text of an env file; empty, with the problem noted, where it cannot be had."""
        try:
            return path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            self._problems.append(f"{label}:{line}: is not UTF-8; save the file as UTF-8")
        except (OSError, ValueError) as error:  # ValueError: no file can have that name
            missing = isinstance(error, FileNotFoundError)
            if required is not None or not missing:
                reason = getattr(error, "strerror", None) or "not a file's name"
                self._problems.append(
                    f"{required or ''}{label}: {reason}; name a file that can be read"
                )
        return ""

    def _add_value(
        self, layer: dict[str, _Given], key: str, value: str, base: Path, where: str
    ) -> None:
        if key in _KNOWN:
            origin = f"{where}: {key}"
            text = value if key in _SECRETS else self._interpolate(value, origin)
            layer[key] = _given(key, text, base, origin)
        else:
            self._add_unknown(key, where)
            text = self._interpolate(value, where)
        if key not in _SECRETS:
            self._written[key] = text

    def _add_unknown(self, key: str, where: str) -> None:
        """A key that is nobody's: a mistake if it is near to a setting, else worth a note."""
        near = _nearest(key)
        if key == "ENV_FILE":
            self._problems.append(
                f"{where}: ENV_FILE: names no file here; set it in the environment"
            )
        elif near:
            self._problems.append(f"{where}: {quoted(key)} is not a setting; did you mean {near}?")
        elif re.fullmatch(r"[A-Z][A-Z0-9_]{,40}|[a-z][a-z0-9_]{,40}", key):
            self._notes.append(f"{where}: {key}: is not a setting of guix-tasks; ignored")
        else:
            self._notes.append(f"{where}: sets what is not a setting of guix-tasks; ignored")

    def _interpolate(self, value: str, origin: str) -> str:
        text = []
        for atom in parse_variables(value):
            if isinstance(atom, Variable):
                if atom.name in _SECRETS:
                    self._problems.append(
                        f"{origin}: would show {atom.name}, a secret; write the text itself"
                    )
                elif atom.default is None and atom.name not in self._variables:
                    self._notes.append(
                        f"{origin}: {quoted(atom.name)} in ${{...}} is not set; taken as empty"
                    )
            text.append(atom.resolve(self._variables))
        return "".join(text)

    def _add_layer(self, layer: dict[str, _Given]) -> None:
        """Put a source above the earlier ones; in one source a secret has one place."""
        for name in _SECRETS:
            itself, file = layer.get(name), layer.pop(f"{name}_FILE", None)
            if itself and itself.text and file and file.text:
                self._problems.append(f"{file.origin}: {name} is set too; keep one of the two")
            elif file and (file.text or not itself):
                layer[name] = file
        self._given.update(layer)

    def _parse(self, name: str) -> Any:
        default = _given(name, _KNOWN[name].default, self._project, f"default: {name}")
        given = self._given.get(name, default)
        values: list[Any] = []
        for problem in _problems(_encodable(given.parse), given.text, given.base, values):
            self._problems.append(f"{given.origin}: {problem}")
        return values[0] if values else None

    def _check_pair(self, one: str, other: str) -> None:
        for name, missing in ((one, other), (other, one)):
            given, lacks = self._given.get(name), self._given.get(missing)
            if given and given.text and not (lacks and lacks.text):
                self._problems.append(f"{given.origin}: needs {missing} too; set both or neither")


def _bindings(text: str) -> Iterator[tuple[int, Binding]]:
    """What dotenv finds in a file, each with the line that it begins on."""
    # newline=None turns CRLF into one newline; dotenv counts two after a malformed line.
    for binding in parse_stream(io.StringIO(text, newline=None)):
        # dotenv counts from the blank lines above.
        written = binding.original.string
        blank = written[: len(written) - len(written.lstrip())]
        yield binding.original.line + blank.count("\n"), binding


def _nearest(key: str) -> str | None:
    """The setting that was probably meant, or None."""
    name = key.upper()
    if f"GUIX_{name}" in _SETTINGS:
        return f"GUIX_{name}"
    return next(iter(difflib.get_close_matches(name, _KNOWN, n=1, cutoff=0.8)), None)


if __name__ == "__main__":
    sys.stdout.write(example_text())
