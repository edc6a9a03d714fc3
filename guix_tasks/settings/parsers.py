"""From the text of a setting to its value.

A parser takes the text, and the folder that a relative path in it starts from.  It raises a
``ValueError`` with one argument for each problem: what is wrong; what would be right.
"""

from __future__ import annotations

import ipaddress
import re
import shlex
import ssl
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from guix_tasks.files import is_pipe, read_text, reopenable
from guix_tasks.guix.result_paths import conflict
from guix_tasks.oci.reference import DEFAULT_TAG, ImageReference, check_tag, quoted
from guix_tasks.settings.values import Listen, Mount, Secret

if TYPE_CHECKING:
    from enum import Enum

Parser = Callable[[str, Path], Any]


def check_text(text: str) -> None:
    """Refuse what no file name, no command and no engine can take."""
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("has a NUL or a broken character in it; write UTF-8 text")


# --- Parsers made of others -----------------------------------------------------------------


def plain(parse: Callable[[str], object]) -> Parser:
    """Make a parser of a function that needs no folder."""
    return lambda text, _base: parse(text)


def optional(parse: Parser) -> Parser:
    """Let empty text be ``None``."""
    return lambda text, base: parse(text, base) if text else None


def list_of(parse: Parser, *, commas: bool = False) -> Parser:
    """Take items separated as a shell separates words; one given twice counts once.

    Where ``commas`` are a part of items, none is taken for a slip.
    """

    def parse_all(text: str, base: Path) -> tuple[Any, ...]:
        try:
            words = shlex.split(text)
        except ValueError:
            raise ValueError("a quote is not closed, or a backslash ends it; close it") from None
        values: list[Any] = []
        problems: list[str] = []
        for word in words:
            slip = "," in word and not commas
            hint = "; items are separated by spaces, not commas" if slip else ""
            try:
                values.append(parse(word, base))
            except ValueError as error:
                problems += [f"{problem}{hint}" for problem in error.args]
        if problems:
            raise ValueError(*problems)
        return tuple(dict.fromkeys(values))

    return parse_all


def mapping_of(parse: Parser) -> Parser:
    """Take a list of pairs, no two of which have the same first half."""

    def parse_all(text: str, base: Path) -> Mapping[str, Any]:
        pairs = list_of(parse)(text, base)
        _no_duplicates([name for name, _ in pairs])
        return MappingProxyType(dict(pairs))

    return parse_all


def _no_duplicates(names: Sequence[str]) -> None:
    twice = dict.fromkeys(name for name in names if names.count(name) > 1)
    if twice:
        raise ValueError(*(f"{quoted(name)} is given twice; keep one" for name in twice))


# --- Words and numbers ----------------------------------------------------------------------


def _matching(pattern: str, rule: str) -> Parser:
    """Take text of one form as it is; ``rule`` says what is wrong with any other, and right."""
    expression = re.compile(pattern, re.ASCII)

    def parse(text: str, _base: Path) -> str:
        if not expression.fullmatch(text):
            raise ValueError(f"{quoted(text)} {rule}")
        return text

    return parse


package = _matching(
    # Strict, so that nothing that looks like an option or a file is ever taken for a package.
    r"[A-Za-z0-9][\w+.-]*(@[A-Za-z0-9][\w+.~^-]*)?(:[A-Za-z0-9][\w.-]*)?",
    "is not a package; write NAME, NAME@VERSION or NAME@VERSION:OUTPUT",
)
sha256 = _matching("[0-9a-f]{64}", "is not a SHA-256 checksum; write 64 lower case hex digits")
volume = _matching(
    r"[A-Za-z0-9][\w.-]{,60}", "is not the name of a volume; write letters and digits"
)
network = _matching(r"[A-Za-z0-9][\w.-]*", "is not a network; write none, host, or a name")
builder = _matching(
    # The rule of buildx, store/util.go and builder.go.
    r"(?!(?i:default)\Z)[A-Za-z][\w.-]*",
    "is not the name of a builder; write letters and digits, the first a letter; the engine's own "
    "is BUILDX_DRIVER=docker",
)
attestation = _matching("provenance|sbom", "is not an attestation; write provenance or sbom")
_cache_form = _matching(
    # What `--cache-to` takes; without a comma it would be an image's name.
    r'type=[a-z0-9]+(,[\w.-]+=[^,"\s]*)*',
    "is not a build cache; write type=KIND,NAME=VALUE, as type=registry,ref=REGISTRY/REPOSITORY",
)


def one_of(kind: type[Enum], what: str) -> Parser:
    def parse(text: str, _base: Path) -> Enum:
        try:
            return kind(text)
        except ValueError:
            allowed = ", ".join(each.value for each in kind)
            raise ValueError(f"{quoted(text)} is not {what}; write one of: {allowed}") from None

    return parse


def switch(text: str, _base: Path) -> bool:
    if text not in ("yes", "no"):
        raise ValueError(f"{quoted(text)} is neither yes nor no; write one of them")
    return text == "yes"


def number(least: int) -> Parser:
    def parse(text: str, _base: Path) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least:
            raise ValueError(f"{quoted(text)} is not a whole number from {least} on; write one")
        return int(text)

    return parse


_MEMORY_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_MEMORY_LEAST = 6 << 20  # the Docker Engine refuses less


def memory(text: str, _base: Path) -> int:
    """Bytes, with the binary suffixes of ``docker run --memory``."""
    match = re.fullmatch(r"([0-9]{1,15})([bkmg]?)", text.lower())
    size = int(match[1]) * _MEMORY_UNITS[match[2]] if match else 0
    if size < _MEMORY_LEAST:
        raise ValueError(f"{quoted(text)} is not an amount from 6m on; write one, as 512m or 4g")
    return size


_TIME_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}


def seconds(text: str, _base: Path) -> int:
    match = re.fullmatch(r"([0-9]{1,7})([smh]?)", text)
    time = int(match[1]) * _TIME_UNITS[match[2]] if match else 0
    if not time:
        raise ValueError(f"{quoted(text)} is not a time; write seconds, or as 45s, 90m or 2h")
    return time


def url(*schemes: str) -> Parser:
    """Take URLs without what a shell, or Guix's lists of URLs, would take apart."""
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


_PORT_MAX = 65535


def listen(text: str, _base: Path) -> Listen:
    address, _, port = text.rpartition(":")
    try:
        ipaddress.IPv4Address(address)
        right = bool(re.fullmatch("[0-9]{1,5}", port)) and 0 < int(port) <= _PORT_MAX
    except ValueError:
        right = False
    if not right:
        raise ValueError(f"{quoted(text)} is no address; write ADDRESS:PORT, as 0.0.0.0:8181")
    return Listen(address, int(port))


# --- Images ---------------------------------------------------------------------------------

# A stage's tag is that of IMAGE with "-STAGE" or "-STAGE-OS-ARCH" behind it.
_STAGE_SUFFIX = r"-(base|pull|install)(-linux-.+)?"
_TAG_MAX = 100  # of the 128 characters that a tag can have


def is_stage_tag(tag: str, image_tag: str) -> bool:
    """Whether a stage, or a platform, of the image with ``image_tag`` could have this tag."""
    suffixes = rf"({_STAGE_SUFFIX}|-linux-.+)"
    return re.fullmatch(re.escape(image_tag) + suffixes, tag) is not None


def reference(text: str, _base: Path) -> ImageReference:
    parsed = ImageReference.parse(text)
    bare = parsed.tag is None and parsed.digest is None
    return parsed.with_tag(DEFAULT_TAG) if bare else parsed


def image(text: str, base: Path) -> ImageReference:
    parsed = reference(text, base)
    if parsed.digest is not None:
        raise ValueError("a digest stands for one image for ever, and IMAGE moves; write a tag")
    tag = parsed.tag or ""
    if len(tag) > _TAG_MAX:
        raise ValueError(f"the tag leaves no room for a stage's; write {_TAG_MAX} letters at most")
    if stage := re.search(rf"{_STAGE_SUFFIX}\Z", tag):
        raise ValueError(f"a tag that ends in {stage[0]} is a stage's; write one that does not")
    return parsed


def cache_image(text: str, base: Path) -> ImageReference:
    parsed = reference(text, base)
    if parsed.digest is not None:
        raise ValueError("a digest names no repository; write REGISTRY/REPOSITORY")
    return parsed


def tag(text: str, _base: Path) -> str:
    check_tag(text)
    return text


# --- Files and folders ----------------------------------------------------------------------


def path(text: str, base: Path) -> Path:
    if not text:
        raise ValueError("a path is empty; name a file or a folder")
    return base / text


def dockerfile(text: str, base: Path) -> Path:
    """Take a path to what a builder reads by itself, which it could not if we had to as well."""
    place = path(text, base)
    if is_pipe(place):
        raise ValueError(f"{quoted(str(place))} is a pipe, which cannot be read twice; name a file")
    return place


def file(text: str, base: Path) -> Path:
    """Take a path to something that is there, and no folder."""
    place = path(text, base)
    if stat.S_ISDIR(_mode(place)):
        raise ValueError(f"{quoted(str(place))} is a folder; name a file")
    return place


def _mode(place: Path) -> int:
    shown = quoted(str(place))
    try:
        return place.stat().st_mode
    except OSError as error:
        problem = f"{shown}: {error.strerror}; make it, or name another"
        if "~" in place.parts:
            problem = f"{shown} does not exist; '~' is not known here, write ${{HOME}}"
        raise ValueError(problem) from None


def _plain_path(text: str, base: Path) -> Path:
    """Take a path that can stand among comma-separated values as it is."""
    place = path(text, base)
    if set(str(place)) & set(',"'):
        problem = "has a comma or a double quote, where buildx ends a path; rename it"
        raise ValueError(f"{quoted(str(place))} {problem}")
    return place


def public_key(text: str, base: Path) -> Path:
    # Beside a public key lies the private one, signing-key.sec, which must not reach an image.
    if not text.endswith(".pub"):
        raise ValueError(f"{quoted(text)} is not a public key; name a file that ends in .pub")
    return file(text, base)


def secret_file(text: str, base: Path) -> Secret:
    """The secret that a file holds, without the newline that an editor puts at its end.

    Its path is not repeated in an error: a password may be there by mistake.
    """
    try:
        secret = read_text(base / text, "utf-8-sig").removesuffix("\n")
    except OSError as error:
        raise ValueError(f"the file: {error.strerror}; make it, or name another") from None
    except UnicodeDecodeError:
        raise ValueError("the file is not UTF-8; write the secret in UTF-8") from None
    if not secret or "\0" in secret:
        raise ValueError("the file holds no text; write the secret into it")
    return Secret(secret)


def certificates(text: str, base: Path) -> Path:
    """Take a file of certificates in PEM, without the key of any of them."""
    place = file(text, base)
    shown = quoted(str(place))
    try:
        pem = read_text(place, "ascii", "replace")
    except OSError as error:
        raise ValueError(f"{shown}: {error.strerror}; name a file that can be read") from None
    if "PRIVATE KEY-----" in pem:
        raise ValueError(f"{shown} has a private key in it; name a file of certificates alone")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem)
    except (ssl.SSLError, ValueError):
        raise ValueError(
            f"{shown} holds no certificates in PEM; name a file with -----BEGIN CERTIFICATE-----"
        ) from None
    return place


def mounts(text: str, base: Path) -> tuple[Mount, ...]:
    found: tuple[Mount, ...] = list_of(_mount)(text, base)
    _no_duplicates([mount.target for mount in found])
    return found


def _mount(text: str, base: Path) -> Mount:
    source, _, rest = text.partition(":")
    target, colon, mode = rest.partition(":")
    if not source or not target or (colon and mode not in {"ro", "rw"}):
        raise ValueError(f"{quoted(text)} is not a mount; write SOURCE:TARGET or SOURCE:TARGET:ro")
    inside = PurePosixPath(target.lstrip("/"))
    if not target.startswith("/") or ".." in inside.parts or not inside.parts:
        raise ValueError(f"{quoted(target)} is not a place in a container; write /FOLDER/NAME")
    if reason := conflict(f"/{inside}"):
        raise ValueError(
            f"{quoted(target)} {reason}, and a commit takes nothing of what is on a mount, so the "
            "image would lack what the stages make; mount it elsewhere"
        )
    outside = path(source, base)
    _mode(outside)  # raises where nothing is there
    return Mount(outside, f"/{inside}", mode == "ro")


# --- Channels -------------------------------------------------------------------------------


def mirror(text: str, base: Path) -> tuple[str, str]:
    pair = re.fullmatch(r"((?:https?|ssh|file)://[^=]+)=((?:https?|file)://.+|ssh://.+)", text)
    if not pair:
        raise ValueError(f"{quoted(text)} is not URL=MIRROR; write two URLs with '=' between")
    for each in pair.groups():
        # The user of an SSH address is no secret, and part of it.
        account = re.match(r"ssh://[\w.-]+@", each)
        rest = each.replace(account[0], "ssh://", 1) if account else each
        url("https", "http", "ssh", "file")(rest, base)
    return pair[1], pair[2]


def channel_credentials(text: str) -> list[tuple[str, str, str]]:
    """How URLs begin, each with the user and the password that open it.

    They are written as in Git's own file of credentials (git-credential-store(1)).  Nothing of
    them is repeated in an error.
    """
    found = []
    for number, word in enumerate(text.split(), 1):
        account, at, rest = word.partition("://")[2].rpartition("@")
        user, _, password = account.partition(":")
        try:
            parts = urlsplit(f"https://{rest}")
            right = word.startswith(("https://", "http://")) and at and user and parts.hostname
            _ = parts.port  # raises where it is not a port
        except ValueError:
            right = False
        if not right:
            raise ValueError(
                f"number {number} is not a URL with an account; write https://USER:TOKEN@HOST"
            )
        begin = f"{word.partition('://')[0]}://{rest}"
        # So that example.org is not the beginning of example.org.evil.
        found.append((f"{begin.rstrip('/')}/", unquote(user), unquote(password)))
    return found


def secret_parts(text: str) -> list[str]:
    """What is secret in credentials, whether they are right or not."""
    parts = []
    for word in text.split():
        account = word.partition("://")[2].rpartition("@")[0] or word
        user, _, password = account.partition(":")
        # A token may stand for the user.
        parts += [account, password or user, unquote(account), unquote(password or user)]
    return parts


# --- Pairs for a build ----------------------------------------------------------------------


def build_arg(text: str, _base: Path) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        raise ValueError(f"{quoted(name)} is not a build argument; write NAME=VALUE")
    return name, value


def build_secret(text: str, base: Path) -> tuple[str, Path]:
    name, equals, source = text.partition("=")
    if not equals or not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
        raise ValueError(f"{quoted(text)} is not a secret's ID with its file; write ID=FILE")
    _plain_path(source, base)
    place = file(source, base)
    try:
        return name, reopenable(place)
    except OSError as error:
        raise ValueError(f"{quoted(str(place))}: {error.strerror}; name another file") from None


def cache_backend(text: str, base: Path) -> str:
    """Take a build cache as buildx does; a folder of this machine is relative to ``base``."""
    kind, *options = str(_cache_form(text, base)).split(",")
    pairs = (option.partition("=") for option in options)
    folders = ("dest", "src") if kind == "type=local" else ()
    found = (
        f"{name}={_plain_path(value, base) if name in folders else value}"
        for name, _, value in pairs
    )
    return ",".join([kind, *found])
