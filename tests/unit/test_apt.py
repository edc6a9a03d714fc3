"""Use of APT to download and unpack packages of Debian."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import guix_tasks.bootstrap
from guix_tasks.bootstrap import apt as apt_module
from guix_tasks.bootstrap.apt import Apt, debian_address, error_line, host_suite, unpack
from guix_tasks.errors import BuilderError, EngineError

if TYPE_CHECKING:
    from collections.abc import Iterable

MIRROR = "http://mirror.example/debian/"


def new_apt(tmp_path: Path, *suites: str) -> Apt:
    suites = suites or ("bookworm", "forky")
    apt = Apt(suites, failure=BuilderError, directory=tmp_path / "apt")
    apt.__dict__.update(mirror=MIRROR, _architecture="amd64")
    return apt


def test_address_of_the_debian_archive_is_found() -> None:
    targets = [
        "Node Source|Node Source|main|https://node.example/",
        "Debian|Debian-Security|main|http://security.example/",
        "Debian|Debian|contrib|http://contrib.example/",
        "Debian|Debian|main|cdrom:[Debian 12]/",
        f"Debian|Debian|main|{MIRROR}",
        "Debian|Debian|main|http://second.example/",
    ]
    assert debian_address("\n".join(targets)) == MIRROR


@pytest.mark.parametrize("targets", ["", "x", "|||http://unknown.example/", "Ubuntu|Ubuntu|main|x"])
def test_sources_without_debian_have_no_address(targets: str) -> None:
    assert debian_address(targets) is None


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("W: old\nE: Failed to fetch X\nE: Some index files failed\n", "Failed to fetch X"),
        ("Error: Unable to locate package x\n", "Unable to locate package x"),
        ("dpkg-deb: error: 'x' is not a Debian format archive", "dpkg-deb: error: 'x' is not"),
        ("something went wrong\n\n", "something went wrong"),
        ("", "no output"),
    ],
)
def test_error_line_is_the_first_error(output: str, line: str) -> None:
    assert error_line(output).startswith(line)


@pytest.mark.parametrize(
    ("release", "suite"),
    [
        ({"ID": "debian", "VERSION_CODENAME": "bookworm"}, "bookworm"),
        ({"ID": "debian"}, None),
        ({"ID": "ubuntu", "VERSION_CODENAME": "noble"}, None),
        (OSError("no os-release"), None),
    ],
)
def test_host_suite_is_the_codename_of_debian_only(
    monkeypatch: pytest.MonkeyPatch, release: dict[str, str] | OSError, suite: str | None
) -> None:
    def answer() -> dict[str, str]:
        if isinstance(release, OSError):
            raise release
        return release

    monkeypatch.setattr(platform, "freedesktop_os_release", answer)
    assert host_suite() == suite


def test_configuration_uses_only_its_directory(tmp_path: Path) -> None:
    apt = new_apt(tmp_path)
    settings = re.findall(r'^(Dir::\S+) "(.*)";$', apt._configure(), re.MULTILINE)
    outside = [
        (name, value)
        for name, value in settings
        if value not in ("", "/dev/null", "bookworm-forky.bin")
        and not value.startswith(str(apt.directory))
    ]
    assert len(settings) >= 8
    assert outside == []


@pytest.mark.parametrize("has_keyring", [True, False])
def test_source_is_signed_by_an_existing_keyring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_keyring: bool
) -> None:
    keyring = tmp_path / "keyring.gpg"
    monkeypatch.setattr(apt_module, "KEYRING", keyring)
    if has_keyring:
        keyring.touch()
    source = new_apt(tmp_path).source("forky")
    assert source.startswith("deb [arch=amd64 ")
    assert source.endswith(f"] {MIRROR} forky main")
    assert (f"signed-by={keyring}" in source) is has_keyring


def test_missing_apt_has_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        EngineError, match=r"apt-get, dpkg or dpkg-deb is not installed.*install Docker"
    ):
        Apt(["forky"], directory=tmp_path / "apt").update()


def test_failure_of_apt_is_one_line_of_the_requested_exception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(argv: list[str], _cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(argv, 100, "", "E: Failed to fetch it\nE: more\n")

    monkeypatch.setattr(apt_module, "_run", run)
    with pytest.raises(BuilderError) as error:
        new_apt(tmp_path)._apt_get("update")
    assert "\n" not in str(error.value)
    assert "update failed for bookworm forky: Failed to fetch it" in str(error.value)


class OfflineApt(Apt):
    """An ``Apt`` that creates empty packages in place of a download."""

    def update(self) -> None:
        pass

    def download(self, packages: Iterable[str], into: Path) -> None:
        into.mkdir(parents=True)
        for package in packages:
            (into / f"{package}.deb").touch()


def test_unpacking_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake_unpack(debs: list[Path], root: Path, failure: type[Exception]) -> None:
        root.mkdir()
        for deb in debs:
            if deb.stem == "bad":
                raise failure("bad package")
            (root / deb.stem).touch()

    monkeypatch.setattr(apt_module, "unpack", fake_unpack)
    apt, root = OfflineApt(["forky"], directory=tmp_path / "apt"), tmp_path / "root"
    with pytest.raises(EngineError):
        apt.unpack(["one", "bad"], root)
    assert not root.exists()
    apt.unpack(["one", "two"], root)
    assert sorted(path.name for path in root.iterdir()) == ["one", "two"]
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


def test_invalid_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(argv: list[str], _cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(argv, 2, "", "dpkg-deb: error: no archive\n")

    monkeypatch.setattr(apt_module, "_run", run)
    with pytest.raises(BuilderError, match=r"cannot unpack .*/x\.deb: dpkg-deb: error: no archive"):
        unpack([tmp_path / "x.deb"], tmp_path / "root", BuilderError)


def test_modules_contain_no_mirror_or_registry() -> None:
    (directory,) = guix_tasks.bootstrap.__path__
    for module in Path(directory).glob("*.py"):
        hosts = re.findall(
            r"https?://[^\s\"'{]+|[\w-]+\.debian\.org|docker\.io/", module.read_text()
        )
        assert hosts == [], module
