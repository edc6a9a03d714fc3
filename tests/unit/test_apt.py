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


def apt(tmp_path: Path, *suites: str) -> Apt:
    suites = suites or ("bookworm", "forky")
    made = Apt(suites, failure=BuilderError, directory=tmp_path / "apt")
    made.__dict__.update(mirror=MIRROR, _architecture="amd64")
    return made


def test_the_address_is_that_of_debians_own_archive() -> None:
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
def test_no_address_where_debian_is_not_among_the_sources(targets: str) -> None:
    assert debian_address(targets) is None


@pytest.mark.parametrize(
    ("output", "cause"),
    [
        ("W: old\nE: Failed to fetch X\nE: Some index files failed\n", "Failed to fetch X"),
        ("Error: Unable to locate package x\n", "Unable to locate package x"),
        ("dpkg-deb: error: 'x' is not a Debian format archive", "dpkg-deb: error: 'x' is not"),
        ("something went wrong\n\n", "something went wrong"),
        ("", "no output"),
    ],
)
def test_error_line_is_the_first_error(output: str, cause: str) -> None:
    assert error_line(output).startswith(cause)


@pytest.mark.parametrize(
    ("release", "suite"),
    [
        ({"ID": "debian", "VERSION_CODENAME": "bookworm"}, "bookworm"),
        ({"ID": "debian"}, None),
        ({"ID": "ubuntu", "VERSION_CODENAME": "noble"}, None),
        (OSError("no os-release"), None),
    ],
)
def test_host_suite(
    monkeypatch: pytest.MonkeyPatch, release: dict[str, str] | OSError, suite: str | None
) -> None:
    def answer() -> dict[str, str]:
        if isinstance(release, OSError):
            raise release
        return release

    monkeypatch.setattr(platform, "freedesktop_os_release", answer)
    assert host_suite() == suite


def test_the_configuration_keeps_to_its_folder(tmp_path: Path) -> None:
    made = apt(tmp_path)
    settings = re.findall(r'^(Dir::\S+) "(.*)";$', made._configure(), re.MULTILINE)
    outside = [
        (name, value)
        for name, value in settings
        if value not in ("", "/dev/null", "bookworm-forky.bin")
        and not value.startswith(str(made.directory))
    ]
    assert len(settings) >= 8
    assert outside == []


@pytest.mark.parametrize("there", [True, False])
def test_a_source_is_signed_where_the_keyring_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    keyring = tmp_path / "keyring.gpg"
    monkeypatch.setattr(apt_module, "KEYRING", keyring)
    if there:
        keyring.touch()
    source = apt(tmp_path).source("forky")
    assert source.startswith("deb [arch=amd64 ")
    assert source.endswith(f"] {MIRROR} forky main")
    assert (f"signed-by={keyring}" in source) is there


def test_a_host_without_apt_gets_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        EngineError, match=r"apt-get, dpkg or dpkg-deb is not installed.*install Docker"
    ):
        Apt(["forky"], directory=tmp_path / "apt").update()


def test_a_failure_of_apt_is_one_line_of_the_kind_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(argv: list[str], _cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(argv, 100, "", "E: Failed to fetch it\nE: more\n")

    monkeypatch.setattr(apt_module, "_run", run)
    with pytest.raises(BuilderError) as error:
        apt(tmp_path)._apt_get("update")
    assert "\n" not in str(error.value)
    assert "update failed for bookworm forky: Failed to fetch it" in str(error.value)


class Unpacking(Apt):
    """One that downloads nothing, and whose packages cannot be unpacked if they are bad."""

    def update(self) -> None:
        pass

    def download(self, packages: Iterable[str], into: Path) -> None:
        into.mkdir(parents=True)
        for package in packages:
            (into / f"{package}.deb").touch()


def test_unpacked_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lay_out(debs: list[Path], root: Path, failure: type[Exception]) -> None:
        root.mkdir()
        for deb in debs:
            if deb.stem == "bad":
                raise failure("bad package")
            (root / deb.stem).touch()

    monkeypatch.setattr(apt_module, "unpack", lay_out)
    made, root = Unpacking(["forky"], directory=tmp_path / "apt"), tmp_path / "root"
    with pytest.raises(EngineError):
        made.unpack(["one", "bad"], root)
    assert not root.exists()
    made.unpack(["one", "two"], root)
    assert sorted(path.name for path in root.iterdir()) == ["one", "two"]
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


def test_a_package_that_is_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(argv: list[str], _cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(argv, 2, "", "dpkg-deb: error: no archive\n")

    monkeypatch.setattr(apt_module, "_run", run)
    with pytest.raises(BuilderError, match=r"cannot unpack .*/x\.deb: dpkg-deb: error: no archive"):
        unpack([tmp_path / "x.deb"], tmp_path / "root", BuilderError)


def test_no_module_names_a_mirror_or_a_registry() -> None:
    (directory,) = guix_tasks.bootstrap.__path__
    for module in Path(directory).glob("*.py"):
        hosts = re.findall(
            r"https?://[^\s\"'{]+|[\w-]+\.debian\.org|docker\.io/", module.read_text()
        )
        assert hosts == [], module
