"""The engine of the Docker SDK, on a fake server."""

from __future__ import annotations

import hashlib
import io
import json
import os
import threading
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, cast

import pytest
import requests
from docker.errors import APIError

from guix_tasks.engine import docker
from guix_tasks.engine.discovery import Address, find_engine
from guix_tasks.engine.docker import DockerEngine
from guix_tasks.errors import FULL_DISK, NO_SHELL, EngineError, RegistryError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from socket import socket

CHUNK = b'{"status": "Pushed"}\r\n'


DIGEST = f"sha256:{'d' * 64}"

INFO = {
    "OSType": "linux",
    "Architecture": "x86_64",
    "ServerVersion": "29.0",
    "Driver": "overlayfs",
    "DriverStatus": [["driver-type", "io.containerd.snapshotter.v1"]],
}

IMAGE = {
    "Id": DIGEST,
    "Os": "linux",
    "Architecture": "amd64",
    "RootFS": {"Layers": ["sha256:l"]},
    "Config": {},
    "Size": 174,
}

PACKED = {"Size": {"Content": 174, "Total": 915}, "ImageData": {"Size": {"Unpacked": 741}}}
UNPACKED = {"Size": {"Content": 740, "Total": 1481}, "ImageData": {"Size": {"Unpacked": 741}}}


class FakeServer(BaseHTTPRequestHandler):
    """A server that breaks off one push, and has no space for a tag.

    Its images are in the containerd store.
    """

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path.endswith("/info"):
            self.answer(200, INFO)
        elif self.path.endswith("/images/packed:t/json?manifests=1"):
            self.answer(200, {**IMAGE, "Manifests": [PACKED]})
        elif self.path.endswith("/images/loaded:t/json?manifests=1"):
            self.answer(200, {**IMAGE, "Manifests": [UNPACKED]})
        elif self.path.endswith("/images/classic:t/json?manifests=1"):
            self.answer(200, IMAGE)
        elif "/images/" in self.path:
            self.answer(404, {"message": "No such image: x"})
        else:
            self.answer(200, {"ApiVersion": "1.48"})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path.endswith("/push?tag=containerd"):
            self.answer(200, {"status": f"containerd: digest: {DIGEST} size: 1638"})
        elif self.path.endswith("/push?tag=classic"):
            self.answer(200, {"aux": {"Tag": "classic", "Digest": DIGEST, "Size": 1638}})
        elif self.path.endswith("/push?tag=silent"):
            self.answer(200, {"status": f"Pushed {DIGEST}"})
        elif self.path.endswith("/push?tag=t"):
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(CHUNK), CHUNK) + b"ff\r\n{")
            self.close_connection = True
        else:
            self.answer(500, {"message": "write /data/x: no space left on device"})

    def answer(self, status: int, content: object) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None: ...


@contextmanager
def run_server() -> Iterator[DockerEngine]:
    with ThreadingHTTPServer(("127.0.0.1", 0), FakeServer) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield DockerEngine(Address(f"tcp://127.0.0.1:{server.server_address[1]}", "test"))
        server.shutdown()


def test_incomplete_answer_is_an_error_of_one_line() -> None:
    with run_server() as engine, pytest.raises(EngineError, match="does not answer: ") as error:
        engine.push("localhost:1/x:t", None)
    assert "\n" not in str(error.value)


def test_answer_of_another_server_is_an_error_of_one_line() -> None:
    with run_server() as engine, pytest.raises(EngineError) as error:
        engine.volumes({})
    assert str(error.value).startswith(
        "the engine could not list volumes: the answer is not one of Docker's API "
        "(KeyError: 'Volumes'); check that an engine listens at tcp://127.0.0.1:"
    )


def test_output_with_a_header_for_4_gb_is_read_in_chunks() -> None:
    class Output(io.BytesIO):
        def makefile(self, _mode: str) -> Output:
            return self

        def read(self, size: int | None = -1) -> bytes:
            assert size is not None
            assert size <= 1 << 16
            return super().read(size)

    output = cast("socket", Output(b"\2\0\0\0\xff\xff\xff\xff" + b"x" * 100_000))
    assert [len(data) for _, data in docker._frames(output)] == [1 << 16, 100_000 - (1 << 16)]


@pytest.mark.parametrize("content", ["", "[", "{}", '"far"', '{"Endpoints": {"docker": 1}}'])
def test_damaged_context_is_an_error_of_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"currentContext": "far"}')
    directory = tmp_path / "contexts/meta" / sha256(b"far").hexdigest()
    directory.mkdir(parents=True)
    (directory / "meta.json").write_text(content)
    with pytest.raises(EngineError, match=r"^cannot read the selected Docker context: .*\Z"):
        find_engine({"DOCKER_CONFIG": str(tmp_path)}, tmp_path / "no.sock")


@pytest.mark.parametrize(
    ("reason", "hint"),
    [
        (
            "privileged mode is incompatible with user namespaces",
            "set GUIX_SANDBOX=capabilities",
        ),
        (
            'unable to start container process: exec: "sh": executable file not found in $PATH',
            NO_SHELL,
        ),
    ],
    ids=["privileges", "shell"],
)
def test_refusal_of_an_engine_has_a_hint(reason: str, hint: str) -> None:
    engine = DockerEngine(Address("unix:///none", "test"))
    response = requests.Response()
    response.status_code = 500
    with pytest.raises(EngineError) as error, engine._engine_errors("create a container"):
        raise APIError("", response, reason)
    assert str(error.value) == f"the engine could not create a container: {reason}; {hint}"


@pytest.mark.parametrize(
    ("directory", "options", "first_id"),
    [
        ("/var/lib/docker/200000.200000", ["name=seccomp,profile=builtin", "name=userns"], 200000),
        ("/srv/1.2", ["name=seccomp,profile=builtin"], 0),
        ("/var/lib/docker", ["name=userns"], 0),
    ],
)
def test_first_id_is_known_with_userns_remap(
    directory: str, options: list[str], first_id: int
) -> None:
    answer = {"DockerRootDir": directory, "SecurityOptions": options}
    assert docker._first_id(answer) == first_id


def test_full_disk_is_reported_with_a_hint() -> None:
    with run_server() as engine, pytest.raises(EngineError) as error:
        engine.tag("sha256:0", "localhost:1/x:t")
    assert str(error.value).endswith(f"no space left on device; {FULL_DISK}")


@pytest.mark.parametrize("store", ["classic", "containerd"])
def test_push_returns_the_digest_of_either_store(store: str) -> None:
    with run_server() as engine:
        assert engine.push(f"localhost:1/x:{store}", None) == DIGEST


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (f"t: digest: {DIGEST} size: 1388", DIGEST),
        ("t: digest: sha256:12 size: 1388", ""),
        ("Pushed", ""),
        (None, ""),
    ],
)
def test_digest_of_a_push_is_in_its_status(status: str | None, expected: str) -> None:
    assert docker._pushed_digest({"status": status}) == expected


def test_push_without_a_digest_is_an_error() -> None:
    with (
        run_server() as engine,
        pytest.raises(RegistryError, match="the registry answered no digest"),
    ):
        engine.push("localhost:1/x:silent", None)


@pytest.mark.parametrize(("reference", "size"), [("packed:t", 915), ("classic:t", 174)])
def test_size_equals_the_size_in_docker_images(reference: str, size: int) -> None:
    with run_server() as engine:
        image = engine.image(reference)
        assert image is not None
        assert image.size == size
        assert engine.image("missing:t") is None


def test_build_compresses_only_uncompressed_layers() -> None:
    with run_server() as engine:
        references = ("loaded:t", "packed:t", "classic:t", "missing:t", "")
        assert [name for name in references if engine._is_uncompressed(name)] == ["loaded:t"]


def test_image_store_is_recognised() -> None:
    with run_server() as engine:
        assert engine.info().uses_containerd
        assert engine.info().store == "containerd image store (overlayfs)"


@pytest.mark.parametrize(
    "message",
    [
        "denied: requested access to the resource is denied",
        "error from registry: authentication required",
        "error from registry: access to the requested resource is not authorized",
        "unexpected status from PUT request to https://r.test/v2/c/manifests/1: 403 Forbidden",
    ],
)
def test_denied_access_has_a_hint_for_both_stores(message: str) -> None:
    error = docker._registry_error("push r.test/c:1", message)
    assert str(error).startswith(f"cannot push r.test/c:1: {message}; the credentials are missing")
    assert not error.is_transient


@pytest.mark.parametrize(
    "message",
    [
        "name unknown: The repository with name 'app' does not exist in the registry with id '1'",
        "unknown: repository team/app not found",
    ],
)
def test_push_to_a_missing_repository_has_a_hint(message: str) -> None:
    error = str(docker._registry_error("push r.test/team/app:1", message))
    assert error.endswith("the registry creates no repositories by itself: create this one there")
    error = str(docker._registry_error("pull r.test/team/app:1", message))
    assert error.endswith("the registry has no such image: fix the reference")


@pytest.mark.parametrize(
    "message",
    [
        "unexpected status from PUT request to https://r.test/v2/c: 413 Request Entity Too Large",
        "error parsing HTTP 413 response body: invalid character '<': \"<html><title>413 ...\"",
    ],
)
def test_upload_over_the_limit_of_a_proxy_has_a_hint(message: str) -> None:
    error = docker._registry_error("push r.test/c:1", message)
    assert "; a proxy or the registry refuses uploads of this size: raise its limit" in str(error)
    assert not error.is_transient


def test_variables_of_requests_do_not_change_the_connection(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Docker's client, in Go, ignores REQUESTS_CA_BUNDLE, and uses no proxy for loopback."""
    for name in ("http_proxy", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "missing.pem"))
    monkeypatch.delenv("no_proxy", raising=False)
    with run_server() as engine:
        assert not engine.is_podman
    for url, proxies in (
        ("https://engine.test:2376", {"https": "http://127.0.0.1:9"}),
        ("tcp://[::1]:2375", {}),
        ("unix:///run/docker.sock", {}),
    ):
        client = docker.Client(url, 1, version="1.48")
        options = client.merge_environment_settings(url, {}, None, None, None)
        assert options["verify"] is True
        assert proxies.items() <= dict(options["proxies"]).items()
        assert bool(options["proxies"]) == bool(proxies)


@pytest.mark.parametrize("variable", [None, "/missing"])
def test_context_is_found_in_the_configuration_of_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None
) -> None:
    """An env file can set DOCKER_CONFIG, without a change of the process's environment."""
    meta = tmp_path / "contexts/meta" / hashlib.sha256(b"far").hexdigest()
    meta.mkdir(parents=True)
    (tmp_path / "config.json").write_text('{"currentContext": "far"}')
    endpoint = {"docker": {"Host": "tcp://far.test:2375", "SkipTLSVerify": False}}
    context = {"Name": "far", "Metadata": {}, "Endpoints": endpoint}
    (meta / "meta.json").write_text(json.dumps(context))
    if variable:
        monkeypatch.setenv("DOCKER_CONFIG", variable)
    else:
        monkeypatch.delenv("DOCKER_CONFIG")
    for name in ("", "far"):
        variables = {"DOCKER_CONFIG": str(tmp_path), "DOCKER_CONTEXT": name}
        address = find_engine(variables, tmp_path / "no.sock")
        assert (address.url, address.context) == ("tcp://far.test:2375", "far")
    assert os.environ.get("DOCKER_CONFIG") == variable


def test_queries_of_urls_are_removed() -> None:
    upload = "https://r.test/v2/c/blobs/uploads/1"
    for message in (
        "unexpected status from PUT request to {}: 502 Bad Gateway",
        'failed to do request: Put "{}": EOF',
    ):
        text = message.format(f"{upload}?_state=a&b=%3A")
        error = docker._registry_error("push r.test/c:1", text)
        assert str(error) == f"cannot push r.test/c:1: {message.format(upload)}"
        assert error.is_transient


@pytest.mark.parametrize("fault", ["connect: connection refused", "lookup r.test: no such host"])
def test_hint_for_an_unavailable_registry_names_no_setting(fault: str) -> None:
    """The reference can be ``CACHE_IMAGE``, a base image or an argument of ``push``."""
    message = str(docker._registry_error("push r.test/c:1", f"dial tcp: {fault}"))
    assert message.startswith(f"cannot push r.test/c:1: dial tcp: {fault}; ")
    assert "fix the reference" in message
    assert "IMAGE" not in message
