"""What Podman does in another way: its answers, and the archive that configures an image."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from typing import TYPE_CHECKING, Any

import pytest

from guix_tasks.engine import podman_api

if TYPE_CHECKING:
    from pathlib import Path

LAYERS = [f"sha256:{digit * 64}" for digit in "12"]

FOUND = {
    "Architecture": "arm64",
    "Os": "linux",
    "Created": "2026-01-02T03:04:05Z",
    "RootFS": {"Type": "layers", "Layers": LAYERS},
    "History": [{"created_by": "a"}, {"created_by": "b", "empty_layer": True}],
}
"""As Podman's own API says it."""

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
def test_podman_is_told_from_docker(version: dict[str, Any], expected: bool) -> None:
    assert podman_api.is_podman(version) is expected


def test_an_image_gets_its_configuration_by_an_archive_without_layers() -> None:
    identity, archive = podman_api.configured_image(FOUND, CONFIG)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        files = {name: _read(tar, name) for name in tar.getnames()}
    assert len(files) == 4
    for name, content in files.items():
        if name.startswith("blobs/"):
            assert name == f"blobs/sha256/{hashlib.sha256(content).hexdigest()}"
    manifest = _blob(files, json.loads(files["index.json"])["manifests"][0])
    assert [each["digest"] for each in manifest["layers"]] == LAYERS
    assert manifest["config"]["digest"] == identity
    assert _blob(files, manifest["config"]) == {
        "architecture": "arm64",
        "os": "linux",
        "created": FOUND["Created"],
        "config": CONFIG,
        "history": FOUND["History"],
        "rootfs": {"type": "layers", "diff_ids": LAYERS},
    }


def _read(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    assert file
    return file.read()


def _blob(files: dict[str, bytes], described: dict[str, Any]) -> Any:
    content = files[f"blobs/{described['digest'].replace(':', '/')}"]
    assert described["size"] == len(content)
    return json.loads(content)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("docker.io/library/debian:sid", "debian:sid"),
        ("docker.io/metacall/guix:latest", "metacall/guix:latest"),
        ("localhost:5055/library/x:t", "localhost:5055/library/x:t"),
    ],
)
def test_names_are_as_docker_says_them(name: str, expected: str) -> None:
    assert podman_api.familiar_name(name) == expected


def test_where_it_listens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    own, roots = podman_api.sockets()
    assert own == tmp_path / "podman" / "podman.sock"
    assert str(roots) == "/run/podman/podman.sock"
