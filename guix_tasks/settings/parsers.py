"""Parsers of the values of settings.

A parser takes the text of a setting and the directory from which relative paths start, and returns
the value. It raises ``ValueError`` with one argument per problem, each as "cause; hint".
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
    """Raise ``ValueError`` for text that file names and command lines cannot contain."""
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("contains a NUL or a malformed character; write UTF-8 text")


def words(text: str, _base: Path) -> tuple[str, ...]:
    """Split text like a shell does."""
    try:
        return tuple(shlex.split(text))
    except ValueError:
        raise ValueError(
            "a quote is not closed, or the text ends in a backslash; close the quote"
        ) from None


# --- Combinators ----------------------------------------------------------------------------


def plain(parse: Callable[[str], object]) -> Parser:
    """Turn a function of the text alone into a parser."""
    return lambda text, _base: parse(text)


def optional(parse: Parser) -> Parser:
    """Parse empty text as ``None``."""
    return lambda text, base: parse(text, base) if text else None


def list_of(parse: Parser, *, commas: bool = False) -> Parser:
    """Parse items that are separated and quoted like words of a shell; drop duplicates.

    Unless items can contain ``commas``, an error about an item with a comma has a hint about that.
    """

    def parse_all(text: str, base: Path) -> tuple[Any, ...]:
        values: list[Any] = []
        problems: list[str] = []
        for word in words(text, base):
            has_stray_comma = "," in word and not commas
            hint = "; separate items by spaces, not commas" if has_stray_comma else ""
            try:
                values.append(parse(word, base))
            except ValueError as error:
                problems += [f"{problem}{hint}" for problem in error.args]
        if problems:
            raise ValueError(*problems)
        return tuple(dict.fromkeys(values))

    return parse_all


def mapping_of(parse: Parser) -> Parser:
    """Parse a list of pairs with distinct keys."""

    def parse_all(text: str, base: Path) -> Mapping[str, Any]:
        pairs = list_of(parse)(text, base)
        _check_duplicates([name for name, _ in pairs])
        return MappingProxyType(dict(pairs))

    return parse_all


def _check_duplicates(names: Sequence[str]) -> None:
    duplicates = dict.fromkeys(name for name in names if names.count(name) > 1)
    if duplicates:
        raise ValueError(*(f"{quoted(name)} is set twice; keep one" for name in duplicates))


# --- Words and numbers ----------------------------------------------------------------------


def _matching(pattern: str, problem: str) -> Parser:
    """Accept text that matches a pattern; ``problem`` is the rest of the error about other text."""
    expression = re.compile(pattern, re.ASCII)

    def parse(text: str, _base: Path) -> str:
        if not expression.fullmatch(text):
            raise ValueError(f"{quoted(text)} {problem}")
        return text

    return parse


package = _matching(
    # Strict, so that no option and no file name passes as a package.
    r"[A-Za-z0-9][\w+.-]*(@[A-Za-z0-9][\w+.~^-]*)?(:[A-Za-z0-9][\w.-]*)?",
    "is not a package; write NAME, NAME@VERSION or NAME@VERSION:OUTPUT",
)
sha256 = _matching("[0-9a-f]{64}", "is not a SHA-256 checksum; write 64 lower case hex digits")
volume = _matching(
    r"[A-Za-z0-9][\w.-]{,60}", "is not a volume name; write at most 61 letters and digits"
)
network = _matching(r"[A-Za-z0-9][\w.-]*", "is not a network; write none, host or a network name")
builder = _matching(
    # The rule of buildx, store/util.go and builder.go.
    # Files, containers, volumes and, with Kubernetes, deployments get the name with a suffix.
    r"(?!(?i:default)\Z)[A-Za-z][\w.-]{,49}",
    "is not a builder name; write at most 50 letters and digits, a letter first; to use the "
    "engine's own builder, set BUILDX_DRIVER=docker",
)
attestation = _matching("provenance|sbom", "is not an attestation; write provenance or sbom")
_cache_form = _matching(
    # The syntax of `--cache-to`; buildx takes text without a comma for an image name.
    r'type=[a-z0-9]+(,[\w.-]+=[^,"\s]*)*',
    "is not a build cache; write type=KIND,NAME=VALUE, for example "
    "type=registry,ref=REGISTRY/REPOSITORY",
)


def one_of(kind: type[Enum], noun: str) -> Parser:
    def parse(text: str, _base: Path) -> Enum:
        try:
            return kind(text)
        except ValueError:
            allowed = ", ".join(member.value for member in kind)
            raise ValueError(f"{quoted(text)} is not {noun}; write one of: {allowed}") from None

    return parse


def switch(text: str, _base: Path) -> bool:
    if text not in ("yes", "no"):
        raise ValueError(f"{quoted(text)} is neither yes nor no; write yes or no")
    return text == "yes"


def _amount(units: Mapping[str, int], digits: int, minimum: int, problem: str) -> Parser:
    """Accept a whole number with a unit; ``problem`` is the rest of the error about other text."""

    def parse(text: str, _base: Path) -> int:
        match = re.fullmatch(rf"([0-9]{{1,{digits}}})({'|'.join(units)})", text.lower())
        amount = int(match[1]) * units[match[2]] if match else -1
        if amount < minimum:
            raise ValueError(f"{quoted(text)} {problem}")
        return amount

    return parse


def number(minimum: int, maximum: int = 10**9) -> Parser:
    example = f"write for example {minimum + 1}"
    parse = _amount({"": 1}, 9, minimum, f"is not a whole number of at least {minimum}; {example}")

    def parse_limited(text: str, base: Path) -> int:
        amount: int = parse(text, base)
        if amount > maximum:
            raise ValueError(f"{quoted(text)} is more than {maximum}; write a smaller number")
        return amount

    return parse_limited


memory = _amount(
    # The suffixes and the minimum of `docker run --memory`.
    {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30},
    digits=15,
    minimum=6 << 20,
    problem="is not an amount of at least 6m; write for example 512m or 4g",
)
seconds = _amount(
    {"": 1, "s": 1, "m": 60, "h": 3600},
    digits=7,
    minimum=1,
    problem="is not a time; write seconds, or for example 45s, 90m or 2h",
)


def url(*schemes: str) -> Parser:
    """Accept URLs that a shell and Guix's lists of URLs leave in one piece."""
    prefixes = tuple(f"{scheme}://" for scheme in schemes)
    hint = f"write a URL that begins with {' or '.join(prefixes)}"

    def parse(text: str, _base: Path) -> str:
        # Command lines and this error would show a password in the URL.
        if "@" in text:
            raise ValueError(
                "a URL contains a user or a password; remove the part up to and including '@'"
            )
        location = _location(text)
        if location is None:
            raise ValueError(f"{quoted(text)} is not a URL; {hint}")
        if not text.startswith(prefixes) or not location:
            raise ValueError(f"{quoted(text)} is not a supported URL; {hint}")
        if not re.fullmatch(r"[\w%+,\-./:=?&\[\]~]+", text, re.ASCII):
            raise ValueError(
                f"{quoted(text)} contains a character that URLs cannot contain; write %XX for it"
            )
        return text

    return parse


def _location(address: str) -> str | None:
    """Return the host of a URL, or the path of a file URL; None if the URL is malformed."""
    try:
        parts = urlsplit(address)
        _ = parts.port  # raises ValueError for a malformed port
    except ValueError:
        return None
    return parts.path if parts.scheme == "file" else parts.hostname or ""


_PORT_MAX = 65535


def listen(text: str, _base: Path) -> Listen:
    address, _, port = text.rpartition(":")
    try:
        ipaddress.IPv4Address(address)
        is_valid = bool(re.fullmatch("[0-9]{1,5}", port)) and 0 < int(port) <= _PORT_MAX
    except ValueError:
        is_valid = False
    if not is_valid:
        raise ValueError(
            f"{quoted(text)} is not an IPv4 address with a port; write ADDRESS:PORT, for example "
            "0.0.0.0:8181"
        )
    return Listen(address, int(port))


# --- Images ---------------------------------------------------------------------------------

# The tag of a stage is the tag of IMAGE followed by "-STAGE" or "-STAGE-OS-ARCH".
_STAGE_SUFFIX = r"-(base|pull|install)(-linux-.+)?"
_TAG_MAX = 100  # of the 128 characters that a tag can have


def is_stage_tag(tag: str, image_tag: str) -> bool:
    """Return True if ``tag`` is reserved for a stage or platform of the image ``image_tag``."""
    suffixes = rf"({_STAGE_SUFFIX}|-linux-.+)"
    return re.fullmatch(re.escape(image_tag) + suffixes, tag) is not None


def reference(text: str, _base: Path) -> ImageReference:
    parsed = ImageReference.parse(text)
    is_bare = parsed.tag is None and parsed.digest is None
    return parsed.with_tag(DEFAULT_TAG) if is_bare else parsed


def image(text: str, base: Path) -> ImageReference:
    parsed = reference(text, base)
    if parsed.digest is not None:
        raise ValueError("has a digest, but each build changes IMAGE; write a tag")
    tag = parsed.tag or ""
    if len(tag) > _TAG_MAX:
        raise ValueError(
            f"the tag is too long for the suffixes of stages; write at most {_TAG_MAX} characters"
        )
    if stage := re.search(rf"{_STAGE_SUFFIX}\Z", tag):
        raise ValueError(
            f"a tag that ends in {stage[0]} is reserved for a stage; write another tag"
        )
    return parsed


def cache_image(text: str, base: Path) -> ImageReference:
    parsed = reference(text, base)
    if parsed.digest is not None:
        raise ValueError("has a digest, but a repository is required; write REGISTRY/REPOSITORY")
    return parsed


def tag(text: str, _base: Path) -> str:
    check_tag(text)
    return text


_MAX_ID = 2**31 - 1


def user(text: str, _base: Path) -> tuple[str, int]:
    """Parse NAME:UID."""
    match = re.fullmatch(r"([a-z_][a-z0-9_-]{,30}):([0-9]{1,10})", text, re.ASCII)
    if not match or int(match[2]) > _MAX_ID or (match[1] == "root") != (int(match[2]) == 0):
        raise ValueError(f"{quoted(text)} is not a user; write NAME:UID, for example app:1000")
    return match[1], int(match[2])


def directory_of_image(text: str, _base: Path) -> str:
    """Accept an absolute path without ``.`` and ``..``."""
    if not re.fullmatch(r"/([\w.+-]+(/[\w.+-]+)*)?", text, re.ASCII) or _has_dots(text):
        raise ValueError(f"{quoted(text)} is not a directory of an image; write for example /srv")
    return text


def _has_dots(path: str) -> bool:
    return bool({".", ".."} & {*path.split("/")})


def port(text: str, _base: Path) -> str:
    """Return a port with its protocol."""
    match = re.fullmatch("([0-9]{1,5})(/tcp|/udp)?", text, re.ASCII)
    if not match or not 0 < int(match[1]) <= _PORT_MAX:
        raise ValueError(f"{quoted(text)} is not a port; write for example 8080 or 53/udp")
    return f"{match[1]}{match[2] or '/tcp'}"


def runtime_link(text: str, _base: Path) -> tuple[str, str]:
    name, _, target = text.partition("=")
    is_valid = re.fullmatch(r"(/[\w.+-]+)+=[\w.+-]+(/[\w.+-]+)*", text, re.ASCII)
    is_reserved = name.split("/")[1:2] in (["gnu"], ["profile"])
    if not is_valid or is_reserved or _has_dots(name) or _has_dots(target):
        raise ValueError(f"{quoted(text)} is not a link; write PATH=FILE, for example /bin=bin")
    return name, target


# --- Files and directories ------------------------------------------------------------------


def path(text: str, base: Path) -> Path:
    if not text:
        raise ValueError("a path is empty; set a file or a directory")
    return base / text


def dockerfile(text: str, base: Path) -> Path:
    """Accept a path that this process and the builder can both read."""
    location = path(text, base)
    if is_pipe(location):
        raise ValueError(
            f"{quoted(str(location))} is a pipe, which cannot be read twice; set a regular file"
        )
    return location


def file(text: str, base: Path) -> Path:
    """Accept a path to an existing file that is not a directory."""
    location = path(text, base)
    if stat.S_ISDIR(_mode(location)):
        raise ValueError(f"{quoted(str(location))} is a directory; set a file")
    return location


def _mode(location: Path) -> int:
    quoted_path = quoted(str(location))
    try:
        return location.stat().st_mode
    except OSError as error:
        problem = f"{quoted_path}: {error.strerror}; create it, or set another path"
        if "~" in location.parts:
            problem = f"{quoted_path} does not exist; '~' is not expanded, write ${{HOME}}"
        raise ValueError(problem) from None


def _plain_path(text: str, base: Path) -> Path:
    """Accept a path that needs no quotes in comma-separated values."""
    location = path(text, base)
    if set(str(location)) & set(',"'):
        problem = "contains a comma or a double quote, which ends a path in buildx; rename it"
        raise ValueError(f"{quoted(str(location))} {problem}")
    return location


def public_key(text: str, base: Path) -> Path:
    # The private key, signing-key.sec, is next to the public key, and must not reach an image.
    if not text.endswith(".pub"):
        raise ValueError(f"{quoted(text)} is not a public key; set a file that ends in .pub")
    return file(text, base)


def secret_file(text: str, base: Path) -> Secret:
    """Read a secret from a file, without the final newline that editors add.

    Errors do not repeat the path, because it can be a password that was set by mistake.
    """
    try:
        secret = read_text(base / text, "utf-8-sig").removesuffix("\n")
    except OSError as error:
        raise ValueError(f"the file: {error.strerror}; create it, or set another path") from None
    except UnicodeDecodeError:
        raise ValueError("the file is not UTF-8; write the secret in UTF-8") from None
    if not secret or "\0" in secret:
        raise ValueError("the file contains no text; write the secret to it")
    return Secret(secret)


def certificates(text: str, base: Path) -> Path:
    """Accept a PEM file of certificates that contains no private key."""
    location = file(text, base)
    quoted_path = quoted(str(location))
    try:
        pem = read_text(location, "ascii", "replace")
    except OSError as error:
        raise ValueError(f"{quoted_path}: {error.strerror}; set a readable file") from None
    if "PRIVATE KEY-----" in pem:
        raise ValueError(
            f"{quoted_path} contains a private key; set a file that contains certificates only"
        )
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem)
    except (ssl.SSLError, ValueError):
        raise ValueError(
            f"{quoted_path} contains no PEM certificates; set a file with "
            "-----BEGIN CERTIFICATE-----"
        ) from None
    return location


def mounts(text: str, base: Path) -> tuple[Mount, ...]:
    values: tuple[Mount, ...] = list_of(_mount)(text, base)
    _check_duplicates([mount.target for mount in values])
    return values


def _mount(text: str, base: Path) -> Mount:
    source, _, rest = text.partition(":")
    target, colon, mode = rest.partition(":")
    if not source or not target or (colon and mode not in {"ro", "rw"}):
        raise ValueError(f"{quoted(text)} is not a mount; write SOURCE:TARGET or SOURCE:TARGET:ro")
    inside = PurePosixPath(target.lstrip("/"))
    if not target.startswith("/") or ".." in inside.parts or not inside.parts:
        raise ValueError(f"{quoted(target)} is not a path in a container; write /DIRECTORY/NAME")
    if reason := conflict(f"/{inside}"):
        raise ValueError(
            f"{quoted(target)} {reason}, and a commit excludes mounts, so the image would lack the "
            "results of the stages; use another target"
        )
    outside = path(source, base)
    _mode(outside)  # raises ValueError if it does not exist
    return Mount(outside, f"/{inside}", mode == "ro")


# --- Channels -------------------------------------------------------------------------------


def mirror(text: str, base: Path) -> tuple[str, str]:
    pair = re.fullmatch(r"((?:https?|ssh|file)://[^=]+)=((?:https?|ssh|file)://.+)", text)
    if not pair:
        raise ValueError(f"{quoted(text)} is not URL=MIRROR; write two URLs with '=' between them")
    for address in pair.groups():
        # The user of an SSH address is part of the address, and no secret.
        without_user = re.sub(r"\Assh://[\w.-]+@", "ssh://", address)
        url("https", "http", "ssh", "file")(without_user, base)
    return pair[1], pair[2]


def channel_credentials(text: str) -> list[tuple[str, str, str]]:
    """Parse credentials into prefixes of URLs, each with a user and a password.

    The format is that of Git's credential file (git-credential-store(1)). Errors do not repeat the
    credentials.
    """
    credentials = []
    for number, word in enumerate(text.split(), 1):
        scheme, _, address = word.partition("://")
        account, _, rest = address.rpartition("@")
        user, _, password = account.partition(":")
        prefix = f"{scheme}://{rest}"
        if scheme not in ("https", "http") or not user or not _location(prefix):
            raise ValueError(
                f"item {number} is not a URL with credentials; write https://USER:TOKEN@HOST"
            )
        # The final slash keeps example.org from being a prefix of example.org.evil.
        credentials.append((f"{prefix.rstrip('/')}/", unquote(user), unquote(password)))
    return credentials


def secret_parts(text: str) -> list[str]:
    """Return all secrets in credentials, valid or not."""
    parts = []
    for word in text.split():
        account = word.partition("://")[2].rpartition("@")[0] or word
        user, _, password = account.partition(":")
        # Some servers take a token in place of the user.
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
        raise ValueError(f"{quoted(text)} is not a build secret; write ID=FILE")
    _plain_path(source, base)
    location = file(source, base)
    try:
        return name, reopenable(location)
    except OSError as error:
        raise ValueError(f"{quoted(str(location))}: {error.strerror}; set another file") from None


def cache_backend(text: str, base: Path) -> str:
    """Parse a build cache in buildx's syntax and make its local directories absolute."""
    kind, *options = str(_cache_form(text, base)).split(",")
    pairs = (option.partition("=") for option in options)
    directories = ("dest", "src") if kind == "type=local" else ()
    absolute = (
        f"{name}={_plain_path(value, base) if name in directories else value}"
        for name, _, value in pairs
    )
    return ",".join([kind, *absolute])
