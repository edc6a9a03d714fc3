"""Differences of Podman: its answers, image names, sockets and archives of configurations."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from guix_tasks.engine import discovery, podman
from guix_tasks.engine.docker import DockerEngine

if TYPE_CHECKING:
    from pathlib import Path

LAYERS = [f"sha256:{digit * 64}" for digit in "12"]

PODMAN_IMAGE = {
    "Architecture": "arm64",
    "Os": "linux",
    "Created": "2026-01-02T03:04:05Z",
    "RootFS": {"Type": "layers", "Layers": LAYERS},
    "History": [{"created_by": "a"}, {"created_by": "b", "empty_layer": True}],
}
"""An image in an answer of Podman's own API."""

CONFIG = {"Env": ["A=b"], "Healthcheck": {"Test": ["CMD", "true"]}, "Labels": {"x": "ü"}}


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ({"Components": [{"Name": "Podman Engine"}, {"Name": "Conmon"}]}, True),
        ({"Components": [{"Name": "Engine"}, {"Name": "containerd"}]}, False),
        ({"Components": None}, False),
        ({"Version": "28.5.2"}, False),
    ],
)
def test_podman_is_distinguished_from_docker(version: dict[str, Any], expected: bool) -> None:
    engine = DockerEngine(discovery.Address("unix:///none", "test"))
    engine.__dict__["_api"] = SimpleNamespace(version=lambda: version)
    assert engine.is_podman is expected


def test_configuration_is_an_archive_without_layers() -> None:
    identity, archive = podman.configured_image(PODMAN_IMAGE, CONFIG)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        files = {name: _read(tar, name) for name in tar.getnames()}
    assert len(files) == 4
    for name, content in files.items():
        if name.startswith("blobs/"):
            assert name == f"blobs/sha256/{hashlib.sha256(content).hexdigest()}"
    manifest = _blob(files, json.loads(files["index.json"])["manifests"][0])
    assert [layer["digest"] for layer in manifest["layers"]] == LAYERS
    assert manifest["config"]["digest"] == identity
    assert _blob(files, manifest["config"]) == {
        "architecture": "arm64",
        "os": "linux",
        "created": PODMAN_IMAGE["Created"],
        "config": CONFIG,
        "history": PODMAN_IMAGE["History"],
        "rootfs": {"type": "layers", "diff_ids": LAYERS},
    }


def _read(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    assert file
    return file.read()


def _blob(files: dict[str, bytes], descriptor: dict[str, Any]) -> Any:
    content = files[f"blobs/{descriptor['digest'].replace(':', '/')}"]
    assert descriptor["size"] == len(content)
    return json.loads(content)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("docker.io/library/debian:sid", "debian:sid"),
        ("docker.io/metacall/guix:latest", "metacall/guix:latest"),
        ("localhost:5055/library/x:t", "localhost:5055/library/x:t"),
    ],
)
def test_names_are_those_of_docker(name: str, expected: str) -> None:
    assert podman.familiar_name(name) == expected


def test_sockets_are_those_of_user_and_system(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    user_socket, system_socket = discovery.podman_sockets()
    assert user_socket == tmp_path / "podman" / "podman.sock"
    assert str(system_socket) == "/run/podman/podman.sock"
