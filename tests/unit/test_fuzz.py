"""Fuzz tests of the parsers: any input is parsed or is one error of one line.

Each function with the decorator ``parses`` calls one parser as the package calls it and has valid
examples. An input is an example after some random changes. Reproduce a failure with the seed of its
run: ``--seed=N``, with ``--soak`` if that run had it.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import http.client
import io
import json
import os
import re
import signal
import subprocess
import tarfile
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import requests
import urllib3
from fake_engine import BufferConsole, channel, clear_file_cache, clear_secrets, new_built_site
from test_buildx import TWO_NODES
from test_docker_engine import DIGEST, INFO, PACKED
from test_docker_engine import IMAGE as INSPECTED
from test_podman_api import PODMAN_IMAGE
from test_search_paths import ETC_PROFILE

from guix_tasks import files, guix
from guix_tasks.bootstrap import apt, engine
from guix_tasks.bootstrap.service import Service
from guix_tasks.buildkit import buildx
from guix_tasks.commands import manifest, release, verify
from guix_tasks.commands.buildx_setup import entitlements
from guix_tasks.engine import accounts, diagnose, discovery, docker, podman
from guix_tasks.engine.api import BuildSpec, ContainerSpec, Image
from guix_tasks.engine.build_context import context_entries
from guix_tasks.engine.ssh import Ssh, ssh_arguments
from guix_tasks.errors import GuixTasksError, NoEngineError, SettingsError
from guix_tasks.guix.progress import Activity, BuildSteps, Noise
from guix_tasks.oci.labels import web_address
from guix_tasks.oci.platform import Platform
from guix_tasks.oci.reference import ImageReference
from guix_tasks.settings import load_settings, nodes
from guix_tasks.settings.values import Driver, ImageStore
from guix_tasks.stages import push_records, volumes
from guix_tasks.stages.channel_access import by_ssh
from guix_tasks.stages.diagnostics import Failure, save_diagnostics
from guix_tasks.stages.images import (
    INPUTS_LABEL,
    LAYERS_LABEL,
    STAGE_LABEL,
    inputs_of,
    is_child,
    proven_stage,
)
from guix_tasks.stages.log_faults import StepFaults
from guix_tasks.stages.ownership import _free_id, _user_id
from guix_tasks.stages.pull import channels_text, lock_mismatch, lock_text
from guix_tasks.ui import redact
from guix_tasks.ui.log import LogReader

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator
    from random import Random
    from types import FrameType

    from fake_engine import Site
    from soak import Soak

    from guix_tasks.settings import Settings

    Parser = Callable[[bytes, "Workspace"], tuple[GuixTasksError, ...] | None]

pytestmark = pytest.mark.soak

CPU_SECONDS = 2.0
"""CPU seconds in which an input must be parsed; a busy machine takes twice the usual time."""

LONG_INPUT = 100_000
"""Bytes of a long input."""

# --- Random changes -------------------------------------------------------------------------

FRAGMENTS = (
    b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\xe2\x80\xae",
    b"\xc2\x85", b"\xc2\x9b2J", b"\xd9\xa3", b"\n", b"\r", b"\r\n", b"\t", b" " * 50, b"\x1b[",
    b"\x1b]", b"9" * 400, b"9" * 5_000, b"-1", b"1e999", b"1.2.3", b"NaN", b"null", b"[]", b"{}",
    b'""', b"\\ud800", b"[" * 10_000, b'{"a":' * 10_000, b"(" * 10_000, b"a/" * 10_000, b"\\",
    b"'", b'"', b"$", b"${", b"}", b"*", b"**/", b"?", b"[", b"]", b"!", b"#", b"#|", b"|", b",",
    b":", b"=", b"@", b"//", b"..", b";", b"<<EOF",
)  # fmt: skip

VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, 10**30, "", "\0", "\ud800", "a\nb", "x" * 1000, [], {}, [None], [[]],
    {"": None}, {"a": {}},
)  # fmt: skip


def cut(random: Random, data: bytes) -> bytes:
    start, end = sorted(random.randrange(len(data) + 1) for _ in range(2))
    return data[:start] + data[end:]


def duplicate(random: Random, data: bytes) -> bytes:
    start, end = sorted(random.randrange(len(data) + 1) for _ in range(2))
    return data[:end] + data[start:]


def insert(random: Random, data: bytes) -> bytes:
    position = random.randrange(len(data) + 1)
    return data[:position] + random.choice(FRAGMENTS) + data[position:]


def overwrite(random: Random, data: bytes) -> bytes:
    position = random.randrange(len(data) + 1)
    return data[:position] + bytes([random.randrange(256)]) + data[position + 1 :]


def shuffle(random: Random, data: bytes) -> bytes:
    parts = data.splitlines(keepends=True)
    random.shuffle(parts)
    return b"".join(parts)


def convert(random: Random, data: bytes) -> bytes:
    return random.choice((b"\xef\xbb\xbf" + data, data.replace(b"\n", b"\r\n")))


def replace_json(random: Random, data: bytes) -> bytes:
    """Replace or delete a value in a line of JSON."""
    parts = data.split(b"\n")
    number = random.randrange(len(parts))
    try:
        value = json.loads(parts[number])
        parts[number] = json.dumps(replace_value(random, value)).encode()
    except (ValueError, RecursionError):
        return data
    return b"\n".join(parts)


def replace_value(random: Random, value: Any) -> Any:
    keys: list[Any] = [*value] if isinstance(value, dict) else []
    keys = [*range(len(value))] if isinstance(value, list) else keys
    if not keys or random.random() < 0.2:
        return random.choice(VALUES)
    changed, key = value.copy(), random.choice(keys)
    if random.random() < 0.2:
        del changed[key]
    else:
        changed[key] = replace_value(random, changed[key])
    return changed


MUTATIONS = (cut, duplicate, insert, insert, overwrite, shuffle, convert, *[replace_json] * 3)


def mutate(random: Random, example: bytes) -> bytes:
    data = example if random.random() < 0.95 else random.randbytes(random.randrange(100))
    for _ in range(random.choice((1, 1, 1, 2, 3, 6))):
        data = random.choice(MUTATIONS)(random, data)
    return data


def lengthen(random: Random, example: bytes) -> bytes:
    """Repeat a part, usually of the example, to find regular expressions that backtrack."""
    start = random.randrange(len(example) + 1)
    end = start + random.choice((1, 1, 2, 5, 20, 80))
    part = example[start:end] if random.random() < 0.8 else random.choice(FRAGMENTS)
    return example[:start] + part * (LONG_INPUT // (len(part) or 1)) + example[end:]


# --- Parsers --------------------------------------------------------------------------------


@dataclass
class Workspace:
    """A directory and a project for one parser."""

    directory: Path
    patch: pytest.MonkeyPatch

    @cached_property
    def site(self) -> Site:
        return new_built_site(self.directory / "project")

    @cached_property
    def settings(self) -> Settings:
        return replace(self.site.settings(), release_url="https://r.test")

    def write(self, name: str, data: bytes) -> Path:
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path


PARSERS: dict[str, tuple[tuple[bytes, ...], Parser]] = {}


def parses(*examples: bytes | str | dict[str, Any] | list[Any]) -> Callable[[Parser], Parser]:
    """Register a parser with valid examples, which can be values to write as JSON."""

    def decorate(parser: Parser) -> Parser:
        texts = (x if isinstance(x, (bytes, str)) else json.dumps(x) for x in examples)
        raw = tuple(x if isinstance(x, bytes) else x.encode() for x in texts)
        PARSERS[parser.__name__] = (raw, parser)
        return parser

    return decorate


def decode_output(data: bytes) -> str:
    """Decode data as output of programs."""
    return data.decode(errors="replace")


def decode_argument(data: bytes) -> str:
    """Decode data as an environment variable or an argument."""
    return os.fsdecode(data.replace(b"\0", b""))


@contextmanager
def as_settings_error() -> Iterator[None]:
    """Convert errors of a parser of settings as ``load_settings`` does."""
    try:
        yield
    except ValueError as error:
        raise SettingsError([*map(str, error.args)]) from None


# --- Files and variables of users -----------------------------------------------------------


@parses("# Comment\n*\n!src/**/*.py\nsrc/[a-c^]?\\*.txt\n /out/../x{2,3} \n", "*\n!/a b\n**/x*\n")
def dockerignore(data: bytes, workspace: Workspace) -> None:
    workspace.write("context/src/ab/c.txt", b"")
    workspace.write("context/.dockerignore", data)
    context_entries(workspace.directory / "context", workspace.directory / "context/Dockerfile")


HUB = {"auth": base64.b64encode(b"me:hunter2").decode()}
CONFIG = {
    "auths": {"https://index.docker.io/v1/": HUB, "r.test:5000": {"identitytoken": "secret"}},
    "credHelpers": {"gcr.test": "gcr"},
    "credsStore": "",
    "currentContext": "default",
    "proxies": {"default": {"httpProxy": "http://p.test:3128", "noProxy": "a,b"}},
}


@parses(CONFIG, {"auths": {"r.test": {"auth": "bWU6aHVudGVyMg==\n"}}})
def docker_config(data: bytes, workspace: Workspace) -> None:
    workspace.write("config.json", data)
    environment = {"DOCKER_CONFIG": str(workspace.directory)}
    workspace.patch.setattr(accounts, "_ask_helper", lambda *_: None)
    store = accounts.docker_accounts(environment)
    for host in ("docker.io", "r.test:5000", "gcr.test"):
        store.find(host)
    accounts.auth_config(store.every())
    load_settings(workspace.directory, workspace.directory, environment)
    with suppress(NoEngineError):
        discovery.find_engine(environment, workspace.directory / "no.sock")


@parses({"auths": {"r.test": HUB, "http://r.test:5000/v2/": {"username": "a", "password": "b"}}})
def docker_auth_config(data: bytes, workspace: Workspace) -> None:
    environment = {accounts.AUTH_CONFIG: decode_argument(data)}
    accounts.auth_config(accounts.docker_accounts(environment).every())


@parses({"ServerURL": "r.test", "Username": "me", "Secret": "hunter2"}, "credentials not found\n")
def credential_helper(data: bytes, workspace: Workspace) -> None:
    result = subprocess.CompletedProcess([], len(data) % 2, decode_output(data), "")
    with workspace.patch.context() as patch:
        patch.setattr(subprocess, "run", lambda *_, **__: result)
        accounts._ask_helper("test", "r.test", {})


@parses(
    {
        "Name": "far",
        "Metadata": {"Description": "x"},
        "Endpoints": {"docker": {"Host": "ssh://me@far.test", "SkipTLSVerify": False}},
    }
)
def docker_context(data: bytes, workspace: Workspace) -> None:
    workspace.write("config.json", b'{"currentContext": "far"}')
    workspace.write(f"contexts/meta/{hashlib.sha256(b'far').hexdigest()}/meta.json", data)
    url = discovery.find_engine(
        {"DOCKER_CONFIG": str(workspace.directory)}, workspace.directory / "no.sock"
    ).url
    if url.startswith("ssh://"):
        ssh_arguments(url)


ENV_FILE = """\
# Comment
IMAGE=r.test/a:1
export TAGS='1 2'
GUIX_PACKAGES="hello git@2" # comment
BUILD_ARGS="A=${HOME} B='x y'"
DOCKER_USERNAME=me
DOCKER_PASSWORD=hunter2$
STAGE_TIMEOUT=90m
BUILDX_NODES=tcp://h:1,platform=linux/arm64,env.A=b
OTHER=\\
"""


@parses(ENV_FILE, "MOUNTS=.:/x:ro\nMEMORY=4g\nPLATFORMS=linux/amd64 linux/386\n")
def env_file(data: bytes, workspace: Workspace) -> None:
    # python-dotenv takes seconds for 100 kB of blanks in one line.
    project = workspace.write("project/.env", re.sub(rb"\s{1000,}", b"\n", data)).parent
    settings = load_settings(project, workspace.directory, {"HOME": "/x"})
    assert all(note.isprintable() for note in settings.notes)
    assert settings.output_directory == project / "out"


@parses("localhost:5000/a/b-c:1.0", f"r.test/a@sha256:{'0' * 64}", "docker.io/library/debian")
def image_reference(data: bytes, workspace: Workspace) -> None:
    with as_settings_error():
        reference = ImageReference.parse(decode_argument(data))
    assert ImageReference.parse(str(reference)) == reference


@parses("linux/amd64", "linux/arm/v7", "linux/arm64/v8", "linux/aarch64")
def platform_name(data: bytes, workspace: Workspace) -> None:
    with as_settings_error():
        platform = Platform.parse(decode_argument(data))
    assert Platform.parse(str(platform)) == platform


@parses("tcp://h:1,platform=linux/arm64,cacert=x", 'ssh://me@h,"env.A=b,c"', "platform=linux/386")
def builder_node(data: bytes, workspace: Workspace) -> None:
    with as_settings_error():
        node = nodes.node(decode_argument(data), workspace.directory)
    for driver in Driver:
        assert all(map(str.isprintable, nodes.problems(driver, (node, node))))


@parses("ssh://me@far.test:22/run/docker.sock", "ssh://far.test")
def ssh_address(data: bytes, workspace: Workspace) -> None:
    ssh_arguments(f"ssh://{decode_argument(data).removeprefix('ssh://')}")


INTRODUCED = channel("guix", "https://g.test/guix.git", "0" * 40)


@parses(
    f'(list {INTRODUCED}\n #| c |# #;(x) ; y\n (channel (inherit c) (name \'b) (url "u")))\n',
    '(specifications->manifest \'("hello" "git@2"))',
)
def channels_file(data: bytes, workspace: Workspace) -> None:
    lock = workspace.settings.guix_channels_lock
    assert lock
    lock.write_bytes(data)
    text = lock_text(workspace.settings) or ""
    lock_mismatch(text, text)
    lock_mismatch(text, INTRODUCED)
    guix.unauthenticated(text)
    guix.is_plain_manifest(text)
    by_ssh(workspace.settings, text)
    channels = workspace.settings.guix_channels
    assert channels
    channels.write_bytes(data)
    channels_text(workspace.settings)


DOCKERFILE = """\
# syntax=docker/dockerfile:1
# escape=\\
ARG BASE_IMAGE
FROM --platform=x ${BASE_IMAGE} AS a
RUN <<EOF cat <<-'B' \\
 # x
EOF
	B
FROM a
VOLUME ["/gnu", "/a b"] $X${Y}
"""


@parses(DOCKERFILE)
def dockerfile(data: bytes, workspace: Workspace) -> None:
    workspace.settings.dockerfile.write_bytes(data)
    instructions = volumes._last_build_stage(workspace.settings)
    assert volumes._origin_and_hint(workspace.settings, instructions, "/gnu/store")


# --- Damaged files of this project ----------------------------------------------------------


RECORD = {"repository": "r.test/a", "platforms": ["linux/amd64"], "digest": DIGEST, "commits": {}}


@parses(RECORD)
def push_record(data: bytes, workspace: Workspace) -> None:
    workspace.write("project/out/digests/x.json", data)
    push_records.load(workspace.settings)


CHANNEL = {"name": "guix", "url": "https://g.test", "commit": "0" * 40}


@parses(
    {"system": "a", "format": "tarball", "file": "a", "sha256": "0", "channels": [CHANNEL]},
    {"system": "a", "format": "deb", "file": "b", "sha256": "0", "channels": []},
)
def pack_record(data: bytes, workspace: Workspace) -> None:
    workspace.write("project/out/build-x.json", data)
    release.release(workspace.settings, BufferConsole())


@parses({"a": {"url": "https://r.test/a", "sha256": "0", "deb": {"url": "b"}, "x": 1}})
def build_index(data: bytes, workspace: Workspace) -> None:
    example = PARSERS["pack_record"][0][0]
    workspace.write("project/out/build-x.json", example)
    workspace.write("project/out/build.json", data)
    release.release(workspace.settings, BufferConsole())


@parses("0" * 64)
def cached_digest(data: bytes, workspace: Workspace) -> None:
    large = workspace.write("large", b"x")
    with workspace.patch.context() as patch:
        patch.setattr(files, "WORTH_CACHING", 1)
        patch.setattr(files, "cache_home", lambda: workspace.directory)
        files._digest_of_state(large, (1,))
        (cached,) = (workspace.directory / "digests").iterdir()
        cached.write_bytes(data)
        files._digest_of_state.cache_clear()
        assert len(files._digest_of_state(large, (1,))) == 64


@parses({"features": {"containerd-snapshotter": True}, "hosts": []})
def engine_configuration(data: bytes, workspace: Workspace) -> None:
    workspace.write("engine/daemon.json", data)
    engine.PrivateEngine(workspace.directory / "engine")._check_store(ImageStore.CONTAINERD)


@parses("12345\n")
def pid_file(data: bytes, workspace: Workspace) -> None:
    Service(Path("/bin/x"), workspace.write("pid", data), workspace.directory / "log").pid()


# --- Answers of engines and registries ------------------------------------------------------


class Connection(io.BytesIO):
    """A socket with an answer to read."""

    def makefile(self, *_: object) -> io.BytesIO:
        return io.BytesIO(self.getvalue())


class Answers(requests.adapters.HTTPAdapter):
    """An engine that answers a call with the first answer whose path is in the URL.

    ``status`` and ``chunked`` apply to the first answer.
    """

    def __init__(self, answers: dict[str, bytes], status: int, *, chunked: bool) -> None:
        super().__init__()
        self._answers, self._status, self._chunked = answers, status, chunked

    def send(self, request: requests.PreparedRequest, *_: Any, **__: Any) -> requests.Response:
        first = next(iter(self._answers))
        path = next((path for path in self._answers if path in str(request.url)), "")
        body, status = self._answers.get(path, b"{}"), self._status if path == first else 200
        head, content = f"Content-Length: {len(body)}", body
        if self._chunked and path == first:
            middle, head = len(body) // 2, "Transfer-Encoding: chunked"
            parts = filter(None, (body[:middle], body[middle:]))
            content = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
            content += b"0\r\n\r\n"
        http_message = f"HTTP/1.1 {status} x\r\n{head}\r\n\r\n".encode() + content
        raw = http.client.HTTPResponse(cast("socket.socket", Connection(http_message)))
        raw.begin()
        response = urllib3.HTTPResponse(
            raw, dict(raw.headers), status, preload_content=False, original_response=raw
        )
        return self.build_response(request, response)


class FakeClient(docker.Client):
    adapter: Answers

    def get_adapter(self, url: str) -> Any:
        return self.adapter


VERSION = {"ApiVersion": "1.48", "Components": [{"Name": "Podman Engine"}]}
ANSWERS: dict[str, Any] = {
    "/version": VERSION,
    "/info": {**INFO, "Plugins": {"Network": ["bridge"]}},
    "/networks": [{"Name": "bridge"}],
    "/commit": {"Id": DIGEST},
    "/libpod/images/": {**PODMAN_IMAGE, "Healthcheck": {}},
    "/images/": {**INSPECTED, "Manifests": [PACKED]},
}
REFERENCE = "r.test/a:1"


def register(
    name: str,
    path: str,
    *examples: str | dict[str, Any] | list[Any],
    call: Callable[[docker.DockerEngine], object],
    product: type[docker.DockerEngine] = docker.DockerEngine,
    status: int = 200,
    chunked: bool = False,
) -> None:
    """Register a parser of the answer to one call of an engine."""
    other_answers = {path: json.dumps(content).encode() for path, content in ANSWERS.items()}

    def parser(data: bytes, workspace: Workspace) -> None:
        answers = {path: data, **{key: other_answers[key] for key in other_answers if key != path}}
        FakeClient.adapter = Answers(answers, status, chunked=chunked)
        workspace.patch.setattr(docker, "Client", FakeClient)
        call(product(discovery.Address("tcp://engine.test:1", "test")))

    parser.__name__ = name
    parses(*examples)(parser)


def stream(*events: dict[str, Any]) -> str:
    return "".join(f"{json.dumps(event)}\r\n" for event in events)


def push(client: docker.DockerEngine) -> None:
    digest = client.push(REFERENCE, ACCOUNT, lambda *_: None)
    assert ImageReference.parse(f"x@{digest}").digest == digest


def build(client: docker.DockerEngine) -> object:
    context = Path(__file__).parent / "guix-logs"
    spec = BuildSpec(context, Path(__file__), args={"BASE_IMAGE": "x:1"})
    return client.build(spec, LogReader(list).add)


PROGRESS = {"status": "Pushing", "id": "abc", "progressDetail": {"current": 1, "total": 2}}
ERROR = {"errorDetail": {"message": "denied: x", "code": 1}, "error": "denied: x"}
CONTAINER = {
    "Id": "c", "Names": ["/a"], "ImageID": DIGEST, "Labels": {"a": "b"}, "State": "running",
    "Created": 1, "NetworkSettings": {"Networks": {"bridge": {"IPAddress": "172.17.0.2"}}},
}  # fmt: skip
STATISTICS = {"networks": {"eth0": {"rx_bytes": 1}, "eth1": {"rx_bytes": 2}}}
ACCOUNT = accounts.Credentials("me", "hunter2")

# fmt: off
register("version", "/version", VERSION,
         call=lambda client: podman.open_engine(client.address, docker.Helpers()))
register("info", "/info", ANSWERS["/info"], call=lambda client: client.info().kind)
register("networks", "/networks", ANSWERS["/networks"], call=lambda client: client.info())
register("image", "/images/", ANSWERS["/images/"], call=lambda client: client.image("x:1"))
register("missing_image", "/images/", {"message": "No such image: x"}, status=404,
         call=lambda client: client.image("x:1"))
register("missing_container", "/containers/", {"message": "No such container: x"}, status=404,
         call=lambda client: client.remove("c"))
register("podman_image", "/libpod/", ANSWERS["/libpod/images/"], product=podman.PodmanEngine,
         call=lambda client: client.image("x:1"))
register("podman_commit", "/libpod/", ANSWERS["/libpod/images/"], product=podman.PodmanEngine,
         call=lambda client: client.commit("c", {}))
register("images", "/images/json", [{"Id": DIGEST}], call=lambda client: client.unnamed({"a": "b"}))
register("manifests", "/images/", ANSWERS["/images/"],
         call=lambda client: client._is_uncompressed("x:1"))
register("history", "/history", [{"Size": 1, "CreatedBy": "x"}],
         call=lambda client: client.layers("x:1"))
register("containers", "/containers/json", [CONTAINER, CONTAINER],
         call=lambda client: client.containers({"a": "b"}))
register("created", "/containers/create", {"Id": "c"},
         call=lambda client: client.create(ContainerSpec("a", "x:1", ("true",))))
register("statistics", "/stats", STATISTICS, call=lambda client: client.bytes_received("c"))
register("exit_status", "/wait", {"StatusCode": 0, "Error": None},
         call=lambda client: client.wait("c"))
register("state", "/containers/", {"State": {"OOMKilled": True}},
         call=lambda client: client.lacked_memory("c"))
register("commit", "/commit", ANSWERS["/commit"], call=lambda client: client.commit("c", {}))
register("volumes", "/volumes", {"Volumes": [{"Name": "a"}]},
         call=lambda client: client.volumes({"a": "b"}))
register("registry_digest", "/distribution/", {"Descriptor": {"digest": DIGEST}, "Platforms": []},
         call=lambda client: client.remote_digest(REFERENCE))
register("registry_check", "/distribution/", {"Descriptor": {"digest": DIGEST}, "Platforms": []},
         call=lambda client: client.check_registry(REFERENCE, None))
register("login", "/auth", {"Status": "Login Succeeded"},
         call=lambda client: client.check_registry(REFERENCE, ACCOUNT))
register("import_rootfs", "/images/create", {"status": DIGEST}, {"error": "x"},
         call=lambda client: client.import_rootfs(iter([b""]), REFERENCE))
register("push", "/push", stream(PROGRESS, {"aux": {"Digest": DIGEST}}), stream(PROGRESS, ERROR),
         stream({"status": f"1: digest: {DIGEST} size: 1"}), chunked=True, call=push)
register("pull", "/images/create", stream(PROGRESS, {"status": "Status: x"}), stream(ERROR),
         chunked=True, call=lambda client: client.pull(REFERENCE, None))
register("build", "/build", stream({"stream": "Step 1/1 : FROM x\n"}, {"aux": {"ID": DIGEST}}),
         stream({"stream": "x"}, ERROR), chunked=True, call=build)
# fmt: on


@parses(b"\1\0\0\0\0\0\0\3one\2\0\0\0\0\0\0\5two\n\n")
def frames(data: bytes, workspace: Workspace) -> None:
    for is_log, part in docker._frames(cast("socket.socket", Connection(data))):
        assert isinstance(is_log, bool)
        assert part


@parses("ssh: connect to host h port 22: Connection refused\n", "Warning: x\r\nPermission denied\n")
def ssh_log(data: bytes, workspace: Workspace) -> None:
    log = io.BytesIO(data)
    Ssh("ssh://me@far.test:22", log).error_line()


@parses(
    'unexpected status from PUT request to https://r.test/v2/blobs/1?_state=a&b=%3A: "502"',
    "toomanyrequests: You have reached your rate limit; retry-after: 60",
    'ERROR: failed to solve: process "/var/guix/guix-tasks/stage pull" did not complete '
    "successfully: exit code: 1",
    "ERROR: target image: failed to solve: failed to resolve source metadata for r.test/x: failed "
    'to do request: Head "https://r.test/v2/": dial tcp: lookup r.test: no such host',
)
def message(data: bytes, workspace: Workspace) -> tuple[GuixTasksError, ...]:
    text = decode_output(data)
    spec = BuildSpec(Path("x"), Path("x"), args={"BASE_IMAGE": "x:1"})
    line = discovery.error_line(text)
    return (
        docker._registry_error(f"push {REFERENCE}", line),
        diagnose.failure(text),
        diagnose.failure(f"ERROR: {text}", spec),
        diagnose.build_error(spec, line),
    )


@parses('{"a": "b"}', f"1 {DIGEST} x")
def image_labels(data: bytes, workspace: Workspace) -> None:
    labels = dict.fromkeys((STAGE_LABEL, INPUTS_LABEL, LAYERS_LABEL), decode_output(data))
    image = Image("x", ("a",), {"Labels": labels}, 0, "", "")
    assert proven_stage(image) is None
    assert is_child(image, image) is False
    inputs_of(image)


# --- Output of buildx -----------------------------------------------------------------------


@parses(TWO_NODES, "Name: a\nDriver: b\nError: c\n")
def builder(data: bytes, workspace: Workspace) -> None:
    for node in buildx.parse_builder(decode_output(data)).nodes:
        entitlements(node)


@parses("github.com/docker/buildx v0.29.1 0123456\n")
def buildx_version(data: bytes, workspace: Workspace) -> None:
    with workspace.patch.context() as patch:
        patch.setattr(buildx.Buildx, "ask", lambda *_: decode_output(data))
        buildx._unsupported_accounts(buildx.Buildx("x", {}))


@parses({"containerimage.digest": DIGEST, "image": {"containerimage.digest": DIGEST}})
def build_metadata(data: bytes, workspace: Workspace) -> None:
    path = workspace.write("metadata.json", data)
    for target in ("", "image"):
        assert isinstance(buildx.built_digest(path, target), str)


@parses({"schemaVersion": 2, "mediaType": "x", "digest": DIGEST, "size": 1, "manifests": []})
def joined_manifest(data: bytes, workspace: Workspace) -> None:
    record = {**RECORD, "repository": workspace.settings.image.name}
    workspace.write("project/out/digests/x.json", json.dumps(record).encode())
    with workspace.patch.context() as patch:
        patch.setattr(buildx.Buildx, "change", lambda *_: "")
        patch.setattr(buildx.Buildx, "ask", lambda *_: decode_output(data))
        assert manifest.join(workspace.site.project(), buildx.Buildx("x", {})).startswith("sha256:")


# --- Output of Guix, Git and other programs -------------------------------------------------

LOGS = [path.read_text() for path in (Path(__file__).parent / "guix-logs").iterdir()]
STORE = f"/gnu/store/{'0' * 32}-hello-2.12"
FAULTS = f"""\
guix substitute: warning: a.test: connection failed: x
guix pull: error: Git error: failed to connect to g.test: timed out
guix install: error: hello: unknown package
/x/manifest.scm:1:2: error: y: unbound variable
builder for `{STORE}.drv' failed with exit code 1
View build log at '/var/log/guix/drvs/00/{"0" * 30}-hello-2.12.drv.gz'.
The following files will be downloaded:
   {STORE}
1,234.5 MB will be downloaded:
2 items will be downloaded
substituting {STORE}...
substitution of {STORE} complete
building {STORE}.drv...
"""
BUILDKIT = f"""\
#7 [base 2/3] RUN apt-get update
#7 0.123 guix substitute: warning: a.test: host not found: x
Step 2/3 : RUN x
 => => # {FAULTS}
"""


@parses(*LOGS, FAULTS, BUILDKIT)
def log(data: bytes, workspace: Workspace) -> None:
    activity, steps, noise = Activity(), BuildSteps(), Noise()
    faults = StepFaults(workspace.settings)

    def show(lines: list[bytes]) -> None:
        steps.look(noise.without(lines))

    reader = LogReader(show)
    lines = [*reader.read(data[: len(data) // 2]), *reader.read(data[len(data) // 2 :])]
    lines += reader.end()
    for number, line in enumerate(lines):
        activity.look(line)
        activity.receive(number, number)
    assert activity.text is not None
    assert faults.network_failed in (True, False)
    text = "\n".join(lines)
    for parse in (guix.last_error, guix.package_hint, guix.fetch_hint, guix.build_logs):
        parse(text)
    guix.package_hint(guix.last_error(text))
    faults.check(lines)


@parses(f"hello\t2.12\tout\t{STORE}\ngit\t2\tgui\t{STORE}\n{ETC_PROFILE}")
def profile_report(data: bytes, workspace: Workspace) -> None:
    report = decode_output(data)
    guix.installed(report)
    definitions = guix.search_paths(report)
    assert guix.search_paths(definitions) == definitions
    guix.with_search_paths(["PATH=/bin", "SSL_CERT_DIR="], definitions)


@parses(
    "weather:system\tx86_64-linux\nweather:wanted\thello\tstored\nweather:fetch\t1\t2\t3\t4\n",
    f"is packed:hello\t2.12\n{STORE}-tarball-pack.tar.gz\n",
    "ok daemon\nfailed build: x\n",
)
def guix_report(data: bytes, workspace: Workspace) -> None:
    report = decode_output(data)
    guix.forecasts(report)
    guix.pack_suffix("docker", guix.packed(report)[0])
    list(verify._parse_results(report))


def archive(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@parses(archive("x-hello.drv.gz", gzip.compress(b"line\n" * 100, mtime=0)))
def build_log(data: bytes, workspace: Workspace) -> None:
    workspace.patch.setattr(workspace.site.engine, "copy_out", lambda *_: iter([data]))
    report = io.BytesIO(f"'/var/log/guix/drvs/00/{'0' * 30}-hello.drv.gz'".encode())
    directory = save_diagnostics(
        workspace.site.engine, workspace.settings, Failure("a", "c", b"x", report)
    )
    assert directory
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()


@parses("https://me:hunter2@g.test/a/b.git\n", "git@g.test:a/b.git\n", "ssh://g@g.test:22/a\n")
def git_remote(data: bytes, workspace: Workspace) -> None:
    web_address(decode_output(data).strip())


@parses("root:x:0:0:root:/root:/bin/sh\nguix-tasks:x:999:999::/:/bin/false\n")
def user_accounts(data: bytes, workspace: Workspace) -> None:
    text = data.decode(errors="surrogateescape")
    _user_id(text)
    _free_id(text, text)


@parses("Debian|Debian|main|http://deb.test/debian\n", "E: Unable to locate package x\n")
def apt_output(data: bytes, workspace: Workspace) -> None:
    apt.debian_address(decode_output(data))
    apt.error_line(decode_output(data))


@parses('time="x" level=warning msg="a"\ntime="x" level=fatal msg="b \\"c\\""\n')
def service_log(data: bytes, workspace: Workspace) -> None:
    Service(Path("/bin/x"), workspace.directory / "pid", workspace.write("log", data)).error_line()


@parses("22 1 0:21 / /proc rw - proc proc rw\n23 1 0:22 / /srv/a\\040b rw shared:1 - tmpfs x rw\n")
def mount_table(data: bytes, workspace: Workspace) -> None:
    engine.mounts_below(Path("/srv"), decode_output(data))


@parses("https://me:hunter2@g.test/x token=abc --secret=id=x, type=s3,secret_access_key=y\n")
def printed_text(data: bytes, workspace: Workspace) -> None:
    redact.add("hunter2", "another secret")
    redact.clean(decode_output(data))
    written: list[bytes] = []
    output = redact.Stream(written.append)
    for start in range(0, len(data), 1 << 13):
        output.add(data[start : start + (1 << 13)])
    output.end()
    assert b"hunter2" not in b"".join(written)


# --- Tests ----------------------------------------------------------------------------------


class TooSlow(BaseException):
    """Parsing an input took too long. No error handler catches this."""


def stop(_number: int, _frame: FrameType | None) -> None:
    raise TooSlow


def parse_in_time(parser: Parser, data: bytes, workspace: Workspace) -> bool:
    """Parse an input in limited time and return whether it is valid.

    Each error that a parser raises or returns must have one printable line.
    """
    clear_file_cache()
    clear_secrets()
    messages, is_valid = [], False
    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        messages = [str(error) for error in parser(data, workspace) or ()]
        is_valid = True
    except SettingsError as error:
        messages = error.problems
    except GuixTasksError as error:
        messages = [str(error)]
    except OSError as error:  # for example a file name that is too long
        messages = [f"{error.filename!r}: {error.strerror}"]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
    console = BufferConsole()
    for text in messages:
        assert text.strip()
        console.error(text)
    assert console.text.count("\n") == len(messages)
    assert console.text.replace("\n", "").isprintable()
    return is_valid


@pytest.fixture(scope="module")
def tally(soak: Soak) -> Iterator[Counter[str]]:
    """Count the inputs of each parser."""
    counts: Counter[str] = Counter()
    yield counts
    count = f"{counts.total()} inputs of {len(counts)} parsers, each in less than {CPU_SECONDS} s"
    soak.report("foreign input is read or is one error", count)


@pytest.mark.parametrize("name", PARSERS)
def test_damaged_input_is_parsed_or_is_one_error(
    name: str,
    soak: Soak,
    tally: Counter[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (examples, parser), random = PARSERS[name], soak.rng(name)
    workspace, times = Workspace(tmp_path, monkeypatch), soak.times(10, 10_000)
    assert parse_in_time(parser, examples[0], workspace), "the first example is valid"
    for number in range(times):
        change = mutate if number % 50 else lengthen
        data = change(random, random.choice(examples))
        try:
            parse_in_time(parser, data, workspace)
        except BaseException as error:  # noqa: BLE001 -- reported with the input
            excerpt = data if len(data) < 2000 else data[:1000] + b" ... " + data[-1000:]
            pytest.fail(f"{error!r} for input {number} of --seed={soak.seed}: {excerpt!r}")
    tally[name] = times
