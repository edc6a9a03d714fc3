"""Diagnostics of a failed stage: complete, and without secrets."""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import itertools
import os
import shutil
import tarfile
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import pytest
from fake_engine import DETERMINISTIC, FakeEngine, Site, new_site
from hypothesis import given
from hypothesis import strategies as st

from guix_tasks.engine.api import ContainerSpec
from guix_tasks.errors import EngineError
from guix_tasks.stages import diagnostics
from guix_tasks.stages.diagnostics import Failure, save_diagnostics

if TYPE_CHECKING:
    from guix_tasks.settings import Settings

DRV = "/var/log/guix/drvs/ab/" + "c" * 30 + "-hello-1.0.drv.gz"
SAVED_DRV = "ab" + "c" * 30 + "-hello-1.0.drv.gz"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = new_site(tmp_path, GUIX_SANDBOX="privileged")
    site.engine.make_image({}, {"/x": b""}, tag="work:1")
    return site


def new_failure(site: Site, log: bytes = b"log\n", **files: bytes) -> Failure:
    """Create a failed container with files by their paths."""
    container = site.engine.create(ContainerSpec("failed", "work:1", ("x",)))
    site.engine.all_containers[container].changes.update(files)
    return Failure("install", container, b"#!/bin/sh\nguix package\n", io.BytesIO(log))


def log_naming(*paths: str) -> bytes:
    """Return a log of Guix that names the build logs."""
    return "".join(f"View build log at '{path}'.\n" for path in paths).encode()


def save(site: Site, failure: Failure, settings: Settings | None = None) -> Path:
    directory = save_diagnostics(site.engine, settings or site.settings(), failure)
    assert directory
    return directory


def bundle_content(directory: Path) -> bytes:
    """Return the names and the decompressed content of all files of a bundle."""
    text = b""
    for file in sorted(directory.iterdir()):
        data = file.read_bytes()
        text += file.name.encode() + b"\n"
        text += gzip.decompress(data) if file.suffix == ".gz" else data
    return text


def saved_names(site: Site) -> list[str]:
    directory = site.settings().output_directory / "failed"
    return sorted(entry.name for entry in directory.iterdir()) if directory.exists() else []


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> str:
    """Stop the clock, and return its time."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: object = None) -> Clock:
            assert tz is timezone.utc
            return cls(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)

    monkeypatch.setattr(diagnostics, "datetime", Clock)
    return "20260102T030405Z"


# --- Content --------------------------------------------------------------------------------


def test_diagnostics_contain_log_command_settings_and_versions(site: Site, clock: str) -> None:
    directory = save(site, new_failure(site))
    assert directory == site.directory / "out" / "failed" / f"install-{clock}"
    assert {file.name for file in directory.iterdir()} == {"log", "command", "settings", "versions"}
    assert (directory / "log").read_bytes() == b"log\n"
    assert (directory / "command").read_text() == "#!/bin/sh\nguix package\n"
    assert "GUIX_PACKAGES=hello\n" in (directory / "settings").read_text()
    assert (directory / "versions").read_text() == "Docker 28 (memory, linux/amd64)\n"


def test_unset_settings_are_not_saved(site: Site) -> None:
    lines = (save(site, new_failure(site)) / "settings").read_text().splitlines()
    assert [line for line in lines if line.endswith("=")] == []


def test_log_without_utf8_is_unchanged(site: Site) -> None:
    log = b"caf\xe9 \xff\xfe\0 \xe2\x82\n\r 50%\r100%\nno end"
    assert (save(site, new_failure(site, log)) / "log").read_bytes() == log


def test_log_is_saved_from_its_start(site: Site) -> None:
    failure = new_failure(site, b"one\ntwo\n")
    failure.log.seek(0, io.SEEK_END)
    assert (save(site, failure) / "log").read_bytes() == b"one\ntwo\n"


def test_log_is_copied_in_chunks(site: Site) -> None:
    class Log(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            assert size is not None
            assert 0 <= size < 1 << 20
            return super().read(size)

    failure = replace(new_failure(site), log=Log(b"a line\n" * 100_000))
    assert (save(site, failure) / "log").stat().st_size == 700_000


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), ("", bytes)],
    ids=["gzip", "bzip2", "plain"],
)
def test_build_logs_of_failed_builds_are_saved(
    site: Site, suffix: str, compress: type[bytes]
) -> None:
    path = DRV.removesuffix(".gz") + suffix
    directory = save(site, new_failure(site, log_naming(path), **{path: compress(b"cc: error\n")}))
    assert gzip.decompress((directory / SAVED_DRV).read_bytes()) == b"cc: error\n"


def test_endless_build_log_is_saved_in_part(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnostics, "_MAX_LOG", 1000)
    for text in (b"a line\n" * 5000, b"0" * 100_000):
        failure = new_failure(site, log_naming(DRV), **{DRV: gzip.compress(text)})
        saved_log = save(site, failure) / SAVED_DRV
        assert gzip.decompress(saved_log.read_bytes()) == text[:1000]
        site.engine.remove(failure.container)


def test_endless_archive_of_a_build_log_is_not_saved(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnostics, "_MAX_ARCHIVE", 10_000)
    monkeypatch.setattr(site.engine, "copy_out", lambda *_: itertools.repeat(b"x" * 1000))
    directory = save(site, new_failure(site, log_naming(DRV)))
    assert {file.name for file in directory.iterdir()} == {"log", "command", "settings", "versions"}


def test_truncated_build_log_is_saved_in_part(site: Site) -> None:
    compressed = gzip.compress(os.urandom(5000).hex().encode() + b"\nthe end\n")
    directory = save(site, new_failure(site, log_naming(DRV), **{DRV: compressed[:-20]}))
    assert (directory / SAVED_DRV).exists()
    assert (directory / "log").exists()


@pytest.mark.parametrize("data", [b"", b"no gzip at all", gzip.compress(b"x", mtime=0)[:5]])
def test_unreadable_build_log_does_not_prevent_the_rest(site: Site, data: bytes) -> None:
    directory = save(site, new_failure(site, log_naming(DRV), **{DRV: data}))
    assert (directory / "log").read_bytes() == log_naming(DRV)


def test_missing_build_log_does_not_prevent_the_others(site: Site) -> None:
    missing = DRV.replace("/ab/", "/zz/")
    failure = new_failure(site, log_naming(missing, DRV), **{DRV: gzip.compress(b"x")})
    directory = save(site, failure)
    assert (directory / SAVED_DRV).exists()


def test_only_the_first_build_logs_are_saved(site: Site) -> None:
    paths = [DRV.replace("/ab/", f"/{number:02}/") for number in range(30)]
    files = dict.fromkeys(paths, gzip.compress(b"x"))
    directory = save(site, new_failure(site, log_naming(*paths, *paths), **files))
    names = sorted(file.name[:2] for file in directory.glob("*.drv.gz"))
    assert names == [f"{number:02}" for number in range(10)]


# --- Hostile archives and paths -------------------------------------------------------------


def tar_archive(*members: tuple[str, bytes, bytes]) -> bytes:
    """Return an archive of members by name, type and content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind, data in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            member.size = len(data) if kind == tarfile.REGTYPE else 0
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "name", ["..", "../../../evil", "/evil", "log", "settings", ".", "a/../.."]
)
def test_archive_cannot_choose_its_target(
    site: Site, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    archive = tar_archive((name, tarfile.REGTYPE, gzip.compress(b"evil")))
    monkeypatch.setattr(site.engine, "copy_out", lambda *_: iter([archive]))
    old_paths = {path for path in site.directory.rglob("*") if "failed" not in path.parts}
    directory = save(site, new_failure(site, log_naming(DRV)))
    assert gzip.decompress((directory / SAVED_DRV).read_bytes()) == b"evil"
    assert (directory / "log").read_bytes() == log_naming(DRV)
    assert b"evil" not in (directory / "settings").read_bytes()
    new_paths = {path for path in site.directory.rglob("*") if "failed" not in path.parts}
    assert new_paths - old_paths == {site.directory / "out"}


@pytest.mark.parametrize(
    "archive",
    [
        b"",
        b"no archive",
        tar_archive(("x.drv.gz", tarfile.SYMTYPE, b"")),
        tar_archive(("x.drv.gz", tarfile.LNKTYPE, b"")),
        tar_archive(("x.drv.gz", tarfile.FIFOTYPE, b"")),
        tar_archive(("x.drv.gz", tarfile.DIRTYPE, b"")),
        tar_archive(("x.drv.gz", tarfile.REGTYPE, gzip.compress(os.urandom(4000))))[:1000],
        gzip.compress(b"x" * 1000),
    ],
    ids=["empty", "junk", "symlink", "link", "fifo", "directory", "cut off", "compressed"],
)
def test_invalid_archive_does_not_prevent_the_rest(
    site: Site, monkeypatch: pytest.MonkeyPatch, archive: bytes
) -> None:
    monkeypatch.setattr(site.engine, "copy_out", lambda *_: iter([archive]))
    directory = save(site, new_failure(site, log_naming(DRV)))
    assert {"log", "command", "settings", "versions"} <= {file.name for file in directory.iterdir()}
    assert not any(file.is_symlink() for file in directory.iterdir())


@pytest.mark.parametrize(
    "path",
    [
        "/var/log/guix/drvs/../../../../var/guix/guix-tasks/environment",
        "/var/log/guix/drvs/ab/../../../../../root/.ssh/id_rsa",
        "/var/log/guix/drvs/ab",
        "/var/log/guix/drvs/ab/" + "c" * 30 + "-x/../../../../../../etc/shadow",
    ],
)
def test_only_build_logs_are_copied_out(site: Site, path: str) -> None:
    save(site, new_failure(site, log_naming(path), **{path: b"secret"}))
    assert "copy_out" not in [name for name, _ in site.engine.calls]


# --- Redaction ------------------------------------------------------------------------------

PASSWORD = "p@ss:w/rd #1%"  # noqa: S105


def set_proxy(site: Site, url: str) -> Settings:
    site.env["https_proxy"] = url
    return site.settings()


def test_password_is_redacted_in_all_files(site: Site) -> None:
    site.env.update(DOCKER_USERNAME="me", DOCKER_PASSWORD=PASSWORD, GUIX_PACKAGES="hello")
    text = f"a {PASSWORD} b {quote(PASSWORD, safe='')}\n".encode()
    failure = new_failure(site, text + log_naming(DRV), **{DRV: gzip.compress(text)})
    bundle = bundle_content(save(site, replace(failure, command=text)))
    assert PASSWORD.encode() not in bundle
    assert quote(PASSWORD, safe="").encode() not in bundle
    assert bundle.count(b"a *** b ***\n") == 3


def test_secret_without_utf8_is_redacted(site: Site) -> None:
    """Values of the environment are bytes."""
    settings = set_proxy(site, "http://me:caf\udce9-secret@proxy.test:3128")
    directory = save(site, new_failure(site, b"said caf\xe9-secret!\n"), settings)
    assert (directory / "log").read_bytes() == b"said ***!\n"


@pytest.mark.parametrize(
    "url",
    [
        "http://me:hunter2@proxy.test:3128",
        "http://:hunter2@proxy.test",
        "me:hunter2@proxy.test:3128",
        "socks5h://me:hunter2@[::1]:1080/",
        "http://me:hunter2@[broken",
    ],
)
def test_password_of_a_proxy_is_redacted_in_every_form_of_its_url(site: Site, url: str) -> None:
    directory = save(site, new_failure(site, b"with hunter2.\n"), set_proxy(site, url))
    assert (directory / "log").read_bytes() == b"with ***.\n"


@pytest.mark.parametrize("password", ["p/w?d#1", "a@b", "a:b", "[xy", "p%2Fw%3Fd", "ü&%"])
@pytest.mark.parametrize("encoded", [False, True])
def test_password_with_special_characters_is_redacted_plain_and_encoded(
    site: Site, password: str, *, encoded: bool
) -> None:
    quoted = quote(password, safe="")
    settings = set_proxy(site, f"http://me:{quoted if encoded else password}@proxy.test:3128")
    log = f"1 {password} 2 {quoted} 3\n".encode()
    directory = save(site, new_failure(site, log), settings)
    assert (directory / "log").read_bytes() == b"1 *** 2 *** 3\n"


@pytest.mark.parametrize(
    "url", ["http://proxy.test:3128", "localhost,127.0.0.1,::1", "http://me@x"]
)
def test_proxy_without_a_password_is_not_redacted(site: Site, url: str) -> None:
    log = b"localhost proxy.test 3128 me http x\n"
    directory = save(site, new_failure(site, log), set_proxy(site, url))
    assert (directory / "log").read_bytes() == log


def test_secret_within_another_secret_is_redacted(site: Site) -> None:
    site.env.update(DOCKER_USERNAME="me", DOCKER_PASSWORD="hunter2-and-more")  # noqa: S106
    settings = set_proxy(site, "http://me:hunter2@proxy.test")
    directory = save(site, new_failure(site, b"hunter2-and-more hunter2\n"), settings)
    assert (directory / "log").read_bytes() == b"*** ***\n"


def test_lines_of_a_key_are_redacted_except_braces(site: Site) -> None:
    site.write("key.json", '{\n  "private_key": "abcdefgh"\n}\n')
    site.env.update(DOCKER_USERNAME="_json_key", DOCKER_PASSWORD_FILE="key.json")  # noqa: S106
    directory = save(site, new_failure(site, b'{\n  "private_key": "abcdefgh"\n}\n'))
    assert (directory / "log").read_bytes() == b"{\n***\n}\n"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"from 'https://me:tok@git.test/x.git'", b"from 'https://***@git.test/x.git'"),
        (b"from https://ghp_0123@git.test/x", b"from https://***@git.test/x"),
        (b"https://git.test/a@b and me@mail.test", b"https://git.test/a@b and me@mail.test"),
        (b'"ssh://a:b@c@host/" https://x', b'"ssh://***@host/" https://x'),
    ],
)
def test_account_in_any_url_is_redacted(site: Site, line: bytes, expected: bytes) -> None:
    """For example in the URL of a channel, which is in no setting."""
    assert (save(site, new_failure(site, line)) / "log").read_bytes() == expected


def test_secrets_of_a_build_cache_are_redacted(site: Site) -> None:
    site.env["BUILDX_CACHE_FROM"] = (
        "type=s3,bucket=b,access_key_id=AKIA,secret_access_key=hunter2,session_token=t0k "
        "type=gha,token=t1k,scope=main"
    )
    text = (save(site, new_failure(site)) / "settings").read_text()
    assert not [secret for secret in ("AKIA", "hunter2", "t0k", "t1k") if secret in text]
    assert "bucket=b,access_key_id=***" in text
    assert "token=***,scope=main" in text


def test_build_arguments_are_redacted_in_all_files(site: Site) -> None:
    site.env["BUILD_ARGS"] = "TOKEN=hunter2"
    assert b"hunter2" not in bundle_content(save(site, new_failure(site)))


def test_secret_in_a_file_name_is_redacted(site: Site) -> None:
    settings = set_proxy(site, "http://me:hello-1.0@proxy.test")
    failure = new_failure(site, log_naming(DRV), **{DRV: gzip.compress(b"x")})
    directory = save(site, failure, settings)
    assert b"hello-1.0" not in bundle_content(directory)


@DETERMINISTIC
@given(
    st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="*"), min_size=3),
    st.text("ab:/@?#%[] "),
)
def test_any_password_is_redacted(
    tmp_path_factory: pytest.TempPathFactory, password: str, context: str
) -> None:
    site = Site(tmp_path_factory.getbasetemp() / "secrets", FakeEngine())
    settings = set_proxy(site, f"http://me:{password}@proxy.test:3128")
    log = f"{context}{password}{context}\nhttp://me:{password}@proxy.test:3128\n".encode()
    failure = Failure("pull", "none", b"", io.BytesIO(log))
    directory = save_diagnostics(site.engine, settings, failure)
    assert directory
    assert password.encode() not in (directory / "log").read_bytes()
    shutil.rmtree(directory)


# --- Failures -------------------------------------------------------------------------------


def test_failures_in_one_second_have_separate_directories(site: Site, clock: str) -> None:
    failure = new_failure(site)
    names = [save(site, failure).name for _ in range(3)]
    assert names == [f"install-{clock}", f"install-{clock}-2", f"install-{clock}-3"]
    assert saved_names(site) == names


def test_failure_to_create_the_directory_is_not_an_error(site: Site) -> None:
    site.write("out", "a file")
    assert save_diagnostics(site.engine, site.settings(), new_failure(site)) is None


def full_disk(path: Path, *_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_full_disk_leaves_no_directory(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "write_bytes", full_disk)
    assert save_diagnostics(site.engine, site.settings(), new_failure(site)) is None
    assert saved_names(site) == []


def test_unreadable_log_is_not_an_error(site: Site) -> None:
    class Broken(io.BytesIO):
        def seek(self, offset: int, whence: int = 0) -> int:
            raise OSError(errno.ENOSPC, f"{offset} {whence}")

    failure = replace(new_failure(site), log=Broken())
    assert save_diagnostics(site.engine, site.settings(), failure) is None
    assert saved_names(site) == []


def test_ctrl_c_leaves_no_directory(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(site.engine, "copy_out", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_diagnostics(site.engine, site.settings(), new_failure(site, log_naming(DRV)))
    assert saved_names(site) == []


def test_lost_engine_does_not_prevent_the_log(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise EngineError("the engine does not answer")

    for name in ("info", "copy_out"):
        monkeypatch.setattr(site.engine, name, fail)
    directory = save(site, new_failure(site, log_naming(DRV)))
    assert {file.name for file in directory.iterdir()} == {"log", "command", "settings"}
