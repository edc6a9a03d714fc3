"""A Docker Engine in memory, a fake of Guix, and a project on disk that uses both.

The engine behaves like Docker in the points on which the tasks depend: a commit merges the
container's configuration into the given one, and adds no layer for a container that changed
nothing; each new layer and image is unique; removing a tag removes its image and the images from
which that was made, unless a container, a tag or another image holds them.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import io
import itertools
import json
import os
import re
import shlex
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from hypothesis import settings as hypothesis_settings

from guix_tasks import files as files_module
from guix_tasks import guix
from guix_tasks.commands.push import push
from guix_tasks.engine.api import (
    BuildSpec,
    Container,
    ContainerSpec,
    Engine,
    EngineInfo,
    Image,
    Layer,
    Progress,
)
from guix_tasks.errors import BuilderError, EngineError, RegistryError
from guix_tasks.guix import CHANNELS_FILE
from guix_tasks.oci.labels import CREATED
from guix_tasks.settings import Settings, load_settings
from guix_tasks.stages.container import STORE_MOUNT
from guix_tasks.stages.images import (
    FILES_LABEL,
    KEY_LABEL,
    LAYERS_LABEL,
    STAGES,
    Ledger,
    proven_stage,
)
from guix_tasks.stages.lifecycle import Lifecycle, StageOptions, State
from guix_tasks.stages.project import Project
from guix_tasks.stages.pull import BUILT_CHANNELS
from guix_tasks.ui import redact
from guix_tasks.ui.console import Console

if TYPE_CHECKING:
    from guix_tasks.engine.accounts import Credentials

P = ParamSpec("P")
R = TypeVar("R")

DETERMINISTIC = hypothesis_settings(derandomize=True, deadline=None, database=None, max_examples=30)
"""Settings of Hypothesis: the same examples in every run."""

Files = dict[str, bytes | None]
"""Content of a layer by path; None for a removed file."""

Output = Iterator[tuple[bool, bytes]]

_numbers = itertools.count(1)
"""Numbers that make otherwise equal layers, images and containers differ."""


def clear_file_cache() -> None:
    """Clear the cache of file contents, which a new process does not have."""
    files_module._contents.clear()
    files_module.read_once.cache_clear()
    files_module.reopenable.cache_clear()


def clear_secrets() -> None:
    """Unregister all secrets of ``redact``."""
    redact._encodings.clear()
    redact._pattern = re.compile(rb"(?!)")


class Killed(BaseException):
    """Simulated kill of ``inv``: later calls do not change the engine, not even the clean-up."""


def digest(*parts: object) -> str:
    return f"sha256:{hashlib.sha256(repr(parts).encode()).hexdigest()}"


@dataclass
class FakeRegistry:
    """A registry: the pushed images by reference, and the credentials of its clients."""

    images: dict[str, Image] = field(default_factory=dict)
    layers: dict[str, Files] = field(default_factory=dict)
    refusal: str = ""
    immutable: bool = False
    """Whether a tag can be pushed only once."""
    used_credentials: list[Credentials | None] = field(default_factory=list)
    local_accounts: dict[str, Credentials] = field(default_factory=dict)

    def put(self, reference: str, image: Image) -> None:
        self.images[reference] = replace(image, digests=(), tags=())

    def find(self, reference: str) -> Image | None:
        name, _, wanted_digest = reference.partition("@")
        if wanted_digest:
            matches = (
                image
                for other, image in self.images.items()
                if other.rpartition(":")[0] == name and digest(image.id) == wanted_digest
            )
            return next(matches, None)
        return self.images.get(reference)


@dataclass
class FakeContainer:
    """A container: its image and its changed files."""

    id: str
    spec: ContainerSpec
    image: Image
    config: dict[str, Any]
    lower: Files
    created: int
    changes: Files = field(default_factory=dict)
    running: bool = False
    started: bool = False
    status: int = 0
    lacked_memory: bool = False
    stdin: bytes = b""
    results: dict[str, Files] = field(default_factory=dict)
    """Results on the engine's volume with the warm store."""

    @property
    def argv(self) -> tuple[str, ...]:
        """The command without the entry point of guix-tasks or the image."""
        return self.spec.command[1:]

    def read(self, path: str) -> bytes | None:
        return self.changes.get(path, self.lower.get(path))

    def text(self, path: str) -> str:
        return (self.read(path) or b"").decode()

    def write(self, path: str, content: str) -> None:
        if self.text(path) != content:
            self.changes[path] = content.encode()

    def record_result(self, name: str) -> None:
        """Record the result of Guix, as ``record.sh`` does."""
        files = {**self.lower, **self.changes}
        self.results[name] = {path: files[path] for path in (PROFILE, CHANNELS) if path in files}

    def remove_files(self, directory: str) -> None:
        """Remove the new files below a directory, as the entry point does at its end."""
        for path in [name for name in self.changes if name.startswith(f"{directory}/")]:
            del self.changes[path]


Behaviour = Callable[[FakeContainer], Output]

SEARCH_PATHS = {
    "python": (
        'export GUIX_PYTHONPATH="${GUIX_PROFILE:-/gnu/store/0-profile}/lib/python3/site-packages'
        '${GUIX_PYTHONPATH:+:}$GUIX_PYTHONPATH"'
    ),
    "curl": 'export SSL_CERT_FILE="${GUIX_PROFILE:-/gnu/store/0-profile}/etc/ssl/all.crt"',
}
"""The lines of a profile's ``etc/profile``, by the package that declares the search path."""

COMMITS = {"guix": "a" * 40, "mine": "b" * 40}

PROFILE, CHANNELS = "/var/guix/profile", "/var/guix/channels"
"""Files of the fake Guix: the installed packages and the pulled channels."""


def _seed(_container: FakeContainer) -> Output:
    return iter(())


def _other_files(container: FakeContainer) -> Output:
    """Fake ``sh other-files.sh COMMAND DIRECTORY ...``."""
    container.results[container.argv[2].rpartition("/")[2]] = dict(container.lower)
    return iter(())


def _assemble(container: FakeContainer) -> Output:
    """Fake ``sh -c SCRIPT assemble.sh VOLUME RESULT KEY LIMIT FILES ...``."""
    result, key, _, files = container.argv[4:8]
    if files:
        wanted = container.results.pop(files.rpartition("/")[2])
        container.changes |= dict.fromkeys(container.lower.keys() - wanted.keys())
        container.changes |= {
            path: content for path, content in wanted.items() if container.read(path) != content
        }
    if result in container.results:
        for path, content in container.results[result].items():
            container.write(path, (content or b"").decode())
        if key:
            container.results[key] = container.results.pop(result)
        yield False, b"1000\n2000\n"
    else:
        container.status = 113


def _guix_state(container: FakeContainer) -> Output:
    for text in (container.text(PROFILE), "keys"):
        yield False, f"{hashlib.sha256(text.encode()).hexdigest()}\n".encode()


def _pack_checkouts(_container: FakeContainer) -> Output:
    yield from ()  # the fake of `guix pull` writes no checkouts


def _check_store(container: FakeContainer) -> Output:
    yield False, b"malformed\n" if "damaged" in container.results else b"ok\n"


STORE_SCRIPTS = {
    "check-store.sh": _check_store,
    "pack-checkouts.sh": _pack_checkouts,
    "seed.sh": _seed,
    "assemble.sh": _assemble,
    "other-files.sh": _other_files,
    "guix-state.sh": _guix_state,
}
"""Fakes of the scripts of the warm store, for every behaviour of the engine."""


@dataclass
class FakeGuix:
    """A fake of the entry point and of the Guix commands of stages, checks and users."""

    heads: dict[str, str] = field(default_factory=lambda: dict(COMMITS))
    """Current commits of the channels that no commit pins."""
    unknown: frozenset[str] = frozenset({"no-such-package"})
    failing: dict[str, str] = field(default_factory=dict)
    """Reasons of the failing checks of ``verify``."""
    evaluate: Callable[[str], str] = lambda text: text
    """Evaluation of a channels file that is a program."""

    def __call__(self, container: FakeContainer) -> Output:
        argv = container.argv
        script = container.text(argv[0]) if argv else ""
        if argv and argv[0].endswith("/verify"):
            yield from self._verify()
        elif argv and argv[-1].startswith("du "):
            yield False, b"12\t/gnu/store/%b-hello-1.0\n" % (b"0" * 32)
        elif script:
            for line in script.splitlines():
                is_report = line.startswith("report=$(")
                command = line[len("report=$(") : -1] if is_report else line
                if is_report and command.startswith("sh -c "):
                    command = shlex.split(command)[2]
                elif not command.startswith(("guix ", "cat ")):
                    continue
                for part in command.split(" && "):
                    for out in self._command(container, shlex.split(part)):
                        yield not is_report, out.encode()
                if container.status:
                    break
        else:
            yield False, f"ran {shlex.join(argv)}\n".encode()
            container.write(f"/made/{'-'.join(argv).replace('/', '_')}", "by hand")
        container.remove_files("/var/guix/guix-tasks")

    def _verify(self) -> Output:
        for check in ("daemon", "build", "channels", "packages", "certificates"):
            reason = self.failing.get(check)
            line = f"failed {check}: {reason}" if reason else f"ok {check}"
            yield False, f"{line}\n".encode()

    def _command(self, container: FakeContainer, words: list[str]) -> Iterator[str]:
        options = dict(word.lstrip("-").split("=", 1) for word in words if "=" in word)
        if words[:2] == ["guix", "pull"]:
            # Without substitutes this file equals the channels file next to it.
            file = options.get("channels", "").replace(BUILT_CHANNELS, "channels.scm")
            text = container.text(file) if file else ""
            yield "Updating channel...\n"
            container.write(CHANNELS, self._pulled_channels(self.evaluate(text) if text else ""))
        elif words[:2] in (["guix", "describe"], ["cat", CHANNELS_FILE]):
            yield container.text(CHANNELS)
        elif words[:2] == ["guix", "package"] and "--list-installed" in words:
            for package in sorted(container.text(PROFILE).split()):
                yield f"{package}\t1.0\tout\t/gnu/store/{package}\n"
        elif words == ["cat", f"{guix.PROFILE}/etc/profile"]:
            packages = container.text(PROFILE).split()
            yield from (f"{line}\n" for name, line in SEARCH_PATHS.items() if name in packages)
        elif words[:2] == ["guix", "package"]:
            yield from self._install(container, words, options.get("manifest"))

    def _pulled_channels(self, text: str) -> str:
        forms = re.split(r"\(channel\s", text)[1:] or [
            f'(name \'guix) (url "https://guix.test") {INTRODUCTION}'
        ]
        channels = []
        for form in forms:
            fields = dict(re.findall(r"\((name|url|branch|commit)\s+['\"]([^\s()\"]+)\"?\)", form))
            if {"name", "url"} <= fields.keys():
                commit = fields.get("commit") or self.heads[fields["name"]]
                introduced = "(introduction" in form
                channels.append(
                    channel(fields["name"], fields["url"], commit, introduced=introduced)
                )
        return f"(list {' '.join(channels)})\n"

    def _install(
        self, container: FakeContainer, words: list[str], manifest: str | None
    ) -> Iterator[str]:
        packages = [word.partition("=")[2] for word in words if word.startswith("--install=")]
        if manifest:
            text = container.text(manifest)
            for inner in re.findall(r'primitive-load "([^"]+)"', text):
                packages += re.findall(r'"([^"]+)"', container.text(inner))
        unknown = [package for package in packages if package in self.unknown]
        for package in unknown:
            yield f"guix package: error: {package}: unknown package\n"
            container.status = 1
        if not unknown:
            profile = {*container.text(PROFILE).split(), *packages}
            container.write(PROFILE, " ".join(sorted(profile)))


INTRODUCTION = (
    f'(introduction (make-channel-introduction "{"1" * 40}" '
    f'(openpgp-fingerprint "{" ".join(["ABCD"] * 10)}")))'
)


def channel(name: str, url: str, commit: str = "", *, introduced: bool = True) -> str:
    """Format a channel as ``guix describe`` does."""
    pin = f'(commit "{commit}")' if commit else ""
    return f'(channel (name \'{name}) (url "{url}") {pin} {INTRODUCTION if introduced else ""})'


def _recorded(
    method: Callable[Concatenate[FakeEngine, P], R],
) -> Callable[Concatenate[FakeEngine, P], R]:
    """Record the calls of a method, and raise the planned fault before or after a call."""
    name = method.__name__

    @functools.wraps(method)
    def call(self: FakeEngine, /, *args: P.args, **kwargs: P.kwargs) -> R:
        number = len(self.calls)
        self.calls.append((name, (*args, *kwargs.values())))
        self.fault(number, name, "before")
        result = method(self, *args, **kwargs)
        self.fault(number, name, "after")
        return result

    return call


READING = frozenset(
    {"info", "image", "containers", "remote_digest", "check_registry", "volumes"}
    | {"layers", "save", "unnamed", "wait", "copy_out", "changed_paths"}
)
"""Methods that change nothing."""

Fault = Callable[[int, str, str], None]


def no_fault(_number: int, _name: str, _when: str) -> None:
    pass


class FakeEngine:
    """An engine in memory."""

    is_dry = False

    def __init__(
        self,
        registry: FakeRegistry | None = None,
        *,
        platform: str = "linux/amd64",
        url: str = "unix:///fake.sock",
        has_bridge: bool = True,
    ) -> None:
        self.registry = registry or FakeRegistry()
        self.behaviour: Behaviour = FakeGuix()
        self.fault: Fault = no_fault
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.all_images: dict[str, Image] = {}
        self.tags: dict[str, str] = {}
        self.all_containers: dict[str, FakeContainer] = {}
        self.all_volumes: dict[str, dict[str, str]] = {}
        self.stores: dict[str, dict[str, Files]] = {}
        """Results in the warm stores, by volume."""
        self.specs: list[ContainerSpec] = []
        """Specifications of the created containers, except those that only move or read files."""
        self.details = EngineInfo(url, "fake", "fake", "28", platform, "memory", has_bridge)
        self._files: dict[str, Files] = {}
        self._parents: dict[str, str] = {}

    def clone(self) -> FakeEngine:
        """Return an independent copy with an empty record of calls."""
        clone = copy.copy(self)
        clone.calls, clone.specs = [], []
        clone.registry = replace(
            self.registry, images=dict(self.registry.images), layers=dict(self.registry.layers)
        )
        clone.behaviour = copy.deepcopy(self.behaviour)
        clone.all_images, clone.tags = dict(self.all_images), dict(self.tags)
        clone.all_containers = copy.deepcopy(self.all_containers)
        clone.all_volumes, clone._files = dict(self.all_volumes), dict(self._files)
        clone.stores = {name: dict(results) for name, results in self.stores.items()}
        clone._parents = dict(self._parents)
        return clone

    @property
    def guix(self) -> FakeGuix:
        assert isinstance(self.behaviour, FakeGuix)
        return self.behaviour

    def changing_calls(self) -> list[str]:
        return [name for name, _ in self.calls if name not in READING]

    def make_image(
        self,
        config: Mapping[str, Any],
        files: Files,
        *,
        parent: Image | None = None,
        tag: str = "",
    ) -> Image:
        """Make an image from scratch or from a parent; without files it adds no layer."""
        layers = parent.layers if parent else ()
        if files:
            layer = digest(files, next(_numbers))
            self._files[layer] = dict(files)
            layers = (*layers, layer)
        number = next(_numbers)
        created = datetime(2026, 1, 1, tzinfo=timezone.utc) + timedelta(seconds=number)
        image = Image(
            id=digest(layers, config, number),
            layers=layers,
            config=copy.deepcopy(dict(config)),
            size=sum(1000 + len(self._files[layer]) for layer in layers),
            created=created.isoformat(),
            platform=self.details.platform,
        )
        self.all_images[image.id] = image
        if parent:
            self._parents[image.id] = parent.id
        if tag:
            self.tags[tag] = image.id
        return image

    def files(self, image: Image) -> Files:
        """The file system of an image."""
        merged: Files = {}
        for layer in image.layers:
            merged.update(self._files[layer])
        return {path: content for path, content in merged.items() if content is not None}

    def info(self) -> EngineInfo:
        return self.details

    def local_accounts(self) -> dict[str, Credentials]:
        return self.registry.local_accounts

    @_recorded
    def image(self, reference: str) -> Image | None:
        return self._image(reference)

    def _image(self, reference: str) -> Image | None:
        match = self.all_images.get(self.tags.get(reference, reference))
        if match is None and "@" in reference:
            match = next((i for i in self.all_images.values() if reference in i.digests), None)
        if match is None:
            return None
        return replace(match, tags=tuple(t for t, i in self.tags.items() if i == match.id))

    def _held(self, image: str) -> bool:
        return any(box.image.id == image for box in self.all_containers.values())

    def _delete(self, image: str) -> None:
        """Delete an image that nothing holds, and then its parents that nothing else holds."""
        held = self._held(image) or image in {*self.tags.values(), *self._parents.values()}
        if image in self.all_images and not held:
            del self.all_images[image]
            self._delete(self._parents.pop(image, ""))

    @_recorded
    def unnamed(self, labels: Mapping[str, str]) -> list[str]:
        held = {*self.tags.values(), *self._parents.values()}
        return [
            identity
            for identity, image in self.all_images.items()
            if identity not in held and labels.items() <= image.labels.items()
        ]

    @_recorded
    def containers(self, labels: Mapping[str, str]) -> list[Container]:
        boxes = sorted(self.all_containers.values(), key=lambda box: box.created, reverse=True)
        return [
            Container(
                box.id, box.spec.name, box.image.id, box.config["Labels"], box.running, box.started
            )
            for box in boxes
            if labels.items() <= box.config["Labels"].items()
        ]

    @_recorded
    def remote_digest(self, reference: str, credentials: Credentials | None = None) -> str | None:
        self.registry.used_credentials.append(credentials)
        image = None if self.registry.refusal else self.registry.find(reference)
        return digest(image.id) if image else None

    @_recorded
    def check_registry(self, reference: str, credentials: Credentials | None) -> bool:
        self.registry.used_credentials.append(credentials)
        if self.registry.refusal:
            raise RegistryError(f"cannot look up {reference}: {self.registry.refusal}")
        return self.details.product != "Podman" or credentials is not None

    @_recorded
    def volumes(self, labels: Mapping[str, str]) -> list[str]:
        volumes = self.all_volumes.items()
        return [name for name, volume_labels in volumes if labels.items() <= volume_labels.items()]

    @_recorded
    def create_volume(self, name: str, labels: Mapping[str, str]) -> None:
        self.all_volumes.setdefault(name, dict(labels))

    @_recorded
    def remove_volume(self, name: str) -> None:
        self.all_volumes.pop(name, None)
        self.stores.pop(name, None)

    @_recorded
    def tag(self, image: str, reference: str) -> None:
        match = self._image(image)
        if match is None:
            raise EngineError(f"the engine could not tag {reference}: No such image: {image}")
        self.tags[reference] = match.id

    @_recorded
    def untag(self, reference: str) -> None:
        image = self.tags.pop(reference, None)
        if image:
            self._delete(image)

    @_recorded
    def drop(self, image: str) -> None:
        self._delete(image)

    @_recorded
    def layers(self, image: str) -> list[Layer]:
        match = self._image(image)
        return [Layer(1000, "fake") for _ in match.layers] if match else []

    @_recorded
    def save(self, image: str) -> Iterator[bytes]:
        match = self._image(image)
        assert match
        index = {"manifests": [{"digest": digest(match.id)}]}
        files = {
            "manifest.json": json.dumps([{"Layers": match.layers}]).encode(),
            "index.json": json.dumps(index).encode(),
        }
        files |= {layer: _tar(self._files[layer]) for layer in match.layers}
        return iter([_tar(dict(files))])

    @_recorded
    def create(self, spec: ContainerSpec) -> str:
        image = self._image(spec.image)
        if image is None:
            raise EngineError(
                f"the engine could not create a container: No such image: {spec.image}"
            )
        if any(box.spec.name == spec.name for box in self.all_containers.values()):
            raise EngineError(f"the engine could not create a container: {spec.name} is in use")
        config: dict[str, Any] = {
            "Entrypoint": list(spec.command),
            "Env": [f"{name}={value}" for name, value in spec.environment.items()],
            "Labels": dict(spec.labels),
            "User": spec.user or "",
            "Hostname": spec.name[:12],
            "Healthcheck": {"Test": ["NONE"]} if spec.no_healthcheck else None,
        }
        box = FakeContainer(
            id=digest("container", number := next(_numbers)),
            spec=spec,
            image=image,
            config=merge_config(config, image.config),
            lower=self.files(image),
            created=number,
        )
        for bind in spec.binds:
            volume, target = bind.split(":")[:2]
            if target in (STORE_MOUNT, "/dev/guix-tasks"):
                box.results = self.stores.setdefault(volume, {})
        words = {word.rpartition("/")[2] for word in spec.command}
        if not words & STORE_SCRIPTS.keys() and "-files-" not in spec.name:
            self.specs.append(spec)
        self.all_containers[box.id] = box
        return box.id

    def _container(self, container: str) -> FakeContainer:
        for box in self.all_containers.values():
            if container in (box.id, box.spec.name):
                return box
        raise EngineError(f"No such container: {container}")

    @_recorded
    def copy_in(self, container: str, archive: bytes | IO[bytes]) -> None:
        data = archive if isinstance(archive, bytes) else archive.read()
        box = self._container(container)
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file:
                    box.changes[f"/{member.name}"] = file.read()

    @_recorded
    def copy_out(self, container: str, path: str) -> Iterator[bytes]:
        content = self._container(container).read(path)
        return iter(() if content is None else [_tar({path.rpartition("/")[2]: content})])

    @_recorded
    def changed_paths(self, container: str) -> list[str]:
        return list(self._container(container).changes)

    @_recorded
    def run(self, container: str, stdin: IO[bytes] | None = None) -> Output:
        box = self._container(container)
        box.stdin = stdin.read() if stdin else b""
        box.running = box.started = True
        program = "".join(box.argv[2:3] if box.argv[:1] == ("-c",) else box.argv[:1])
        records_result = re.search(r"results/(new-\w+)", box.text(program))
        yield from STORE_SCRIPTS.get(program.rpartition("/")[2], self.behaviour)(box)
        if records_result and not box.status:
            box.record_result(records_result[1])
        box.running = False

    @_recorded
    def bytes_received(self, container: str) -> int | None:
        return None

    @_recorded
    def start(self, container: str) -> None:
        box = self._container(container)
        box.running = box.started = True

    @_recorded
    def wait(self, container: str) -> int:
        return self._container(container).status

    @_recorded
    def lacked_memory(self, container: str) -> bool:
        return self._container(container).lacked_memory

    @_recorded
    def stop(self, container: str, seconds: int) -> None:
        box = self._container(container)
        box.running, box.status = False, 143

    @_recorded
    def remove(self, container: str) -> None:
        for box in list(self.all_containers.values()):
            if container in (box.id, box.spec.name):
                del self.all_containers[box.id]

    @_recorded
    def commit(self, container: str, config: Mapping[str, Any], comment: str = "") -> str:
        box = self._container(container)
        result = merge_config(copy.deepcopy(dict(config)), box.config)
        return self.make_image(result, box.changes, parent=box.image).id

    @_recorded
    def import_rootfs(self, archive: Iterator[bytes], reference: str) -> str:
        return self.make_image({}, {"/rootfs": b"".join(archive)}, tag=reference).id

    @_recorded
    def build(self, spec: BuildSpec, output: Callable[[bytes], None]) -> str:
        """Build as BuildKit does: the base image is not among the local images afterwards."""
        name = spec.args["BASE_IMAGE"]
        base = self._image(name) or (None if self.registry.refusal else self.registry.find(name))
        if base is None:
            raise BuilderError(f"cannot get the base image {name}: pull access denied")
        self._files |= {layer: self.registry.layers.get(layer, {}) for layer in base.layers} | {
            layer: files for layer, files in self._files.items() if layer in base.layers
        }
        output(b"#1 building\n")
        config = {**base.config, "Entrypoint": ["/entry-point.sh"], "Cmd": ["bash"]}
        image = self.make_image(config, {"/entry-point.sh": b"#!/bin/sh\n"}, parent=base)
        del self._parents[image.id]
        return image.id

    @_recorded
    def push(
        self, reference: str, credentials: Credentials | None, progress: Progress | None = None
    ) -> str:
        image = self._image(reference)
        if image is None:
            raise RegistryError(f"cannot push {reference}: tag does not exist")
        self.registry.used_credentials.append(credentials)
        if self.registry.refusal:
            raise RegistryError(f"cannot push {reference}: {self.registry.refusal}")
        if self.registry.immutable and self.registry.find(reference):
            raise RegistryError(f"cannot push {reference}: the tag is immutable")
        for layer in image.layers:
            self.registry.layers[layer] = self._files[layer]
            if progress:
                progress(layer[7:19], "Pushed", 1000, 1000)
        self.registry.put(reference, image)
        name = f"{reference.rpartition(':')[0]}@{digest(image.id)}"
        self.all_images[image.id] = replace(
            self.all_images[image.id], digests=tuple({*image.digests, name})
        )
        return digest(image.id)

    @_recorded
    def pull(
        self, reference: str, credentials: Credentials | None, progress: Progress | None = None
    ) -> None:
        self.registry.used_credentials.append(credentials)
        image = None if self.registry.refusal else self.registry.find(reference)
        if image is None:
            raise RegistryError(
                f"cannot pull {reference}: {self.registry.refusal or 'manifest unknown'}"
            )
        for layer in image.layers:
            self._files[layer] = self.registry.layers[layer]
            if progress:
                progress(layer[7:19], "Pull complete", 1000, 1000)
        name = reference.partition("@")[0] if "@" in reference else reference.rpartition(":")[0]
        known = self.all_images.get(image.id, image)
        self.all_images[image.id] = replace(
            known, digests=tuple({*known.digests, f"{name}@{digest(image.id)}"})
        )
        if "@" not in reference:
            self.tags[reference] = image.id


def merge_config(config: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Add the defaults of another configuration (moby, daemon ``merge``)."""
    result = dict(config)
    for name in ("User", "WorkingDir", "StopSignal"):
        result[name] = result.get(name) or defaults.get(name) or ""
    for name in ("ExposedPorts", "Volumes"):
        both = {**(defaults.get(name) or {}), **(result.get(name) or {})}
        result[name] = both or None
    names = {line.partition("=")[0] for line in result.get("Env") or ()}
    added = [line for line in defaults.get("Env") or () if line.partition("=")[0] not in names]
    result["Env"] = [*(result.get("Env") or ()), *added]
    result["Labels"] = {**(defaults.get("Labels") or {}), **(result.get("Labels") or {})}
    if not result.get("Entrypoint"):
        result["Cmd"] = result.get("Cmd") or defaults.get("Cmd")
        if result.get("Entrypoint") is None:
            result["Entrypoint"] = defaults.get("Entrypoint")
    result["Healthcheck"] = result.get("Healthcheck") or defaults.get("Healthcheck")
    return result


def _tar(files: Files) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name.lstrip("/"))
            member.size = len(content or b"")
            tar.addfile(member, io.BytesIO(content or b""))
    return buffer.getvalue()


# --- A project ------------------------------------------------------------------------------

BASE_IMAGE = "registry.test/base:1"
IMAGE = "registry.test/team/app:1"
BASE_CONFIG: dict[str, Any] = {
    "Cmd": ["sh"],
    "Entrypoint": None,
    "Env": ["PATH=/bin", "LANG=C"],
    "User": "guest",
    "WorkingDir": "/srv",
    "ExposedPorts": {"80/tcp": {}},
    "Volumes": {"/data": {}},
    "Labels": {"maintainer": "me"},
    "StopSignal": "SIGINT",
    "Healthcheck": {"Test": ["CMD", "true"]},
    "Shell": ["/bin/sh", "-c"],
    "OnBuild": ["RUN true"],
}
"""A configuration with a value in every field."""


def publish_base(
    registry: FakeRegistry, reference: str = BASE_IMAGE, profile: str = "certs"
) -> None:
    """Push a base image with Guix to a registry."""
    engine = FakeEngine(registry)
    engine.make_image(BASE_CONFIG, {PROFILE: profile.encode()}, tag=reference)
    engine.push(reference, None)


class BufferConsole(Console):
    """A console whose output goes to buffers."""

    def __init__(self) -> None:
        self.results, self.messages = io.StringIO(), io.StringIO()
        super().__init__(out=self.results, err=self.messages)

    @property
    def text(self) -> str:
        return self.results.getvalue() + self.messages.getvalue()


class SerialExecutor:
    """An executor without threads, whose start would take most of the time of the tests."""

    def map(self, function: Callable[[str], str], items: list[str]) -> Iterator[str]:
        return map(function, items)


def serial_executor() -> AbstractContextManager[SerialExecutor]:
    return nullcontext(SerialExecutor())


class CachedLifecycle(Lifecycle):
    """A lifecycle that computes each state once, for inputs that do not change."""

    def __init__(self, project: Project) -> None:
        super().__init__(project)
        self._states: dict[str, State] = {}

    def state(self, name: str, packages: tuple[str, ...] | None = None) -> State:
        if name not in self._states:
            self._states[name] = super().state(name, packages)
        return self._states[name]


class Site:
    """A checkout of a project, and the engine of its user.

    Each call of ``project`` loads the project as a new process does.
    """

    def __init__(self, directory: Path, engine: FakeEngine, **env: str) -> None:
        self.directory = directory
        self.engine = engine
        self._loaded: tuple[dict[str, str], Settings] | None = None
        self.env = {
            "IMAGE": IMAGE,
            "BASE_IMAGE": BASE_IMAGE,
            "BUILD_CONTEXT": "context",
            "GUIX_CHANNELS": "channels.scm",
            "GUIX_PACKAGES": "hello",
            "GUIX_SANDBOX": "privileged",
            **env,
        }
        self.write("Dockerfile", "FROM x\n")
        self.write("context/file", "content\n")
        self.write("channels.scm", f"(list {channel('guix', 'https://guix.test')})\n")

    @property
    def lock(self) -> Path:
        return self.directory / "channels.lock.scm"

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def settings(self) -> Settings:
        if self._loaded is None or self._loaded[0] != self.env:
            self._loaded = (dict(self.env), self._load())
        return self._loaded[1]

    def _load(self) -> Settings:
        # In the environment an empty value counts as unset, in a file it does not.
        empty = "".join(f"{name}=\n" for name, value in self.env.items() if not value)
        if empty or (self.directory / ".env").exists():
            self.write(".env", empty)
        clear_file_cache()
        return load_settings(self.directory, self.directory, self.env)

    def project(self, engine: Engine | None = None) -> Project:
        files_module._digest_of_state.cache_clear()
        return Project(self.settings(), engine or self.engine, BufferConsole())

    @property
    def lifecycle(self) -> Lifecycle:
        return Lifecycle(self.project())

    @property
    def ledger(self) -> Ledger:
        return self.project().ledger

    def make(
        self,
        *stages: str,
        engine: Engine | None = None,
        packages: tuple[str, ...] = (),
        **options: bool,
    ) -> str:
        """Build stages in turn, each in a new process, and return the messages."""
        messages = ""
        for stage in stages:
            project = self.project(engine)
            Lifecycle(project).make(stage, StageOptions(packages=packages, **options))
            messages += console_text(project)
        return messages

    def push(self, stage: str | None = None) -> dict[str, str]:
        return push(self.project(), stage)

    def image(self, stage: str = "") -> Image:
        """Return the image of a stage, or ``IMAGE``."""
        ledger = self.ledger
        image = self.engine._image(ledger.tag(stage) if stage else str(ledger.image))
        assert image, stage
        return image

    def states(self) -> dict[str, State]:
        lifecycle = CachedLifecycle(self.project())
        return {stage: lifecycle.state(stage) for stage in STAGES}

    def keys(self) -> dict[str, str | None]:
        return {stage: state.key for stage, state in self.states().items()}

    def why(self, stage: str) -> str | None:
        return self.lifecycle.state(stage).why

    def trace_stages(self, action: Callable[[], object]) -> list[str]:
        """Return the names of the stages that an action runs in a container."""
        first = len(self.engine.specs)
        action()
        return [spec.name.split("-")[2] for spec in self.engine.specs[first:]]


def console_text(project: Project) -> str:
    assert isinstance(project.console, BufferConsole)
    return project.console.text


def new_site(directory: Path, registry: FakeRegistry | None = None, **env: str) -> Site:
    """Create a project on an empty engine; its base image is in the registry."""
    registry = registry or FakeRegistry()
    if not registry.find(BASE_IMAGE):
        publish_base(registry)
    return Site(directory, FakeEngine(registry), **env)


@functools.cache
def _template() -> tuple[FakeEngine, str]:
    """Return an engine with all stages of a project, and the content of the lock file."""
    with tempfile.TemporaryDirectory() as directory:
        site = new_site(Path(directory))
        site.make(*STAGES)
        return site.engine, site.lock.read_text()


def new_built_site(directory: Path) -> Site:
    """Create a project with all stages built."""
    engine, lock = _template()
    site = Site(directory, engine.clone())
    site.lock.write_text(lock)
    return site


def outline(engine: FakeEngine) -> dict[str, object]:
    """Return the state of each tag, without values that differ from run to run."""
    states: dict[str, object] = {}
    for tag, identity in engine.tags.items():
        image = engine.all_images[identity]
        varying = (LAYERS_LABEL, FILES_LABEL, CREATED)
        labels = {name: text for name, text in image.labels.items() if name not in varying}
        state = (proven_stage(image), labels.get(KEY_LABEL), len(image.layers))
        states[tag] = (state, sorted(labels.items()), str(image.config.get("Cmd")))
    return states


@contextmanager
def another_process() -> Iterator[None]:
    """Run the block under the id of another process, which has ended afterwards."""
    real = os.getpid
    with subprocess.Popen(["sleep", "60"]) as process:
        os.getpid = lambda: process.pid
        try:
            yield
        finally:
            os.getpid = real
            process.kill()
