"""Implementation of the ``Engine`` protocol for Podman, with its Docker-compatible API.

Podman's commit takes no configuration, adds variables to the environment and the container's
labels to the image, and cannot remove either. The configuration is therefore set in a second
step: an archive with the same layers and another configuration is loaded. The archive contains
no layer data, because Podman reads only layers that it does not have.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from guix_tasks.engine.api import UNFINISHED_LABEL
from guix_tasks.engine.docker import DockerEngine, Helpers, seccomp_profile
from guix_tasks.errors import REFUSED, BuilderError, EngineError
from guix_tasks.oci.reference import ImageReference, is_loopback
from guix_tasks.oci.tar import archive

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from guix_tasks.engine.accounts import Credentials
    from guix_tasks.engine.api import BuildSpec, ContainerSpec, Image
    from guix_tasks.engine.discovery import Address


def open_engine(address: Address, helpers: Helpers) -> DockerEngine:
    """Return the engine at an address: a ``PodmanEngine`` if Podman answers, else Docker's.

    Raise ``EngineError`` if the engine does not answer.
    """
    engine = DockerEngine(address, helpers)
    return PodmanEngine(address, helpers) if engine.is_podman else engine


class PodmanEngine(DockerEngine):
    """A Podman service.

    Each method works around one difference between Podman's API and Docker's.
    """

    product = "Podman"

    def _has_bridge(self, info: Mapping[str, Any]) -> bool:  # noqa: ARG002
        # Podman's default network may have any name.
        return True

    def image(self, reference: str) -> Image | None:
        image = super().image(reference)
        if image is None:
            return None
        # Only the libpod API reports the health check.
        with self._engine_errors(f"inspect the image {reference}"):
            check = self._libpod_image(image.id).get("Healthcheck")
        return replace(
            image,
            config={**image.config, **({"Healthcheck": check} if check else {})},
            # Podman reports a digest even for an image that no registry has.
            digests=(),
            tags=tuple(map(familiar_name, image.tags)),
        )

    def _libpod_image(self, image: str) -> dict[str, Any]:
        answer = self._api.get(f"{self._api.base_url}/v4.0.0/libpod/images/{image}/json")
        answer.raise_for_status()
        inspected: dict[str, Any] = answer.json()
        return inspected

    def unnamed(self, labels: Mapping[str, str]) -> list[str]:
        # Podman finds no image if the filter has several labels.
        first, *others = (super(PodmanEngine, self).unnamed({k: v}) for k, v in labels.items())
        return [image for image in first if all(image in other for other in others)]

    def _look_up(self, reference: str, account: Credentials | None) -> bool:  # noqa: ARG002
        # The API cannot look up an image in a registry. The login has tested a password already.
        return account is not None and not account.identity_token

    def _security(self, spec: ContainerSpec) -> list[str]:
        if any(map(seccomp_profile, spec.security)) and not self.info().is_local:
            raise EngineError(
                f"{REFUSED} filter a container's system calls: Podman takes no filter from "
                "another machine; set GUIX_SANDBOX=privileged, which needs no filter"
            )
        # Podman reads the profile's file itself. Its option for `unmasked` differs from Docker's.
        return [*spec.security, *(["unmask=ALL"] if spec.unmasked else [])]

    def commit(self, container: str, config: Mapping[str, Any], comment: str = "") -> str:  # noqa: ARG002
        # Podman's OCI images have no comments.
        with self._engine_errors("commit a container"):
            changes = [f"LABEL {UNFINISHED_LABEL}=yes"]
            unfinished = self._work_api.commit(container, changes=changes)["Id"]
            try:
                image, copy = configured_image(self._libpod_image(unfinished), config)
                events = self._work_api.load_image(copy)  # type: ignore[no-untyped-call]
                deque(events, maxlen=0)
            finally:
                self._work_api.remove_image(unfinished)
        return image

    def build(self, spec: BuildSpec, output: Callable[[bytes], None]) -> str:
        if spec.secrets:
            raise BuilderError(
                "BUILD_SECRETS needs BuildKit, and the engine is Podman, whose API takes no "
                "secrets; unset it, or use a Docker Engine"
            )
        return self._classic_build(spec, output)

    @contextmanager
    def _plain_http(self, reference: str) -> Iterator[None]:
        # Podman has this parameter for a push and a build, but not for a pull.
        if is_loopback(ImageReference.parse(reference).registry):
            self._work_api.params = {"tlsVerify": "false"}
        try:
            yield
        finally:
            self._work_api.params = {}


_DOCKER = "application/vnd.docker."
_MANIFEST = f"{_DOCKER}distribution.manifest.v2+json"
"""Docker's image format; OCI's has no health check."""


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
