"""The Docker Engine behind the ``Engine`` protocol, by the docker SDK."""

from __future__ import annotations

import json
import re
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from http import HTTPStatus
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

import docker
import docker.context
import docker.errors
import docker.types
import docker.utils
import requests
import urllib3.exceptions

from guix_tasks.engine import diagnose, retry
from guix_tasks.engine.accounts import HUB, docker_key
from guix_tasks.engine.api import Container, EngineInfo, Image, Layer
from guix_tasks.engine.build_context import context_archive, linked_context
from guix_tasks.engine.discovery import Address, error_line
from guix_tasks.engine.docker_ssh import Client, client_over_ssh
from guix_tasks.engine.ssh import Ssh
from guix_tasks.errors import (
    REFUSED,
    BuilderError,
    EngineError,
    GuixTasksError,
    RegistryError,
    full_disk,
)
from guix_tasks.oci.reference import ImageReference

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from guix_tasks.engine.accounts import Credentials
    from guix_tasks.engine.api import BuildSpec, ContainerSpec, Progress


PROBE_TIMEOUT = 60
"""Seconds that a call which only reads may take."""

WORK_TIMEOUT = 6 * 60 * 60
"""Seconds for a commit, an import, a push.

A commit that the client gives up on is finished by the engine all the same, so giving up early
only loses track of it.
"""


_CONTAINERD_STORE = "io.containerd.snapshotter.v1"
"""The type of its storage driver that an engine reports if containerd keeps its images."""


_NO_ANSWER = (
    docker.errors.DockerException,
    docker.errors.StreamParseError,
    requests.RequestException,
    # The SDK reads answers that come bit by bit from below `requests`.
    urllib3.exceptions.HTTPError,
    OSError,
)
"""What an engine that dies, or is not there, makes the SDK raise."""


class Build(Protocol):
    """Build an image, pass on the output as it comes, and return the image's ID."""

    def __call__(
        self, spec: BuildSpec, output: Callable[[bytes], None], *, compress: bool
    ) -> str: ...


@dataclass(frozen=True)
class Helpers:
    """What of this machine an engine uses besides its API."""

    accounts: Callable[[str], Mapping[str, Credentials]] = lambda _url: {}
    """The accounts of local registries of ours, by host, for the engine at a URL."""
    find_build: Callable[[Address], Build | None] = lambda _address: None
    """What builds by BuildKit on an engine; None where buildx is not on this machine."""


_NO_HELPERS = Helpers()


class DockerEngine:
    """A real engine.  Connects with the first call that needs it."""

    is_dry = False
    product = "Docker"

    def __init__(self, address: Address, helpers: Helpers = _NO_HELPERS) -> None:
        self.address = address
        self._helpers = helpers

    def info(self) -> EngineInfo:
        return self._info

    def local_accounts(self) -> Mapping[str, Credentials]:
        return self._helpers.accounts(self.address.url)

    @cached_property
    def _info(self) -> EngineInfo:
        with self._speaking("be asked for its version"):
            info = self._api.info()
            has_bridge = self._has_bridge(info)
        return EngineInfo(
            url=self.address.url,
            origin=self.address.origin,
            context=self.address.context,
            name=info.get("Name", ""),
            version=info["ServerVersion"],
            product=self.product,
            platform=_platform(info["OSType"], info["Architecture"]),
            storage_driver=info.get("Driver", ""),
            uses_containerd=_CONTAINERD_STORE in dict(info.get("DriverStatus") or ()).values(),
            has_bridge=has_bridge,
            root=info.get("DockerRootDir", ""),
            time=_time(info.get("SystemTime", "")),
            cgroups=info.get("CgroupVersion", ""),
            security=_security(info),
        )

    def _has_bridge(self, info: Mapping[str, Any]) -> bool:
        networks = info.get("Plugins", {}).get("Network") or []
        return "bridge" in networks and bool(self._api.networks(names=["bridge"]))

    def answers_as(self, is_it: Callable[[Mapping[str, Any]], bool]) -> bool:
        """Whether it is of a kind that is told by its answer to ``/version``."""
        with self._speaking("be asked for its version"):
            return is_it(self._api.version())

    def image(self, reference: str) -> Image | None:
        with self._speaking(f"look at the image {reference}"):
            try:
                found = self._inspected(reference)
            except docker.errors.ImageNotFound:
                return None
        platform = "/".join(
            part for part in (found["Os"], found["Architecture"], found.get("Variant")) if part
        )
        return Image(
            id=found["Id"],
            layers=tuple(found["RootFS"].get("Layers") or ()),
            config=found["Config"] or {},
            size=_disk_usage(found),
            created=found.get("Created") or "",
            platform=platform,
            digests=tuple(found.get("RepoDigests") or ()),
            tags=tuple(found.get("RepoTags") or ()),
        )

    def _inspected(self, reference: str) -> dict[str, Any]:
        api, name = self._api, quote(reference, safe="/:")
        # Not by the SDK: the containerd store measures an image only if asked for its manifests.
        answer = api.get(
            f"{api.base_url}/v{api.api_version}/images/{name}/json",
            params={"manifests": "1"},
            timeout=api.timeout,
        )
        try:
            answer.raise_for_status()
        except requests.HTTPError as error:
            docker.errors.create_api_error_from_http_exception(error)
        found: dict[str, Any] = answer.json()
        return found

    def unnamed(self, labels: Mapping[str, str]) -> list[str]:
        with self._speaking("list images"):
            found = self._api.images(
                quiet=True, filters={"dangling": True, "label": _filters(labels)}
            )
        return list(dict.fromkeys(found))

    def containers(self, labels: Mapping[str, str]) -> list[Container]:
        with self._speaking("list containers"):
            found = self._api.containers(all=True, filters={"label": _filters(labels)})
        containers = [
            Container(
                id=each["Id"],
                name=each["Names"][0].lstrip("/"),
                image=each["ImageID"],
                labels=each["Labels"],
                running=each["State"] in ("running", "paused", "restarting"),
                created=each["Created"],
                addresses={
                    name: network["IPAddress"]
                    for name, network in _networks(each).items()
                    if network.get("IPAddress")
                },
            )
            for each in found
        ]
        return sorted(containers, key=lambda each: each.created, reverse=True)

    def remote_digest(self, reference: str, credentials: Credentials | None = None) -> str | None:
        try:
            found = self._api.inspect_distribution(  # type: ignore[no-untyped-call]
                reference, _auth(credentials)
            )
        except (docker.errors.DockerException, requests.RequestException):
            return None
        return str(found["Descriptor"]["digest"])

    def greet_registry(self, reference: str, credentials: Credentials | None) -> bool:
        host, what = ImageReference.parse(reference).registry, f"ask for {reference}"
        with self._speaking(what):
            try:
                if credentials and credentials.password:
                    _log_in(self._api, "" if host == HUB else host, credentials)
                return self._is_asked(reference, credentials)
            except docker.errors.NotFound:
                pass
            except docker.errors.APIError as error:
                # As some registries say that an image, or its repository, is not there.
                if not re.match(
                    r"unknown: (artifact|repository) \S+ not found", why := error_line(error)
                ):
                    raise _registry_error(what, why) from None
        return True

    def _is_asked(self, reference: str, account: Credentials | None) -> bool:
        """Let the registry be asked for an image; whether it was."""
        self._api.inspect_distribution(reference, _auth(account))  # type: ignore[no-untyped-call]
        return True

    def volumes(self, labels: Mapping[str, str]) -> list[str]:
        with self._speaking("list volumes"):
            found = self._api.volumes(filters={"label": _filters(labels)})["Volumes"] or ()
        return [each["Name"] for each in found]

    def make_volume(self, name: str, labels: Mapping[str, str]) -> None:
        with self._speaking(f"make the volume {name}"):
            self._api.create_volume(name, labels=dict(labels))

    def remove_volume(self, name: str) -> None:
        with self._speaking(f"remove the volume {name}"):
            try:
                self._api.remove_volume(name)
            except docker.errors.NotFound:
                return

    def tag(self, image: str, reference: str) -> None:
        repository, _, tag = reference.rpartition(":")
        with self._speaking(f"tag {reference}"):
            self._api.tag(image, repository, tag)

    def untag(self, reference: str) -> None:
        with self._speaking(f"remove the tag {reference}"):
            try:
                self._api.remove_image(reference)
            except docker.errors.ImageNotFound:
                return
            except docker.errors.APIError as error:
                # A container is made of it, and goes on as it is without the image's name.
                if error.status_code != HTTPStatus.CONFLICT:
                    raise
                self._api.remove_image(reference, force=True)

    def drop(self, image: str) -> None:
        found = self.image(image)
        if found is None or found.tags:
            return
        # Held by a container or by an image made from it: it stays, and goes with those.
        with self._speaking("remove an image"), suppress(docker.errors.APIError):
            self._slow.remove_image(image)

    def layers(self, image: str) -> list[Layer]:
        with self._speaking("ask what an image is made of"):
            history = self._api.history(image)  # type: ignore[no-untyped-call]
        steps = [Layer(step["Size"], step["CreatedBy"]) for step in reversed(history)]
        return [step for step in steps if step.size]

    def save(self, image: str) -> Iterator[bytes]:
        with self._speaking("save an image"):
            yield from self._slow.get_image(image)

    def create(self, spec: ContainerSpec) -> str:
        with self._speaking(f"make a container of {spec.image}"):
            host = self._api.create_host_config(
                privileged=spec.privileged,
                security_opt=self._security(spec),
                cap_drop=["ALL"] if spec.capabilities is not None else None,
                cap_add=list(spec.capabilities or ()),
                tmpfs=dict.fromkeys(spec.memory_folders, ""),
                network_mode=spec.network,
                binds=list(spec.binds),
                port_bindings={
                    port: (spec.publish_on, ours) for ours, port in spec.publish.items()
                },
                mounts=[docker.types.Mount(spec.scratch, None)] if spec.scratch else None,
                mem_limit=spec.memory,
                init=spec.init,
            )
            if spec.unmasked:  # what `docker run --security-opt systempaths=unconfined` sends
                host["MaskedPaths"] = host["ReadonlyPaths"] = []
            created = self._api.create_container(
                spec.image,
                name=spec.name,
                # All in the entry point, and no command: what an image lacks can then be given
                # back to it by a commit, whose merge takes the container's command else.
                entrypoint=list(spec.command),
                labels=dict(spec.labels),
                environment=dict(spec.environment),
                host_config=host,
                ports=list(spec.publish.values()),
                tty=spec.tty,
                stdin_open=spec.tty,
                user=spec.user,
                healthcheck={"test": ["NONE"]} if spec.no_healthcheck else None,
                platform=spec.platform,
                # Else the proxies of Docker's own configuration were in what is committed; those
                # are among ours.
                use_config_proxy=False,
            )
        return str(created["Id"])

    def _security(self, spec: ContainerSpec) -> list[str]:
        return [_with_profile(option) for option in spec.security]

    def copy_in(self, container: str, archive: bytes | IO[bytes]) -> None:
        with self._speaking("copy files into a container"):
            self._slow.put_archive(container, "/", archive)

    def copy_out(self, container: str, path: str) -> Iterator[bytes]:
        with self._speaking(f"copy {path} out of a container"), suppress(docker.errors.NotFound):
            yield from self._slow.get_archive(container, path)[0]

    def run(self, container: str) -> Iterator[tuple[bool, bytes]]:
        with self._speaking("run a container"):
            # Attached before the start, so that not a byte is missed.
            output = self._api.attach(container, stream=True, demux=True)
            self._api.start(container)
            for out, err in output:
                if err:
                    yield True, err
                if out:
                    yield False, out

    def received(self, container: str) -> int | None:
        with self._speaking("ask what a container does"):
            found = self._api.stats(container, stream=False, one_shot=True)
        networks = found.get("networks") or {}
        return sum(each["rx_bytes"] for each in networks.values()) if networks else None

    def start(self, container: str) -> None:
        with self._speaking("start a container"):
            self._api.start(container)

    def wait(self, container: str) -> int:
        with self._speaking("wait for a container"):
            return int(self._slow.wait(container)["StatusCode"])

    def stop(self, container: str, seconds: int) -> None:
        with self._speaking("stop a container"):
            self._slow.stop(container, timeout=seconds)

    def remove(self, container: str) -> None:
        with self._speaking("remove a container"):
            try:
                self._slow.remove_container(container, v=True, force=True)
            except docker.errors.NotFound:
                return

    def commit(self, container: str, config: Mapping[str, Any]) -> str:
        with self._speaking("commit a container"):
            return str(self._slow.commit(container, conf=dict(config))["Id"])

    def import_rootfs(self, archive: Iterator[bytes], reference: str) -> str:
        with self._speaking(f"import {reference}"):
            answer = self._slow.import_image_from_data(archive, *self._import_name(reference))
        last = json.loads(answer.strip().splitlines()[-1])
        if "error" in last:
            why = last["error"]
            raise EngineError(f"{REFUSED} import {reference}: {why}{full_disk(why)}")
        return str(last["status"])

    def _import_name(self, reference: str) -> tuple[str, str | None]:
        repository, _, tag = reference.rpartition(":")
        return repository, tag

    def build(self, spec: BuildSpec, output: Callable[[bytes], None]) -> str:
        build = self._helpers.find_build(self.address)
        if build is None:
            return self._classic_build(spec, output)
        compress = self._is_uncompressed(spec.args.get("BASE_IMAGE", ""))
        linked = replace(spec, context=linked_context(spec.context, spec.dockerfile))
        return build(linked, output, compress=compress)

    def _is_uncompressed(self, reference: str) -> bool:
        """Return whether the containerd store keeps an image as it is in an archive.

        ``docker load`` leaves layers as they come, and a push would send them so.
        """
        if not reference or not self.info().uses_containerd:
            return False
        with self._speaking(f"look at the image {reference}"):
            try:
                manifests = self._inspected(reference).get("Manifests") or ()
            except docker.errors.NotFound:
                return False
        content = sum(each["Size"]["Content"] for each in manifests)
        unpacked = sum(each["ImageData"]["Size"]["Unpacked"] for each in manifests
                       if "ImageData" in each)  # fmt: skip
        # What is unpacked is counted in blocks.  Packed files come to half of it, about.
        return bool(unpacked) and content > 0.9 * unpacked

    def _classic_build(self, spec: BuildSpec, output: Callable[[bytes], None]) -> str:
        if spec.secrets:
            raise BuilderError(
                "BUILD_SECRETS needs buildx, which is not on this machine; "
                "install the package docker-buildx (docker-buildx-plugin in Docker's own archive)"
            )
        image = ""
        with self._speaking("build"):
            try:
                for event in self._build_events(spec):
                    if "error" in event:
                        raise diagnose.build_error(spec, error_line(event["error"]))
                    output(event.get("stream", "").encode())
                    image = (event.get("aux") or {}).get("ID", image)
            except docker.errors.APIError as error:
                raise diagnose.build_error(spec, error_line(error)) from None
        return str(image)

    def _build_events(self, spec: BuildSpec) -> Iterator[dict[str, Any]]:
        accounts = spec.accounts.every() if spec.accounts else {}
        self._slow.give({docker_key(host): _auth(each) for host, each in accounts.items()})
        # Not packed by the SDK, which has rules of its own for .dockerignore.
        context, dockerfile = context_archive(spec.context, spec.dockerfile)
        return self._slow.build(
            fileobj=context,
            custom_context=True,
            dockerfile=dockerfile,
            buildargs={**spec.proxies, **spec.args},
            platform=spec.platform,
            network_mode=spec.network,
            rm=True,
            forcerm=True,
            decode=True,
        )

    def push(
        self, reference: str, credentials: Credentials | None, progress: Progress | None = None
    ) -> str:
        digest = ""
        with self._speaking(f"push {reference}"):
            events = self._push_events(reference, credentials)
            # The call itself raises nothing when a push fails: the stream says so.
            for event in _checked(events, f"push {reference}", progress):
                digest = self._pushed(event) or digest
        if not digest:
            raise RegistryError(f"{reference} was not pushed: the registry answered no digest")
        return digest

    def _push_events(
        self, reference: str, credentials: Credentials | None
    ) -> Iterator[dict[str, Any]]:
        repository, _, tag = reference.rpartition(":")
        events: Iterator[dict[str, Any]] = self._slow.push(
            repository, tag, stream=True, decode=True, auth_config=_auth(credentials)
        )
        return events

    @staticmethod
    def _pushed(event: Mapping[str, Any]) -> str:
        """Return the digest that an event of a push reports, if any.

        The classic image store sends it as data, the containerd store in a line of status.
        """
        line = _PUSHED.fullmatch(event.get("status", ""))
        return str((event.get("aux") or {}).get("Digest", "")) or (line[1] if line else "")

    def pull(
        self,
        reference: str,
        credentials: Credentials | None,
        platform: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        name, at, digest = reference.partition("@")
        repository, _, tag = (name, at, digest) if at else reference.rpartition(":")
        with self._speaking(f"pull {reference}"):
            try:
                events = self._slow.pull(
                    repository, tag, stream=True, decode=True,
                    auth_config=_auth(credentials), platform=platform,
                )  # fmt: skip
            except docker.errors.APIError as error:
                raise _registry_error(f"pull {reference}", error_line(error)) from None
            for _ in _checked(events, f"pull {reference}", progress):
                pass

    @cached_property
    def _api(self) -> Client:
        return self._client(PROBE_TIMEOUT, "auto")

    @cached_property
    def _slow(self) -> Client:
        return self._client(WORK_TIMEOUT, self._api.api_version)

    def _client(self, timeout: int, version: str) -> Client:
        if self._ssh:
            return client_over_ssh(self._ssh, timeout, version)
        return Client(
            base_url=self.address.url,
            tls=self.address.tls or False,
            timeout=timeout,
            version=version,
        )

    @cached_property
    def _ssh(self) -> Ssh | None:
        return Ssh(self.address.url) if self.address.url.startswith("ssh://") else None

    @contextmanager
    def _speaking(self, what: str) -> Iterator[None]:
        """Every fault of the engine or of the way to it becomes an ``EngineError``."""
        try:
            yield
        except GuixTasksError:
            raise
        except docker.errors.APIError as error:
            why = error_line(error)
            raise EngineError(f"{REFUSED} {what}: {why}{full_disk(why)}") from None
        except _NO_ANSWER as error:
            raise EngineError(self._unreachable(error)) from None

    def _unreachable(self, error: Exception) -> str:
        where = f"the Docker Engine at {self.address.url} ({self.address.origin})"
        text = str(error)
        if self._ssh and (said := self._ssh.complaint()):
            return f"{where} cannot be reached: {said}"
        if "PermissionError" in text or "Permission denied" in text:
            return (
                f"{where} may not be used by this user; run as root, or join the group that owns "
                "the socket (`sudo usermod -aG docker $USER`, then log in again)"
            )
        mend = "`inv engine.up`" if self.address.origin == "private engine" else "start it"
        return f"{where} does not answer: {_cause(text)}; {mend}, or choose another by DOCKER_HOST"


def _disk_usage(image: Mapping[str, Any]) -> int:
    """Return the bytes that an image takes on the engine's disk, as ``docker images`` shows them.

    In the containerd store that is the content, which is packed, and what is unpacked from it.
    Engines before 28 (API 1.48) report only the content there.
    """
    totals = [manifest["Size"]["Total"] for manifest in image.get("Manifests") or ()]
    return sum(totals) or int(image["Size"])


def _log_in(api: docker.APIClient, host: str, credentials: Credentials) -> None:
    api.login(credentials.username, credentials.password, registry=host, reauth=True)


def _filters(labels: Mapping[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in labels.items()]


def _auth(credentials: Credentials | None) -> dict[str, str] | None:
    """An account in the words of Docker's API; see ``Client``, too, which looks for no other."""
    if credentials is None:
        return None
    if credentials.identity_token:
        return {"identitytoken": credentials.identity_token}
    return {"username": credentials.username, "password": credentials.password}


def _checked(
    events: Iterator[dict[str, Any]], what: str, progress: Progress | None
) -> Iterator[dict[str, Any]]:
    for event in events:
        if "error" in event or "errorDetail" in event:
            detail = (event.get("errorDetail") or {}).get("message") or event.get("error", "")
            raise _registry_error(what, " ".join(str(detail).split()))
        if progress and event.get("id"):
            amount = event.get("progressDetail") or {}
            progress(
                event["id"], event.get("status", ""),
                amount.get("current") or 0, amount.get("total") or 0,
            )  # fmt: skip
        yield event


_PUSHED = re.compile(r"\S+: digest: (sha256:[0-9a-f]{64}) size: \d+")
"""The line of status that ends a push from the containerd store."""

_REGISTRY_MENDS = {
    "the credentials are missing or refused: set DOCKER_USERNAME and DOCKER_PASSWORD for the "
    "registry of IMAGE, or `docker login` for any, and see that they may write there": (
        "no basic auth", "unauthorized", "authentication required", "denied",
    ),
    "no registry listens there: start it (`inv registry.up` for a local one), or mend the "
    "reference": ("connection refused",),
    "there is no such registry: mend the reference": (
        "no such host", "server misbehaving", "name resolution",
    ),
    "that registry speaks plain HTTP: add it to the engine's insecure-registries (for Podman, to "
    "/etc/containers/registries.conf: [[registry]], location and insecure = true)": (
        "http response to https client",
    ),
    "the engine does not trust its certificate: put its CA into the engine's certs.d": (
        "x509", "certificate",
    ),
    "the registry has no such image: mend the reference": (
        "manifest unknown", "not found", "does not exist",
    ),
}  # fmt: skip
"""What mends a fault, by words that the engine's message for it has."""


def _registry_error(what: str, detail: str) -> RegistryError:
    text = detail.lower()
    mends = (mend for mend, words in _REGISTRY_MENDS.items() if any(word in text for word in words))
    mend = next(mends, "")
    said = f"; {mend}" if mend else full_disk(detail)
    error = RegistryError(f"cannot {what}: {detail}{said}")
    # A number in a name is no status.
    reference = what.rpartition(" ")[2]
    for name in (reference, ImageReference.parse(reference).repository):
        detail = detail.replace(name, "")
    error.passes = retry.passes(detail)
    return error


def _networks(container: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    return (container.get("NetworkSettings") or {}).get("Networks") or {}


def profile(option: str) -> Path | None:
    """The file that an option names."""
    value = option.partition("=")[2]
    return Path(value) if value.startswith("/") else None


def _with_profile(option: str) -> str:
    """An option with the content of its file, as Docker's API wants a seccomp profile."""
    file = profile(option)
    return f"{option.partition('=')[0]}={file.read_text()}" if file else option


def _security(info: Mapping[str, Any]) -> tuple[str, ...]:
    # As "name=seccomp,profile=builtin".
    options = info.get("SecurityOptions") or ()
    found = [each.partition(",")[0].removeprefix("name=") for each in options]
    # Podman says it beside the others.
    return tuple(dict.fromkeys([*found, *(["rootless"] if info.get("Rootless") else [])]))


def _time(text: str) -> datetime | None:
    """The time that an engine gives, to the second."""
    try:
        # RFC 3339, with more digits of a second than Python reads, and perhaps an offset.
        zone = re.search(r"(Z|[+-][0-9:]+)$", text[19:])
        return datetime.fromisoformat(text[:19] + (zone[1] if zone else "Z").replace("Z", "+00:00"))
    except ValueError:
        return None


def _platform(system: str, machine: str) -> str:
    # The engine gives the kernel's name of the machine here, OCI's in an image.
    names = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm/v7", "i686": "386"}
    return f"{system}/{names.get(machine, machine)}"


def _cause(text: str) -> str:
    """The innermost cause of what requests wraps in several exceptions."""
    for known in (
        "Connection refused",
        "Connection reset by peer",
        "closed connection",
        "Connection broken",
        "No such file or directory",
        "timed out",
        "Name or service",
    ):
        if known in text:
            return known.lower()
    return " ".join(text.split())
