"""An OCI archive of the docker archive that ``guix pack`` makes, since Guix makes none itself.

Form: the OCI image layout and image specification.  As in what ``docker save`` writes there is a
``manifest.json`` beside the layout, so that an engine that knows only that loads it, too.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import zlib
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_INDEX = "application/vnd.oci.image.index.v1+json"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_LAYER = "application/vnd.oci.image.layer.v1.tar"
_NAME = "org.opencontainers.image.ref.name"

_BLOBS = "blobs/sha256"
_PIECE = 1 << 20
"""Bytes that are read at once."""

_MOST_JSON = 1 << 24
"""Bytes that a description may have; it is read whole."""

_KEYS = {"env": "Env", "entrypoint": "Entrypoint", "cmd": "Cmd", "workingdir": "WorkingDir"}
"""The specification's names of what Guix writes small, which not every reader takes."""


@dataclass(frozen=True)
class _Blob:
    media_type: str
    digest: str
    size: int

    @property
    def name(self) -> str:
        return f"{_BLOBS}/{self.digest}"

    @property
    def descriptor(self) -> dict[str, Any]:
        return {"mediaType": self.media_type, "digest": f"sha256:{self.digest}", "size": self.size}


def oci_archive(docker: IO[bytes], folder: Path, *, compressed: bool) -> Iterator[bytes]:
    """The OCI archive of a docker archive, piece by piece; of the same, the same.

    The docker archive is read once; what comes of it is put into ``folder``, an empty one that is
    the caller's to remove.  The layers are ``compressed`` with gzip, or not.  Raises
    ``tarfile.TarError`` for what is no docker archive.
    """
    layers, texts = _taken_apart(docker, folder, compressed=compressed)
    try:
        (image,) = json.loads(texts["manifest.json"])
        config = json.loads(texts[image["Config"]])
        own = [layers[name] for name in image["Layers"]]
        name = str(image["RepoTags"][0])
        text = _config(config, len(own))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError):
        raise tarfile.ReadError("no docker archive") from None
    config_blob = _kept(folder, _CONFIG, text)
    manifest = _kept(folder, _MANIFEST, _json(_manifest(config_blob, own)))
    tag = {_NAME: name.rpartition(":")[2], "io.containerd.image.name": name}
    descriptor = {**manifest.descriptor, "platform": _platform(config), "annotations": tag}
    index = {"schemaVersion": 2, "mediaType": _INDEX, "manifests": [descriptor]}
    of_docker = [
        {"Config": config_blob.name, "RepoTags": [name], "Layers": [each.name for each in own]}
    ]
    yield from _member("oci-layout", _json({"imageLayoutVersion": "1.0.0"}))
    yield from _member("index.json", _json(index))
    yield from _member("manifest.json", _json(of_docker))
    # Two layers may be the same.
    for blob in dict.fromkeys((manifest, config_blob, *own)):
        yield from _blob_member(folder, blob)
    yield bytes(2 * tarfile.BLOCKSIZE)


def _taken_apart(
    docker: IO[bytes], folder: Path, *, compressed: bool
) -> tuple[dict[str, _Blob], dict[str, bytes]]:
    """The layers and the descriptions of a docker archive, by their names in it."""
    layers, texts = {}, {}
    with tarfile.open(fileobj=docker, mode="r|*") as tar:
        for member in tar:
            name, file = member.name.removeprefix("./"), tar.extractfile(member)
            if file is not None and name.endswith("/layer.tar"):
                layers[name] = _layer(file, folder, compressed=compressed)
            elif file is not None and name.endswith(".json") and member.size <= _MOST_JSON:
                texts[name] = file.read()
    return layers, texts


def _layer(file: IO[bytes], folder: Path, *, compressed: bool) -> _Blob:
    unnamed = folder / "layer"
    digest, size = hashlib.sha256(), 0
    with unnamed.open("wb") as target:
        for piece in _gzipped(file) if compressed else _pieces(file):
            digest.update(piece)
            size += target.write(piece)
    blob = _Blob(f"{_LAYER}+gzip" if compressed else _LAYER, digest.hexdigest(), size)
    unnamed.rename(folder / blob.digest)
    return blob


def _gzipped(file: IO[bytes]) -> Iterator[bytes]:
    # Without a name or a time in its header, so that the same comes out each time.
    packer = zlib.compressobj(wbits=zlib.MAX_WBITS | 16)
    for piece in _pieces(file):
        yield packer.compress(piece)
    yield packer.flush()


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    return iter(lambda: file.read(_PIECE), b"")


def _config(config: dict[str, Any], layers: int) -> bytes:
    """Guix's configuration in the specification's words, with one line of history a layer."""
    if len(config["rootfs"]["diff_ids"]) != layers:
        raise ValueError("not as many layers as diff IDs")
    past = {"created": config["created"], "created_by": "guix pack --format=docker"}
    return _json(
        {
            **{key: config[key] for key in ("architecture", "os", "created", "rootfs")},
            "config": {_KEYS.get(key, key): value for key, value in config["config"].items()},
            "history": [past] * layers,
        }
    )


def _manifest(config: _Blob, layers: list[_Blob]) -> dict[str, Any]:
    return {
        "schemaVersion": 2,
        "mediaType": _MANIFEST,
        "config": config.descriptor,
        "layers": [each.descriptor for each in layers],
    }


def _platform(config: dict[str, Any]) -> dict[str, str]:
    return {key: config[key] for key in ("architecture", "os")}


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()


def _kept(folder: Path, media_type: str, content: bytes) -> _Blob:
    blob = _Blob(media_type, hashlib.sha256(content).hexdigest(), len(content))
    (folder / blob.digest).write_bytes(content)
    return blob


def _header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member.tobuf()


def _member(name: str, content: bytes) -> Iterator[bytes]:
    yield _header(name, len(content)) + content + _padding(len(content))


def _blob_member(folder: Path, blob: _Blob) -> Iterator[bytes]:
    yield _header(blob.name, blob.size)
    with (folder / blob.digest).open("rb") as file:
        yield from _pieces(file)
    yield _padding(blob.size)


def _padding(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)
