"""What one needs to find out why a stage failed: ``out/failed/STAGE-TIME/``."""

from __future__ import annotations

import io
import os
import tarfile
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import IO, TYPE_CHECKING
from urllib.parse import urlsplit

from guix_tasks import guix
from guix_tasks.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from guix_tasks.engine import Engine
    from guix_tasks.settings import Settings

_BUILD_LOGS = 10
"""Logs of failed builds that are kept."""

HIDDEN = "***"


@dataclass(frozen=True)
class Failed:
    """A command that failed in a work container."""

    name: str
    container: str
    command: bytes
    log: IO[bytes]


def keep_failure(engine: Engine, settings: Settings, failed: Failed) -> Path | None:
    """Keep log, command, build logs, settings and versions of a stage; where.

    No secret is among it.  None where it cannot be written: the stage's own error is the one to
    tell.
    """
    time = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    folder = settings.output_folder / "failed" / f"{failed.name}-{time}"
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    failed.log.seek(0)
    text = failed.log.read().decode(errors="replace")
    with suppress(OSError):
        unfinished.mkdir(parents=True)
        for file, content in _files(engine, settings, text, failed.command).items():
            (unfinished / file).write_text(hidden(content, settings), encoding="utf-8")
        for path in guix.build_logs(text)[:_BUILD_LOGS]:
            with suppress(EngineError, tarfile.TarError):
                _unpack(engine.copy_out(failed.container, path), unfinished)
        unfinished.rename(folder)
        return folder
    return None


def _files(engine: Engine, settings: Settings, log: str, command: bytes) -> Mapping[str, str]:
    info = engine.info()
    return {
        "log": log,
        "command": command.decode(errors="replace"),
        "settings": "".join(f"{name}={text}\n" for name, text in settings.written.items() if text),
        "versions": f"Docker {info.version} ({info.storage_driver}, {info.platform})\n",
    }


def _unpack(archive: bytes, folder: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            if member.isfile() and (file := tar.extractfile(member)):
                (folder / member.name.replace("/", "_")).write_bytes(file.read())


def hidden(text: str, settings: Settings) -> str:
    """A text without the secrets that the settings hold."""
    for secret in sorted(_secrets(settings), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def _secrets(settings: Settings) -> Iterator[str]:
    if settings.docker_password:
        yield settings.docker_password.reveal()
    for url in settings.proxies.values():
        with suppress(ValueError):
            if password := urlsplit(url).password:
                yield password
