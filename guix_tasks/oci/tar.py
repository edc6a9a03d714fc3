"""Archives of files in memory, and archives that arrive in chunks."""

from __future__ import annotations

import io
import tarfile
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, cast

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_READS_AT_END = 10
"""Maximum number of reads at the end of a complete archive."""


@contextmanager
def new_archive(
    file: IO[bytes], archive_format: int = tarfile.DEFAULT_FORMAT
) -> Iterator[tarfile.TarFile]:
    """Write an archive to an empty file, without the padding that tarfile adds after its end mark.

    Podman stops reading at the mark and then sometimes reports a broken pipe.
    """
    with tarfile.open(fileobj=file, mode="w", format=archive_format) as tar:
        yield tar
        end = tar.offset + 2 * tarfile.BLOCKSIZE
    file.truncate(end)


def archive(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with new_archive(buffer) as tar:
        for name, content in files.items():
            add_file(tar, name, content)
    return buffer.getvalue()


def add_file(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def as_file(chunks: Iterator[bytes]) -> IO[bytes]:
    """Return a file with the content of chunks, which tarfile can read once with mode ``r|``."""
    return cast("IO[bytes]", _ChunkReader(chunks))


class _ChunkReader:
    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = filter(None, chunks), b""
        self._reads_at_end = 0

    def read(self, size: int) -> bytes:
        chunks, missing = [self._rest], size - len(self._rest)
        while missing > 0 and (chunk := next(self._chunks, b"")):
            chunks.append(chunk)
            missing -= len(chunk)
        data = b"".join(chunks)
        if not data:
            # tarfile reads as many bytes as a header announces, even if the archive ends before.
            self._reads_at_end += 1
            if self._reads_at_end > _READS_AT_END:
                raise tarfile.ReadError("the archive ends too early")
        self._rest = data[size:]
        return data[:size]
