"""Image layouts: the same bytes for the same files, and no blob that no image needs."""

from __future__ import annotations

import io
import json
import tarfile
from hashlib import sha256
from typing import TYPE_CHECKING

import zstandard

from guix_tasks.runtime.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import IO


def members(text: bytes) -> Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]:
    member = tarfile.TarInfo("file")
    member.size = len(text)
    yield member, io.BytesIO(text)


def test_layer_has_the_digests_of_its_bytes_and_of_its_archive(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layer = layout.add_layer("text", members(b"12345"))
    packed = layout.blob(layer.digest).read_bytes()
    assert layer.digest == f"sha256:{sha256(packed).hexdigest()}"
    assert layer.size == len(packed)
    archive = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(packed)).read()
    assert layer.diff_id == f"sha256:{sha256(archive).hexdigest()}"
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        assert tar.getnames() == ["file"]


def test_layers_of_an_image_are_found_by_their_content(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layers = [layout.add_layer(name, members(name.encode())) for name in ("one", "two")]
    layout.publish("linux-amd64", layout.add_image({"os": "linux"}, layers))
    again = Layout(tmp_path)
    assert again.layers(again.find("linux-amd64")) == dict(zip(("one", "two"), layers, strict=True))
    assert again.layers({}) == {}
    again.blob(again.find("linux-amd64")["digest"]).write_text("{}")
    assert again.layers(again.find("linux-amd64")) == {}


def test_new_image_replaces_that_of_its_name_and_its_blobs(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    for name in ("linux-amd64", "linux-arm64", "linux-amd64"):
        text = f"{name} {len(list(tmp_path.rglob('*')))}"
        layer = layout.add_layer(text, members(text.encode()))
        layout.publish(name, layout.add_image({}, [layer]))
    index = json.loads((tmp_path / "index.json").read_text())
    names = [
        entry["annotations"]["org.opencontainers.image.ref.name"] for entry in index["manifests"]
    ]
    assert names == ["linux-arm64", "linux-amd64"]
    # Two images of a manifest, a configuration and a layer; the configurations are different.
    assert len(list((tmp_path / "blobs" / "sha256").iterdir())) == 6
