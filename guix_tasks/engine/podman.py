"""Implementation of the ``Engine`` protocol for Podman, with its Docker-compatible API."""

from __future__ import annotations

from collections import deque
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from guix_tasks.engine import podman_api
from guix_tasks.engine.docker import DockerEngine, Helpers, seccomp_profile
from guix_tasks.errors import REFUSED, BuilderError, EngineError
from guix_tasks.oci.reference import ImageReference, is_loopback

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

    product = podman_api.NAME

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
            tags=tuple(map(podman_api.familiar_name, image.tags)),
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
        # A commit takes no configuration; ``podman_api`` describes this second step.  Podman's OCI
        # images have no comments.
        with self._engine_errors("commit a container"):
            changes = [f"LABEL {podman_api.UNFINISHED_LABEL}=yes"]
            unfinished = self._work_api.commit(container, changes=changes)["Id"]
            try:
                image, archive = podman_api.configured_image(self._libpod_image(unfinished), config)
                events = self._work_api.load_image(archive)  # type: ignore[no-untyped-call]
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
