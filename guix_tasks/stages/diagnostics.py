"""What one needs to find out why a stage failed: ``out/failed/STAGE-TIME/``."""

from __future__ import annotations

import bz2
import errno
import gzip
import itertools
import os
import re
import shutil
import tarfile
import tempfile
import zlib
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from io import BytesIO
from typing import IO, TYPE_CHECKING, cast

from guix_tasks import guix
from guix_tasks.errors import EngineError
from guix_tasks.ui.redact import clean, hidden, to_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from guix_tasks.engine.api import Engine
    from guix_tasks.settings import Settings

_IN_MEMORY = 1 << 20
"""Bytes of a log from which it is on disk while it comes."""

_BUILD_LOGS = 10
"""Logs of failed builds that are kept."""

_COPY_MOST = 64 << 20
"""Bytes of such a log as it is in the container, packed: a file there may have no end."""

_LOG_MOST = 64 << 20
"""Bytes of such a log, unpacked: what a container packs may be without an end."""


@dataclass(frozen=True)
class Failed:
    """A command that failed in a work container."""

    name: str
    container: str
    command: bytes
    log: IO[bytes]


def log_path(settings: Settings, name: str) -> Path:
    """Where the whole log of a stage's last run is, without secrets."""
    suffix = f"-{settings.platform.tag_suffix}" if settings.platform else ""
    return settings.output_folder / "logs" / f"{name}{suffix}.log"


@contextmanager
def kept_log(settings: Settings, name: str) -> Iterator[IO[bytes]]:
    """A file for a log, which is at ``log_path`` when the block has ended.

    That it could not be written is no fault of whose log it is.
    """
    log = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115 -- see below
    path = log_path(settings, name)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield log
    finally:
        with suppress(OSError):
            if log.tell():
                path.parent.mkdir(parents=True, exist_ok=True)
                _copy_hidden(log, unfinished)
                unfinished.replace(path)
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        with suppress(OSError):
            log.close()


def _copy_hidden(log: IO[bytes], path: Path) -> None:
    log.seek(0)
    with path.open("wb") as file:
        file.writelines(map(hidden, log))


def keep_failure(engine: Engine, settings: Settings, failed: Failed) -> Path | None:
    """Keep log, command, build logs, settings and versions of a stage; where.

    No secret is among it.  None where it cannot be written: the stage's own error is the one to
    tell.
    """
    time = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    folder = settings.output_folder / "failed" / f"{failed.name}-{time}"
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        _fill(unfinished, engine, settings, failed)
        return _finished(unfinished, folder)
    except OSError:
        return None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _fill(folder: Path, engine: Engine, settings: Settings, failed: Failed) -> None:
    written = "".join(f"{name}={text}\n" for name, text in settings.written.items() if text)
    (folder / "command").write_bytes(hidden(failed.command))
    (folder / "settings").write_bytes(to_bytes(clean(written)))
    # Where the engine is gone, the rest is still worth keeping.
    with suppress(EngineError):
        info = engine.info()
        about = f"{info.kind} ({info.storage_driver}, {info.platform})\n"
        (folder / "versions").write_text(about, encoding="utf-8")
    failed.log.seek(0)
    paths: dict[str, None] = {}
    with (folder / "log").open("wb") as log:
        for line in failed.log:
            log.write(hidden(line))
            paths.update(dict.fromkeys(guix.build_logs(line.decode(errors="replace"))))
    for path in itertools.islice(paths, _BUILD_LOGS):
        # Of one that cannot be read to its end what came is kept.
        with suppress(EngineError, tarfile.TarError, OSError, EOFError, zlib.error):
            archive = _joined(engine.copy_out(failed.container, path))
            _unpack(archive, path, folder)


def _joined(pieces: Iterator[bytes]) -> bytes:
    """What was copied out; raises ``EOFError`` where it has no end that is near."""
    found = bytearray()
    for piece in pieces:
        found += piece
        if len(found) > _COPY_MOST:
            raise EOFError
    return bytes(found)


def _unpack(archive: bytes, path: str, folder: Path) -> None:
    """Write the one build log in an archive, with its derivation's name and compressed."""
    *_, start, rest = path.split("/")
    plain = re.sub(r"\.(gz|bz2)$", "", rest)
    name = clean(start + plain)
    with tarfile.open(fileobj=BytesIO(archive), mode="r:") as tar:
        member = next((each for each in tar if each.isfile()), None)
        file = tar.extractfile(member) if member else None
        if file:
            with gzip.open(folder / f"{name}.gz", "wb") as log:
                log.writelines(hidden(line) for line in _lines(file, rest))


def _lines(file: IO[bytes], name: str) -> Iterator[bytes]:
    plain: IO[bytes] = file
    if name.endswith(".gz"):
        plain = cast("IO[bytes]", gzip.GzipFile(fileobj=file))
    elif name.endswith(".bz2"):
        plain = bz2.BZ2File(file)
    left = _LOG_MOST
    while left > 0 and (line := plain.readline(left)):
        left -= len(line)
        yield line


def _finished(unfinished: Path, folder: Path) -> Path:
    """Give a folder its name; a number is added where another failure of this second has it."""
    for number in itertools.count(1):
        name = folder.name if number == 1 else f"{folder.name}-{number}"
        try:
            return unfinished.rename(folder.with_name(name))
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
    raise AssertionError
