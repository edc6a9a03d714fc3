"""Differences between Podman's Docker-compatible API and Docker's.

Podman's commit takes no configuration, adds variables to the environment and the container's
labels to the image, and cannot remove either. The configuration is therefore set in a second
step: an archive with the same layers and another configuration is loaded. The archive contains
no layer data, because Podman reads only layers that it does not have.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guix_tasks.oci.tar import archive

if TYPE_CHECKING:
    from collections.abc import Mapping

NAME = "Podman"

UNFINISHED_LABEL = "org.guix-tasks.unfinished"
"""Label of a committed image that has no configuration yet."""

_DOCKER = "application/vnd.docker."
_MANIFEST = f"{_DOCKER}distribution.manifest.v2+json"
"""Docker's image format; OCI's has no health check."""


def sockets() -> list[Path]:
    """Return the sockets of ``podman.socket``: the user's, then root's."""
    user = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}"
    return [Path(directory, "podman/podman.sock") for directory in (user, "/run")]


def is_podman(version: Mapping[str, Any]) -> bool:
    """Return True if an answer to ``/version`` comes from Podman."""
    components = version.get("Components") or ()
    return any(str(component.get("Name", "")).startswith(NAME) for component in components)


def familiar_name(name: str) -> str:
    """Return an image name without Docker Hub's prefixes, as Docker prints it."""
    return name.removeprefix("docker.io/").removeprefix("library/")


def configured_image(inspected: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[str, bytes]:
    """Return the ID and the archive of a copy of an image with another configuration.

    ``inspected`` is the libpod API's description of the image. The copy has the same layers and
    history. The archive can be loaded only by an engine that has the layers.
    """
    layers = inspected["RootFS"]["Layers"]
    image = _json(
        {
            **{name.lower(): inspected[name] for name in ("Architecture", "Os", "Created")},
            "config": dict(config),
            "history": inspected.get("History") or [],
            "rootfs": {"type": "layers", "diff_ids": layers},
        }
    )
    kind = f"{_DOCKER}image.rootfs.diff.tar"
    manifest = _json(
        {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "config": _descriptor(f"{_DOCKER}container.image.v1+json", image),
            # Podman reads neither the layers nor their sizes.
            "layers": [{"mediaType": kind, "size": 1, "digest": digest} for digest in layers],
        }
    )
    index = _json({"schemaVersion": 2, "manifests": [_descriptor(_MANIFEST, manifest)]})
    files = {
        "oci-layout": _json({"imageLayoutVersion": "1.0.0"}),
        "index.json": index,
        **{f"blobs/sha256/{_sha256(blob)}": blob for blob in (image, manifest)},
    }
    return f"sha256:{_sha256(image)}", archive(files)


def _descriptor(kind: str, blob: bytes) -> dict[str, Any]:
    return {"mediaType": kind, "size": len(blob), "digest": f"sha256:{_sha256(blob)}"}


def _json(content: object) -> bytes:
    return json.dumps(content).encode()


def _sha256(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()
