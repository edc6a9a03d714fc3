"""The task ``release``: ``build.json``, the index of packed files."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from fake_engine import BufferConsole, new_site

from guix_tasks.commands.pack_records import Packed, load, save
from guix_tasks.commands.release import release
from guix_tasks.errors import CheckError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from guix_tasks.settings import Settings

CHANNELS = [{"name": "guix", "url": "https://guix.test", "commit": "a" * 40}]
URL = "https://example.org/v1"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    loaded = new_site(tmp_path, RELEASE_URL=URL).settings()
    loaded.output_directory.mkdir()
    return loaded


def create_pack(
    settings: Settings, system: str = "x86_64-linux", format_: str = "tarball", text: str = "x"
) -> Packed:
    """Create a packed file and its record."""
    file = f"hello-1-{system}.{format_}"
    (settings.output_directory / file).write_text(text)
    record = Packed(system, format_, file, hashlib.sha256(text.encode()).hexdigest(), CHANNELS)
    save(settings, record)
    return record


def run_release(settings: Settings) -> dict[str, Any]:
    path = release(settings, BufferConsole())
    assert path == settings.output_directory / "build.json"
    text = path.read_text()
    index: dict[str, Any] = json.loads(text)
    assert text == f"{json.dumps(index, indent=2, sort_keys=True)}\n"
    assert [file for file in path.parent.iterdir() if file.name.startswith(".")] == []
    return index


def entry(record: Packed, url: str = URL) -> dict[str, Any]:
    return {"url": f"{url}/{record.file}", "sha256": record.sha256, "channels": CHANNELS}


def test_saved_records_are_loaded(settings: Settings) -> None:
    records = [create_pack(settings), create_pack(settings, format_="docker")]
    assert sorted(load(settings), key=str) == sorted(records, key=str)


def test_each_system_has_an_entry(settings: Settings) -> None:
    first, second = create_pack(settings), create_pack(settings, "aarch64-linux")
    assert run_release(settings) == {"x86_64-linux": entry(first), "aarch64-linux": entry(second)}


def test_other_format_is_in_the_entry_of_its_system(settings: Settings) -> None:
    first, second = create_pack(settings), create_pack(settings, format_="docker")
    assert run_release(settings) == {"x86_64-linux": {**entry(first), "docker": entry(second)}}


def test_unchanged_file_keeps_its_url(settings: Settings) -> None:
    first, second = create_pack(settings), create_pack(settings, "aarch64-linux")
    run_release(settings)
    second = create_pack(settings, "aarch64-linux", text="new")
    next_release = replace(settings, release_url="https://example.org/v2/")
    index = run_release(next_release)
    assert index["x86_64-linux"] == entry(first)
    assert index["aarch64-linux"] == entry(second, "https://example.org/v2")


def test_unchanged_files_need_no_release_url(settings: Settings) -> None:
    create_pack(settings)
    index = run_release(settings)
    assert run_release(replace(settings, release_url=None)) == index


def test_entries_of_other_tools_are_kept(settings: Settings) -> None:
    previous = {
        "riscv64-linux": {"url": "https://a.test/x", "sha256": "1", "cache": {"url": "y"}},
        "x86_64-linux": {"url": "https://a.test/z", "sha256": "2", "cache": {"url": "c"}},
    }
    (settings.output_directory / "build.json").write_text(json.dumps(previous))
    record = create_pack(settings)
    assert run_release(settings) == {
        "riscv64-linux": previous["riscv64-linux"],
        "x86_64-linux": {**entry(record), "cache": {"url": "c"}},
    }


def test_record_of_another_job_needs_no_file(settings: Settings) -> None:
    record = create_pack(settings, "aarch64-linux")
    (settings.output_directory / record.file).unlink()
    console = BufferConsole()
    release(settings, console)
    assert f"{record.file} does not exist here" in console.text
    assert run_release(settings) == {"aarch64-linux": entry(record)}


def test_changed_file_is_an_error(settings: Settings) -> None:
    record = create_pack(settings)
    (settings.output_directory / record.file).write_text("other")
    with pytest.raises(CheckError, match=r"differs from the packed file: .* run `inv pack` again"):
        release(settings, BufferConsole())
    assert not (settings.output_directory / "build.json").exists()


def test_missing_release_url_is_an_error(settings: Settings) -> None:
    create_pack(settings)
    with pytest.raises(UsageError, match="set RELEASE_URL, or use `--url"):
        release(replace(settings, release_url=None), BufferConsole())


def test_nothing_to_release_is_an_error(settings: Settings) -> None:
    with pytest.raises(UsageError, match=r"nothing to release: .* run `inv pack` first"):
        release(settings, BufferConsole())


def test_file_name_is_quoted_in_the_url(settings: Settings) -> None:
    record = replace(create_pack(settings), file="a~1+2 x.tar.gz")
    save(settings, record)
    assert run_release(settings)["x86_64-linux"]["url"] == f"{URL}/a~1%2B2%20x.tar.gz"


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "1", "null", "{}", '{"system": "x"}', "[" * 100_000, "\udcff",
        '{"system": 1, "format": "a", "file": "b", "sha256": "c", "channels": []}',
        '{"system": "x", "format": "a", "file": "\\ud800", "sha256": "c", "channels": []}',
        '{"system": "x", "format": "a", "file": "../b", "sha256": "c", "channels": []}',
        '{"system": "x", "format": "a", "file": "b", "sha256": "c", "channels": {}}',
        '{"system": "x", "format": "a", "file": "b", "sha256": "c", "channels": [], "more": 1}',
    ],
)  # fmt: skip
def test_invalid_record_is_reported(settings: Settings, text: str) -> None:
    path = settings.output_directory / "build-x86_64-linux.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UsageError, match=r"build-x86_64-linux.json is not a record of `inv pack`"):
        load(settings)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"x86_64-linux": 1}', '{"x86_64-linux": {"docker": "y"}}', "\udcff"]
)
def test_invalid_build_json_is_reported(settings: Settings, text: str) -> None:
    create_pack(settings, format_="docker")
    path = settings.output_directory / "build.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UsageError, match=r"build.json is not a valid build.json; delete it"):
        release(settings, BufferConsole())
    assert path.read_bytes() == text.encode(errors="surrogateescape")
