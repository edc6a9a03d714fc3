"""What comes piece by piece, as a file that is read once."""

from __future__ import annotations

import tarfile
from typing import IO, TYPE_CHECKING, cast

if TYPE_CHECKING:
    from collections.abc import Iterator

_READS_AT_END = 10
"""How often the end of an archive is read by whoever does not wait for more to come."""


def as_file(pieces: Iterator[bytes]) -> IO[bytes]:
    """Pieces as a file that tarfile can read, with its mode ``r|``."""
    return cast("IO[bytes]", _Pieces(pieces))


class _Pieces:
    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._rest = filter(None, pieces), b""
        self._reads_at_end = 0

    def read(self, size: int) -> bytes:
        parts, wanted = [self._rest], size - len(self._rest)
        while wanted > 0 and (piece := next(self._pieces, b"")):
            parts.append(piece)
            wanted -= len(piece)
        data = b"".join(parts)
        if not data:
            # tarfile skips what a member says it has, be it a terabyte that is not there.
            self._reads_at_end += 1
            if self._reads_at_end > _READS_AT_END:
                raise tarfile.ReadError("the archive ends too early")
        self._rest = data[size:]
        return data[:size]
