"""What platforms were pushed, as files that jobs of a CI matrix hand on."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from fake_engine import new_site

from guix_tasks.errors import UsageError
from guix_tasks.oci.platform import Platform
from guix_tasks.stages.push_records import Pushed, load, records_directory, save

if TYPE_CHECKING:
    from pathlib import Path

    from guix_tasks.settings import Settings

AMD64, ARM64 = Platform.parse("linux/amd64"), Platform.parse("linux/arm64")
ARM32 = Platform.parse("linux/arm/v7")
DIGEST, OTHER = f"sha256:{'a' * 64}", f"sha256:{'b' * 64}"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return new_site(tmp_path).settings()


def test_what_was_pushed_is_read_as_it_was_written(settings: Settings) -> None:
    one = Pushed("docker.io/my.site/app", (ARM32,), DIGEST)
    two = Pushed("debian", (AMD64, ARM64), OTHER, {"guix": "c" * 40})
    places = [save(settings, each) for each in (one, two)]
    assert [each.name for each in places] == ["linux-arm-v7.json", "linux-amd64_linux-arm64.json"]
    assert load(settings) == {places[0]: one, places[1]: two}
    assert [each.reference for each in (one, two)] == [
        f"docker.io/my.site/app@{DIGEST}",
        f"debian@{OTHER}",
    ]
    assert records_directory(settings) == places[0].parent == settings.output_directory / "digests"


def test_a_push_replaces_what_was_pushed_for_the_same_platforms(settings: Settings) -> None:
    save(settings, Pushed("debian", (AMD64, ARM64), DIGEST))
    place = save(settings, Pushed("debian", (ARM64, AMD64), OTHER))
    (found,) = load(settings).values()
    assert found.digest == OTHER
    assert list(place.parent.iterdir()) == [place]  # and nothing unfinished is left


def test_where_nothing_was_pushed_there_is_nothing(settings: Settings) -> None:
    assert load(settings) == {}


def test_what_another_push_is_just_writing_is_passed_over(settings: Settings) -> None:
    place = save(settings, Pushed("debian", (AMD64,), DIGEST))
    (place.parent / f".{place.name}.123").write_text("{")
    (place.parent / ".x.json").write_text("{")
    (place.parent / "README").write_text("x")
    assert list(load(settings)) == [place]


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"{",
        b"\xff",
        b"null",
        b"[]",
        b'"x"',
        b"[" * 100_000,
        {},
        {"platforms": []},
        {"platforms": None},
        {"platforms": "linux/amd64"},
        {"platforms": [1]},
        {"platforms": ["linux/s390x"]},
        {"digest": None},
        {"digest": ""},
        {"digest": "sha256:x"},
        {"digest": f"{DIGEST}\n"},
        {"commits": None},
        {"commits": ["guix"]},
        {"repository": ""},
        {"repository": None},
        {"repository": "Debian"},
        {"repository": "--tag=x"},
        {"repository": f"debian@{DIGEST}"},
        {"repository": "http://me:hunter2@host/x"},
    ],
)
def test_a_file_that_no_push_wrote_is_named(
    settings: Settings, record: bytes | dict[str, object]
) -> None:
    place = save(settings, Pushed("debian", (AMD64,), DIGEST))
    if isinstance(record, bytes):
        place.write_bytes(record)
    else:
        place.write_text(json.dumps({**json.loads(place.read_text()), **record} if record else {}))
    with pytest.raises(UsageError) as caught:
        load(settings)
    assert str(caught.value) == (
        f"{place} is not a push record; delete it and push that platform again"
    )


def test_a_folder_in_the_place_of_a_file_is_named(settings: Settings) -> None:
    place = save(settings, Pushed("debian", (AMD64,), DIGEST))
    place.with_name("x.json").mkdir()
    with pytest.raises(UsageError, match=r"x\.json is not a push record"):
        load(settings)


def test_the_tag_of_a_reference_is_no_part_of_it(settings: Settings) -> None:
    place = save(settings, Pushed("debian", (AMD64,), DIGEST))
    place.write_text(place.read_text().replace("debian", "docker.io/library/debian:12"))
    assert load(settings)[place].reference == f"debian@{DIGEST}"
