"""The warm store: Guix's store on a volume, and images that are assembled from it.

Work containers of a stage mount the volume of their project over the image's store, so Guix finds
what it has downloaded or built for earlier images. At the end of its script a stage records which
store items the roots of its container need (``resources/record.sh``). An image is then assembled in
a container without Guix: ``resources/assemble.sh`` makes the store and Guix's state equal to that
result, and the engine commits one layer. The container starts from the previous image of the stage
if that saves layers, else from the stage's parent. If the base image has changed since, the
container also gets the files of the new one (``resources/other-files.sh``).

The volume is a cache. If it is missing or lacks items of an image, ``fill_store`` copies them from
that image. It contains, in addition to the directory ``store``:

* ``guix-tasks/db``: the database of Guix's daemon;
* ``guix-tasks/results/NAME``: results by the key of what Guix made, and new results.
"""

from __future__ import annotations

import re
import secrets
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from guix_tasks import guix
from guix_tasks.errors import EngineError, StageError, full_disk
from guix_tasks.files import file_digest, text_digest
from guix_tasks.settings.values import Sandbox
from guix_tasks.stages.commit import commit_image, committed_config
from guix_tasks.stages.container import (
    STORE_MOUNT,
    WORK_DIRECTORY,
    Work,
    archive,
    cache_prefix,
    image_platform,
    project_labels,
    resource_files,
    run_silently,
    shell_work,
    work_container,
)
from guix_tasks.stages.images import (
    FILES_LABEL,
    GUIX_KEY_LABEL,
    LAYERS_MAX,
    files_digest,
    shared_layers,
    stage_key,
)
from guix_tasks.stages.ownership import daemon_user
from guix_tasks.stages.pull import is_authenticated
from guix_tasks.stages.stage import MISSING_ITEMS, STATE
from guix_tasks.ui.format import human_size, printable
from guix_tasks.ui.redact import clean

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from guix_tasks.engine.api import Image
    from guix_tasks.settings import Settings
    from guix_tasks.stages.project import Project
    from guix_tasks.stages.stage import Stage

VOLUME_MOUNT = "/dev/guix-tasks"
"""Directory of the volume in containers that assemble or seed. A mount below ``/dev`` leaves no
directory in an image."""

RESULTS = f"{VOLUME_MOUNT}/guix-tasks/results"
"""Directory of the results in these containers."""

SEED = ("seed.sh", "seed.scm", "database.scm")
"""Scripts that copy the store of an image to the warm store. ``owner`` is their input."""

_RUN_IF_PRESENT = f'[ -f "$0" ] || exit {MISSING_ITEMS}; exec sh "$0" "$@"'
"""Run the script ``$0``, the first argument after ``-c``, or exit if the volume lacks it."""

_UNSUITABLE = 114
"""Exit status of ``assemble.sh`` if deleted items would take too much of the image, or if its
other files cannot be changed."""

_MAX_LAYERS = 10
"""Maximum number of layers on the base image before an image is assembled in one layer."""

_MAX_WASTE = 10_000_000_000
"""A volume is removed after a run if its unused items exceed this many bytes plus twice the size of
the image's items."""

LIVE_LABEL = "org.guix-tasks.live"
"""Bytes of an assembled image's store items that are not of the base image, unpacked."""

TRUST_LABEL = "org.guix-tasks.trust"
"""Digest of the substitute keys that the base image trusts."""


def trust_digest(project: Project, stage: Stage, parent: Image) -> str:
    """Return a digest of what Guix accepts into the store of a stage on ``parent``.

    That depends on the substitute keys and the channels that it trusts. Items that it accepted with
    other settings must not reach an image.
    """
    unauthenticated = any(guix.UNAUTHENTICATED in command for command in stage.commands)
    return text_digest(
        image_platform(project.engine, project.settings),
        *trust_inputs(
            project.settings,
            parent.labels.get(TRUST_LABEL, ""),
            authenticate=not unauthenticated and is_authenticated(parent),
        ),
    )


def trust_inputs(settings: Settings, base_keys: str, *, authenticate: bool) -> tuple[str, ...]:
    """Return what decides which items and channels Guix accepts.

    ``base_keys`` is a digest of the substitute keys that the base image trusts.
    """
    keys = sorted(map(file_digest, settings.guix_substitute_keys))
    return (*keys, base_keys, "" if authenticate else "unauthenticated")


def store_volume(project: Project, trust: str) -> str:
    """Return the name of the volume for a ``trust_digest``.

    A daemon without root has another volume, because it has to own its store.
    """
    rootless = project.settings.guix_sandbox is Sandbox.ROOTLESS
    suffix = f"-{Sandbox.ROOTLESS.value}" if rootless else ""
    return f"{cache_prefix(project.settings)}-store-{trust[:8]}{suffix}"


def store_volumes(project: Project) -> list[str]:
    """Return the names of the volumes with warm stores of a project."""
    volumes = project.engine.volumes(project_labels(project.settings))
    prefix = cache_prefix(project.settings)
    return [volume for volume in volumes if volume.startswith(f"{prefix}-store-")]


def guix_key(stage: Stage, parent: Image, inputs: Mapping[str, str]) -> str:
    """Return the key of what Guix makes in a stage; empty if other files of the image can matter.

    It is made of the inputs of the stage and of the key of what Guix made in the parent.
    """
    below = parent.labels.get(GUIX_KEY_LABEL, "")
    paths = ("GUIX_PACKAGE_PATH=", "GUILE_LOAD_PATH=")
    if not stage.is_pure or not below:
        return ""
    if any(line.startswith(paths) for line in parent.config.get("Env") or ()):
        return ""
    return stage_key(stage.name, below, inputs)


def new_result() -> str:
    """Return a name for a result, different from that of another process on the same volume."""
    return f"new-{secrets.token_hex(4)}"


def result_directory(result: str) -> str:
    """Return the directory of a result in a work container."""
    return f"{STORE_MOUNT}/guix-tasks/results/{result}"


def fill_store(project: Project, volume: str, images: Sequence[Image]) -> None:
    """Create the volume if it is missing, and copy to it what it lacks from the images.

    Raise ``StageError`` if that fails, for example for lack of space.
    """
    project.engine.create_volume(volume, project_labels(project.settings))
    for image in images:
        _seed(project, volume, image)


def _seed(project: Project, volume: str, image: Image) -> None:
    """Copy the store items of an image that the volume lacks to the volume."""
    engine, settings = project.engine, project.settings
    work = _script_work("seed", SEED, VOLUME_MOUNT, volume=volume)
    project.console.detail(
        f"store: copying the packages of {image.id[7:19]} to the volume {volume}, if it lacks them"
    )
    with work_container(engine, settings, image.id, work) as container:
        rootless = settings.guix_sandbox is Sandbox.ROOTLESS and not engine.is_dry
        owner = daemon_user(engine, container) if rootless else 0
        engine.copy_in(container, archive({"owner": str(owner).encode()}))
        status, log = run_silently(engine, container)
    if status:
        hint = full_disk(log) or f"; `docker volume rm {volume}` removes the volume"
        raise StageError(
            f"cannot copy the store of {image.id} to the volume {volume}: "
            f"{_last_line(log, status)}{hint}"
        )


def assemble(
    project: Project,
    stage: Stage,
    parent: Image,
    volume: str,
    labels: Mapping[str, str],
    *,
    result: str,
    starts: Sequence[Image],
) -> Image | None:
    """Assemble the image of a stage from a result, on the first of ``starts`` that is suitable.

    The last of ``starts`` is always suitable. Return None if the volume lacks the result.

    Raise ``StageError`` if the files cannot be copied, for example for lack of space.
    """
    engine, settings = project.engine, project.settings
    base = project.ledger.find("base") or parent
    variables = _variables(committed_config(parent, labels))
    for start in starts:
        # A commit cannot remove a variable of its container.
        if not _variables(start.config) <= variables:
            continue
        used, files = 0, ""
        if start is not starts[-1]:
            used = bytes_above(project, start, base)
            if files_digest(start) != labels[FILES_LABEL]:
                files = _compare_files(project, volume, start, parent)
                if not files:
                    continue
        # The script is on the volume, because copying a file into the container would leave mount
        # points in the layer.
        script = f"{RESULTS}/{result}/assemble.sh"
        arguments = (VOLUME_MOUNT, result, labels[GUIX_KEY_LABEL], str(used), files, *STATE)
        binds = (f"{volume}:{VOLUME_MOUNT}",)
        work = shell_work("assemble", ("-c", _RUN_IF_PRESENT, script, *arguments), {}, binds)
        with work_container(engine, settings, start.id, work) as container:
            status, log = run_silently(engine, container)
            if status == _UNSUITABLE:
                continue
            if status == MISSING_ITEMS:
                return None
            if status:
                raise StageError(
                    f"{stage.name}: cannot copy the store items of the volume {volume}: "
                    f"{_last_line(log, status)}, and nothing was committed{full_disk(log)}"
                )
            # A program of the image can print a warning before, and a dry run prints nothing.
            sizes = re.search(r"^([0-9]{1,18})\n([0-9]{1,18})\n\Z", log, re.MULTILINE)
            live, waste = map(int, sizes.groups()) if sizes else (0, 0)
            tag = project.ledger.tag(stage.name)
            labels = {**labels, LIVE_LABEL: str(live) if sizes else ""}
            image = commit_image(project, container, parent, tag, labels, start=start)
        if waste > _MAX_WASTE + 2 * live:
            project.console.print(
                f"{stage.name}: removing the volume {volume}, because {human_size(waste)} of it "
                "are not in the latest images; the next run copies their items to a new one"
            )
            # Another run that uses the volume removes it later.
            with suppress(EngineError):
                engine.remove_volume(volume)
        return image
    raise AssertionError


def is_reusable(project: Project, stage: Stage, parent: Image, current: Image) -> bool:
    """Whether an image can be assembled on the current image of its stage.

    It must share layers with the base image. Files outside of Guix's directories must not be the
    stage's own.
    """
    shared = shared_layers(current, project.ledger.find("base") or parent)
    layers = len(current.layers)
    has_room = layers - shared < _MAX_LAYERS and layers < LAYERS_MAX
    return not stage.as_root and shared > 0 and has_room


def _variables(config: Mapping[str, Any]) -> set[str]:
    return {line.partition("=")[0] for line in config.get("Env") or ()}


def _compare_files(project: Project, volume: str, start: Image, parent: Image) -> str:
    """Find which files outside of Guix's directories differ between two images.

    Return the directory on the volume that lists them for ``assemble.sh``; empty if the images lack
    the programs to do that.
    """
    directory = f"{RESULTS}/{new_result()}"
    for image, command in ((start, "list"), (parent, "compare")):
        arguments = (command, directory, *STATE)
        work = _script_work("files", ("other-files.sh",), *arguments, volume=volume)
        with work_container(project.engine, project.settings, image.id, work) as container:
            status, log = run_silently(project.engine, container)
        if status:
            project.console.detail(f"store: cannot compare the files: {_last_line(log, status)}")
            return ""
    return directory


def guix_state(project: Project, image: Image) -> tuple[str, str]:
    """Return digests of an image's Guix with all that it has installed, and of its trusted keys.

    Both are empty if the image cannot run a shell script. A dry run assumes the keys of the current
    base stage.
    """
    work = _script_work("state", ("guix-state.sh",))
    try:
        with work_container(project.engine, project.settings, image.id, work) as container:
            status, log = run_silently(project.engine, container)
    except EngineError as error:
        # An image without a shell can be pushed, but Guix cannot run in it.
        if "executable file" not in str(error):
            raise
        return "", ""
    if project.engine.is_dry:
        current = project.ledger.find("base")
        return "", current.labels.get(TRUST_LABEL, "") if current else ""
    digests = re.findall(r"^[0-9a-f]{64}$", log, re.MULTILINE)
    expected = ("state", "keys")
    if status or len(digests) != len(expected):
        return "", ""
    return digests[0], digests[1]


def check_store(project: Project, volume: str, image: Image) -> str:
    """Return why the database of a volume is damaged, or an empty string.

    ``image`` is one that has Guix.
    """
    scripts = ("check-store.sh", "check-store.scm", "database.scm")
    work = _script_work("check-store", scripts, VOLUME_MOUNT, volume=volume)
    with work_container(project.engine, project.settings, image.id, work) as container:
        status, log = run_silently(project.engine, container)
    line = _last_line(log, status)
    return "" if status == 0 and line == "ok" else line


def bytes_above(project: Project, image: Image, base: Image) -> int:
    """Return the size of an image's layers that the base image does not have, in bytes."""
    layers = project.engine.layers(image.id)
    return sum(layer.size for layer in layers[shared_layers(image, base) :])


def _script_work(name: str, scripts: Sequence[str], *arguments: str, volume: str = "") -> Work:
    """Return a work that runs the first of ``scripts``, which finds the others next to it."""
    binds = (f"{volume}:{VOLUME_MOUNT}",) if volume else ()
    argv = (f"{WORK_DIRECTORY}/{scripts[0]}", *arguments)
    return shell_work(name, argv, resource_files(scripts), binds)


def _last_line(log: str, status: int) -> str:
    lines = log.strip().splitlines()
    return printable(clean(lines[-1])) if lines else f"exit status {status}"
