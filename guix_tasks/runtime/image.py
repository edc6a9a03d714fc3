"""Build the runtime image: the profile of the packages and what it needs, in an image layout.

Guix builds the profile in a work container of the install stage. The same container then writes
the store items of those layers that the layout does not have yet. Owners, times, modes and the
order of files are fixed, so the image is a function of the store items and of the settings.
"""

from __future__ import annotations

import io
import json
import tarfile
import time
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

from guix_tasks import guix
from guix_tasks.errors import StageError, UsageError
from guix_tasks.files import check_writable, read_file, text_digest
from guix_tasks.guix.nar import STORE_TIME, Nar
from guix_tasks.guix.search_paths import with_search_paths
from guix_tasks.oci.platform import Platform
from guix_tasks.oci.tar import as_file
from guix_tasks.runtime.contents import LINK, parse_contents
from guix_tasks.runtime.files import describe, image_files
from guix_tasks.runtime.layers import plan
from guix_tasks.runtime.layout import Layer, Layout
from guix_tasks.stages.container import WORK_DIRECTORY, Work, cache_prefix, fill, work_container
from guix_tasks.stages.images import CHANNELS_LABEL, PACKAGES_LABEL, key_of
from guix_tasks.stages.install import given_packages, install_stage
from guix_tasks.stages.lifecycle import Lifecycle
from guix_tasks.stages.runner import run_with_retries
from guix_tasks.stages.stage import FORGET_SUBSTITUTES, LOCK
from guix_tasks.stages.store import fill_store, store_volume, store_volumes, trust_digest
from guix_tasks.stages.substitute_server import local_server
from guix_tasks.ui.format import human_size, human_time
from guix_tasks.ui.log import LogReader

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from guix_tasks.engine.api import Image
    from guix_tasks.oci.reference import ImageReference
    from guix_tasks.runtime.contents import Contents
    from guix_tasks.runtime.layers import Item
    from guix_tasks.settings import Settings
    from guix_tasks.stages.project import Project
    from guix_tasks.ui.console import Step

CREATED = "1970-01-01T00:00:01Z"
"""Time of the image, which does not depend on the clock."""

KEY = "org.guix-tasks.key"
"""Annotation of an image of the layout: the key of what it was made from."""

_FORMAT = "1"
"""Version of what this module makes of the same store items and settings."""

_LINK_IN_CONTAINER = "/tmp/guix-tasks-profile"  # noqa: S108 -- inside the container


def build(project: Project, *, force: bool = False) -> str:
    """Build the runtime image in the layout and return its digest; empty in a dry run.

    Raise ``UsageError`` if install is not up to date, or ``StageError`` if Guix fails.
    """
    settings, console = project.settings, project.console
    required_image(settings)
    image = install_image(project)
    layout, name = Layout(layout_directory(settings)), image_name(image)
    key = text_digest(_FORMAT, key_of(image), json.dumps(_inputs(settings)))
    current = layout.find(name)
    if current.get("annotations", {}).get(KEY) == key and not force:
        console.print("runtime: up to date")
        return str(current["digest"])
    check_writable(settings.output_directory)
    manifest = make(project, image, layout, {} if force else layout.layers(current))
    if not manifest:
        return ""
    layout.publish(name, {**manifest, "platform": _platform(image), "annotations": {KEY: key}})
    return str(manifest["digest"])


def required_image(settings: Settings) -> ImageReference:
    """Return ``RUNTIME_IMAGE``. Raise ``UsageError`` if it is not set."""
    if settings.runtime_image is None:
        raise UsageError("RUNTIME_IMAGE is not set; set it to REGISTRY/REPOSITORY[:TAG]")
    return settings.runtime_image


def layout_directory(settings: Settings) -> Path:
    return settings.output_directory / "runtime"


def image_name(image: Image) -> str:
    """Return the name of the runtime image in the layout, which has one for each platform."""
    return Platform.parse(image.platform).tag_suffix


def install_image(project: Project) -> Image:
    """Return the image of the install stage. Raise ``UsageError`` if it is not up to date."""
    state = Lifecycle(project).state("install")
    if state.image is None:
        raise UsageError("install is missing; run `inv install`, then this task again")
    if state.why:
        raise UsageError(
            f"install is stale ({state.why}); run `inv install --upstream`, then this task again"
        )
    return state.image


def _inputs(settings: Settings) -> list[Any]:
    return [
        settings.runtime_layers,
        settings.runtime_entrypoint,
        settings.runtime_command,
        settings.runtime_user,
        settings.runtime_directory,
        settings.runtime_ports,
        sorted(settings.runtime_links.items()),
    ]


def _platform(image: Image) -> dict[str, str]:
    platform = Platform.parse(image.platform)
    variant = {"variant": platform.variant} if platform.variant else {}
    return {"os": platform.os, "architecture": platform.architecture, **variant}


def make(
    project: Project, image: Image, layout: Layout, known: Mapping[str, Layer]
) -> dict[str, Any]:
    """Build the profile, write the layers that are not ``known``, and the image.

    Return the descriptor of its manifest; an empty one in a dry run.
    """
    started, settings, engine = time.monotonic(), project.settings, project.engine
    given = given_packages(image)
    project = project.with_sandbox(image)
    store = _store(project, image)
    work = Work(
        "runtime",
        (f"{WORK_DIRECTORY}/stage",),
        _files(settings, given),
        local_server=local_server(project, "runtime"),
        store=store,
        logged=False,
    )
    with (
        project.console.step("runtime") as step,
        work_container(engine, project.settings, image.id, work) as container,
    ):
        report = run_with_retries(project, container, work)
        if engine.is_dry:
            return {}
        contents = parse_contents(report)
        files = image_files(settings, contents)
        last = [item for item in contents.items if item.path == contents.profile]
        others = [item for item in contents.items if item.path != contents.profile]
        groups = [*plan(others, settings.runtime_layers - 1), last]
        texts = [_content(contents, group) for group in groups]
        texts[-1] += f"files {text_digest(*map(describe, files))}\n"
        layers = {
            text: known[text]
            for text in texts
            if text in known and layout.blob(known[text].digest).exists()
        }
        missing = [number for number, text in enumerate(texts) if text not in layers]
        step.show_activity(lambda: f"writing {len(missing)} layers")
        paths = [item.path for number in missing for item in groups[number]]
        nars = _export(project, container, work, paths, step)
        for number in missing:
            own_files = files if groups[number] is last else ()
            members = _members(nars, groups[number], contents, own_files)
            try:
                layers[texts[number]] = layout.add_layer(texts[number], members)
            except (ValueError, tarfile.TarError) as error:
                raise StageError(
                    f"runtime: cannot read the store items of a layer: {error}; run it again"
                ) from None
    ordered = [layers[text] for text in texts]
    config = image_config(settings, image, contents, groups)
    manifest = layout.add_image(config, ordered)
    packed = human_size(sum(layer.size for layer in ordered))
    added = human_size(sum(layers[texts[number]].size for number in missing))
    project.console.print(
        f"runtime: {len(contents.items)} store items in {len(groups)} layers, {packed}; "
        f"{len(missing)} new layers, {added}; {human_time(time.monotonic() - started)}"
    )
    return manifest


def _store(project: Project, image: Image) -> str:
    """Return the volume with the warm store, filled from the image; empty without volumes."""
    if cache_prefix(project.settings) is None:
        return ""
    stage = install_stage(project.settings, given_packages(image))
    volume = store_volume(project, trust_digest(project, stage, image))
    if volume not in store_volumes(project):
        fill_store(project, volume, (image,))
    return volume


def _files(settings: Settings, given: Sequence[str]) -> dict[str, bytes]:
    """Return the files of the container: what to build, and the scripts that describe it."""
    manifest, packages = settings.guix_manifest, given or settings.guix_packages
    names = " ".join(f'"{package}"' for package in packages)
    loaded = f'(primitive-load "{WORK_DIRECTORY}/manifest.scm")' if manifest else ""
    profile = (
        "(use-modules (guix profiles) (gnu packages))\n"
        "(profile\n"
        " (content\n"
        f"  (concatenate-manifests (list {loaded} (specifications->manifest '({names}))))))\n"
    )
    build = (
        "guix", "build", f"--file={WORK_DIRECTORY}/profile.scm", f"--root={_LINK_IN_CONTAINER}",
    )  # fmt: skip
    describe = f"guix repl -- {WORK_DIRECTORY}/closure.scm {_LINK_IN_CONTAINER}"
    report = ("sh", "-c", f"{describe} && cat {_LINK_IN_CONTAINER}/etc/profile")
    scripts = ("closure.scm", "export.scm")
    return {
        "stage": guix.script([build], report, before=[*FORGET_SUBSTITUTES, *LOCK]).encode(),
        "profile.scm": profile.encode(),
        **({"manifest.scm": read_file(manifest)} if manifest else {}),
        **{name: Path(__file__).with_name(name).read_bytes() for name in scripts},
    }


def _content(contents: Contents, group: Sequence[Item]) -> str:
    """Return the annotation that describes the store items of a layer."""
    lines = (f"{PurePosixPath(item.path).name} {contents.hashes[item.path]}\n" for item in group)
    return "".join(sorted(lines))


def image_config(
    settings: Settings, image: Image, contents: Contents, groups: Sequence[Sequence[Item]]
) -> dict[str, Any]:
    """Return the configuration of the image, without its layers."""
    path = [f"PATH={LINK}/bin:{LINK}/sbin"]
    uid = settings.runtime_user[1]
    labels = {
        PACKAGES_LABEL: " ".join(contents.packages),
        CHANNELS_LABEL: image.labels.get(CHANNELS_LABEL, ""),
    }
    config = {
        "Env": with_search_paths(path, contents.search_paths),
        "Entrypoint": list(settings.runtime_entrypoint),
        "Cmd": list(settings.runtime_command),
        "User": f"{uid}:{uid}",
        "WorkingDir": settings.runtime_directory,
        "ExposedPorts": {port: {} for port in settings.runtime_ports},
        "Labels": {name: text for name, text in labels.items() if text},
    }
    return {
        **_platform(image),
        "created": CREATED,
        "config": {name: value for name, value in config.items() if value},
        "history": [
            {"created": CREATED, "created_by": " ".join(item.name for item in group)}
            for group in groups
        ],
    }


# --- Layers ---------------------------------------------------------------------------------


def _export(
    project: Project, container: str, work: Work, paths: Sequence[str], step: Step
) -> IO[bytes]:
    """Start the container again, and return the nars that it writes."""
    if not paths:
        return as_file(iter(()))
    argv = f"exec guix repl -- {WORK_DIRECTORY}/export.scm {WORK_DIRECTORY}/wanted"
    files = {
        **work.files,
        "stage": f"#!/bin/sh\n{argv}\n".encode(),
        "wanted": "".join(f"{path}\n" for path in paths).encode(),
    }
    fill(project.engine, project.settings, container, replace(work, files=files))
    return as_file(LogReader(step.log).results(project.engine.run(container)))


def _members(
    nars: IO[bytes],
    group: Sequence[Item],
    contents: Contents,
    files: Sequence[tuple[tarfile.TarInfo, bytes]],
) -> Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]:
    """Yield the members of a layer.

    Raise ``ValueError`` if an item is not complete, and ``StageError`` if it does not have the hash
    that Guix's database has.
    """
    for directory in ("gnu", "gnu/store"):
        member = tarfile.TarInfo(directory)
        member.type, member.mode, member.mtime = tarfile.DIRTYPE, 0o755, STORE_TIME
        yield member, None
    for item in group:
        nar = Nar(nars)
        yield from nar.members(item.path.lstrip("/"))
        if nar.sha256 != contents.hashes[item.path]:
            raise StageError(
                f"runtime: {item.path} is damaged: its hash is not that of Guix's database; "
                "`inv clean` removes the volumes with the store, then build again"
            )
    for member, data in files:
        yield member, io.BytesIO(data) if member.isreg() else None
