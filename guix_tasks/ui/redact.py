"""Redaction of secrets in all output.

Like the masks of a CI job, the set of secrets belongs to the whole process. Code that reads a
secret adds it to the set. No output shows it afterwards, including errors of the engine.
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
"""Minimum characters of a secret; shorter text occurs in many words and is easy to guess."""

_LINE_MIN = 8
"""Minimum characters of a line in a secret of several lines, so that a brace is not redacted."""

_LINE_MAX = 8192
"""Maximum bytes of a line in a secret."""

_PASSWORD = re.compile(r"://[^\s/'\":@]*:([^\s/'\"]+)@")

_ACCOUNT = re.compile(rb"://(?!(?<=ssh://)[^\s/'\":@]+@)[^\s/'\"]+(?=@)")
"""User and password in a URL, except an SSH address with a user only."""

_PARTIAL_ACCOUNT = re.compile(rb"(:|:/|://[^\s/'\"]{,4096})\Z")
"""End of a text that can be the start of an account."""

_NAME = r"\w*(?:token|secret|passw(?:or)?d|access_key)\w*(?<!_FILE)"
"""Names of options and build arguments whose values are secret."""

_OPTION = re.compile(rf"(?<!-)\b({_NAME})=(?!id=)([^,\s'\"]+)", re.IGNORECASE)
"""Option such as ``secret_access_key=…`` of a build cache, but not ``--secret=id=…``."""

_encodings: set[bytes] = set()
"""All secrets, in all their encodings."""

_pattern = re.compile(rb"(?!)")
"""Expression that matches all of ``_encodings``."""


def add(*secrets: str) -> None:
    """Redact secrets from now on, in all their encodings."""
    global _pattern  # noqa: PLW0603 -- the process has one set of secrets
    new = {encoding for secret in secrets for encoding in _encode(secret)} - _encodings
    if new:
        _encodings.update(new)
        longest_first = sorted(_encodings, key=lambda encoding: (-len(encoding), encoding))
        _pattern = re.compile(b"|".join(map(re.escape, longest_first)))


def secrets_in(text: str) -> list[str]:
    """Return the passwords of URLs and the values of secret options in a text."""
    return _PASSWORD.findall(text) + [value for _, value in _OPTION.findall(text)]


def is_secret_name(name: str) -> bool:
    """Return True if the value of an option or build argument is probably secret."""
    return re.fullmatch(_NAME, name, re.IGNORECASE) is not None


def holds_secret(text: str) -> bool:
    """Return True if a text must not be printed or passed on a command line."""
    return clean(text) != text


def has_account(text: str) -> bool:
    """Return True if a URL in a text contains a password or a possible token."""
    return _ACCOUNT.search(to_bytes(text)) is not None


def hidden(text: bytes) -> bytes:
    """Redact secrets and the accounts in URLs."""
    return _redact_accounts(_redact_secrets(text))


def clean(text: str) -> str:
    """Redact secrets, accounts in URLs and values of secret options."""
    raw = to_bytes(text)
    safe = hidden(raw)
    return _OPTION.sub(rf"\1={HIDDEN.decode()}", text if safe == raw else _to_text(safe))


class Stream:
    """Redacts a stream, and writes data as soon as it cannot be a part of a secret.

    ``accounts`` also redacts the accounts in URLs, which are recognised by their form. Set it to
    false if the output must be unchanged except for known secrets.
    """

    def __init__(self, write: Callable[[bytes], object], *, accounts: bool = True) -> None:
        self._write = write
        self._filters = [_Filter(_redact_secrets, _end_of_complete_secrets)]
        if accounts:
            self._filters.append(_Filter(_redact_accounts, _end_of_complete_accounts))

    def add(self, data: bytes, *, last: bool = False) -> None:
        for data_filter in self._filters:
            data = data_filter.read(data, last=last)
        if data:
            self._write(data)

    def end(self) -> None:
        """Write the data that was held back."""
        self.add(b"", last=True)


class _Filter:
    """Redacts data that arrives in chunks.

    ``complete`` returns the length of the data that no later data can turn into a match; the rest
    is held back.
    """

    def __init__(self, redact: Callable[[bytes], bytes], complete: Callable[[bytes], int]) -> None:
        self._redact = redact
        self._complete = complete
        self._rest = b""

    def read(self, data: bytes, *, last: bool) -> bytes:
        text = self._rest + data
        end = len(text) if last else self._complete(text)
        self._rest = text[end:]
        return self._redact(text[:end])


def _redact_secrets(text: bytes) -> bytes:
    return _pattern.sub(HIDDEN, text)


def _redact_accounts(text: bytes) -> bytes:
    return _ACCOUNT.sub(b"://" + HIDDEN, text)


def _end_of_complete_secrets(text: bytes) -> int:
    end = len(text) - max((_overlap(text, secret) for secret in _encodings), default=0)
    # Do not cut a complete secret that ends in the data to be held back.
    matches = (match.span() for match in _pattern.finditer(text))
    return next((start for start, stop in matches if start < end < stop), end)


def _overlap(text: bytes, secret: bytes) -> int:
    """Return the length of the longest end of a text that is an incomplete start of a secret."""
    start = max(0, len(text) - len(secret) + 1)
    while (start := text.find(secret[:1], start)) >= 0:
        if secret.startswith(text[start:]):
            return len(text) - start
        start += 1
    return 0


def _end_of_complete_accounts(text: bytes) -> int:
    match = _PARTIAL_ACCOUNT.search(text)
    return match.start() if match else len(text)


def _encode(secret: str) -> Iterator[bytes]:
    """Yield a secret unchanged and as written in URLs, JSON, a shell, Python and HTTP.

    Output is redacted line by line, so a secret of several lines yields each of its lines.
    """
    lines = secret.splitlines()
    if len(lines) > 1:
        yield base64.b64encode(to_bytes(secret))
        lines = [line for line in lines if len(line.strip()) >= _LINE_MIN]
    for part in {text for line in lines for text in (line, line.strip()) if len(text) >= LEAST}:
        raw = to_bytes(part)
        quoted = {
            json.dumps(part)[1:-1],
            json.dumps(part, ensure_ascii=False)[1:-1],
            repr(part)[1:-1],
            shlex.quote(part).removeprefix("'").removesuffix("'"),
        }
        encodings = {
            raw,
            unquote_to_bytes(raw),
            quote(raw, safe="").encode(),
            quote(raw).encode(),
            base64.b64encode(raw),
            base64.urlsafe_b64encode(raw),
            *map(to_bytes, quoted),
        }
        for encoding in encodings:
            if len(_to_text(encoding)) >= LEAST and len(encoding) <= _LINE_MAX:
                yield encoding


def to_bytes(text: str) -> bytes:
    """Encode text that need not be valid UTF-8, such as a variable of the environment."""
    try:
        return text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return text.encode(errors="surrogatepass")


def _to_text(data: bytes) -> str:
    return data.decode(errors="surrogateescape")
