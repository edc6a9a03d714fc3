"""Push records: files of pushed platforms that jobs of a CI matrix pass on."""

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
DIGEST, OTHER_DIGEST = f"sha256:{'a' * 64}", f"sha256:{'b' * 64}"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return new_site(tmp_path).settings()


def test_saved_records_are_loaded(settings: Settings) -> None:
    first = Pushed("docker.io/my.site/app", (ARM32,), DIGEST)
    second = Pushed("debian", (AMD64, ARM64), OTHER_DIGEST, {"guix": "c" * 40})
    paths = [save(settings, record) for record in (first, second)]
    assert [path.name for path in paths] == ["linux-arm-v7.json", "linux-amd64_linux-arm64.json"]
    assert load(settings) == {paths[0]: first, paths[1]: second}
    assert [record.reference for record in (first, second)] == [
        f"docker.io/my.site/app@{DIGEST}",
        f"debian@{OTHER_DIGEST}",
    ]
    assert records_directory(settings) == paths[0].parent == settings.output_directory / "digests"


def test_record_of_the_same_platforms_is_replaced(settings: Settings) -> None:
    save(settings, Pushed("debian", (AMD64, ARM64), DIGEST))
    path = save(settings, Pushed("debian", (ARM64, AMD64), OTHER_DIGEST))
    (record,) = load(settings).values()
    assert record.digest == OTHER_DIGEST
    assert list(path.parent.iterdir()) == [path]  # no temporary file is left


def test_missing_directory_has_no_records(settings: Settings) -> None:
    assert load(settings) == {}


def test_other_files_are_ignored(settings: Settings) -> None:
    path = save(settings, Pushed("debian", (AMD64,), DIGEST))
    (path.parent / f".{path.name}.123").write_text("{")
    (path.parent / ".x.json").write_text("{")
    (path.parent / "README").write_text("x")
    assert list(load(settings)) == [path]


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
def test_invalid_record_is_reported(settings: Settings, record: bytes | dict[str, object]) -> None:
    path = save(settings, Pushed("debian", (AMD64,), DIGEST))
    if isinstance(record, bytes):
        path.write_bytes(record)
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), **record} if record else {}))
    with pytest.raises(UsageError) as caught:
        load(settings)
    assert str(caught.value) == (
        f"{path} is not a push record; delete it and push that platform again"
    )


def test_directory_with_the_name_of_a_record_is_reported(settings: Settings) -> None:
    path = save(settings, Pushed("debian", (AMD64,), DIGEST))
    path.with_name("x.json").mkdir()
    with pytest.raises(UsageError, match=r"x\.json is not a push record"):
        load(settings)


def test_tag_of_a_repository_is_removed(settings: Settings) -> None:
    path = save(settings, Pushed("debian", (AMD64,), DIGEST))
    path.write_text(path.read_text().replace("debian", "docker.io/library/debian:12"))
    assert load(settings)[path].reference == f"debian@{DIGEST}"
