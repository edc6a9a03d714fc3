"""Inputs of a BuildKit build."""

from __future__ import annotations

import errno
import io
import json
import os
import stat
import tarfile
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from fake_engine import FakeEngine, FakeRegistry, new_site, publish_base

from guix_tasks.buildkit.context import (
    local_base_image,
    save_as_layout,
    write_environment,
    write_mounts,
    write_step,
)
from guix_tasks.errors import BuilderError, UsageError
from guix_tasks.oci.reference import ImageReference

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from guix_tasks.engine.api import Image
    from guix_tasks.settings import Settings


def new_settings(tmp_path: Path, **env: str) -> Settings:
    return new_site(tmp_path / "project", None, **env).settings()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "build"
    path.mkdir()
    return path


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_modes_of_a_step_do_not_depend_on_the_umask(
    tmp_path: Path, directory: Path, umask: int
) -> None:
    (tmp_path / "file").touch(0o640)
    settings = new_settings(tmp_path, MOUNTS=f"{tmp_path / 'file'}:/file")
    directory.chmod(0o700)
    original_umask = os.umask(umask)
    try:
        write_step(settings, directory, "pull", {"stage": b"#!/bin/sh\n", "x/y": b""}, force=False)
        write_mounts(settings, directory)
    finally:
        os.umask(original_umask)
    modes = {
        str(path.relative_to(directory)): f"{path.stat().st_mode & 0o777:o}"
        for path in directory.rglob("*")
    }
    assert modes == {
        "work": "755",
        "work/pull": "755",
        "work/pull/entry-point.sh": "755",
        "work/pull/environment": "644",
        "work/pull/stage": "755",
        "work/pull/x": "755",
        "work/pull/x/y": "644",
        "work/mounts": "755",
        "work/mounts/0": "640",
    }
    assert directory.stat().st_mode & 0o777 == 0o700


def files(directory: Path) -> dict[str, bytes]:
    paths = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


# --- Steps ----------------------------------------------------------------------------------


def test_step_has_the_files_of_a_work_container(tmp_path: Path, directory: Path) -> None:
    (tmp_path / "a.pub").write_text("key\n")
    settings = new_settings(tmp_path, GUIX_SUBSTITUTE_KEYS=str(tmp_path / "a.pub"))
    write_step(
        settings, directory, "pull", {"stage": b"#!/bin/sh\n", "x/y.scm": b"()"}, force=False
    )
    step_files = files(directory / "work" / "pull")
    assert set(step_files) == {"entry-point.sh", "environment", "keys/0-a.pub", "stage", "x/y.scm"}
    assert step_files["keys/0-a.pub"] == b"key\n"
    assert step_files["x/y.scm"] == b"()"
    modes = {
        name: stat.S_IMODE((directory / "work" / "pull" / name).stat().st_mode)
        for name in step_files
    }
    assert {name for name, mode in modes.items() if mode == 0o755} == {"entry-point.sh", "stage"}
    assert {mode for name, mode in modes.items() if "." in name and "entry" not in name} == {0o644}


def test_environment_is_outside_of_the_steps(tmp_path: Path, directory: Path) -> None:
    settings = replace(
        new_settings(tmp_path), proxies={"https_proxy": "http://me:hunter2@proxy; '$x"}
    )
    write_environment(settings, directory)
    write_step(settings, directory, "install", {}, force=False)
    contents = files(directory)
    assert contents.pop("environment").decode() == (
        "GUIX_SANDBOX=privileged\nHOME=/root\nUSER=root\nLOGNAME=root\n"
        "GUIX_DISTRO_AGE_WARNING=12000m\n"
        "https_proxy='http://me:hunter2@proxy; '\"'\"'$x'\n"
    )
    assert contents["work/install/environment"] == b""
    assert not [name for name, content in contents.items() if b"hunter2" in content]


def test_step_is_reproducible_unless_forced(tmp_path: Path, directory: Path) -> None:
    settings = new_settings(tmp_path)
    for name in ("a", "b"):
        write_step(settings, directory, name, {"stage": b"x"}, force=False)
    for name in ("c", "d"):
        write_step(settings, directory, name, {"stage": b"x"}, force=True)
    a, b, c, d = (files(directory / "work" / name) for name in "abcd")
    assert a == b
    assert c.pop("again") != d.pop("again")
    assert a == c == d


# --- MOUNTS ---------------------------------------------------------------------------------


def test_mounted_directory_is_a_context_and_file_is_copied(tmp_path: Path, directory: Path) -> None:
    (tmp_path / "dir é").mkdir()
    (tmp_path / "a,b $c").write_text("content")
    settings = new_settings(
        tmp_path, MOUNTS=f"'{tmp_path}/dir é:/a:ro' '{tmp_path}/a,b $c:/b/c' {tmp_path}/build:/d"
    )
    binds, contexts = write_mounts(settings, directory)
    assert binds == {
        "/a": "type=bind,from=mount-0,target=/a",
        "/b/c": "type=bind,from=work,target=/b/c,source=mounts/1,rw",
        "/d": "type=bind,from=mount-2,target=/d,rw",
    }
    assert contexts == {"mount-0": tmp_path / "dir é", "mount-2": directory}
    assert files(directory) == {"work/mounts/1": b"content"}


def test_empty_mounts_have_no_contexts(tmp_path: Path, directory: Path) -> None:
    assert write_mounts(new_settings(tmp_path), directory) == ({}, {})


@pytest.mark.parametrize("target", ["/a b", "/a,b", "/a\nb", '/a"b', "/a'b", "/$a", "/é", "/a\\b"])
def test_target_with_unsupported_characters_is_rejected(
    tmp_path: Path, directory: Path, target: str
) -> None:
    (mount,) = new_settings(tmp_path, MOUNTS="/etc:/x").mounts
    settings = replace(new_settings(tmp_path), mounts=(replace(mount, target=target),))
    with pytest.raises(UsageError) as error:
        write_mounts(settings, directory)
    assert str(error.value).startswith(f"MOUNTS: {target!r} has a character that a build step's")


def test_mounted_device_or_pipe_is_rejected(tmp_path: Path, directory: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for source in (tmp_path / "fifo", "/dev/zero"):
        with pytest.raises(UsageError, match=f"MOUNTS: {source} is neither a file nor a directory"):
            write_mounts(new_settings(tmp_path, MOUNTS=f"{source}:/x"), directory)


# --- The base image -------------------------------------------------------------------------

REFERENCE = ImageReference.parse("registry.test/base:1")


class SavingEngine(FakeEngine):
    """An engine that saves every image as a given archive."""

    def __init__(self, chunks: list[bytes]) -> None:
        super().__init__(FakeRegistry())
        self.chunks = chunks

    def save(self, image: str) -> Iterator[bytes]:
        return iter(self.chunks)


def make_image(engine: FakeEngine) -> Image:
    return engine.make_image({}, {"/x": b"x"}, tag=str(REFERENCE))


def saved_image(index: bytes | None, name: str = "blobs/sha256/x") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path, content in ((name, b"x" * 50_000), ("index.json", index)):
            if content is not None:
                member = tarfile.TarInfo(path)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


GOOD_INDEX = json.dumps({"manifests": [{"digest": "sha256:abc"}, {"digest": "x"}]}).encode()


def test_image_is_local_if_it_was_never_in_its_registry(tmp_path: Path) -> None:
    settings = new_settings(tmp_path, BASE_IMAGE=str(REFERENCE))
    engine = FakeEngine(FakeRegistry())
    assert local_base_image(engine, settings) is None
    image = make_image(engine)
    assert getattr(local_base_image(engine, settings), "id", None) == image.id
    engine.all_images[image.id] = replace(image, digests=("elsewhere.test/base@sha256:1",))
    assert local_base_image(engine, settings)
    # The containerd image store gives digests to images that were never pushed.
    engine.all_images[image.id] = replace(image, digests=("registry.test/base@sha256:1",))
    assert local_base_image(engine, settings)


def test_pulled_image_is_not_local(tmp_path: Path) -> None:
    settings = new_settings(tmp_path, BASE_IMAGE=str(REFERENCE))
    registry = FakeRegistry()
    publish_base(registry, str(REFERENCE))
    engine = FakeEngine(registry)
    engine.pull(str(REFERENCE), None)
    assert local_base_image(engine, settings) is None
    # The image of the engine counts, as for stages without BuildKit.
    publish_base(registry, str(REFERENCE), "newer")
    assert local_base_image(engine, settings)


@pytest.mark.parametrize("size", [1, 511, 10_240, 1 << 20])
def test_image_is_saved_from_chunks_of_any_size(directory: Path, size: int) -> None:
    data = saved_image(GOOD_INDEX)
    chunks = [data[start : start + size] for start in range(0, len(data), size)]
    engine = SavingEngine([b"", *chunks[:1], b"", *chunks[1:]])
    image = make_image(engine)
    context = save_as_layout(engine, image, REFERENCE, directory)
    layout = directory / image.id.replace(":", "-")
    assert context == f"oci-layout://{layout}@sha256:abc"
    assert (layout / "blobs/sha256/x").read_bytes() == b"x" * 50_000
    assert list(directory.iterdir()) == [layout]


def test_saved_image_is_kept_for_a_week_after_its_last_use(directory: Path) -> None:
    engine = SavingEngine([saved_image(GOOD_INDEX)])
    image = make_image(engine)
    other, unfinished = replace(image, id="sha256:other"), directory / "sha256-x.1234"
    context = save_as_layout(engine, image, REFERENCE, directory)
    engine.chunks = []
    assert save_as_layout(engine, image, REFERENCE, directory) == context
    unfinished.mkdir()
    week = 7 * 24 * 3600
    for path in directory.iterdir():
        os.utime(path, (time.time() - week - 1,) * 2)
    engine.chunks = [saved_image(GOOD_INDEX)]
    save_as_layout(engine, other, REFERENCE, directory)
    assert [path.name for path in directory.iterdir()] == ["sha256-other"]


def test_full_disk_is_not_reported_as_an_error_of_the_engine(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "extractall", fill)
    engine = SavingEngine([saved_image(GOOD_INDEX)])
    with pytest.raises(OSError, match="No space left"):
        save_as_layout(engine, make_image(engine), REFERENCE, directory)
    assert list(directory.iterdir()) == []


def truncated_archive(kind: bytes) -> bytes:
    """Return an archive whose only member lacks its terabyte of content."""
    member = tarfile.TarInfo("x")
    member.type, member.size = kind, 1 << 40
    return member.tobuf(tarfile.GNU_FORMAT)


def dangling_link() -> bytes:
    """Return an archive with a link to a missing member."""
    member = tarfile.TarInfo("link")
    member.type, member.linkname = tarfile.LNKTYPE, "nowhere"
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no archive at all" * 100,
        saved_image(GOOD_INDEX)[:20_000],
        saved_image(None),
        saved_image(b"{"),
        saved_image(b"\xff"),
        saved_image(b"[]"),
        saved_image(b"null"),
        saved_image(b'{"manifests": []}'),
        saved_image(b'{"manifests": null}'),
        saved_image(b'{"manifests": ["x"]}'),
        saved_image(GOOD_INDEX, "../outside"),
        saved_image(b"[" * 99_999),
        truncated_archive(tarfile.REGTYPE),
        # tarfile searches all members for the target of a link.
        dangling_link() + truncated_archive(tarfile.REGTYPE),
    ],
)
def test_invalid_oci_layout_is_an_error(directory: Path, data: bytes) -> None:
    engine = SavingEngine([data])
    with pytest.raises(BuilderError) as error:
        save_as_layout(engine, make_image(engine), REFERENCE, directory)
    assert str(error.value).startswith(
        f"this engine cannot save {REFERENCE} as an OCI layout (Docker 25 and newer can); "
    )
    assert not (directory / "outside").exists()
