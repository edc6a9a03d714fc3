"""Logs of stages, and diagnostics of a failed stage in ``out/failed/STAGE-TIME/``."""

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
from guix_tasks.files import write_whole
from guix_tasks.oci.tar import as_file
from guix_tasks.ui.redact import clean, hidden, to_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from guix_tasks.engine.api import Engine
    from guix_tasks.settings import Settings

_IN_MEMORY = 1 << 20
"""Bytes of a log that are kept in memory before they go to a file."""

_BUILD_LOGS = 10
"""Maximum number of saved build logs."""

_MAX_ARCHIVE = 64 << 20
"""Maximum bytes of a build log's archive: a file of a container can be endless."""

_MAX_LOG = 64 << 20
"""Maximum bytes of a decompressed build log: a container can compress endless data."""


@dataclass(frozen=True)
class Failure:
    """A command that failed in a work container."""

    name: str
    container: str
    command: bytes
    log: IO[bytes]


def log_path(settings: Settings, name: str) -> Path:
    """Return the path of the complete log of a stage's last run."""
    suffix = f"-{settings.platform.tag_suffix}" if settings.platform else ""
    return settings.output_directory / "logs" / f"{name}{suffix}.log"


@contextmanager
def saved_log(settings: Settings, name: str) -> Iterator[IO[bytes]]:
    """Yield a file for a log, which is saved without secrets at ``log_path`` after the block.

    A log that cannot be written is not an error.
    """
    log = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115 -- closed below
    path = log_path(settings, name)
    try:
        yield log
    finally:
        with suppress(OSError):
            if log.tell():
                path.parent.mkdir(parents=True, exist_ok=True)
                log.seek(0)
                write_whole(path, map(hidden, log))
        with suppress(OSError):
            log.close()


def save_diagnostics(engine: Engine, settings: Settings, failure: Failure) -> Path | None:
    """Save log, command, build logs, settings and versions of a failed stage, without secrets.

    Return the directory, or None if it cannot be written: that error must not replace the
    stage's.
    """
    time = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    directory = settings.output_directory / "failed" / f"{failure.name}-{time}"
    unfinished = directory.with_name(f".{directory.name}.{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        _write(unfinished, engine, settings, failure)
        return _rename(unfinished, directory)
    except OSError:
        return None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write(directory: Path, engine: Engine, settings: Settings, failure: Failure) -> None:
    text = "".join(f"{name}={value}\n" for name, value in settings.written.items() if value)
    (directory / "command").write_bytes(hidden(failure.command))
    (directory / "settings").write_bytes(to_bytes(clean(text)))
    # A lost engine must not prevent the rest.
    with suppress(EngineError):
        info = engine.info()
        versions = f"{info.kind} ({info.storage_driver}, {info.platform})\n"
        (directory / "versions").write_text(versions, encoding="utf-8")
    failure.log.seek(0)
    paths: dict[str, None] = {}
    with (directory / "log").open("wb") as log:
        for line in failure.log:
            log.write(hidden(line))
            paths.update(dict.fromkeys(guix.build_logs(line.decode(errors="replace"))))
    for path in itertools.islice(paths, _BUILD_LOGS):
        # A truncated build log is kept as far as it can be read.
        with suppress(EngineError, tarfile.TarError, OSError, EOFError, zlib.error):
            archive = as_file(engine.copy_out(failure.container, path)).read(_MAX_ARCHIVE + 1)
            if len(archive) <= _MAX_ARCHIVE:
                _unpack(archive, path, directory)


def _unpack(archive: bytes, path: str, directory: Path) -> None:
    """Save the build log of an archive, compressed, under the name of its derivation.

    Guix splits the name: ``ab/cd-NAME.drv.gz`` belongs to ``abcd-NAME.drv``.
    """
    *_, start, rest = path.split("/")
    name = clean(start + re.sub(r"\.(gz|bz2)$", "", rest))
    with tarfile.open(fileobj=BytesIO(archive), mode="r:") as tar:
        member = next((member for member in tar if member.isfile()), None)
        file = tar.extractfile(member) if member else None
        if file:
            with gzip.open(directory / f"{name}.gz", "wb") as log:
                log.writelines(hidden(line) for line in _log_lines(file, rest))


def _log_lines(file: IO[bytes], name: str) -> Iterator[bytes]:
    """Decompress a build log, up to ``_MAX_LOG``."""
    log: IO[bytes] = file
    if name.endswith(".gz"):
        log = cast("IO[bytes]", gzip.GzipFile(fileobj=file))
    elif name.endswith(".bz2"):
        log = bz2.BZ2File(file)
    remaining = _MAX_LOG
    while remaining > 0 and (line := log.readline(remaining)):
        remaining -= len(line)
        yield line


def _rename(unfinished: Path, directory: Path) -> Path:
    """Rename a directory; add a number if another failure of the same second has the name."""
    for number in itertools.count(1):
        name = directory.name if number == 1 else f"{directory.name}-{number}"
        try:
            return unfinished.rename(directory.with_name(name))
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
    raise AssertionError
