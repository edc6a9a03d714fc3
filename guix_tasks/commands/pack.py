"""Run ``guix pack`` in a work container and copy the result to ``out/``."""

from __future__ import annotations

import re
import shlex
import tarfile
import time
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from guix_tasks import guix
from guix_tasks.commands.pack_records import Packed, save
from guix_tasks.commands.push import check_up_to_date, require_image
from guix_tasks.errors import EngineError, StageError, UsageError
from guix_tasks.files import check_writable, content_digest, read_file, write_whole
from guix_tasks.oci.platform import Platform
from guix_tasks.oci.reference import quoted
from guix_tasks.oci.tar import as_file
from guix_tasks.settings.parsers import check_text, package
from guix_tasks.stages.container import WORK_DIRECTORY, Work, work_container
from guix_tasks.stages.images import CHANNELS_LABEL
from guix_tasks.stages.runner import run_with_retries
from guix_tasks.stages.substitute_server import local_server
from guix_tasks.ui import redact
from guix_tasks.ui.format import human_size, human_time, pasteable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guix_tasks.engine.api import Image
    from guix_tasks.settings import Settings
    from guix_tasks.stages.project import Project

_CHUNK_SIZE = 1 << 20


def pack(
    project: Project, options: guix.Pack, name: str = "", packages: Sequence[str] = ()
) -> Path | None:
    """Pack ``packages``, or ``GUIX_MANIFEST`` and ``GUIX_PACKAGES``, and return the file.

    Guix of ``IMAGE`` packs; nothing is committed. The file is named after the package and its
    version or, if there are several packages, after ``IMAGE`` and its tag. ``name`` replaces the
    name of the package or image. Return None in a dry run.

    Raise ``UsageError``, ``EngineError``, or ``StageError`` if Guix fails.
    """
    started = time.monotonic()
    settings, console = project.settings, project.console
    _check_options(options, name, packages)
    argv = guix.pack_argv(options, f"{WORK_DIRECTORY}/pack.scm")
    files = _files(settings, argv, packages)
    check_writable(settings.output_directory)
    image = require_image(project)
    check_up_to_date(project, image, "pack")
    project = project.with_sandbox(image)
    work = Work(
        "pack", (f"{WORK_DIRECTORY}/stage",), files, local_server=local_server(project, "pack")
    )
    with (
        console.step("pack"),
        work_container(project.engine, project.settings, image.id, work) as container,
    ):
        console.detail(f"pack: in a {project.settings.guix_sandbox.value} container")
        console.detail(pasteable(argv))
        report = run_with_retries(project, container, work)
        if project.engine.is_dry:
            return None
        item, contents = guix.packed(report)
        if not item:
            raise StageError(
                "pack: guix pack printed no store item; the output above shows the reason"
            )
        system = Platform.parse(image.platform).guix_system
        stem = _stem(settings, contents, name)
        path = (
            settings.output_directory / f"{stem}-{system}{guix.pack_suffix(options.format, item)}"
        )
        digest = _copy_out(project, container, item, path)
    save(settings, Packed(system, options.format, path.name, digest, _channels(image)))
    duration, size = human_time(time.monotonic() - started), human_size(path.stat().st_size)
    console.print(f"pack: {path.name}, {size}, {duration}")
    return path


def _check_options(options: guix.Pack, name: str, packages: Sequence[str]) -> None:
    """Raise ``UsageError`` for options that Guix would reject, before a container is created."""
    _check_choice("--format", options.format, guix.PACK_FORMATS)
    _check_choice("--compression", options.compression, ("", *guix.COMPRESSIONS))
    if options.max_layers < 0 or (options.max_layers and options.format != guix.DOCKER):
        raise UsageError("--max-layers: use a number above 0, together with `--format docker`")
    if options.format == "appimage" and not options.entry_point:
        raise UsageError("--format appimage needs `--entry-point PROGRAM`, for example bin/hello")
    try:
        for text in packages:
            package(text, Path())
    except ValueError as error:
        raise UsageError(f"--package: {error}") from None
    for link in options.symlinks:
        _check_pattern("--symlink", link, "[^=]+=[^=]+", "SOURCE=TARGET, for example /bin=bin")
    program = "a program of a package, for example bin/hello"
    _check_pattern("--entry-point", options.entry_point, ".*", program)
    _check_pattern("--name", name, r"([A-Za-z0-9][\w+.~-]{,99})?", "at most 100 letters and digits")


def _check_choice(option: str, text: str, choices: tuple[str, ...]) -> None:
    if text not in choices:
        names = ", ".join(filter(None, choices))
        raise UsageError(
            f"{option}: guix pack does not support {quoted(text)}; choose one of {names}"
        )


def _check_pattern(option: str, text: str, pattern: str, description: str) -> None:
    try:
        check_text(text)
    except ValueError as error:
        raise UsageError(f"{option}: {quoted(text)} {error}") from None
    if not re.fullmatch(pattern, text, re.ASCII):
        raise UsageError(f"{option}: {quoted(text)} is invalid; use {description}")


def _files(settings: Settings, argv: Sequence[str], packages: Sequence[str]) -> dict[str, bytes]:
    """Return the files of the container: the manifest to pack and the script that packs it."""
    manifest = None if packages else settings.guix_manifest
    packages = packages or settings.guix_packages
    if not manifest and not packages:
        raise UsageError(
            "nothing to pack: set GUIX_PACKAGES or GUIX_MANIFEST, or use `--package NAME`"
        )
    manifest_path = f"{WORK_DIRECTORY}/manifest.scm" if manifest else None
    return {
        "stage": f"#!/bin/sh\nexec {shlex.join(argv)}\n".encode(),
        "pack.scm": guix.pack_manifest(manifest_path, packages).encode(),
        **({"manifest.scm": read_file(manifest)} if manifest else {}),
    }


def _stem(settings: Settings, packages: list[tuple[str, str]], name: str) -> str:
    image = settings.image
    default_name, version = image.repository.rpartition("/")[2], image.tag
    if len({package for package, _ in packages}) == 1:
        default_name, version = packages[0]
    # Name and version of a package may contain any character.
    return re.sub(r"[^\w+.~-]", "_", f"{name or default_name}-{version}", flags=re.ASCII)


def _copy_out(project: Project, container: str, item: str, path: Path) -> str:
    """Copy a file from a container atomically, write its checksum file and return its SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        stream = as_file(project.engine.copy_out(container, item))
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            header = next(iter(tar))
            file = tar.extractfile(header)
            if file is None:
                raise EngineError(
                    f"cannot copy {item}: it is not a regular file; run `inv pack` again"
                )
            chunks = iter(lambda: file.read(_CHUNK_SIZE), b"")
            write_whole(path, chunks, 0o777 if header.mode & 0o100 else 0o666)
    except (tarfile.TarError, StopIteration):
        raise EngineError(
            f"cannot copy {PurePosixPath(item).name}: the engine sent only a part of it; "
            "run `inv pack` again"
        ) from None
    digest = content_digest(path)
    write_whole(path.with_name(f"{path.name}.sha256"), f"{digest}  {path.name}\n".encode())
    return digest


def _channels(image: Image) -> list[dict[str, str]]:
    """Return the channels of an image's Guix; they are unknown if ``pull`` never ran."""
    text = image.labels.get(CHANNELS_LABEL, "")
    redact.add(*redact.secrets_in(text))
    return [
        {"name": channel.name, "url": channel.url, "commit": channel.commit or ""}
        for channel in guix.channels(text).values()
    ]
