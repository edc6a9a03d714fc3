"""The task ``pack``: packages, file names, options and incomplete transfers."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import tracemalloc
from typing import TYPE_CHECKING

import pytest
from fake_engine import IMAGE, FakeContainer, Output, Site, console_text, outline

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


def fake_pack(
    built_site: Site, names: Sequence[str] = ("hello 2.12.2",), ending: str = "tarball-pack.tar.gz"
) -> dict[str, str]:
    """Make the fake Guix pack packages, and return the files of the work container."""
    store_item, files = f"/gnu/store/{'0' * 32}-{ending}", {}

    def behaviour(container: FakeContainer) -> Output:
        for name in ("stage", "pack.scm", "manifest.scm"):
            files[name] = container.text(f"{WORK_DIRECTORY}/{name}")
        for name in names:
            yield False, f"is packed:{name.replace(' ', chr(9), 1)}\n".encode()
        yield True, b"building...\n"
        yield False, f"{store_item}\n".encode()
        container.write(store_item, CONTENT)
        container.remove_files(WORK_DIRECTORY)

    built_site.engine.behaviour = behaviour
    return files


def run_pack(built_site: Site, options: Pack | None = None, name: str = "", *packages: str) -> Path:
    path = pack.pack(built_site.project(), options or Pack(), name, packages)
    assert path
    return path


def test_unwritable_output_directory_is_reported_before_the_work(
    built_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_pack(built_site)
    monkeypatch.setattr(os, "access", lambda path, _: path != built_site.directory)

    def fail() -> None:
        with pytest.raises(PermissionError):
            run_pack(built_site)

    assert built_site.trace_stages(fail) == []


def output_files(built_site: Site) -> list[str]:
    """Return the names of the files in ``out/`` except logs."""
    return sorted(path.name for path in built_site.directory.glob("out/*") if path.name != "logs")


def test_pack_writes_file_checksum_and_record(built_site: Site) -> None:
    fake_pack(built_site)
    initial_state = outline(built_site.engine)
    path = run_pack(built_site)
    assert path == built_site.directory / "out" / "hello-2.12.2-x86_64-linux.tar.gz"
    assert path.read_text() == CONTENT
    assert path.stat().st_mode & 0o111 == 0
    checksum = path.with_name(f"{path.name}.sha256").read_text()
    assert checksum == f"{DIGEST}  hello-2.12.2-x86_64-linux.tar.gz\n"
    record = json.loads((path.parent / "build-x86_64-linux.json").read_text())
    assert record == {
        "system": "x86_64-linux",
        "format": "tarball",
        "file": path.name,
        "sha256": DIGEST,
        "channels": [{"name": "guix", "url": "https://guix.test", "commit": "a" * 40}],
    }
    assert len(output_files(built_site)) == 3
    assert outline(built_site.engine) == initial_state
    assert built_site.engine.all_containers == {}


@pytest.mark.parametrize(
    ("names", "ending", "options", "name", "file"),
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
def test_file_name_has_package_version_and_system(
    built_site: Site, *, names: list[str], ending: str, options: Pack, name: str, file: str
) -> None:
    fake_pack(built_site, names, ending)
    assert run_pack(built_site, options, name).name == file.replace("SYSTEM", "x86_64-linux")


def test_each_format_has_a_separate_record(built_site: Site) -> None:
    fake_pack(built_site)
    run_pack(built_site)
    fake_pack(built_site, ending="docker-pack.tar.gz")
    run_pack(built_site, Pack("docker"))
    records = [name for name in output_files(built_site) if name.startswith("build-")]
    assert records == ["build-x86_64-linux-docker.json", "build-x86_64-linux.json"]


def test_options_are_passed_to_guix_pack(built_site: Site) -> None:
    files = fake_pack(built_site)
    run_pack(built_site, Pack("docker", 2, ("/bin=bin", "/a b=c"), "zstd", 7, "bin/hello"))
    assert files["stage"] == (
        "#!/bin/sh\n"
        "exec guix pack --format=docker --relocatable --relocatable --symlink=/bin=bin "
        f"'--symlink=/a b=c' --compression=zstd --max-layers=7 --entry-point=bin/hello "
        f"--manifest={WORK_DIRECTORY}/pack.scm\n"
    )


def test_manifest_and_packages_are_packed(built_site: Site) -> None:
    text = '(specifications->manifest (list "tar"))\n'
    built_site.write("manifest.scm", text)
    built_site.env["GUIX_MANIFEST"] = "manifest.scm"
    built_site.make("install")
    files = fake_pack(built_site)
    run_pack(built_site)
    assert files["manifest.scm"] == text
    project_manifest = f'(primitive-load "{WORK_DIRECTORY}/manifest.scm")'
    assert f'(list {project_manifest} (specifications->manifest \'("hello")))' in files["pack.scm"]


def test_packages_of_the_command_line_replace_those_of_the_settings(built_site: Site) -> None:
    built_site.write("manifest.scm", "(specifications->manifest (list))\n")
    built_site.env["GUIX_MANIFEST"] = "manifest.scm"
    built_site.make("install")
    files = fake_pack(built_site)
    run_pack(built_site, None, "", "tar@1.35", "git:send-email")
    assert files["manifest.scm"] == ""
    assert '\'("tar@1.35" "git:send-email")' in files["pack.scm"]
    assert "primitive-load" not in files["pack.scm"]


@pytest.mark.parametrize(
    ("options", "name", "packages", "message"),
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
def test_invalid_option_is_reported_before_the_work(
    built_site: Site, options: Pack, name: str, packages: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        run_pack(built_site, options, name, *packages)
    assert built_site.engine.changing_calls() == []


def test_nothing_to_pack_is_an_error(built_site: Site) -> None:
    built_site.env["GUIX_PACKAGES"] = ""
    with pytest.raises(UsageError, match="nothing to pack: set GUIX_PACKAGES or GUIX_MANIFEST"):
        run_pack(built_site)


def test_stale_image_is_not_packed(built_site: Site) -> None:
    built_site.engine.guix.heads["guix"] = "c" * 40
    built_site.make("pull", update=True)
    with pytest.raises(UsageError, match=r"install is stale \(.*; run `inv install.*, then pack"):
        run_pack(built_site)
    assert output_files(built_site) == []


def test_pack_requires_only_a_pull(site: Site) -> None:
    site.make("base", "pull")
    fake_pack(site)
    assert run_pack(site, None, "", "hello").read_text() == CONTENT


def test_record_without_a_pull_has_no_channels(site: Site) -> None:
    site.env["GUIX_CHANNELS"] = ""
    site.make("base")
    fake_pack(site)
    run_pack(site)
    record = json.loads((site.directory / "out" / "build-x86_64-linux.json").read_text())
    assert record["channels"] == []


def test_error_of_guix_pack_is_reported(built_site: Site) -> None:
    def fail(container: FakeContainer) -> Output:
        container.status = 1
        yield True, b"guix pack: error: x: unknown package\n"

    built_site.engine.behaviour = fail
    with pytest.raises(StageError, match=r"pack: x: unknown package, and nothing"):
        run_pack(built_site)
    assert output_files(built_site) == ["failed"]
    assert built_site.engine.all_containers == {}


def test_missing_store_item_is_an_error(built_site: Site) -> None:
    def print_no_item(container: FakeContainer) -> Output:
        yield True, b"well\n"

    built_site.engine.behaviour = print_no_item
    with pytest.raises(StageError, match="printed no store item"):
        run_pack(built_site)
    assert output_files(built_site) == []


def make_archive(kind: bytes, size: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        member = tarfile.TarInfo("x")
        member.type, member.size = kind, size
        tar.addfile(member, io.BytesIO(b"y" * size) if size else None)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("archive", "message"),
    [
        (b"", "sent only a part of it"),
        (b"nonsense" * 200, "sent only a part of it"),
        (make_archive(tarfile.REGTYPE, 1 << 20)[: 1 << 19], "sent only a part of it"),
        (make_archive(tarfile.DIRTYPE, 0), "is not a regular file"),
    ],
    ids=["nothing", "nonsense", "half", "a directory"],
)
def test_incomplete_transfer_keeps_the_previous_file(
    built_site: Site, monkeypatch: pytest.MonkeyPatch, archive: bytes, message: str
) -> None:
    fake_pack(built_site)
    path = run_pack(built_site)
    initial_files = output_files(built_site)
    monkeypatch.setattr(
        built_site.engine, "copy_out", lambda *_: iter([archive] if archive else [])
    )
    with pytest.raises(EngineError, match=message):
        run_pack(built_site)
    assert output_files(built_site) == initial_files
    assert path.read_text() == CONTENT
    assert built_site.engine.all_containers == {}


def test_large_file_is_not_read_into_memory(
    built_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_pack(built_site)
    size, chunk = 64 << 20, b"z" * (1 << 16)

    def copy_out(*_arguments: object) -> Iterator[bytes]:
        member = tarfile.TarInfo("x")
        member.size, member.mode = size, 0o555
        yield member.tobuf()
        for _ in range(size // len(chunk)):
            yield chunk
        yield b"\0" * 1024

    monkeypatch.setattr(built_site.engine, "copy_out", copy_out)
    tracemalloc.start()
    path = run_pack(built_site)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size == size
    assert path.stat().st_mode & 0o100
    assert peak < size // 4


def test_token_in_a_channel_url_is_not_in_the_record(built_site: Site) -> None:
    channels = (built_site.directory / "channels.scm").read_text()
    url = "https://me:hunter2-token@guix.test"
    built_site.write("channels.scm", channels.replace("https://guix.test", url))
    built_site.make("pull", update=True)
    built_site.make("install")
    fake_pack(built_site)
    run_pack(built_site)
    record = (built_site.directory / "out" / "build-x86_64-linux.json").read_text()
    assert "guix.test" in record
    assert "hunter2" not in record


def test_each_platform_is_packed(built_site: Site) -> None:
    built_site.env["PLATFORMS"] = "linux/amd64 linux/386"
    for platform in built_site.settings().platforms:
        built_site.env["PLATFORMS"] = str(platform)
        built_site.make("install", upstream=True)
    built_site.env["PLATFORMS"] = "linux/amd64 linux/386"
    fake_pack(built_site)
    for project in built_site.project().each_platform():
        assert pack.pack(project, Pack())
    assert {spec.platform for spec in built_site.engine.specs[-2:]} == {"linux/amd64", "linux/386"}


def test_dry_run_shows_the_command(built_site: Site) -> None:
    project = built_site.project()
    dry_project = built_site.project(
        TracedEngine(built_site.engine, project.console, perform=False)
    )
    initial_calls = built_site.engine.changing_calls()
    assert pack.pack(dry_project, Pack()) is None
    assert built_site.engine.changing_calls() == initial_calls
    assert f"+ guix pack --format=tarball --manifest={WORK_DIRECTORY}/pack.scm" in console_text(
        dry_project
    )
    assert output_files(built_site) == []
    assert IMAGE in built_site.engine.tags


def test_last_store_item_of_the_report_is_the_pack() -> None:
    report = "is packed:a\t1\n/gnu/store/x.drv\nsomething\nis packed:b\t2\n/gnu/store/y\n\n"
    assert guix.packed(report) == ("/gnu/store/y", [("a", "1"), ("b", "2")])
    assert guix.packed("") == ("", [])
