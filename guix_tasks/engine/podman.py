"""Podman behind the Docker-compatible API: what it does in another way than Docker."""

from __future__ import annotations

from collections import deque
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from guix_tasks.engine import podman_api
from guix_tasks.engine.docker import DockerEngine, Helpers, profile
from guix_tasks.errors import REFUSED, BuilderError, EngineError
from guix_tasks.oci.reference import ImageReference

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from guix_tasks.engine.accounts import Credentials
    from guix_tasks.engine.api import BuildSpec, ContainerSpec, Image
    from guix_tasks.engine.discovery import Address


def open_engine(address: Address, helpers: Helpers) -> DockerEngine:
    """The engine at an address, of whichever kind it is.  Raises ``EngineError``."""
    engine = DockerEngine(address, helpers)
    is_podman = engine.answers_as(podman_api.is_podman)
    return PodmanEngine(address, helpers) if is_podman else engine


class PodmanEngine(DockerEngine):
    """A real Podman.  Each method says why it is not as Docker's."""

    product = podman_api.NAME

    def _has_bridge(self, info: Mapping[str, Any]) -> bool:  # noqa: ARG002
        # It gives a network by default, whatever that is called.
        return True

    def image(self, reference: str) -> Image | None:
        found = super().image(reference)
        if found is None:
            return None
        # A health check is told by its own API alone.
        check = self._libpod_image(found.id).get("Healthcheck")
        return replace(
            found,
            config={**found.config, **({"Healthcheck": check} if check else {})},
            # Each image has one, also where no registry knows it, and no word tells which.
            digests=(),
            tags=tuple(map(podman_api.plain, found.tags)),
        )

    def _libpod_image(self, image: str) -> dict[str, Any]:
        with self._speaking(f"look at the image {image}"):
            answer = self._api.get(f"{self._api.base_url}/v4.0.0/libpod/images/{image}/json")
            answer.raise_for_status()
            found: dict[str, Any] = answer.json()
        return found

    def unnamed(self, labels: Mapping[str, str]) -> list[str]:
        # Of several labels it finds nothing.
        first, *others = (super(PodmanEngine, self).unnamed({k: v}) for k, v in labels.items())
        return [each for each in first if all(each in other for other in others)]

    def _is_asked(self, reference: str, account: Credentials | None) -> bool:  # noqa: ARG002
        # Its API asks no registry for an image; an account has been tried by now.
        return account is not None and not account.identity_token

    def _security(self, spec: ContainerSpec) -> list[str]:
        if any(map(profile, spec.security)) and not self.info().is_local:
            raise EngineError(
                f"{REFUSED} filter a container's system calls: Podman takes no filter from "
                "another machine; GUIX_SANDBOX=privileged does without"
            )
        # It reads the file itself, and has another word for all of /proc.
        return [*spec.security, *(["unmask=ALL"] if spec.unmasked else [])]

    def commit(self, container: str, config: Mapping[str, Any]) -> str:
        # See ``podman_api``: a commit takes no configuration.
        with self._speaking("commit a container"):
            changes = [f"LABEL {podman_api.UNFINISHED_LABEL}=yes"]
            unfinished = self._slow.commit(container, changes=changes)["Id"]
            try:
                image, archive = podman_api.configured(self._libpod_image(unfinished), config)
                events = self._slow.load_image(archive)  # type: ignore[no-untyped-call]
                deque(events, maxlen=0)
            finally:
                self._slow.remove_image(unfinished)
        return image

    def _import_name(self, reference: str) -> tuple[str, str | None]:
        # It takes the tag with the name alone.
        return reference, None

    def build(self, spec: BuildSpec, output: Callable[[bytes], None]) -> str:
        if spec.secrets:
            raise BuilderError(
                "BUILD_SECRETS needs BuildKit, and the engine is Podman, whose API takes no "
                "secrets; unset it, or use a Docker Engine"
            )
        return self._classic_build(spec, output)

    def _build_events(self, spec: BuildSpec) -> Iterator[dict[str, Any]]:
        with self._plain_http(spec.args.get("BASE_IMAGE", "scratch")):
            return super()._build_events(spec)

    def _push_events(
        self, reference: str, credentials: Credentials | None
    ) -> Iterator[dict[str, Any]]:
        with self._plain_http(reference):
            return super()._push_events(reference, credentials)

    @staticmethod
    def _pushed(event: Mapping[str, Any]) -> str:
        return podman_api.pushed(event)

    @contextmanager
    def _plain_http(self, reference: str) -> Iterator[None]:
        """Let it speak plain HTTP to a registry on loopback, as Docker does by itself.

        It takes this for a push and a build; for a pull it does not.
        """
        if podman_api.on_loopback(ImageReference.parse(reference).registry):
            self._slow.params = {"tlsVerify": "false"}
        try:
            yield
        finally:
            self._slow.params = {}
