"""Implementation of the ``Engine`` protocol for Docker Engine, with the docker SDK."""

from __future__ import annotations

import json
import os
import re
import select
import socket
import threading
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from http import HTTPStatus
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol
from urllib.parse import quote, urlsplit

import docker
import docker.auth
import docker.errors
import docker.types
import requests
import urllib3.exceptions

from guix_tasks.engine import diagnose, retry
from guix_tasks.engine.accounts import HUB, docker_key
from guix_tasks.engine.api import Container, EngineInfo, Image, Layer
from guix_tasks.engine.build_context import context_archive, linked_context
from guix_tasks.engine.discovery import Address, error_line
from guix_tasks.engine.ssh import Ssh, SshAdapter
from guix_tasks.errors import (
    FEWER_LAYERS,
    NO_SHELL,
    REFUSED,
    UPLOAD_LIMIT,
    BuilderError,
    EngineError,
    GuixTasksError,
    RegistryError,
    full_disk,
)
from guix_tasks.oci.platform import canonical_name
from guix_tasks.oci.reference import ImageReference, is_loopback
from guix_tasks.ui.redact import to_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager

    from guix_tasks.engine.accounts import Credentials
    from guix_tasks.engine.api import BuildSpec, ContainerSpec, Progress


PROBE_TIMEOUT = 60
"""Timeout in seconds of calls that only read."""

WORK_TIMEOUT = 6 * 60 * 60
"""Timeout in seconds of calls that do long work: a commit, an import, a push.

The engine finishes a commit even if the client disconnects, so a shorter timeout would only lose
the result.
"""


_CONTAINERD_STORE = "io.containerd.snapshotter.v1"
"""Type of the storage driver, as reported by an engine with the containerd image store."""


_NO_ANSWER = (
    docker.errors.DockerException,
    docker.errors.StreamParseError,
    requests.RequestException,
    # The SDK reads streams from urllib3, below `requests`.
    urllib3.exceptions.HTTPError,
    OSError,
)
"""Exceptions of the SDK if the engine is missing or dies during a call."""

_MALFORMED = (
    ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError,
)  # fmt: skip
"""Exceptions of the code that reads an answer, if the answer is none of Docker's API."""


_ENGINE_HINTS = {
    "max depth exceeded": FEWER_LAYERS,
    "incompatible with user namespaces": "set GUIX_SANDBOX=capabilities",
    'exec: "sh": executable file not found': NO_SHELL,
}
"""Hints for refusals of the engine, by words of the message."""


class Build(Protocol):
    """Function that builds an image, streams the log to ``output`` and returns the image's ID."""

    def __call__(
        self, spec: BuildSpec, output: Callable[[bytes], None], *, compress: bool
    ) -> str: ...


@dataclass(frozen=True)
class Helpers:
    """Functions of this machine that an engine needs in addition to its API."""

    accounts: Callable[[EngineInfo], Mapping[str, Credentials]] = lambda _engine: {}
    """Return the accounts of the local registries that an engine reaches, by host."""
    find_build: Callable[[Address], Build | None] = lambda _address: None
    """Return a function that builds with BuildKit, or None if buildx is not installed."""


_NO_HELPERS = Helpers()


class DockerEngine:
    """A Docker Engine. The connection is opened by the first call that needs it."""

    is_dry = False
    product = "Docker"

    def __init__(self, address: Address, helpers: Helpers = _NO_HELPERS) -> None:
        self.address = address
        self._helpers = helpers
        self._ssh = Ssh(address.url) if address.url.startswith("ssh://") else None

    def info(self) -> EngineInfo:
        return self._info

    def local_accounts(self) -> Mapping[str, Credentials]:
        return self._helpers.accounts(self.info())

    @cached_property
    def _info(self) -> EngineInfo:
        with self._engine_errors("report its version"):
            info = self._api.info()
            return EngineInfo(
                url=self.address.url,
                origin=self.address.origin,
                context=self.address.context,
                name=info.get("Name", ""),
                version=info["ServerVersion"],
                product=self.product,
                platform=canonical_name(f"{info['OSType']}/{info['Architecture']}"),
                storage_driver=info.get("Driver", ""),
                uses_containerd=_CONTAINERD_STORE in dict(info.get("DriverStatus") or ()).values(),
                has_bridge=self._has_bridge(info),
                root=info.get("DockerRootDir", ""),
                time=_time(info.get("SystemTime", "")),
                cgroups=info.get("CgroupVersion", ""),
                security=_security(info),
                first_id=_first_id(info),
            )

    def _has_bridge(self, info: Mapping[str, Any]) -> bool:
        networks = info.get("Plugins", {}).get("Network") or []
        return "bridge" in networks and bool(self._api.networks(names=["bridge"]))

    @property
    def is_podman(self) -> bool:
        """True if a Podman service answers at the address."""
        with self._engine_errors("report its version"):
            components = self._api.version().get("Components") or ()
            return any(str(part.get("Name", "")).startswith("Podman") for part in components)

    def image(self, reference: str) -> Image | None:
        with self._engine_errors(f"inspect the image {reference}"):
            try:
                return _image(self._inspect(reference))
            except docker.errors.ImageNotFound:
                return None
            except docker.errors.APIError as error:
                # The containerd store, if another client removes the image at this moment.
                if not re.search(r"content digest sha256:\w+: not found", error_line(error)):
                    raise
                return None

    def _inspect(self, reference: str) -> dict[str, Any]:
        api, name = self._api, quote(reference, safe="/:")
        # The SDK has no parameter `manifests`, without which the containerd store reports no sizes.
        answer = api.get(
            f"{api.base_url}/v{api.api_version}/images/{name}/json",
            params={"manifests": "1"},
            timeout=api.timeout,
        )
        try:
            answer.raise_for_status()
        except requests.HTTPError as error:
            docker.errors.create_api_error_from_http_exception(error)
        image: dict[str, Any] = answer.json()
        return image

    def unnamed(self, labels: Mapping[str, str]) -> list[str]:
        with self._engine_errors("list images"):
            ids = self._api.images(
                quiet=True, filters={"dangling": True, "label": _filters(labels)}
            )
            return list(dict.fromkeys(ids))

    def containers(self, labels: Mapping[str, str]) -> list[Container]:
        with self._engine_errors("list containers"):
            answers = self._api.containers(all=True, filters={"label": _filters(labels)})
            # The API documents no order.
            answers.sort(key=lambda answer: answer["Created"], reverse=True)
            return [_container(answer) for answer in answers]

    def remote_digest(self, reference: str, credentials: Credentials | None = None) -> str | None:
        try:
            answer = self._api.inspect_distribution(  # type: ignore[no-untyped-call]
                reference, _auth_config(credentials)
            )
            return str(answer["Descriptor"]["digest"])
        except (docker.errors.DockerException, requests.RequestException, *_MALFORMED):
            return None

    def check_registry(self, reference: str, credentials: Credentials | None) -> bool:
        host, action = ImageReference.parse(reference).registry, f"look up {reference}"
        with self._engine_errors(action):
            try:
                if credentials and credentials.password:
                    self._api.login(
                        credentials.username, credentials.password,
                        registry="" if host == HUB else host, reauth=True,
                    )  # fmt: skip
                return self._look_up(reference, credentials)
            except docker.errors.NotFound:
                pass
            except docker.errors.APIError as error:
                # Some registries answer so for a missing image or repository.
                reason = error_line(error)
                if not re.match(r"unknown: (artifact|repository) \S+ not found", reason):
                    raise _registry_error(action, reason) from None
        return True

    def _look_up(self, reference: str, account: Credentials | None) -> bool:
        """Look up an image in its registry. Return False if the engine has no such call."""
        self._api.inspect_distribution(reference, _auth_config(account))  # type: ignore[no-untyped-call]
        return True

    def volumes(self, labels: Mapping[str, str]) -> list[str]:
        with self._engine_errors("list volumes"):
            volumes = self._api.volumes(filters={"label": _filters(labels)})["Volumes"] or ()
            return [volume["Name"] for volume in volumes]

    def create_volume(self, name: str, labels: Mapping[str, str]) -> None:
        with self._engine_errors(f"create the volume {name}"):
            self._api.create_volume(name, labels=dict(labels))

    def remove_volume(self, name: str) -> None:
        with self._engine_errors(f"remove the volume {name}"), suppress(docker.errors.NotFound):
            self._api.remove_volume(name)

    def tag(self, image: str, reference: str) -> None:
        repository, _, tag = reference.rpartition(":")
        with self._engine_errors(f"tag {reference}"):
            self._api.tag(image, repository, tag)

    def untag(self, reference: str) -> None:
        with self._engine_errors(f"remove the tag {reference}"):
            try:
                self._api.remove_image(reference)
            except docker.errors.ImageNotFound:
                return
            except docker.errors.APIError as error:
                # A container uses the image. The container does not need the tag.
                if error.status_code != HTTPStatus.CONFLICT:
                    raise
                self._api.remove_image(reference, force=True)

    def drop(self, image: str) -> None:
        inspected = self.image(image)
        if inspected is None or inspected.tags:
            return
        # The engine refuses to remove an image that a container or a child image uses.
        with self._engine_errors("remove an image"), suppress(docker.errors.APIError):
            self._work_api.remove_image(image)

    def layers(self, image: str) -> list[Layer]:
        with self._engine_errors("list the layers of an image"):
            history = self._api.history(image)  # type: ignore[no-untyped-call]
            steps = [Layer(step["Size"], step["CreatedBy"]) for step in reversed(history)]
            return [step for step in steps if step.size]

    def save(self, image: str) -> Iterator[bytes]:
        with self._engine_errors("save an image"):
            yield from self._work_api.get_image(image)

    def create(self, spec: ContainerSpec) -> str:
        with self._engine_errors(f"create a container from {spec.image}"):
            host = self._api.create_host_config(
                privileged=spec.privileged,
                security_opt=self._security(spec),
                cap_drop=["ALL"] if spec.capabilities is not None else None,
                cap_add=list(spec.capabilities or ()),
                tmpfs=dict.fromkeys(spec.tmpfs_directories, ""),
                network_mode=spec.network,
                binds=list(spec.binds),
                port_bindings={
                    port: (spec.publish_on, host_port) for host_port, port in spec.publish.items()
                },
                mounts=[docker.types.Mount(spec.scratch, None)] if spec.scratch else None,
                devices=list(spec.devices),
                mem_limit=spec.memory,
                # Podman's default of 2048 is too few for several builds.
                pids_limit=-1,
                log_config=None if spec.logged else docker.types.LogConfig(type="none"),
            )
            if spec.unmasked:  # the API's form of `--security-opt systempaths=unconfined`
                host["MaskedPaths"] = host["ReadonlyPaths"] = []
            created = self._api.create_container(
                spec.image,
                name=spec.name,
                # No command: a commit merges the container's command into a configuration that
                # has none.
                entrypoint=list(spec.command),
                labels=dict(spec.labels),
                environment=dict(spec.environment),
                host_config=host,
                ports=list(spec.publish.values()),
                tty=spec.tty,
                stdin_open=spec.tty or spec.stdin,
                user=spec.user,
                healthcheck={"test": ["NONE"]} if spec.no_healthcheck else None,
                platform=spec.platform,
                # The proxies of Docker's config.json are in the settings already, and variables
                # of a container would be committed.
                use_config_proxy=False,
            )
            return str(created["Id"])

    def _security(self, spec: ContainerSpec) -> list[str]:
        return [_with_profile(option) for option in spec.security]

    def copy_in(self, container: str, archive: bytes | IO[bytes]) -> None:
        with self._engine_errors("copy files into a container"):
            self._work_api.put_archive(container, "/", archive)

    def copy_out(self, container: str, path: str) -> Iterator[bytes]:
        with (
            self._engine_errors(f"copy {path} out of a container"),
            suppress(docker.errors.NotFound),
        ):
            yield from self._work_api.get_archive(container, path)[0]

    def changed_paths(self, container: str) -> list[str]:
        with self._engine_errors("list the changes of a container"):
            return [str(change["Path"]) for change in self._work_api.diff(container) or ()]

    def run(self, container: str, stdin: IO[bytes] | None = None) -> Iterator[tuple[bool, bytes]]:
        with self._engine_errors("run a container"), ExitStack() as stack:
            # Attached before the start, so that not a byte is missed.
            output = stack.enter_context(self._attach(container, "stdout", "stderr"))
            source = stack.enter_context(self._attach(container, "stdin")) if stdin else None
            self._api.start(container)
            if stdin and source:
                threading.Thread(target=_send, args=(stdin, source), daemon=True).start()
            yield from _frames(output)

    @contextmanager
    def _attach(self, container: str, *streams: str) -> Iterator[socket.socket]:
        """Yield a connection to streams of a container."""
        # Podman would otherwise end the input at the bytes of its keys for detaching.
        parameters = {"stream": 1, "detachKeys": "", **dict.fromkeys(streams, 1)}
        attached: Any = self._api.attach_socket(container, parameters)
        # Without TLS it is a file of the socket.
        connection: socket.socket = getattr(attached, "_sock", attached)
        connection.settimeout(None)
        try:
            yield connection
        finally:
            # With TLS the response keeps the connection open; without, it can be closed already.
            with suppress(ValueError):
                attached._response.close()  # noqa: SLF001
            connection.close()
            attached.close()

    def bytes_received(self, container: str) -> int | None:
        with self._engine_errors("read the statistics of a container"):
            stats = self._api.stats(container, stream=False, one_shot=True)
            networks = stats.get("networks") or {}
            return sum(network["rx_bytes"] for network in networks.values()) if networks else None

    def start(self, container: str) -> None:
        with self._engine_errors("start a container"):
            self._api.start(container)

    def wait(self, container: str) -> int:
        with self._engine_errors("wait for a container"):
            return int(self._work_api.wait(container)["StatusCode"])

    def lacked_memory(self, container: str) -> bool:
        with self._engine_errors("inspect a container"):
            return bool(self._api.inspect_container(container)["State"].get("OOMKilled"))

    def stop(self, container: str, seconds: int) -> None:
        with self._engine_errors("stop a container"):
            self._work_api.stop(container, timeout=seconds)

    def remove(self, container: str) -> None:
        with self._engine_errors("remove a container"), suppress(docker.errors.NotFound):
            self._work_api.remove_container(container, v=True, force=True)

    def commit(self, container: str, config: Mapping[str, Any], comment: str = "") -> str:
        with self._engine_errors("commit a container"):
            made = self._work_api.commit(container, message=comment, conf=dict(config))
            return str(made["Id"])

    def import_rootfs(self, archive: Iterator[bytes], reference: str) -> str:
        with self._engine_errors(f"import {reference}"):
            answer = self._work_api.import_image_from_data(archive, reference)
            last = json.loads(answer.strip().splitlines()[-1])
            if "error" in last:
                reason = error_line(last["error"])
                raise EngineError(f"{REFUSED} import {reference}: {reason}{full_disk(reason)}")
            return str(last["status"])

    def build(self, spec: BuildSpec, output: Callable[[bytes], None]) -> str:
        build = self._helpers.find_build(self.address)
        if build is None:
            return self._classic_build(spec, output)
        compress = self._is_uncompressed(spec.args.get("BASE_IMAGE", ""))
        linked = replace(spec, context=linked_context(spec.context, spec.dockerfile))
        try:
            return build(linked, output, compress=compress)
        except BuilderError as error:
            # github.com/moby/moby/issues/47377
            if not (self.info().first_id and self.info().uses_containerd):
                raise
            raise BuilderError(
                f"{error}; BuildKit of an engine with userns-remap and the containerd image store "
                "gives files to other users: use the store overlay2, or turn off userns-remap"
            ) from None

    def _is_uncompressed(self, reference: str) -> bool:
        """Return True if the containerd store has uncompressed layers of an image.

        ``docker load`` keeps the layers as they are in the archive, and a push would upload them
        uncompressed.
        """
        if not reference or not self.info().uses_containerd:
            return False
        with self._engine_errors(f"inspect the image {reference}"):
            try:
                manifests = self._inspect(reference).get("Manifests") or ()
            except docker.errors.NotFound:
                return False
            content = sum(manifest["Size"]["Content"] for manifest in manifests)
            unpacked = sum(manifest["ImageData"]["Size"]["Unpacked"] for manifest in manifests
                           if "ImageData" in manifest)  # fmt: skip
            # The unpacked size is a sum of blocks. Compressed layers have about half of it.
            return bool(unpacked) and content > 0.9 * unpacked

    def _classic_build(self, spec: BuildSpec, output: Callable[[bytes], None]) -> str:
        if spec.secrets:
            raise BuilderError(
                "BUILD_SECRETS needs buildx, which is not installed on this machine; "
                "install the package docker-buildx (docker-buildx-plugin in Docker's own archive)"
            )
        accounts = spec.accounts.every() if spec.accounts else {}
        # The SDK would pack the context by different rules for .dockerignore.
        context, dockerfile = context_archive(spec.context, spec.dockerfile)
        base, image = spec.args.get("BASE_IMAGE", "scratch"), ""
        with self._engine_errors("build"), self._plain_http(base):
            self._work_api.set_accounts(
                {docker_key(host): _auth_config(account) for host, account in accounts.items()}
            )
            try:
                events = self._work_api.build(
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
                for event in events:
                    if "error" in event:
                        raise diagnose.build_error(spec, error_line(event["error"]))
                    output(to_bytes(event.get("stream", "")))
                    image = (event.get("aux") or {}).get("ID", image)
            except docker.errors.APIError as error:
                raise diagnose.build_error(spec, error_line(error)) from None
        return str(image)

    def _plain_http(self, _reference: str) -> AbstractContextManager[None]:
        """Allow plain HTTP to a registry on loopback, which Docker allows by default."""
        return nullcontext()

    def push(
        self, reference: str, credentials: Credentials | None, progress: Progress | None = None
    ) -> str:
        digest = ""
        with self._engine_errors(f"push {reference}"), self._plain_http(reference):
            events = self._work_api.push(
                reference, stream=True, decode=True, auth_config=_auth_config(credentials)
            )
            # A failed push raises nothing: the error is an event of the stream.
            for event in _events(events, f"push {reference}", progress):
                digest = _pushed_digest(event) or digest
        if not digest:
            raise RegistryError(f"cannot push {reference}: the registry answered no digest")
        return digest

    def pull(
        self, reference: str, credentials: Credentials | None, progress: Progress | None = None
    ) -> None:
        name, at, digest = reference.partition("@")
        repository, _, tag = (name, at, digest) if at else reference.rpartition(":")
        with self._engine_errors(f"pull {reference}"):
            try:
                account = _auth_config(credentials)
                events = self._work_api.pull(
                    repository, tag, stream=True, decode=True, auth_config=account
                )
            except docker.errors.APIError as error:
                raise _registry_error(f"pull {reference}", error_line(error)) from None
            for _ in _events(events, f"pull {reference}", progress):
                pass

    @cached_property
    def _api(self) -> Client:
        return self._client(PROBE_TIMEOUT, "auto")

    @cached_property
    def _work_api(self) -> Client:
        return self._client(WORK_TIMEOUT, self._api.api_version)

    def _client(self, timeout: int, version: str) -> Client:
        tls = self.address.tls or False
        return Client(self.address.url, timeout, self._ssh, tls=tls, version=version)

    @contextmanager
    def _engine_errors(self, action: str) -> Iterator[None]:
        """Convert errors of the SDK and of the connection to ``EngineError``.

        ``action`` completes the message "the engine could not ...".
        """
        try:
            yield
        except docker.errors.APIError as error:
            reason = error_line(error)
            hints = (f"; {fix}" for words, fix in _ENGINE_HINTS.items() if words in reason)
            hint = next(hints, full_disk(reason))
            raise EngineError(f"{REFUSED} {action}: {reason}{hint}") from None
        except _NO_ANSWER as error:
            if isinstance(error.__cause__, GuixTasksError):  # the SDK wraps an error of ssh
                raise error.__cause__ from None
            raise EngineError(self._unreachable(error)) from None
        except _MALFORMED as error:
            reason = f"{type(error).__name__}: {error_line(error):.80}"
            raise EngineError(
                f"{REFUSED} {action}: the answer is not one of Docker's API ({reason}); check that "
                f"an engine listens at {self.address.url} ({self.address.origin})"
            ) from error

    def _unreachable(self, error: Exception) -> str:
        engine = f"the Docker Engine at {self.address.url} ({self.address.origin})"
        text = str(error)
        if self._ssh and (cause := self._ssh.error_line()):
            return f"{engine} cannot be reached: {cause}"
        if "PermissionError" in text or "Permission denied" in text:
            return (
                f"{engine} may not be used by this user; run as root, or join the group that owns "
                "the socket (`sudo usermod -aG docker $USER`, then log in again)"
            )
        start = "`inv engine.up`" if self.address.origin == "private engine" else "start it"
        # The message of requests nests several exceptions.
        innermost = re.search(
            "Connection refused|Connection reset by peer|closed connection|Connection broken|"
            "No such file or directory|timed out|Name or service",
            text,
        )
        cause = innermost[0].lower() if innermost else " ".join(text.split())
        return f"{engine} does not answer: {cause}; {start}, or set DOCKER_HOST to another one"


class Client(docker.APIClient):
    """SDK client that reads neither Docker's config.json nor the variables of ``requests``.

    Accounts come from ``set_accounts``, so that a broken config.json is not an error. With ``ssh``,
    the connection is made over SSH; the SDK's SSH support needs paramiko even if it runs ssh.

    Like Docker's own client, it reaches an engine on loopback without the proxies of the
    environment, and trusts only the CA of ``DOCKER_CERT_PATH``, not that of ``REQUESTS_CA_BUNDLE``.
    """

    trust_env = property(lambda _self: False, lambda _self, _value: None)

    def __init__(self, base_url: str, timeout: int, ssh: Ssh | None = None, **options: Any) -> None:
        self._ssh_adapter = SshAdapter(ssh, timeout) if ssh else None
        super().__init__("unix:///ssh" if ssh else base_url, timeout=timeout, **options)
        self.set_accounts({})

    def merge_environment_settings(
        self, url: str | bytes | None, proxies: Any, stream: Any, verify: Any, cert: Any
    ) -> Any:
        merged = super().merge_environment_settings(url, proxies, stream, verify, cert)
        address = urlsplit(self.base_url)
        if address.scheme in ("http", "https") and not is_loopback(address.netloc):
            merged["proxies"] = requests.utils.get_environ_proxies(self.base_url)
        return merged

    def post(self, url: str | bytes, data: Any = None, json: Any = None, **options: Any) -> Any:
        # The SDK attaches to containers without a timeout.
        return super().post(url, data, json, **{"timeout": self.timeout, **options})

    def get_adapter(self, url: str) -> Any:
        return self._ssh_adapter or super().get_adapter(url)

    @property
    def _general_configs(self) -> dict[str, Any]:
        return {"auths": {}}  # an empty dictionary would let the SDK read the file

    @_general_configs.setter
    def _general_configs(self, _: object) -> None: ...

    def set_accounts(self, accounts: Mapping[str, Any]) -> None:
        """Set the accounts of a build, by ``docker_key`` of their hosts."""
        self._auth_configs = _Accounts({"auths": dict(accounts)})


class _Accounts(docker.auth.AuthConfig):
    is_empty = False  # True would let the SDK read the file


_STANDARD_ERROR = 2

_PART = 1 << 16
"""Maximum bytes to read at once: a header can announce 4 GB, also one that is none."""


def _frames(connection: socket.socket) -> Iterator[tuple[bool, bytes]]:
    """Yield ``(is_standard_error, data)`` of a container's output, in the form of Docker's API.

    A frame has a byte for the stream, three empty ones, and the length of its data in four.

    The SDK's own reader waits until the connection has more data, also if TLS has received a whole
    record and passed on a part of it, so that lines are late.
    """
    with connection.makefile("rb") as file:
        while len(header := file.read(8)) == 8:  # noqa: PLR2004 -- the length of a header
            left = int.from_bytes(header[4:], "big")
            while left and (data := file.read(min(left, _PART))):
                left -= len(data)
                yield header[0] == _STANDARD_ERROR, data


def _send(source: IO[bytes], connection: socket.socket) -> None:
    """Send ``source`` to its end, and then tell the container that its input has ended."""
    # A command can end before it has read its input.
    with suppress(OSError, ValueError):
        try:
            # Another process can have made a pipe non-blocking.
            while select.select([source], [], []) and (data := os.read(source.fileno(), 1 << 16)):
                connection.sendall(data)
        finally:
            connection.shutdown(socket.SHUT_WR)


def _disk_usage(image: Mapping[str, Any]) -> int:
    """Return the bytes that an image takes on the engine's disk, as shown by ``docker images``.

    The containerd store holds both the compressed content and its unpacked files. Engines before
    28 (API 1.48) report only the content of that store.
    """
    totals = [manifest["Size"]["Total"] for manifest in image.get("Manifests") or ()]
    return sum(totals) or int(image["Size"])


def _filters(labels: Mapping[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in labels.items()]


def _auth_config(credentials: Credentials | None) -> dict[str, str] | None:
    """Return an account in the form of Docker's API.

    ``Client`` prevents the SDK from searching for another account if this is None.
    """
    if credentials is None:
        return None
    if credentials.identity_token:
        return {"identitytoken": credentials.identity_token}
    return {"username": credentials.username, "password": credentials.password}


def _events(
    events: Iterator[dict[str, Any]], action: str, progress: Progress | None
) -> Iterator[dict[str, Any]]:
    """Yield the events of a push or a pull, report progress, and raise an event's error."""
    for event in events:
        if "error" in event or "errorDetail" in event:
            detail = (event.get("errorDetail") or {}).get("message") or event.get("error", "")
            raise _registry_error(action, error_line(detail))
        if progress and event.get("id"):
            amount = event.get("progressDetail") or {}
            progress(
                event["id"], event.get("status", ""),
                amount.get("current") or 0, amount.get("total") or 0,
            )  # fmt: skip
        yield event


def _pushed_digest(event: Mapping[str, Any]) -> str:
    """Return the digest in an event of a push, or an empty string.

    Docker's classic image store sends the digest as data; its containerd store and Podman send a
    last status line.
    """
    data = event.get("aux") or {}
    status = f"digest: {data['Digest']}" if "Digest" in data else event.get("status") or ""
    line = re.search(r"\bdigest: (sha256:[0-9a-f]{64})\b", status)
    return line[1] if line else ""


_NOT_FOUND = "the registry has no such image: fix the reference"

_REGISTRY_HINTS = {
    UPLOAD_LIMIT: (
        "413 request entity too large", "413 payload too large", "413 content too large",
        "http 413 ", "status: 413",
    ),
    "the registry does not allow that a tag is overwritten: choose another tag": (
        "immutable", "cannot be overwritten",
    ),
    "the credentials are missing or refused: set DOCKER_USERNAME and DOCKER_PASSWORD for the "
    "registry of IMAGE, or run `docker login` for any registry, and check that the account may "
    "write to it": (
        "no basic auth", "unauthorized", "not authorized", "authentication required", "denied",
        "forbidden",
    ),
    "no registry listens there: start it (`inv registry.up` for a local one), or fix the "
    "reference": ("connection refused",),
    "there is no such registry: fix the reference": (
        "no such host", "server misbehaving", "name resolution",
    ),
    "the registry speaks plain HTTP: add it to the engine's insecure-registries (for Podman, to "
    "/etc/containers/registries.conf: [[registry]], location and insecure = true)": (
        "http response to https client",
    ),
    "the engine does not trust the registry's certificate: put its CA into the engine's certs.d": (
        "x509", "certificate",
    ),
    _NOT_FOUND: (
        "manifest unknown", "not found", "does not exist",
    ),
}  # fmt: skip
"""Hints, with the words of the engine's messages to which they apply."""


_QUERY = re.compile(r'(https?://[^\s"?]+)\?[^\s"]*?(?=:?(?:[\s"]|$))')
"""A URL and its query, which may be long and have a signature that gives access to a blob."""


def _registry_error(action: str, detail: str) -> RegistryError:
    detail = _QUERY.sub(r"\1", detail)
    text = detail.lower()
    hints = (hint for hint, words in _REGISTRY_HINTS.items() if any(word in text for word in words))
    hint = next(hints, "")
    if hint == _NOT_FOUND and action.startswith("push "):
        hint = "the registry creates no repositories by itself: create this one there"
    error = RegistryError(f"cannot {action}: {detail}{f'; {hint}' if hint else full_disk(detail)}")
    # Names are removed because a number in a name is not an HTTP status.
    reference = action.rpartition(" ")[2]
    for name in (reference, ImageReference.parse(reference).repository):
        detail = detail.replace(name, "")
    error.is_transient = retry.is_transient(detail)
    return error


def _image(answer: Mapping[str, Any]) -> Image:
    platform = (answer["Os"], answer["Architecture"], answer.get("Variant"))
    return Image(
        id=answer["Id"],
        layers=tuple(answer["RootFS"].get("Layers") or ()),
        config=answer["Config"] or {},
        size=_disk_usage(answer),
        created=answer.get("Created") or "",
        platform="/".join(filter(None, platform)),
        digests=tuple(answer.get("RepoDigests") or ()),
        tags=tuple(answer.get("RepoTags") or ()),
    )


def _container(answer: Mapping[str, Any]) -> Container:
    networks = (answer.get("NetworkSettings") or {}).get("Networks") or {}
    return Container(
        id=answer["Id"],
        name=answer["Names"][0].lstrip("/"),
        image=answer["ImageID"],
        labels=answer["Labels"],
        running=answer["State"] in ("running", "paused", "restarting"),
        started=answer["State"] != "created",
        addresses={
            name: network["IPAddress"]
            for name, network in networks.items()
            if network.get("IPAddress")
        },
    )


def seccomp_profile(option: str) -> Path | None:
    """Return the file in the value of a security option, or None if the value is not a file."""
    value = option.partition("=")[2]
    return Path(value) if value.startswith("/") else None


def _with_profile(option: str) -> str:
    """Return a security option with the content of its file, as Docker's API expects it."""
    file = seccomp_profile(option)
    return f"{option.partition('=')[0]}={file.read_text(encoding='utf-8')}" if file else option


def _security(info: Mapping[str, Any]) -> tuple[str, ...]:
    # For example "name=seccomp,profile=builtin".
    options = info.get("SecurityOptions") or ()
    names = [option.partition(",")[0].removeprefix("name=") for option in options]
    # Podman reports "Rootless" in a separate field.
    return tuple(dict.fromkeys([*names, *(["rootless"] if info.get("Rootless") else [])]))


def _first_id(info: Mapping[str, Any]) -> int:
    """Return the user ID after which an engine with ``userns-remap`` names its directory."""
    match = re.search(r"/(\d+)\.\d+/?$", info.get("DockerRootDir", ""))
    return int(match[1]) if match and "userns" in _security(info) else 0


def _time(text: str) -> datetime | None:
    """Return the time of an engine's clock in seconds, or None if it cannot be parsed."""
    try:
        # RFC 3339, perhaps with an offset and with more fractional digits than Python accepts.
        zone = re.search(r"(Z|[+-][0-9:]+)$", text[19:])
        return datetime.fromisoformat(text[:19] + (zone[1] if zone else "Z").replace("Z", "+00:00"))
    except ValueError:
        return None
