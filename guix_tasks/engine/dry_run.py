"""Engine that prints the calls that change state, and skips them in a dry run."""

from __future__ import annotations

from dataclasses import replace
from typing import IO, TYPE_CHECKING, Any

from guix_tasks.engine.api import Image, build_options

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from guix_tasks.engine.accounts import Credentials
    from guix_tasks.engine.api import BuildSpec, ContainerSpec, Engine, Progress
    from guix_tasks.ui.console import Console


class TracedEngine:
    """Wrapper of an engine that prints every call that changes state as a ``docker`` command.

    With ``perform=False`` (``inv --dry``) these calls are not made. Calls that read go to the
    wrapped engine. Tags and images of skipped calls are remembered, so that later stages see the
    state that a real run would leave.
    """

    def __init__(self, engine: Engine, console: Console, *, perform: bool) -> None:
        self._engine = engine
        self._console = console
        self._perform = perform
        self.is_dry = not perform
        self._images: dict[str, Image | None] = {}
        self._started: set[str] = set()
        self._specs: dict[str, ContainerSpec] = {}
        self._volumes: dict[str, Mapping[str, str]] = {}
        # Calls that only read.
        self.info = engine.info
        self.local_accounts = engine.local_accounts
        self.unnamed = engine.unnamed
        self.layers = engine.layers
        self.save = engine.save
        self.remote_digest = engine.remote_digest
        self.check_registry = engine.check_registry
        self.containers = engine.containers
        self.copy_out = engine.copy_out
        self.changed_paths = engine.changed_paths
        self.bytes_received = engine.bytes_received

    def image(self, reference: str) -> Image | None:
        if reference in self._images:
            return self._images[reference]
        return self._engine.image(reference)

    def volumes(self, labels: Mapping[str, str]) -> list[str]:
        created = [name for name, own in self._volumes.items() if labels.items() <= own.items()]
        return [*self._engine.volumes(labels), *created]

    def create_volume(self, name: str, labels: Mapping[str, str]) -> None:
        if self._shown("volume", "create", name):
            self._engine.create_volume(name, labels)
        else:
            self._volumes[name] = labels

    def remove_volume(self, name: str) -> None:
        if self._shown("volume", "rm", name):
            self._engine.remove_volume(name)

    def tag(self, image: str, reference: str) -> None:
        if self._shown("tag", image, reference):
            self._engine.tag(image, reference)
        else:
            self._images[reference] = self.image(image)

    def untag(self, reference: str) -> None:
        if self._shown("image", "rm", reference):
            self._engine.untag(reference)
        else:
            self._images[reference] = None

    def drop(self, image: str) -> None:
        inspected = self.image(image)
        tagged = {known.id for known in self._images.values() if known}
        if inspected and not inspected.tags and inspected.id not in tagged:
            self._shown("image", "rm", image)
        if self._perform:
            self._engine.drop(image)

    def create(self, spec: ContainerSpec) -> str:
        self._console.command(create_argv(spec))
        if self._perform:
            return self._engine.create(spec)
        self._specs[spec.name] = spec
        return spec.name

    def copy_in(self, container: str, archive: bytes | IO[bytes]) -> None:
        if self._shown("cp", "-", f"{container}:/"):
            self._engine.copy_in(container, archive)

    def run(self, container: str, stdin: IO[bytes] | None = None) -> Iterator[tuple[bool, bytes]]:
        self._started.add(container)
        is_made = self._shown("start", "--attach", *(["-i"] if stdin else []), container)
        return self._engine.run(container, stdin) if is_made else iter(())

    def start(self, container: str) -> None:
        if self._shown("start", container):
            self._engine.start(container)

    def wait(self, container: str) -> int:
        return self._engine.wait(container) if self._perform else 0

    def lacked_memory(self, container: str) -> bool:
        return self._perform and self._engine.lacked_memory(container)

    def stop(self, container: str, seconds: int) -> None:
        if self._shown("stop", f"--time={seconds}", container):
            self._engine.stop(container, seconds)

    def remove(self, container: str) -> None:
        if self._shown("rm", "--force", container):
            self._engine.remove(container)

    def commit(self, container: str, config: Mapping[str, Any], comment: str = "") -> str:
        if self._shown("commit", container):
            return self._engine.commit(container, config, comment)
        # A commit adds one layer if the container was run.
        image = f"dry-run:{container}"
        spec = self._specs.get(container)
        parent = self.image(spec.image) if spec else None
        if parent:
            layers = (*parent.layers, *([image] if container in self._started else []))
            self._images[image] = replace(parent, id=image, layers=layers, config=config)
        return image

    def import_rootfs(self, archive: Iterator[bytes], reference: str) -> str:
        is_made = self._shown("import", "-", reference)
        return self._engine.import_rootfs(archive, reference) if is_made else reference

    def build(self, spec: BuildSpec, output: Callable[[bytes], None]) -> str:
        self._console.command(("docker", "build", *build_options(spec), str(spec.context)))
        if self._perform:
            return self._engine.build(spec, output)
        image = "dry-run:build"
        self._images[image] = Image(image, (image,), {}, 0, "", self.info().platform)
        return image

    def push(
        self, reference: str, credentials: Credentials | None, progress: Progress | None = None
    ) -> str:
        is_made = self._shown("push", reference)
        return self._engine.push(reference, credentials, progress) if is_made else ""

    def pull(
        self, reference: str, credentials: Credentials | None, progress: Progress | None = None
    ) -> None:
        if self._shown("pull", reference):
            self._engine.pull(reference, credentials, progress)

    def _shown(self, *words: str) -> bool:
        """Print a call that changes state; return False if it is not made."""
        self._console.command(("docker", *words))
        return self._perform


def create_argv(spec: ContainerSpec) -> Sequence[str]:
    """Return the ``docker create`` command of a container."""
    entry, *arguments = spec.command
    return (
        "docker", "create", f"--name={spec.name}",
        *(["--privileged"] if spec.privileged else []),
        *(f"--security-opt={option}" for option in spec.security),
        *(["--security-opt=systempaths=unconfined"] if spec.unmasked else []),
        *(["--cap-drop=ALL"] if spec.capabilities is not None else []),
        *(f"--cap-add={capability}" for capability in spec.capabilities or ()),
        *(["--interactive"] if spec.tty or spec.stdin else []),
        *(["--tty"] if spec.tty else []),
        *([f"--network={spec.network}"] if spec.network else []),
        *(f"--device={device}" for device in spec.devices),
        *([f"--memory={spec.memory}"] if spec.memory else []),
        "--pids-limit=-1",
        *([] if spec.logged else ["--log-driver=none"]),
        *([f"--user={spec.user}"] if spec.user else []),
        *([f"--platform={spec.platform}"] if spec.platform else []),
        *(f"--publish={spec.publish_on}:{host}:{port}" for host, port in spec.publish.items()),
        *(f"--volume={bind}" for bind in spec.binds),
        *([f"--volume={spec.scratch}"] if spec.scratch else []),
        *(f"--tmpfs={directory}" for directory in spec.tmpfs_directories),
        *(f"--env={name}={value}" for name, value in spec.environment.items()),
        *(f"--label={name}={value}" for name, value in spec.labels.items()),
        f"--entrypoint={entry}", spec.image, *arguments,
    )  # fmt: skip
