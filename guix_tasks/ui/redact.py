"""What must not be seen, and the one filter that everything that goes out passes.

The secrets are those of the whole process, as the masks of a CI job are: what reads a secret adds
it, and whatever speaks, an error of the engine included, cannot show it.
"""

from __future__ import annotations

import base64
import json
import re
import shlex
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote_to_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HIDDEN = b"***"

LEAST = 3
"""Characters from which text is hidden: what is shorter is in every word, and guessed anyway."""

_LINE = 8
"""Characters from which a line of a secret is one itself; a mere brace is not."""

_LONGEST = 8192
"""Bytes of a line up to which it is hidden."""

_PASSWORD = re.compile(r"://[^\s/'\":@]*:([^\s/'\"]+)@")

_ACCOUNT = re.compile(rb"://(?!(?<=ssh://)[^\s/'\":@]+@)[^\s/'\"]+(?=@)")
"""The user and the password in a URL, whoever wrote it; the mere user of an SSH address is none."""

_OPEN_ACCOUNT = re.compile(rb"(:|:/|://[^\s/'\"]{,4096})\Z")
"""The end of a text that may be the beginning of one."""

_NAME = r"\w*(?:token|secret|passw(?:or)?d|access_key)\w*(?<!_FILE)"
"""What the name of an option or of a build argument says that its value is to nobody."""

_OPTION = re.compile(rf"(?<!-)\b({_NAME})=(?!id=)([^,\s'\"]+)", re.IGNORECASE)
"""An option such as those of build caches, ``secret_access_key=…``; no ``--secret=id=…``."""

_known: set[bytes] = set()
_any = re.compile(rb"(?!)")


def add(*secrets: str) -> None:
    """Have text hidden from now on, in each way in which it may be written."""
    global _any  # noqa: PLW0603 -- the process has one set of secrets
    found = {way for secret in secrets for way in _ways(secret)} - _known
    if found:
        _known.update(found)
        longest_first = sorted(_known, key=lambda way: (-len(way), way))
        _any = re.compile(b"|".join(map(re.escape, longest_first)))


def forget() -> None:
    """Hide nothing any more, for tests."""
    global _any  # noqa: PLW0603
    _known.clear()
    _any = re.compile(rb"(?!)")


def secrets_in(text: str) -> list[str]:
    """The passwords of URLs and the values of secret options in a text."""
    return _PASSWORD.findall(text) + [value for _, value in _OPTION.findall(text)]


def is_secret_name(name: str) -> bool:
    """Whether what has this name is probably a secret."""
    return re.fullmatch(_NAME, name, re.IGNORECASE) is not None


def holds_secret(text: str) -> bool:
    """Whether a text is not to be said, or passed on a command line, as it is."""
    return clean(text) != text


def has_account(text: str) -> bool:
    """Whether a URL in a text has a password, or what may be a token."""
    return _ACCOUNT.search(to_bytes(text)) is not None


def hidden(text: bytes) -> bytes:
    """A text without secrets, and without the accounts in URLs."""
    return _without_accounts(_without_secrets(text))


def clean(text: str) -> str:
    """What is said, without secrets, accounts in URLs and values of secret options."""
    raw = to_bytes(text)
    safe = hidden(raw)
    return _OPTION.sub(rf"\1={HIDDEN.decode()}", text if safe == raw else _to_text(safe))


class Stream:
    """Hides secrets in what comes in pieces, each given on as soon as no secret can be in it.

    Of ``accounts`` nothing is known but how they look; where a text has to stay as it is, only the
    secrets themselves are hidden.
    """

    def __init__(self, write: Callable[[bytes], object], *, accounts: bool = True) -> None:
        self._write = write
        self._secrets = _Held(_without_secrets, _whole_secrets)
        self._accounts = _Held(_without_accounts, _whole_accounts) if accounts else None

    def add(self, data: bytes) -> None:
        self._give(self._secrets.add(data), last=False)

    def end(self) -> None:
        """Give on what may have been the beginning of a secret, and was none."""
        self._give(self._secrets.end(), last=True)

    def _give(self, data: bytes, *, last: bool) -> None:
        if self._accounts:
            data = self._accounts.add(data) + (self._accounts.end() if last else b"")
        if data:
            self._write(data)


class _Held:
    """Text that comes in pieces, and its end, held back for as long as it can become a match."""

    def __init__(self, change: Callable[[bytes], bytes], whole: Callable[[bytes], int]) -> None:
        self._change = change
        self._whole = whole
        self._rest = b""

    def add(self, data: bytes) -> bytes:
        text = self._rest + data
        end = self._whole(text)
        self._rest = text[end:]
        return self._change(text[:end])

    def end(self) -> bytes:
        text, self._rest = self._rest, b""
        return self._change(text)


def _without_secrets(text: bytes) -> bytes:
    return _any.sub(HIDDEN, text)


def _without_accounts(text: bytes) -> bytes:
    return _ACCOUNT.sub(b"://" + HIDDEN, text)


def _whole_secrets(text: bytes) -> int:
    """Up to where a text is the same whatever comes behind it."""
    end = len(text) - max((_overlap(text, way) for way in _known), default=0)
    # What is held back may also be the end of another secret, which is not to be cut.
    matches = (match.span() for match in _any.finditer(text))
    return next((start for start, stop in matches if start < end < stop), end)


def _overlap(text: bytes, secret: bytes) -> int:
    """How many bytes at the end of a text are the first ones of a secret, but not all."""
    start = max(0, len(text) - len(secret) + 1)
    while (start := text.find(secret[:1], start)) >= 0:
        if secret.startswith(text[start:]):
            return len(text) - start
        start += 1
    return 0


def _whole_accounts(text: bytes) -> int:
    match = _OPEN_ACCOUNT.search(text)
    return match.start() if match else len(text)


def _ways(secret: str) -> Iterator[bytes]:
    """A secret as it is, and as URLs, JSON, a shell, Python and HTTP write it.

    A text is looked through line by line, and a key may have several.
    """
    lines = secret.splitlines()
    if len(lines) > 1:
        yield base64.b64encode(to_bytes(secret))
        lines = [line for line in lines if len(line.strip()) >= _LINE]
    for part in {text for line in lines for text in (line, line.strip()) if len(text) >= LEAST}:
        raw = to_bytes(part)
        written = {
            json.dumps(part)[1:-1],
            json.dumps(part, ensure_ascii=False)[1:-1],
            repr(part)[1:-1],
            shlex.quote(part).removeprefix("'").removesuffix("'"),
        }
        ways = {
            raw,
            unquote_to_bytes(raw),
            quote(raw, safe="").encode(),
            quote(raw).encode(),
            base64.b64encode(raw),
            base64.urlsafe_b64encode(raw),
            *map(to_bytes, written),
        }
        yield from (way for way in ways if len(_to_text(way)) >= LEAST and len(way) <= _LONGEST)


def to_bytes(text: str) -> bytes:
    """Text as bytes; what the environment holds need not be UTF-8."""
    try:
        return text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return text.encode(errors="surrogatepass")


def _to_text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode(errors="surrogateescape")
