"""Conversion of the docker archive of ``guix pack`` into an OCI archive, which Guix cannot write.

The format is that of the OCI image layout and image specification. Like the archives of
``docker save``, it also contains ``manifest.json``, for engines that do not read the OCI layout.
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
_CHUNK_SIZE = 1 << 20
"""Bytes to read at once."""

_JSON_MAX = 1 << 24
"""Maximum bytes of a JSON file, which is read into memory."""

_KEYS = {"env": "Env", "entrypoint": "Entrypoint", "cmd": "Cmd", "workingdir": "WorkingDir"}
"""Specified names of keys that Guix writes in lower case, which some engines do not accept."""


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


def oci_archive(docker: IO[bytes], directory: Path, *, compressed: bool) -> Iterator[bytes]:
    """Convert a docker archive, and yield the OCI archive in chunks.

    The result is reproducible. ``docker`` is read once. Blobs are stored in ``directory``, which
    must be empty and which the caller removes. If ``compressed``, layers are compressed with gzip.
    Raise ``tarfile.TarError`` if ``docker`` is not a docker archive.
    """
    layer_files, json_files = _extract(docker, directory, compressed=compressed)
    try:
        (image,) = json.loads(json_files["manifest.json"])
        docker_config = json.loads(json_files[image["Config"]])
        layers = [layer_files[name] for name in image["Layers"]]
        name = str(image["RepoTags"][0])
        content = _config(docker_config, len(layers))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError):
        raise tarfile.ReadError("not a docker archive") from None
    config = _store(directory, _CONFIG, content)
    manifest = _store(directory, _MANIFEST, _json(_manifest(config, layers)))
    descriptor = {
        **manifest.descriptor,
        "platform": {key: docker_config[key] for key in ("architecture", "os")},
        "annotations": {_NAME: name.rpartition(":")[2], "io.containerd.image.name": name},
    }
    index = {"schemaVersion": 2, "mediaType": _INDEX, "manifests": [descriptor]}
    docker_manifest = [
        {"Config": config.name, "RepoTags": [name], "Layers": [layer.name for layer in layers]}
    ]
    yield from _member("oci-layout", _json({"imageLayoutVersion": "1.0.0"}))
    yield from _member("index.json", _json(index))
    yield from _member("manifest.json", _json(docker_manifest))
    # Without duplicates, because two layers can have the same content.
    for blob in dict.fromkeys((manifest, config, *layers)):
        yield _header(blob.name, blob.size)
        with (directory / blob.digest).open("rb") as file:
            yield from _chunks(file)
        yield _padding(blob.size)
    yield bytes(2 * tarfile.BLOCKSIZE)


def _extract(
    docker: IO[bytes], directory: Path, *, compressed: bool
) -> tuple[dict[str, _Blob], dict[str, bytes]]:
    """Return the layers and the JSON files of a docker archive, by file name."""
    layers, json_files = {}, {}
    with tarfile.open(fileobj=docker, mode="r|*") as tar:
        for member in tar:
            name, file = member.name.removeprefix("./"), tar.extractfile(member)
            if file is not None and name.endswith("/layer.tar"):
                layers[name] = _layer(file, directory, compressed=compressed)
            elif file is not None and name.endswith(".json") and member.size <= _JSON_MAX:
                json_files[name] = file.read()
    return layers, json_files


def _layer(file: IO[bytes], directory: Path, *, compressed: bool) -> _Blob:
    temporary = directory / "layer"
    digest, size = hashlib.sha256(), 0
    with temporary.open("wb") as target:
        for chunk in _gzip(file) if compressed else _chunks(file):
            digest.update(chunk)
            size += target.write(chunk)
    blob = _Blob(f"{_LAYER}+gzip" if compressed else _LAYER, digest.hexdigest(), size)
    temporary.rename(directory / blob.digest)
    return blob


def _gzip(file: IO[bytes]) -> Iterator[bytes]:
    # The header has neither a name nor a time, so the result is reproducible.
    compressor = zlib.compressobj(wbits=zlib.MAX_WBITS | 16)
    for chunk in _chunks(file):
        yield compressor.compress(chunk)
    yield compressor.flush()


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    return iter(lambda: file.read(_CHUNK_SIZE), b"")


def _config(config: dict[str, Any], layers: int) -> bytes:
    """Convert Guix's configuration to that of the specification, with a history of all layers."""
    if len(config["rootfs"]["diff_ids"]) != layers:
        raise ValueError("the numbers of layers and diff IDs differ")
    history = {"created": config["created"], "created_by": "guix pack --format=docker"}
    return _json(
        {
            **{key: config[key] for key in ("architecture", "os", "created", "rootfs")},
            "config": {_KEYS.get(key, key): value for key, value in config["config"].items()},
            "history": [history] * layers,
        }
    )


def _manifest(config: _Blob, layers: list[_Blob]) -> dict[str, Any]:
    return {
        "schemaVersion": 2,
        "mediaType": _MANIFEST,
        "config": config.descriptor,
        "layers": [layer.descriptor for layer in layers],
    }


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()


def _store(directory: Path, media_type: str, content: bytes) -> _Blob:
    blob = _Blob(media_type, hashlib.sha256(content).hexdigest(), len(content))
    (directory / blob.digest).write_bytes(content)
    return blob


def _header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member.tobuf()


def _member(name: str, content: bytes) -> Iterator[bytes]:
    yield _header(name, len(content)) + content + _padding(len(content))


def _padding(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)
