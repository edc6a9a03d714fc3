"""Pack: ``guix pack`` in a work container, its result in ``out/``."""

from __future__ import annotations

import hashlib
import re
import shlex
import tarfile
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from guix_tasks import guix
from guix_tasks.commands.pack_records import Packed, save
from guix_tasks.commands.push import image_to_use, refuse_stale
from guix_tasks.errors import EngineError, StageError, UsageError
from guix_tasks.files import read_file, write_whole
from guix_tasks.oci.archive import oci_archive
from guix_tasks.oci.platform import Platform
from guix_tasks.oci.reference import quoted
from guix_tasks.oci.tar import as_file
from guix_tasks.settings.parsers import check_text, package
from guix_tasks.stages.container import FOLDER, Work, work_container
from guix_tasks.stages.images import CHANNELS_LABEL
from guix_tasks.stages.runner import run_again
from guix_tasks.ui import redact
from guix_tasks.ui.format import human_size, human_time, pasteable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from guix_tasks.engine.api import Image
    from guix_tasks.settings import Settings
    from guix_tasks.stages.project import Project

_PIECE = 1 << 20
"""Bytes that are read at once."""


def pack_each(project: Project, wanted: guix.Pack, name: str, packages: Sequence[str]) -> None:
    """Pack for each platform, and print the files."""
    for each in project.each_platform():
        path = pack(each, wanted, name, packages)
        if path:
            each.console.result(str(path))


def pack(
    project: Project, wanted: guix.Pack, name: str = "", packages: Sequence[str] = ()
) -> Path | None:
    """Pack ``GUIX_MANIFEST`` and ``GUIX_PACKAGES``, or these packages; the file in ``out/``.

    It is done with the Guix of ``IMAGE``, and nothing is committed.  The file is called after the
    one package and its version, or after ``IMAGE`` and its tag where there are several; ``name``
    stands for the first of these.  None on a dry run.  Raises ``UsageError``, ``EngineError``, and
    ``StageError`` where Guix fails.
    """
    started = time.monotonic()
    settings, console = project.settings, project.console
    _refuse(wanted, name, packages)
    files = _files(settings, wanted, packages)
    image = image_to_use(project)
    refuse_stale(project, image, "pack")
    project = project.settled(image)
    work = Work("pack", (f"{FOLDER}/stage",), files, nearby=project.nearby("pack"))
    with (
        console.step("pack"),
        work_container(project.engine, project.settings, image.id, work) as container,
    ):
        console.detail(f"pack: in a {project.settings.guix_sandbox.value} container")
        console.detail(pasteable(guix.pack_argv(wanted, f"{FOLDER}/pack.scm")))
        report = run_again(project, container, work)
        if project.engine.is_dry:
            return None
        item, contents = guix.packed(report)
        if not item:
            raise StageError("pack: guix pack did not say what it made; the output above says why")
        system = Platform.parse(image.platform).guix_system
        stem = _stem(settings, contents, name)
        path = settings.output_folder / f"{stem}-{system}{guix.pack_suffix(wanted.format, item)}"
        digest = _copy_out(project, container, item, path, wanted)
    save(settings, Packed(system, wanted.format, path.name, digest, _channels(image)))
    took, size = human_time(time.monotonic() - started), human_size(path.stat().st_size)
    console.say(f"pack: {path.name}, {size}, {took}")
    return path


def _refuse(wanted: guix.Pack, name: str, packages: Sequence[str]) -> None:
    """Refuse what Guix would refuse, before a container is made."""
    _refuse_unknown("--format", wanted.format, guix.PACK_FORMATS)
    _refuse_unknown("--compression", wanted.compression, ("", *guix.COMPRESSIONS))
    if wanted.format == guix.OCI and wanted.compression not in _OCI_COMPRESSIONS:
        raise UsageError("--compression: layers of an OCI archive take gzip or none")
    if wanted.max_layers < 0 or (wanted.max_layers and wanted.format not in guix.IMAGES):
        raise UsageError("--max-layers: write a number above 0, beside `--format` docker or oci")
    if wanted.format == "appimage" and not wanted.entry_point:
        raise UsageError("--format appimage needs `--entry-point PROGRAM`, as bin/hello")
    for each in packages:
        _refuse_package(each)
    for spec in wanted.symlinks:
        _refuse_text("--symlink", spec, "[^=]+=[^=]+", "SOURCE=TARGET, as /bin=bin")
    _refuse_text("--entry-point", wanted.entry_point, ".*", "a program of a package, as bin/hello")
    _refuse_text("--name", name, r"([A-Za-z0-9][\w+.~-]*)?", "letters and digits")


_OCI_COMPRESSIONS = ("", "gzip", "none")


def _refuse_unknown(option: str, text: str, known: tuple[str, ...]) -> None:
    if text not in known:
        names = ", ".join(filter(None, known))
        raise UsageError(f"{option}: guix pack has no {quoted(text)}; it has {names}")


def _refuse_text(option: str, text: str, pattern: str, right: str) -> None:
    try:
        check_text(text)
    except ValueError as error:
        raise UsageError(f"{option}: {quoted(text)} {error}") from None
    if not re.fullmatch(pattern, text, re.ASCII):
        raise UsageError(f"{option}: {quoted(text)} cannot be used; write {right}")


def _refuse_package(text: str) -> None:
    try:
        package(text, Path())
    except ValueError as error:
        raise UsageError(f"--package: {error}") from None


def _files(settings: Settings, wanted: guix.Pack, packages: Sequence[str]) -> dict[str, bytes]:
    """What the container finds: the manifest of what is packed, and the script that packs it."""
    manifest = None if packages else settings.guix_manifest
    packages = packages or settings.guix_packages
    if not manifest and not packages:
        raise UsageError(
            "nothing to pack: set GUIX_PACKAGES or GUIX_MANIFEST, or say `--package NAME`"
        )
    theirs = f"{FOLDER}/manifest.scm" if manifest else None
    argv = guix.pack_argv(wanted, f"{FOLDER}/pack.scm")
    return {
        "stage": f"#!/bin/sh\nexec {shlex.join(argv)}\n".encode(),
        "pack.scm": guix.pack_manifest(theirs, packages).encode(),
        **({"manifest.scm": read_file(manifest)} if manifest else {}),
    }


def _stem(settings: Settings, packages: list[tuple[str, str]], name: str) -> str:
    image = settings.image
    own, version = image.repository.rpartition("/")[2], image.tag
    if len({package for package, _ in packages}) == 1:
        own, version = packages[0]
    # A package's author may have put anything there.
    return re.sub(r"[^\w+.~-]", "_", f"{name or own}-{version}", flags=re.ASCII)


def _copy_out(project: Project, container: str, item: str, path: Path, wanted: guix.Pack) -> str:
    """Bring a file of a container here, wholly or not at all, and its checksum; its SHA-256."""
    digest = hashlib.sha256()

    def hashed(pieces: Iterator[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            digest.update(piece)
            yield piece

    path.parent.mkdir(parents=True, exist_ok=True)
    with _opened(project, container, item) as (header, pieces), _scratch(path) as folder:
        content = pieces
        if wanted.format == guix.OCI:
            compressed = wanted.compression != "none"
            content = oci_archive(as_file(pieces), Path(folder), compressed=compressed)
        write_whole(path, hashed(content), 0o777 if header.mode & 0o100 else 0o666)
    line = f"{digest.hexdigest()}  {path.name}\n"
    write_whole(path.with_name(f"{path.name}.sha256"), line.encode())
    return digest.hexdigest()


def _scratch(path: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder on the disk of what is to be made, which has the room for it."""
    return tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.")


@contextmanager
def _opened(
    project: Project, container: str, item: str
) -> Iterator[tuple[tarfile.TarInfo, Iterator[bytes]]]:
    """A file of a container: its header and its content, which comes as it is read."""
    stream = as_file(project.engine.copy_out(container, item))
    try:
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            header = next(iter(tar))
            file = tar.extractfile(header)
            if file is None:
                raise EngineError(f"{item} is no file, so it cannot be brought here; pack it anew")
            yield header, iter(lambda: file.read(_PIECE), b"")
    except (tarfile.TarError, StopIteration):
        name = PurePosixPath(item).name
        raise EngineError(f"the engine did not send all of {name}; run it again") from None


def _channels(image: Image) -> list[dict[str, str]]:
    """The channels of an image's Guix; none are known of one that was never pulled."""
    text = image.labels.get(CHANNELS_LABEL, "")
    redact.add(*redact.secrets_in(text))
    return [
        {"name": each.name, "url": each.url, "commit": each.commit or ""}
        for each in guix.channels(text).values()
    ]
