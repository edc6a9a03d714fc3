"""Secrets in the values of settings: functions for ``Setting.secrets``."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from guix_tasks.files import read_text
from guix_tasks.settings.parsers import secret_parts
from guix_tasks.ui import redact

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from guix_tasks.settings.values import Secret

_FILE_MAX = 1 << 16
"""Maximum bytes of a file whose lines are redacted."""


def whole(_text: str, value: Secret | None) -> Iterable[str]:
    return [value.reveal()] if value else []


def of_channel_credentials(_text: str, value: Secret | None) -> Iterable[str]:
    return secret_parts(value.reveal()) if value else []


def of_build_arguments(text: str, value: Mapping[str, str] | None) -> Iterable[str]:
    return [*redact.secrets_in(text), *(argument for _, argument in secret_arguments(value))]


def secret_arguments(arguments: Mapping[str, str] | None) -> list[tuple[str, str]]:
    return [(name, text) for name, text in (arguments or {}).items() if redact.is_secret_name(name)]


def of_files(_text: str, value: Mapping[str, Path] | None) -> Iterator[str]:
    for path in (value or {}).values():
        with suppress(OSError), path.open("rb") as file:
            yield file.read(_FILE_MAX).decode(errors="surrogateescape")


def of_channels_file(text: str, value: Path | None) -> Iterable[str]:
    return redact.secrets_in(f"{text}\n{channels_text(value)}")


def channels_text(path: Path | None) -> str:
    """Return the channels file, or nothing if it is unreadable, which ``pull`` reports."""
    with suppress(OSError, UnicodeDecodeError):
        if path:
            return read_text(path)
    return ""
