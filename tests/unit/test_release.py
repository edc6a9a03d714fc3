"""Release: what was packed, joined in ``build.json``."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from fake_engine import Heard, new_site

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
    found = new_site(tmp_path, RELEASE_URL=URL).settings()
    found.output_directory.mkdir()
    return found


def packed(
    settings: Settings, system: str = "x86_64-linux", format_: str = "tarball", text: str = "x"
) -> Packed:
    """Something that was packed, its file included."""
    file = f"hello-1-{system}.{format_}"
    (settings.output_directory / file).write_text(text)
    made = Packed(system, format_, file, hashlib.sha256(text.encode()).hexdigest(), CHANNELS)
    save(settings, made)
    return made


def released(settings: Settings) -> dict[str, Any]:
    path = release(settings, Heard())
    assert path == settings.output_directory / "build.json"
    text = path.read_text()
    found: dict[str, Any] = json.loads(text)
    assert text == f"{json.dumps(found, indent=2, sort_keys=True)}\n"
    assert [each for each in path.parent.iterdir() if each.name.startswith(".")] == []
    return found


def entry(made: Packed, url: str = URL) -> dict[str, Any]:
    return {"url": f"{url}/{made.file}", "sha256": made.sha256, "channels": CHANNELS}


def test_what_was_packed_is_read_as_it_was_written(settings: Settings) -> None:
    both = [packed(settings), packed(settings, format_="docker")]
    assert sorted(load(settings), key=str) == sorted(both, key=str)


def test_an_entry_for_each_system(settings: Settings) -> None:
    one, two = packed(settings), packed(settings, "aarch64-linux")
    assert released(settings) == {"x86_64-linux": entry(one), "aarch64-linux": entry(two)}


def test_another_format_is_below_its_name(settings: Settings) -> None:
    one, two = packed(settings), packed(settings, format_="docker")
    assert released(settings) == {"x86_64-linux": {**entry(one), "docker": entry(two)}}


def test_what_did_not_change_stays_where_it_is(settings: Settings) -> None:
    one, two = packed(settings), packed(settings, "aarch64-linux")
    released(settings)
    two = packed(settings, "aarch64-linux", text="new")
    later = replace(settings, release_url="https://example.org/v2/")
    found = released(later)
    assert found["x86_64-linux"] == entry(one)
    assert found["aarch64-linux"] == entry(two, "https://example.org/v2")


def test_where_nothing_changed_no_address_is_needed(settings: Settings) -> None:
    packed(settings)
    before = released(settings)
    assert released(replace(settings, release_url=None)) == before


def test_what_was_not_packed_here_stays(settings: Settings) -> None:
    old = {
        "riscv64-linux": {"url": "https://a.test/x", "sha256": "1", "cache": {"url": "y"}},
        "x86_64-linux": {"url": "https://a.test/z", "sha256": "2", "cache": {"url": "c"}},
    }
    (settings.output_directory / "build.json").write_text(json.dumps(old))
    made = packed(settings)
    assert released(settings) == {
        "riscv64-linux": old["riscv64-linux"],
        "x86_64-linux": {**entry(made), "cache": {"url": "c"}},
    }


def test_a_part_of_another_job_needs_no_file(settings: Settings) -> None:
    made = packed(settings, "aarch64-linux")
    (settings.output_directory / made.file).unlink()
    console = Heard()
    release(settings, console)
    assert f"{made.file} does not exist here" in console.text
    assert released(settings) == {"aarch64-linux": entry(made)}


def test_a_file_that_changed_is_not_released(settings: Settings) -> None:
    made = packed(settings)
    (settings.output_directory / made.file).write_text("other")
    with pytest.raises(CheckError, match=r"differs from the packed file: .* run `inv pack` again"):
        release(settings, Heard())
    assert not (settings.output_directory / "build.json").exists()


def test_an_address_is_needed(settings: Settings) -> None:
    packed(settings)
    with pytest.raises(UsageError, match="set RELEASE_URL, or use `--url"):
        release(replace(settings, release_url=None), Heard())


def test_nothing_to_release_is_an_error(settings: Settings) -> None:
    with pytest.raises(UsageError, match=r"nothing to release: .* run `inv pack` first"):
        release(settings, Heard())


def test_a_name_is_quoted_in_an_address(settings: Settings) -> None:
    made = replace(packed(settings), file="a~1+2 x.tar.gz")
    save(settings, made)
    assert released(settings)["x86_64-linux"]["url"] == f"{URL}/a~1%2B2%20x.tar.gz"


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
def test_a_part_that_is_none_is_named(settings: Settings, text: str) -> None:
    path = settings.output_directory / "build-x86_64-linux.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UsageError, match=r"build-x86_64-linux.json is not a record of `inv pack`"):
        load(settings)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"x86_64-linux": 1}', '{"x86_64-linux": {"docker": "y"}}', "\udcff"]
)
def test_a_build_json_that_is_none_is_named(settings: Settings, text: str) -> None:
    packed(settings, format_="docker")
    path = settings.output_directory / "build.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UsageError, match=r"build.json is not a valid build.json; delete it"):
        release(settings, Heard())
    assert path.read_bytes() == text.encode(errors="surrogateescape")
