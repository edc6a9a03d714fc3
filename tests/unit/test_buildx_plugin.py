"""The buildx plugin: put where the Docker CLI looks for it, whole or not at all."""

from __future__ import annotations

import hashlib
import os
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fake_engine import Heard

from guix_tasks.bootstrap import apt, buildx_plugin
from guix_tasks.bootstrap.buildx_plugin import install_plugin
from guix_tasks.errors import BuilderError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

CONTENT = b"#!/bin/sh\necho buildx\n"
SUM = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "home" / ".docker" / "cli-plugins" / "docker-buildx"


@pytest.fixture
def url(tmp_path: Path) -> str:
    (tmp_path / "file").write_bytes(CONTENT)
    return f"file://{tmp_path}/file"


def refused(target: Path, url: str | None, sha256: str | None = SUM) -> str:
    with pytest.raises(BuilderError) as caught:
        install_plugin(target, url, sha256, Heard())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_with_its_checksum_is_installed(target: Path, url: str) -> None:
    console = Heard()
    install_plugin(target, url, SUM, console)
    assert target.read_bytes() == CONTENT
    assert os.access(target, os.X_OK)
    assert [each.name for each in target.parent.iterdir()] == ["docker-buildx"]
    assert console.text == f"downloading buildx from {url}\ninstalled buildx at {target}\n"


def test_a_large_file_is_installed_whole(target: Path, tmp_path: Path) -> None:
    content = bytes(range(256)) * (3 << 12) + b"end"
    (tmp_path / "large").write_bytes(content)
    sha256 = hashlib.sha256(content).hexdigest()
    install_plugin(target, f"file://{tmp_path}/large", sha256, Heard())
    assert target.read_bytes() == content


def test_a_file_with_another_checksum_is_not_kept(target: Path, url: str) -> None:
    said = refused(target, url, "0" * 64)
    assert said.startswith(f"BUILDX_SHA256: {url} has the SHA-256 {SUM}, not {'0' * 64}")
    assert list(target.parent.iterdir()) == []


def test_what_was_there_stays_where_it_cannot_be_replaced(target: Path, url: str) -> None:
    target.parent.mkdir(parents=True)
    target.write_text("the one before")
    refused(target, url, "0" * 64)
    refused(target, f"{url}-that-is-not-there")
    assert target.read_text() == "the one before"
    assert [each.name for each in target.parent.iterdir()] == ["docker-buildx"]
    install_plugin(target, url, SUM, Heard())
    assert target.read_bytes() == CONTENT


def test_a_file_that_is_not_there_is_one_line(target: Path, url: str) -> None:
    said = refused(target, f"{url}-that-is-not-there")
    assert said.startswith(f"BUILDX_URL: cannot download {url}-that-is-not-there: ")
    assert "No such file" in said
    assert list(target.parent.iterdir()) == []


def test_a_folder_is_no_plugin(target: Path, tmp_path: Path) -> None:
    assert "cannot download" in refused(target, f"file://{tmp_path}")


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, url: str) -> None:
    (tmp_path / "home").write_text("a file")
    said = refused(tmp_path / "home" / "cli-plugins" / "docker-buildx", url)
    assert "Not a directory" in said


def test_a_full_disk_is_not_the_servers_fault(
    target: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.open

    def opened(self: Path, mode: str = "r") -> object:
        return real(Path("/dev/full") if "w" in mode else self, mode)

    monkeypatch.setattr(Path, "open", opened)
    said = refused(target, url)
    assert "No space left on device" in said
    assert "BUILDX_URL" not in said


# --- A server -------------------------------------------------------------------------------


class Server(BaseHTTPRequestHandler):
    """Answers with these bytes."""

    def __init__(self, answer: bytes, *arguments: object) -> None:
        self.answer = answer
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        self.wfile.write(self.answer)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes], str]]:
    """Start a server; its address."""
    servers: list[HTTPServer] = []
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)

    def start(answer: bytes) -> str:
        servers.append(HTTPServer(("127.0.0.1", 0), partial(Server, answer)))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/buildx"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_it_is_had_from_a_server(target: Path, serve: Callable[[bytes], str]) -> None:
    head = b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(CONTENT)
    install_plugin(target, serve(head + CONTENT), SUM, Heard())
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.0 404 Not Found\r\n\r\n", "Not Found"),
        (b"nonsense\r\n\r\n", ": nonsense"),
        (b"", "closed connection"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "cannot download"),
    ],
)
def test_a_server_that_does_not_have_it_is_one_line(
    target: Path, serve: Callable[[bytes], str], answer: bytes, words: str
) -> None:
    assert words in refused(target, serve(answer))
    assert list(target.parent.iterdir()) == []


def test_half_a_file_is_not_kept(target: Path, serve: Callable[[bytes], str]) -> None:
    refused(target, serve(b"HTTP/1.0 200 OK\r\nContent-Length: 100\r\n\r\n" + CONTENT[:5]))
    assert list(target.parent.iterdir()) == []


@pytest.mark.usefixtures("serve")
def test_nobody_who_listens_is_one_line(target: Path) -> None:
    assert "cannot download" in refused(target, "http://127.0.0.1:1/buildx")


# --- Debian's package -----------------------------------------------------------------------


def test_without_an_address_it_is_debians(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Apt:
        def __init__(self, suites: Sequence[str], **_: object) -> None:
            self.suites = suites

        def unpack(self, packages: list[str], root: Path) -> None:
            assert self.suites[0] == "bookworm"
            assert packages[0].startswith("docker-buildx/")
            program = root / "usr/libexec/docker/cli-plugins/docker-buildx"
            program.parent.mkdir(parents=True)
            program.write_bytes(CONTENT)

    monkeypatch.setattr(apt, "host_suite", lambda: "bookworm")
    monkeypatch.setattr(buildx_plugin, "Apt", Apt)
    install_plugin(target, None, None, Heard())
    assert target.read_bytes() == CONTENT
    assert os.access(target, os.X_OK)
    assert [each.name for each in target.parent.iterdir()] == ["docker-buildx"]


def test_a_package_without_the_plugin_is_one_line(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Apt:
        def __init__(self, *_: object, **_more: object) -> None:
            pass

        def unpack(self, _packages: list[str], root: Path) -> None:
            root.mkdir()

    monkeypatch.setattr(apt, "host_suite", lambda: "bookworm")
    monkeypatch.setattr(buildx_plugin, "Apt", Apt)
    assert "No such file" in refused(target, None, None)
    assert list(target.parent.iterdir()) == []


def test_on_another_system_the_settings_are_named(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apt, "host_suite", lambda: None)
    assert "set BUILDX_URL and BUILDX_SHA256" in refused(target, None, None)
    assert list(target.parent.iterdir()) == []
