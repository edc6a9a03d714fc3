"""What Podman does in another way than Docker, behind the API that both have.

Its commit takes no configuration, adds words of its own to the environment and the container's
labels to the image, and cannot take out what is there.  So what it commits is given its
configuration afterwards: the same layers are loaded under another configuration, as an archive
that has no layer in it, since Podman does not ask for those that it has.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

NAME = "Podman"

UNFINISHED_LABEL = "org.guix-tasks.unfinished"
"""Of what was committed and has no configuration yet."""

_DOCKER = "application/vnd.docker."
_MANIFEST = f"{_DOCKER}distribution.manifest.v2+json"
"""Docker's own form of an image, since OCI's knows no health check."""


def sockets() -> list[Path]:
    """Where Podman listens, if its ``podman.socket`` is started: the user's, then root's."""
    own = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}"
    return [Path(folder, "podman/podman.sock") for folder in (own, "/run")]


def is_podman(version: Mapping[str, Any]) -> bool:
    """Whether an engine's answer to ``/version`` is Podman's."""
    components = version.get("Components") or ()
    return any(str(each.get("Name", "")).startswith(NAME) for each in components)


def plain(name: str) -> str:
    """The name of an image as Docker says it."""
    return name.removeprefix("docker.io/").removeprefix("library/")


def pushed(event: Mapping[str, Any]) -> str:
    """The digest that an event of a push tells, where it does so in words alone."""
    found = re.search(r"\bdigest: (sha256:[0-9a-f]{64})\b", str(event.get("status", "")))
    return found[1] if found else ""


def on_loopback(host: str) -> bool:
    """Whether a registry is on the engine's own machine, to which Docker speaks plain HTTP, too."""
    return host.partition(":")[0] == "localhost" or host.startswith("127.")


def configured(found: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[str, bytes]:
    """An image with the layers and the history of another, and this configuration.

    ``found`` is what Podman's own API says of the other.  The ID of the image, and the archive
    that makes it where the layers are.
    """
    layers = found["RootFS"]["Layers"]
    image = _json(
        {
            **{name.lower(): found[name] for name in ("Architecture", "Os", "Created")},
            "config": dict(config),
            "history": found.get("History") or [],
            "rootfs": {"type": "layers", "diff_ids": layers},
        }
    )
    kind = f"{_DOCKER}image.rootfs.diff.tar"
    manifest = _json(
        {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "config": _described(f"{_DOCKER}container.image.v1+json", image),
            # Nobody reads a layer, nor how long it is.
            "layers": [{"mediaType": kind, "size": 1, "digest": each} for each in layers],
        }
    )
    index = _json({"schemaVersion": 2, "manifests": [_described(_MANIFEST, manifest)]})
    files = {
        "oci-layout": _json({"imageLayoutVersion": "1.0.0"}),
        "index.json": index,
        **{f"blobs/sha256/{_sha256(blob)}": blob for blob in (image, manifest)},
    }
    return f"sha256:{_sha256(image)}", _archive(files)


def _described(kind: str, blob: bytes) -> dict[str, Any]:
    return {"mediaType": kind, "size": len(blob), "digest": f"sha256:{_sha256(blob)}"}


def _json(content: object) -> bytes:
    return json.dumps(content).encode()


def _sha256(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()


def _archive(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()
