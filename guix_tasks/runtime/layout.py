"""Image layouts: a directory with the blobs of images (OCI Image Format, image-layout.md).

A layer is described by what it contains, in an annotation of its descriptor. So a layer of an
earlier image is used again without making it, even if its blob is only in a registry.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, cast

import zstandard

from guix_tasks.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar+zstd"

REF_NAME = "org.opencontainers.image.ref.name"
"""Annotation with which the programs that read layouts choose an image."""

CONTENT = "org.guix-tasks.content"
"""Annotation of a layer: a line for each of its store items, with the hash of the nar."""

_LEVEL = 9
"""Level of zstd. A higher one takes much more time for few bytes."""

_BUFFER = 1 << 18
"""Bytes of an archive that are compressed at once."""


@dataclass(frozen=True)
class Layer:
    """A layer of an image, whose blob may be missing in the layout."""

    descriptor: Mapping[str, Any]
    diff_id: str

    @property
    def digest(self) -> str:
        return str(self.descriptor["digest"])

    @property
    def size(self) -> int:
        """Bytes of the compressed layer."""
        return int(self.descriptor["size"])


class Layout:
    """An image layout with one image for each platform."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._blobs = directory / "blobs" / "sha256"

    def blob(self, digest: str) -> Path:
        return self._blobs / digest.removeprefix("sha256:")

    def find(self, name: str) -> dict[str, Any]:
        """Return the descriptor of the image with a name, or an empty one."""
        entries = (entry for entry in self._entries() if _name(entry) == name)
        return next(entries, {})

    def layers(self, descriptor: Mapping[str, Any]) -> dict[str, Layer]:
        """Return the layers of a manifest by their content; without those that were damaged."""
        try:
            manifest = json.loads(self.blob(descriptor["digest"]).read_bytes())
            config = json.loads(self.blob(manifest["config"]["digest"]).read_bytes())
        except (OSError, ValueError, LookupError):
            return {}
        return layers_of(manifest, config)

    def add_layer(
        self, content: str, members: Iterable[tuple[tarfile.TarInfo, IO[bytes] | None]]
    ) -> Layer:
        """Write a layer with these files, whose order is that of the archive."""
        self._blobs.mkdir(parents=True, exist_ok=True)
        unfinished = self._blobs / f".unfinished.{os.getpid()}"
        try:
            with unfinished.open("wb") as file:
                packed = _Hashed(file)
                with zstandard.ZstdCompressor(level=_LEVEL).stream_writer(
                    cast("IO[bytes]", packed)
                ) as compressor:
                    unpacked = _Hashed(compressor)
                    _write_archive(cast("IO[bytes]", unpacked), members)
            digest = packed.digest
            unfinished.replace(self.blob(digest))
        finally:
            unfinished.unlink(missing_ok=True)
        descriptor = {
            "mediaType": LAYER_TYPE,
            "digest": digest,
            "size": packed.size,
            "annotations": {CONTENT: content},
        }
        return Layer(descriptor, unpacked.digest)

    def add_blob(self, media_type: str, document: Mapping[str, Any]) -> dict[str, Any]:
        """Write a JSON document and return its descriptor."""
        self._blobs.mkdir(parents=True, exist_ok=True)
        text = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
        digest = f"sha256:{hashlib.sha256(text).hexdigest()}"
        write_whole(self.blob(digest), text)
        return {"mediaType": media_type, "digest": digest, "size": len(text)}

    def add_image(self, config: Mapping[str, Any], layers: Sequence[Layer]) -> dict[str, Any]:
        """Write an image, and return the descriptor of its manifest.

        ``config`` is the configuration (config.md of the specification) without the layers.
        """
        rootfs = {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]}
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": self.add_blob(CONFIG_TYPE, {**config, "rootfs": rootfs}),
            "layers": [dict(layer.descriptor) for layer in layers],
        }
        return self.add_blob(MANIFEST_TYPE, manifest)

    def publish(self, name: str, entry: Mapping[str, Any]) -> None:
        """Give an image a name, which no other image keeps, and remove blobs without an image."""
        annotations = {**entry.get("annotations", {}), REF_NAME: name}
        others = [other for other in self._entries() if _name(other) != name]
        entries = [*others, {**entry, "annotations": annotations}]
        index = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": entries}
        write_whole(self.directory / "oci-layout", b'{"imageLayoutVersion":"1.0.0"}\n')
        write_whole(self.directory / "index.json", f"{json.dumps(index, indent=2)}\n".encode())
        kept = {digest for each in entries for digest in self._needed(each["digest"])}
        for file in self._blobs.iterdir():
            if f"sha256:{file.name}" not in kept:
                file.unlink()

    def _entries(self) -> list[dict[str, Any]]:
        try:
            index = json.loads((self.directory / "index.json").read_bytes())
            return [entry for entry in index["manifests"] if self.blob(entry["digest"]).exists()]
        except (OSError, ValueError, LookupError, TypeError):
            return []

    def _needed(self, digest: str) -> Iterator[str]:
        manifest = json.loads(self.blob(digest).read_bytes())
        yield digest
        yield manifest["config"]["digest"]
        yield from (layer["digest"] for layer in manifest["layers"])


def _name(entry: Mapping[str, Any]) -> str:
    return str(entry.get("annotations", {}).get(REF_NAME, ""))


def _write_archive(
    file: IO[bytes], members: Iterable[tuple[tarfile.TarInfo, IO[bytes] | None]]
) -> None:
    with tarfile.open(
        fileobj=file, mode="w|", format=tarfile.PAX_FORMAT, bufsize=_BUFFER
    ) as archive:
        for member, data in members:
            archive.addfile(member, data)


def layers_of(manifest: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Layer]:
    """Return the layers of an image by their content."""
    layers = {}
    diff_ids = config.get("rootfs", {}).get("diff_ids", ())
    for descriptor, diff_id in zip(manifest.get("layers", ()), diff_ids, strict=False):
        content = descriptor.get("annotations", {}).get(CONTENT)
        if content and descriptor.get("mediaType") == LAYER_TYPE:
            layers[content] = Layer(descriptor, diff_id)
    return layers


class _Hashed:
    """A file that is only written, with the digest and the size of what was written."""

    def __init__(self, file: Any) -> None:
        self._file, self._hash, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        self.size += len(data)
        self._file.write(data)
        return len(data)

    @property
    def digest(self) -> str:
        return f"sha256:{self._hash.hexdigest()}"
