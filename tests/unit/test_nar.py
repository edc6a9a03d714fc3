"""Reading of nars: every file arrives, and nothing but a complete nar is accepted."""

from __future__ import annotations

import hashlib
import io
from contextlib import suppress
from typing import TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guix_tasks.guix.nar import Nar

Node: TypeAlias = "bytes | str | dict[str, Node] | tuple[bytes]"
"""Content of a file, target of a link, directory, or content of an executable file."""


def token(data: bytes) -> bytes:
    return len(data).to_bytes(8, "little") + data + bytes(-len(data) % 8)


def node(value: Node) -> bytes:
    if isinstance(value, bytes):
        parts = [b"regular", b"contents", value]
    elif isinstance(value, tuple):
        parts = [b"regular", b"executable", b"", b"contents", *value]
    elif isinstance(value, str):
        parts = [b"symlink", b"target", value.encode()]
    else:
        entries = b"".join(
            b"".join(map(token, (b"entry", b"(", b"name", name.encode(), b"node")))
            + node(child)
            + token(b")")
            for name, child in sorted(value.items())
        )
        return token(b"(") + token(b"type") + token(b"directory") + entries + token(b")")
    return b"".join(map(token, (b"(", b"type", *parts, b")")))


def nar(value: Node) -> bytes:
    return token(b"nix-archive-1") + node(value)


TREE: Node = {
    "bin": {"hello": (b"#!/bin/sh\n",)},
    "empty": {},
    "link": "bin/hello",
    "share": {"text": b"12345678", "void": b""},
}


def read(data: bytes, name: str = "item") -> list[tuple[str, str, bytes]]:
    stream = io.BytesIO(data)
    files = []
    for member, content in Nar(stream).members(name):
        text = content.read(member.size) if content else member.linkname.encode()
        files.append((member.name, f"{member.type!r} {member.mode:o}", text))
    return files


def test_files_arrive_with_their_modes_and_contents() -> None:
    assert read(nar(TREE)) == [
        ("item", "b'5' 555", b""),
        ("item/bin", "b'5' 555", b""),
        ("item/bin/hello", "b'0' 555", b"#!/bin/sh\n"),
        ("item/empty", "b'5' 555", b""),
        ("item/link", "b'2' 777", b"bin/hello"),
        ("item/share", "b'5' 555", b""),
        ("item/share/text", "b'0' 444", b"12345678"),
        ("item/share/void", "b'0' 444", b""),
    ]


def test_two_nars_in_one_stream_have_their_own_hashes() -> None:
    first, second = nar(TREE), nar(b"a file")
    stream = io.BytesIO(first + second)
    for data in (first, second):
        one = Nar(stream)
        for member, content in one.members("item"):
            if content:
                content.read(member.size)
        assert one.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("name", ["..", ".", "", "a/b"])
def test_name_that_leaves_the_item_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="a file with the name"):
        read(nar({name: b"text"}))


@given(cut=st.integers(0, len(nar(TREE)) - 1))
def test_nar_that_ends_early_is_refused(cut: int) -> None:
    with pytest.raises(ValueError, match="the end comes too early"):
        read(nar(TREE)[:cut])


@given(position=st.integers(0, len(nar(TREE)) - 1), value=st.integers(0, 255))
def test_damaged_nar_is_refused_or_read_to_its_end(position: int, value: int) -> None:
    data = bytearray(nar(TREE))
    data[position] = value
    with suppress(ValueError):
        assert read(bytes(data))[0][0] == "item"
