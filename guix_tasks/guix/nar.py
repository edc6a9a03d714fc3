"""Nars: the archives in which Guix moves store items, and whose hash its database keeps.

The format is that of ``write-file`` in Guix's ``guix/serialization.scm``. It has neither owners nor
times, and one order of the files, so equal items have equal nars on every machine.
"""

from __future__ import annotations

import hashlib
import tarfile
from typing import IO, TYPE_CHECKING, cast

if TYPE_CHECKING:
    from collections.abc import Iterator

STORE_TIME = 1
"""Time of all files in Guix's store, in seconds since 1970."""

_MAGIC = b"nix-archive-1"
_MAX_TOKEN = 1 << 16
"""Maximum bytes of a keyword, a file name or the target of a link."""

_MAX_FILE = 1 << 50
"""Maximum bytes of a file: more than any disk has."""


class Nar:
    """One nar in a stream, which is read up to its end."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._hash = stream, hashlib.sha256()

    def members(self, name: str) -> Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]:
        """Yield the files of the nar as members of a tar archive, with ``name`` as their root.

        The caller reads the content of each regular file, its ``size`` bytes, before the next
        member. Raise ``ValueError`` for anything that is no complete nar.
        """
        self._expect(_MAGIC)
        yield from self._node(name)

    @property
    def sha256(self) -> str:
        """SHA-256 of what has been read, as hex digits; at the end the hash of the nar."""
        return self._hash.hexdigest()

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        if len(data) < size:
            raise ValueError("the end comes too early")
        self._hash.update(data)
        return data

    def _node(self, name: str) -> Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]:
        self._expect(b"(", b"type")
        kind = self._token()
        member = tarfile.TarInfo(name)
        member.mtime = STORE_TIME
        if kind == b"regular":
            keyword = self._token()
            member.mode = 0o444
            if keyword == b"executable":
                member.mode = 0o555
                self._expect(b"")
                keyword = self._token()
            if keyword != b"contents":
                raise ValueError("a file without content")
            member.size = self._number()
            if member.size > _MAX_FILE:
                raise ValueError(f"a file of {member.size} bytes")
            yield member, cast("IO[bytes]", self)
            self._skip_padding(member.size)
            self._expect(b")")
        elif kind == b"symlink":
            member.type, member.mode = tarfile.SYMTYPE, 0o777
            self._expect(b"target")
            member.linkname = _text(self._token())
            self._expect(b")")
            yield member, None
        elif kind == b"directory":
            member.type, member.mode = tarfile.DIRTYPE, 0o555
            yield member, None
            while (keyword := self._token()) == b"entry":
                self._expect(b"(", b"name")
                entry = _text(self._token())
                if entry in ("", ".", "..") or "/" in entry:
                    raise ValueError(f"a file with the name {entry!r}")
                self._expect(b"node")
                yield from self._node(f"{name}/{entry}")
                self._expect(b")")
            if keyword != b")":
                raise ValueError("a directory without its end")
        else:
            raise ValueError(f"a file of the type {kind!r}")

    def _expect(self, *tokens: bytes) -> None:
        for token in tokens:
            if (found := self._token()) != token:
                raise ValueError(f"{found!r} in place of {token!r}")

    def _token(self) -> bytes:
        size = self._number()
        if size > _MAX_TOKEN:
            raise ValueError(f"a name of {size} bytes")
        token = self.read(size)
        self._skip_padding(size)
        return token

    def _number(self) -> int:
        return int.from_bytes(self.read(8), "little")

    def _skip_padding(self, size: int) -> None:
        self.read(-size % 8)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
