"""Archives that arrive in chunks, as files for ``tarfile``."""

from __future__ import annotations

import tarfile
from typing import IO, TYPE_CHECKING, cast

if TYPE_CHECKING:
    from collections.abc import Iterator

_READS_AT_END = 10
"""Maximum number of reads at the end of a complete archive."""


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
