"""Pack: what is packed, how its file is called, and that it comes wholly or not at all."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import tracemalloc
from typing import TYPE_CHECKING

import pytest
from fake_engine import IMAGE, FakeContainer, Output, Site, heard, outline

from guix_tasks import guix
from guix_tasks.commands import pack
from guix_tasks.engine.dry_run import TracedEngine
from guix_tasks.errors import EngineError, StageError, UsageError
from guix_tasks.guix import Pack
from guix_tasks.stages.container import WORK_DIRECTORY

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("serial_hashing")

CONTENT = "packed"
DIGEST = hashlib.sha256(CONTENT.encode()).hexdigest()


def packs(
    made: Site, names: Sequence[str] = ("hello 2.12.2",), ending: str = "tarball-pack.tar.gz"
) -> dict[str, str]:
    """Let Guix pack these; the files that it was given."""
    item, seen = f"/gnu/store/{'0' * 32}-{ending}", {}

    def behaviour(container: FakeContainer) -> Output:
        for name in ("stage", "pack.scm", "manifest.scm"):
            seen[name] = container.text(f"{WORK_DIRECTORY}/{name}")
        for name in names:
            yield False, f"is packed:{name.replace(' ', chr(9), 1)}\n".encode()
        yield True, b"building...\n"
        yield False, f"{item}\n".encode()
        container.write(item, CONTENT)
        container.forget(WORK_DIRECTORY)

    made.engine.behaviour = behaviour
    return seen


def run(made: Site, wanted: Pack | None = None, name: str = "", *packages: str) -> Path:
    path = pack.pack(made.project(), wanted or Pack(), name, packages)
    assert path
    return path


def test_output_directory_that_cannot_be_written_is_reported_before_the_work(
    made: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    packs(made)
    monkeypatch.setattr(os, "access", lambda path, _: path != made.directory)

    def refused() -> None:
        with pytest.raises(PermissionError):
            run(made)

    assert made.ran(refused) == []


def out(made: Site) -> list[str]:
    """What is in ``out/`` besides the logs."""
    return sorted(each.name for each in made.directory.glob("out/*") if each.name != "logs")


def test_the_file_its_checksum_and_what_a_release_needs(made: Site) -> None:
    packs(made)
    before = outline(made.engine)
    path = run(made)
    assert path == made.directory / "out" / "hello-2.12.2-x86_64-linux.tar.gz"
    assert path.read_text() == CONTENT
    assert path.stat().st_mode & 0o111 == 0
    checksum = path.with_name(f"{path.name}.sha256").read_text()
    assert checksum == f"{DIGEST}  hello-2.12.2-x86_64-linux.tar.gz\n"
    part = json.loads((path.parent / "build-x86_64-linux.json").read_text())
    assert part == {
        "system": "x86_64-linux",
        "format": "tarball",
        "file": path.name,
        "sha256": DIGEST,
        "channels": [{"name": "guix", "url": "https://guix.test", "commit": "a" * 40}],
    }
    assert len(out(made)) == 3
    assert outline(made.engine) == before
    assert made.engine.all_containers == {}


@pytest.mark.parametrize(
    ("names", "ending", "wanted", "name", "file"),
    [
        (["a 1", "b 2"], "tarball-pack.tar.gz", Pack(), "", "app-1-SYSTEM.tar.gz"),
        (["a 1", "b 2"], "tarball-pack.tar", Pack(compression="none"), "my", "my-1-SYSTEM.tar"),
        (["a 1", "a 1"], "tarball-pack.tar.xz", Pack(compression="xz"), "b", "b-1-SYSTEM.tar.xz"),
        (["a 1:/2 x"], "tarball-pack.tar.gz", Pack(), "", "a-1__2_x-SYSTEM.tar.gz"),
        (["a-pack 1"], "a-pack-tarball-pack.tar", Pack(), "", "a-pack-1-SYSTEM.tar"),
        (["a 1"], "docker-pack.tar.gz", Pack("docker"), "", "a-1-SYSTEM.docker.tar.gz"),
        (["a 1"], "squashfs-pack.gz.squashfs", Pack("squashfs"), "", "a-1-SYSTEM.gz.squashfs"),
        ([], "tarball-pack.tar.gz", Pack(), "", "app-1-SYSTEM.tar.gz"),
    ],
)
def test_how_the_file_is_called(
    made: Site, *, names: list[str], ending: str, wanted: Pack, name: str, file: str
) -> None:
    packs(made, names, ending)
    assert run(made, wanted, name).name == file.replace("SYSTEM", "x86_64-linux")


def test_each_format_has_a_part_of_its_own(made: Site) -> None:
    packs(made)
    run(made)
    packs(made, ending="docker-pack.tar.gz")
    run(made, Pack("docker"))
    parts = [each for each in out(made) if each.startswith("build-")]
    assert parts == ["build-x86_64-linux-docker.json", "build-x86_64-linux.json"]


def test_the_options_are_those_of_guix_pack(made: Site) -> None:
    seen = packs(made)
    run(made, Pack("docker", 2, ("/bin=bin", "/a b=c"), "zstd", 7, "bin/hello"))
    assert seen["stage"] == (
        "#!/bin/sh\n"
        "exec guix pack --format=docker --relocatable --relocatable --symlink=/bin=bin "
        f"'--symlink=/a b=c' --compression=zstd --max-layers=7 --entry-point=bin/hello "
        f"--manifest={WORK_DIRECTORY}/pack.scm\n"
    )


def test_the_manifest_and_the_packages_are_packed(made: Site) -> None:
    text = '(specifications->manifest (list "tar"))\n'
    made.write("manifest.scm", text)
    made.env["GUIX_MANIFEST"] = "manifest.scm"
    made.make("install")
    seen = packs(made)
    run(made)
    assert seen["manifest.scm"] == text
    theirs = f'(primitive-load "{WORK_DIRECTORY}/manifest.scm")'
    assert f'(list {theirs} (specifications->manifest \'("hello")))' in seen["pack.scm"]


def test_packages_that_are_named_are_packed_instead(made: Site) -> None:
    made.write("manifest.scm", "(specifications->manifest (list))\n")
    made.env["GUIX_MANIFEST"] = "manifest.scm"
    made.make("install")
    seen = packs(made)
    run(made, None, "", "tar@1.35", "git:send-email")
    assert seen["manifest.scm"] == ""
    assert '\'("tar@1.35" "git:send-email")' in seen["pack.scm"]
    assert "primitive-load" not in seen["pack.scm"]


@pytest.mark.parametrize(
    ("wanted", "name", "packages", "said"),
    [
        (
            Pack("oci"),
            "",
            [],
            "--format: guix pack does not support 'oci'; choose one of tarball, .*appimage$",
        ),
        (Pack(compression="rar"), "", [], "--compression: .*; choose one of gzip, .*none$"),
        (Pack(max_layers=3), "", [], "--max-layers: .* `--format docker`"),
        (Pack("docker", max_layers=-1), "", [], "--max-layers: use a number above 0"),
        (Pack("appimage"), "", [], "needs `--entry-point PROGRAM`"),
        (Pack(symlinks=("/bin",)), "", [], "--symlink: '/bin' is invalid; use SOURCE=TARGET"),
        (Pack(symlinks=("/bin=\udce9",)), "", [], "--symlink: .* malformed character"),
        (Pack(entry_point="a\nb"), "", [], "--entry-point: .* use a program"),
        (Pack(), "../x", [], "--name: '../x' is invalid; use at most 100 letters and digits"),
        (Pack(), ".x", [], "--name: "),
        (Pack(), "", ["-r"], "--package: '-r' is not a package"),
    ],
)
def test_what_cannot_be_is_refused_first(
    made: Site, wanted: Pack, name: str, packages: list[str], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        run(made, wanted, name, *packages)
    assert made.engine.changing_calls() == []


def test_nothing_to_pack_is_an_error(made: Site) -> None:
    made.env["GUIX_PACKAGES"] = ""
    with pytest.raises(UsageError, match="nothing to pack: set GUIX_PACKAGES or GUIX_MANIFEST"):
        run(made)


def test_a_stale_image_packs_nothing(made: Site) -> None:
    made.engine.guix.heads["guix"] = "c" * 40
    made.make("pull", update=True)
    with pytest.raises(UsageError, match=r"install is stale \(.*; run `inv install.*, then pack"):
        run(made)
    assert out(made) == []


def test_a_pull_is_enough_to_pack(site: Site) -> None:
    site.make("base", "pull")
    packs(site)
    assert run(site, None, "", "hello").read_text() == CONTENT


def test_a_guix_that_was_never_pulled_has_no_channels(site: Site) -> None:
    site.env["GUIX_CHANNELS"] = ""
    site.make("base")
    packs(site)
    run(site)
    part = json.loads((site.directory / "out" / "build-x86_64-linux.json").read_text())
    assert part["channels"] == []


def test_what_guix_cannot_pack_is_its_error(made: Site) -> None:
    def fails(container: FakeContainer) -> Output:
        container.status = 1
        yield True, b"guix pack: error: x: unknown package\n"

    made.engine.behaviour = fails
    with pytest.raises(StageError, match=r"pack: x: unknown package, and nothing"):
        run(made)
    assert out(made) == ["failed"]
    assert made.engine.all_containers == {}


def test_a_guix_that_says_nothing_is_an_error(made: Site) -> None:
    def says_nothing(container: FakeContainer) -> Output:
        yield True, b"well\n"

    made.engine.behaviour = says_nothing
    with pytest.raises(StageError, match="printed no store item"):
        run(made)
    assert out(made) == []


def _archive(kind: bytes, size: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        member = tarfile.TarInfo("x")
        member.type, member.size = kind, size
        tar.addfile(member, io.BytesIO(b"y" * size) if size else None)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("archive", "said"),
    [
        (b"", "sent only a part of it"),
        (b"nonsense" * 200, "sent only a part of it"),
        (_archive(tarfile.REGTYPE, 1 << 20)[: 1 << 19], "sent only a part of it"),
        (_archive(tarfile.DIRTYPE, 0), "is not a regular file"),
    ],
    ids=["nothing", "nonsense", "half", "a directory"],
)
def test_what_does_not_come_whole_leaves_what_was_there(
    made: Site, monkeypatch: pytest.MonkeyPatch, archive: bytes, said: str
) -> None:
    packs(made)
    path = run(made)
    before = out(made)
    monkeypatch.setattr(made.engine, "copy_out", lambda *_: iter([archive] if archive else []))
    with pytest.raises(EngineError, match=said):
        run(made)
    assert out(made) == before
    assert path.read_text() == CONTENT
    assert made.engine.all_containers == {}


def test_a_large_file_is_not_held_in_memory(made: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    packs(made)
    size, piece = 64 << 20, b"z" * (1 << 16)

    def copy_out(*_: object) -> Iterator[bytes]:
        member = tarfile.TarInfo("x")
        member.size, member.mode = size, 0o555
        yield member.tobuf()
        for _each in range(size // len(piece)):
            yield piece
        yield b"\0" * 1024

    monkeypatch.setattr(made.engine, "copy_out", copy_out)
    tracemalloc.start()
    path = run(made)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size == size
    assert path.stat().st_mode & 0o100
    assert peak < size // 4


def test_a_token_in_a_channels_url_is_not_published(made: Site) -> None:
    channels = (made.directory / "channels.scm").read_text()
    url = "https://me:hunter2-token@guix.test"
    made.write("channels.scm", channels.replace("https://guix.test", url))
    made.make("pull", update=True)
    made.make("install")
    packs(made)
    run(made)
    part = (made.directory / "out" / "build-x86_64-linux.json").read_text()
    assert "guix.test" in part
    assert "hunter2" not in part


def test_each_platform_is_packed(made: Site) -> None:
    made.env["PLATFORMS"] = "linux/amd64 linux/386"
    for platform in made.settings().platforms:
        made.env["PLATFORMS"] = str(platform)
        made.make("install", upstream=True)
    made.env["PLATFORMS"] = "linux/amd64 linux/386"
    packs(made)
    for project in made.project().each_platform():
        assert pack.pack(project, Pack())
    assert {spec.platform for spec in made.engine.specs[-2:]} == {"linux/amd64", "linux/386"}


def test_a_dry_run_shows_what_it_would_run(made: Site) -> None:
    project = made.project()
    dry = made.project(TracedEngine(made.engine, project.console, perform=False))
    before = made.engine.changing_calls()
    assert pack.pack(dry, Pack()) is None
    assert made.engine.changing_calls() == before
    assert f"+ guix pack --format=tarball --manifest={WORK_DIRECTORY}/pack.scm" in heard(dry)
    assert out(made) == []
    assert IMAGE in made.engine.tags


def test_what_was_packed_is_the_last_store_item_that_is_told() -> None:
    report = "is packed:a\t1\n/gnu/store/x.drv\nsomething\nis packed:b\t2\n/gnu/store/y\n\n"
    assert guix.packed(report) == ("/gnu/store/y", [("a", "1"), ("b", "2")])
    assert guix.packed("") == ("", [])
