"""Atomic installation of the buildx plugin."""

from __future__ import annotations

import hashlib
import os
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fake_engine import BufferConsole

from guix_tasks.bootstrap import apt, buildx_plugin
from guix_tasks.bootstrap.buildx_plugin import install_plugin
from guix_tasks.errors import BuilderError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

CONTENT = b"#!/bin/sh\necho buildx\n"
CHECKSUM = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "home" / ".docker" / "cli-plugins" / "docker-buildx"


@pytest.fixture
def url(tmp_path: Path) -> str:
    (tmp_path / "file").write_bytes(CONTENT)
    return f"file://{tmp_path}/file"


def install_error(target: Path, url: str | None, sha256: str | None = CHECKSUM) -> str:
    with pytest.raises(BuilderError) as error:
        install_plugin(target, url, sha256, BufferConsole())
    assert "\n" not in str(error.value)
    return str(error.value)


def test_file_with_the_right_checksum_is_installed(target: Path, url: str) -> None:
    console = BufferConsole()
    install_plugin(target, url, CHECKSUM, console)
    assert target.read_bytes() == CONTENT
    assert os.access(target, os.X_OK)
    assert [path.name for path in target.parent.iterdir()] == ["docker-buildx"]
    assert console.text == f"downloading buildx from {url}\ninstalled buildx at {target}\n"


def test_large_file_is_installed_completely(target: Path, tmp_path: Path) -> None:
    content = bytes(range(256)) * (3 << 12) + b"end"
    (tmp_path / "large").write_bytes(content)
    sha256 = hashlib.sha256(content).hexdigest()
    install_plugin(target, f"file://{tmp_path}/large", sha256, BufferConsole())
    assert target.read_bytes() == content


def test_file_with_a_wrong_checksum_is_not_installed(target: Path, url: str) -> None:
    message = install_error(target, url, "0" * 64)
    assert message.startswith(f"BUILDX_SHA256: {url} has the SHA-256 {CHECKSUM}, not {'0' * 64}")
    assert list(target.parent.iterdir()) == []


def test_failed_download_keeps_the_installed_file(target: Path, url: str) -> None:
    target.parent.mkdir(parents=True)
    target.write_text("the one before")
    install_error(target, url, "0" * 64)
    install_error(target, f"{url}-that-is-not-there")
    assert target.read_text() == "the one before"
    assert [path.name for path in target.parent.iterdir()] == ["docker-buildx"]
    install_plugin(target, url, CHECKSUM, BufferConsole())
    assert target.read_bytes() == CONTENT


def test_missing_file_is_reported(target: Path, url: str) -> None:
    message = install_error(target, f"{url}-that-is-not-there")
    assert message.startswith(f"BUILDX_URL: cannot download {url}-that-is-not-there: ")
    assert "No such file" in message
    assert list(target.parent.iterdir()) == []


def test_directory_is_not_downloaded(target: Path, tmp_path: Path) -> None:
    assert "cannot download" in install_error(target, f"file://{tmp_path}")


def test_failure_to_create_the_directory_is_reported(tmp_path: Path, url: str) -> None:
    (tmp_path / "home").write_text("a file")
    message = install_error(tmp_path / "home" / "cli-plugins" / "docker-buildx", url)
    assert "Not a directory" in message


def test_full_disk_is_not_reported_as_a_failed_download(
    target: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.open

    def open_full_disk(self: Path, mode: str = "r") -> object:
        return real(Path("/dev/full") if "w" in mode else self, mode)

    monkeypatch.setattr(Path, "open", open_full_disk)
    message = install_error(target, url)
    assert "No space left on device" in message
    assert "BUILDX_URL" not in message


# --- Downloads from a server ----------------------------------------------------------------


class Server(BaseHTTPRequestHandler):
    """A server that answers every request with the same bytes."""

    def __init__(self, answer: bytes, *arguments: object) -> None:
        self.answer = answer
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        self.wfile.write(self.answer)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes], str]]:
    """Start a server and return its address."""
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


def test_file_is_downloaded_from_a_server(target: Path, serve: Callable[[bytes], str]) -> None:
    head = b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(CONTENT)
    install_plugin(target, serve(head + CONTENT), CHECKSUM, BufferConsole())
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
def test_error_of_the_server_is_reported(
    target: Path, serve: Callable[[bytes], str], answer: bytes, words: str
) -> None:
    assert words in install_error(target, serve(answer))
    assert list(target.parent.iterdir()) == []


def test_incomplete_download_is_not_installed(target: Path, serve: Callable[[bytes], str]) -> None:
    install_error(target, serve(b"HTTP/1.0 200 OK\r\nContent-Length: 100\r\n\r\n" + CONTENT[:5]))
    assert list(target.parent.iterdir()) == []


@pytest.mark.usefixtures("serve")
def test_unavailable_server_is_reported(target: Path) -> None:
    assert "cannot download" in install_error(target, "http://127.0.0.1:1/buildx")


# --- Package of Debian ----------------------------------------------------------------------


def test_default_is_the_package_of_debian(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    install_plugin(target, None, None, BufferConsole())
    assert target.read_bytes() == CONTENT
    assert os.access(target, os.X_OK)
    assert [path.name for path in target.parent.iterdir()] == ["docker-buildx"]


def test_package_without_plugin_is_reported(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Apt:
        def __init__(self, *_: object, **_more: object) -> None:
            pass

        def unpack(self, _packages: list[str], root: Path) -> None:
            root.mkdir()

    monkeypatch.setattr(apt, "host_suite", lambda: "bookworm")
    monkeypatch.setattr(buildx_plugin, "Apt", Apt)
    assert "No such file" in install_error(target, None, None)
    assert list(target.parent.iterdir()) == []


def test_other_systems_need_the_settings(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apt, "host_suite", lambda: None)
    assert "set BUILDX_URL and BUILDX_SHA256" in install_error(target, None, None)
    assert list(target.parent.iterdir()) == []
