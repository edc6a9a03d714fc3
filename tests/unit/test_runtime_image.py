"""Contents of a runtime image: store items as Guix has them, and few other files."""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from test_nar import TREE, nar

from guix_tasks.errors import StageError, UsageError
from guix_tasks.oci.reference import ImageReference
from guix_tasks.runtime import image, push, skopeo
from guix_tasks.runtime.contents import parse_contents
from guix_tasks.runtime.files import image_files
from guix_tasks.runtime.layers import Item
from guix_tasks.runtime.layout import CONTENT
from guix_tasks.settings import load_settings

if TYPE_CHECKING:
    from pathlib import Path

    from guix_tasks.settings import Settings

PROFILE = f"/gnu/store/{'p' * 32}-profile"
HELLO = f"/gnu/store/{'h' * 32}-hello-2.12"
REPORT = f"""profile\t{PROFILE}
package\thello\t2.12\tout
package\tbind\t9.1\tutils
program\thello
certificates
item\t{HELLO}\tab\t100\t{HELLO}
item\t{PROFILE}\tcd\t50\t{HELLO} {PROFILE}
export PATH="${{GUIX_PROFILE:-{PROFILE}}}/bin${{PATH:+:}}$PATH"
export SSL_CERT_DIR="${{GUIX_PROFILE:-{PROFILE}}}/etc/ssl/certs"
"""


def settings(directory: Path, **values: str) -> Settings:
    return load_settings(directory, directory, values)


def test_report_of_the_container_is_parsed() -> None:
    contents = parse_contents(REPORT)
    assert contents.profile == PROFILE
    assert contents.hashes == {HELLO: "ab", PROFILE: "cd"}
    assert contents.items[0] == Item("hello-2.12", HELLO, 100, frozenset({HELLO}))
    assert contents.packages == ["bind@9.1:utils", "hello@2.12"]
    assert contents.programs == ["hello"]
    assert contents.has_certificates
    assert contents.search_paths == 'export SSL_CERT_DIR="/profile/etc/ssl/certs"'


@pytest.mark.parametrize("report", ["", "profile\t/x", "nothing\nof\tthis"])
def test_incomplete_report_is_an_error(report: str) -> None:
    with pytest.raises(StageError, match="did not describe the profile"):
        parse_contents(report)


def test_image_has_few_files_outside_of_the_store(tmp_path: Path) -> None:
    given = settings(tmp_path, RUNTIME_USER="app:1000", RUNTIME_DIRECTORY="/srv/app",
                     RUNTIME_LINKS="/bin/sh=bin/sh")  # fmt: skip
    files = image_files(given, parse_contents(REPORT))
    members = {f"/{member.name}": (member, data) for member, data in files}
    assert list(members) == [
        "/tmp", "/var", "/var/tmp", "/root", "/srv", "/srv/app", "/etc", "/etc/passwd",  # noqa: S108
        "/etc/group", "/etc/nsswitch.conf", "/profile", "/etc/ssl", "/etc/ssl/certs", "/bin",
        "/bin/sh",
    ]  # fmt: skip
    assert b"app:x:1000:1000:app:/:/bin/sh\n" in members["/etc/passwd"][1]
    assert members["/profile"][0].linkname == PROFILE
    assert members["/bin/sh"][0].linkname == "/profile/bin/sh"
    assert {member.uid for member, _ in files} == {0, 1000}
    assert {member.mtime for member, _ in files} == {1}


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"RUNTIME_ENTRYPOINT": "helo"}, "RUNTIME_ENTRYPOINT: the packages have no program helo; "),
        ({"RUNTIME_COMMAND": "x"}, "RUNTIME_COMMAND: .*set one of theirs, for example hello"),
    ],
)
def test_program_that_no_package_has_is_an_error(
    tmp_path: Path, values: dict[str, str], error: str
) -> None:
    with pytest.raises(UsageError, match=error):
        image_files(settings(tmp_path, **values), parse_contents(REPORT))


@pytest.mark.parametrize("links", ["/etc=etc", "/a=bin /a/b=bin", "/a/b=bin /a=bin"])
def test_paths_that_exclude_each_other_are_an_error(tmp_path: Path, links: str) -> None:
    given = settings(tmp_path, RUNTIME_LINKS=links)
    with pytest.raises(UsageError, match="exclude each other; remove one"):
        image_files(given, parse_contents(REPORT))


@pytest.mark.parametrize(
    "values",
    [
        {"RUNTIME_ENTRYPOINT": "hello", "RUNTIME_COMMAND": "--traditional"},
        {"RUNTIME_ENTRYPOINT": "/profile/libexec/hello"},
    ],
)
def test_arguments_and_paths_are_no_programs(tmp_path: Path, values: dict[str, str]) -> None:
    assert image_files(settings(tmp_path, **values), parse_contents(REPORT))


def test_store_item_has_to_have_the_hash_of_the_database() -> None:
    data, contents = nar(TREE), parse_contents(REPORT)
    item, digest = contents.items[0], hashlib.sha256(data).hexdigest()

    def read(stream: bytes, expected: str) -> list[str]:
        hashed = replace(contents, hashes={HELLO: expected})
        names = []
        for member, file in image._members(io.BytesIO(stream), [item], hashed, []):
            names.append(member.name)
            if file:
                file.read(member.size)
        return names

    assert read(data, digest)[:3] == ["gnu", "gnu/store", HELLO.lstrip("/")]
    with pytest.raises(StageError, match=r"hello-2\.12 is damaged: its hash is not that of"):
        read(data, "0" * 64)
    for cut in (8, 100):
        with pytest.raises(ValueError, match="the end comes too early"):
            read(data[:-cut], digest)


def manifest(*lines: str, layer: str = "a") -> dict[str, object]:
    content = "".join(f"{line}\n" for line in lines)
    return {"layers": [{"digest": layer, "annotations": {CONTENT: content}}]}


@pytest.mark.parametrize(
    ("own", "pushed", "difference"),
    [
        (manifest("a 1", "b 2"), manifest("a 1", "b 3"), "other content: b"),
        (manifest("a 1", "b 2"), manifest("a 1", "c 2"), "only here: b; only in the registry: c"),
        (manifest("a 1"), manifest("a 1"), "the settings of the image differ"),
        (manifest("a 1"), manifest("a 1", layer="b"), "the layers are packed differently"),
        (
            manifest(*(f"{n} 0" for n in range(7))),
            manifest(),
            "only here: 0, 1, 2, 3, 4 and 2 more",
        ),
    ],
)
def test_difference_names_store_items(
    own: dict[str, object], pushed: dict[str, object], difference: str
) -> None:
    assert push._difference(own, pushed) == difference


@pytest.mark.parametrize(
    ("log", "error"),
    [
        ('time="x" level=fatal msg="reading: say \\"no\\""', 'say "no"; check RUNTIME_IMAGE'),
        ("last line\n\n", "last line"),
        ("", "no message"),
        ('msg="manifest unknown: manifest unknown"', "is not in its registry; run"),
    ],
)
def test_error_of_skopeo_is_one_line(log: str, error: str) -> None:
    message = str(skopeo._failure(ImageReference.parse("a.example/b:c"), log))
    assert "a.example/b:c" in message
    assert error in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [
        ("localhost:5055", True), ("127.0.0.9", True), ("[::1]:5000", True),
        ("registry.example:5000", False), ("localhost.example", False), ("10.0.0.1:80", False),
    ],
)  # fmt: skip
def test_only_a_registry_of_this_machine_needs_no_certificate(host: str, is_loopback: bool) -> None:
    assert skopeo._is_loopback(host) is is_loopback
