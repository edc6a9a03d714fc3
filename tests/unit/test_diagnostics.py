"""Diagnostics of a failed stage: they are complete and contain no secret."""

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
from fake_engine import STEADY, FakeEngine, Site, new_site
from hypothesis import given
from hypothesis import strategies as st

from guix_tasks.engine.api import ContainerSpec
from guix_tasks.errors import EngineError
from guix_tasks.stages import diagnostics
from guix_tasks.stages.diagnostics import Failure, save_diagnostics

if TYPE_CHECKING:
    from guix_tasks.settings import Settings

DRV = "/var/log/guix/drvs/ab/" + "c" * 30 + "-hello-1.0.drv.gz"
KEPT_DRV = "ab" + "c" * 30 + "-hello-1.0.drv.gz"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = new_site(tmp_path, GUIX_SANDBOX="privileged")
    site.engine.make_image({}, {"/x": b""}, tag="work:1")
    return site


def failed_one(site: Site, log: bytes = b"log\n", **files: bytes) -> Failure:
    """A container that has failed, with files by their paths."""
    container = site.engine.create(ContainerSpec("failed", "work:1", ("x",)))
    site.engine.all_containers[container].changes.update(files)
    return Failure("install", container, b"#!/bin/sh\nguix package\n", io.BytesIO(log))


def points_to(*paths: str) -> bytes:
    """A log that does, in Guix's words."""
    return "".join(f"View build log at '{path}'.\n" for path in paths).encode()


def kept(site: Site, failed: Failure, settings: Settings | None = None) -> Path:
    directory = save_diagnostics(site.engine, settings or site.settings(), failed)
    assert directory
    return directory


def content(directory: Path) -> bytes:
    """All that is in a bundle, names and what is compressed included."""
    found = b""
    for each in sorted(directory.iterdir()):
        data = each.read_bytes()
        found += each.name.encode() + b"\n"
        found += gzip.decompress(data) if each.suffix == ".gz" else data
    return found


def left(site: Site) -> list[str]:
    directory = site.settings().output_directory / "failed"
    return sorted(each.name for each in directory.iterdir()) if directory.exists() else []


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> str:
    """A clock that stands; what it shows."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: object = None) -> Clock:
            assert tz is timezone.utc
            return cls(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)

    monkeypatch.setattr(diagnostics, "datetime", Clock)
    return "20260102T030405Z"


# --- What is in it --------------------------------------------------------------------------


def test_diagnostics_contain_log_command_settings_and_versions(site: Site, still: str) -> None:
    directory = kept(site, failed_one(site))
    assert directory == site.directory / "out" / "failed" / f"install-{still}"
    assert {each.name for each in directory.iterdir()} == {"log", "command", "settings", "versions"}
    assert (directory / "log").read_bytes() == b"log\n"
    assert (directory / "command").read_text() == "#!/bin/sh\nguix package\n"
    assert "GUIX_PACKAGES=hello\n" in (directory / "settings").read_text()
    assert (directory / "versions").read_text() == "Docker 28 (memory, linux/amd64)\n"


def test_unset_settings_are_not_saved(site: Site) -> None:
    lines = (kept(site, failed_one(site)) / "settings").read_text().splitlines()
    assert [line for line in lines if line.endswith("=")] == []


def test_a_log_that_is_not_utf_8_is_kept_as_it_is(site: Site) -> None:
    log = b"caf\xe9 \xff\xfe\0 \xe2\x82\n\r 50%\r100%\nno end"
    assert (kept(site, failed_one(site, log)) / "log").read_bytes() == log


def test_a_log_is_kept_from_its_start_wherever_it_was_left(site: Site) -> None:
    failed = failed_one(site, b"one\ntwo\n")
    failed.log.seek(0, io.SEEK_END)
    assert (kept(site, failed) / "log").read_bytes() == b"one\ntwo\n"


def test_a_huge_log_is_never_in_memory(site: Site) -> None:
    class Log(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            assert size is not None
            assert 0 <= size < 1 << 20
            return super().read(size)

    failed = replace(failed_one(site), log=Log(b"a line\n" * 100_000))
    assert (kept(site, failed) / "log").stat().st_size == 700_000


@pytest.mark.parametrize(
    ("ending", "packed"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), ("", bytes)],
    ids=["gzip", "bzip2", "plain"],
)
def test_build_logs_of_failed_builds_are_saved(
    site: Site, ending: str, packed: type[bytes]
) -> None:
    path = DRV.removesuffix(".gz") + ending
    directory = kept(site, failed_one(site, points_to(path), **{path: packed(b"cc: error\n")}))
    assert gzip.decompress((directory / KEPT_DRV).read_bytes()) == b"cc: error\n"


def test_endless_build_log_is_saved_in_part(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnostics, "_MAX_LOG", 1000)
    for text in (b"a line\n" * 5000, b"0" * 100_000):
        failed = failed_one(site, points_to(DRV), **{DRV: gzip.compress(text)})
        kept_log = kept(site, failed) / KEPT_DRV
        assert gzip.decompress(kept_log.read_bytes()) == text[:1000]
        site.engine.remove(failed.container)


def test_endless_archive_of_a_build_log_is_left_out(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnostics, "_MAX_ARCHIVE", 10_000)
    monkeypatch.setattr(site.engine, "copy_out", lambda *_: itertools.repeat(b"x" * 1000))
    directory = kept(site, failed_one(site, points_to(DRV)))
    assert {each.name for each in directory.iterdir()} == {"log", "command", "settings", "versions"}


def test_a_build_log_that_is_cut_off_is_kept_as_far_as_it_goes(site: Site) -> None:
    whole = gzip.compress(os.urandom(5000).hex().encode() + b"\nthe end\n")
    directory = kept(site, failed_one(site, points_to(DRV), **{DRV: whole[:-20]}))
    assert (directory / KEPT_DRV).exists()
    assert (directory / "log").exists()


@pytest.mark.parametrize("data", [b"", b"no gzip at all", gzip.compress(b"x", mtime=0)[:5]])
def test_a_build_log_that_cannot_be_read_does_not_take_the_rest_along(
    site: Site, data: bytes
) -> None:
    directory = kept(site, failed_one(site, points_to(DRV), **{DRV: data}))
    assert (directory / "log").read_bytes() == points_to(DRV)


def test_a_build_log_that_is_gone_does_not_take_the_others_along(site: Site) -> None:
    gone = DRV.replace("/ab/", "/zz/")
    directory = kept(site, failed_one(site, points_to(gone, DRV), **{DRV: gzip.compress(b"x")}))
    assert (directory / KEPT_DRV).exists()


def test_only_the_first_build_logs_are_kept(site: Site) -> None:
    paths = [DRV.replace("/ab/", f"/{number:02}/") for number in range(30)]
    files = dict.fromkeys(paths, gzip.compress(b"x"))
    directory = kept(site, failed_one(site, points_to(*paths, *paths), **files))
    names = sorted(each.name[:2] for each in directory.glob("*.drv.gz"))
    assert names == [f"{number:02}" for number in range(10)]


# --- Hostile archives and paths -------------------------------------------------------------


def tar_of(*members: tuple[str, bytes, bytes]) -> bytes:
    """An archive of members by name, type and content."""
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
def test_an_archive_cannot_choose_what_it_is_written_to(
    site: Site, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    archive = tar_of((name, tarfile.REGTYPE, gzip.compress(b"evil")))
    monkeypatch.setattr(site.engine, "copy_out", lambda *_: iter([archive]))
    before = {path for path in site.directory.rglob("*") if "failed" not in path.parts}
    directory = kept(site, failed_one(site, points_to(DRV)))
    assert gzip.decompress((directory / KEPT_DRV).read_bytes()) == b"evil"
    assert (directory / "log").read_bytes() == points_to(DRV)
    assert b"evil" not in (directory / "settings").read_bytes()
    after = {path for path in site.directory.rglob("*") if "failed" not in path.parts}
    assert after - before == {site.directory / "out"}


@pytest.mark.parametrize(
    "archive",
    [
        b"",
        b"no archive",
        tar_of(("x.drv.gz", tarfile.SYMTYPE, b"")),
        tar_of(("x.drv.gz", tarfile.LNKTYPE, b"")),
        tar_of(("x.drv.gz", tarfile.FIFOTYPE, b"")),
        tar_of(("x.drv.gz", tarfile.DIRTYPE, b"")),
        tar_of(("x.drv.gz", tarfile.REGTYPE, gzip.compress(os.urandom(4000))))[:1000],
        gzip.compress(b"x" * 1000),
    ],
    ids=["empty", "junk", "symlink", "link", "fifo", "directory", "cut off", "compressed"],
)
def test_invalid_archive_does_not_prevent_the_rest(
    site: Site, monkeypatch: pytest.MonkeyPatch, archive: bytes
) -> None:
    monkeypatch.setattr(site.engine, "copy_out", lambda *_: iter([archive]))
    directory = kept(site, failed_one(site, points_to(DRV)))
    assert {"log", "command", "settings", "versions"} <= {each.name for each in directory.iterdir()}
    assert not any(each.is_symlink() for each in directory.iterdir())


@pytest.mark.parametrize(
    "path",
    [
        "/var/log/guix/drvs/../../../../var/guix/guix-tasks/environment",
        "/var/log/guix/drvs/ab/../../../../../root/.ssh/id_rsa",
        "/var/log/guix/drvs/ab",
        "/var/log/guix/drvs/ab/" + "c" * 30 + "-x/../../../../../../etc/shadow",
    ],
)
def test_nothing_but_build_logs_is_copied_out(site: Site, path: str) -> None:
    kept(site, failed_one(site, points_to(path), **{path: b"secret"}))
    assert "copy_out" not in [name for name, _ in site.engine.calls]


# --- No secret is in it ---------------------------------------------------------------------

PASSWORD = "p@ss:w/rd #1%"  # noqa: S105


def with_proxy(site: Site, url: str) -> Settings:
    site.env["https_proxy"] = url
    return site.settings()


def test_the_password_is_in_none_of_its_files(site: Site) -> None:
    site.env.update(DOCKER_USERNAME="me", DOCKER_PASSWORD=PASSWORD, GUIX_PACKAGES="hello")
    text = f"a {PASSWORD} b {quote(PASSWORD, safe='')}\n".encode()
    failed = failed_one(site, text + points_to(DRV), **{DRV: gzip.compress(text)})
    everything = content(kept(site, replace(failed, command=text)))
    assert PASSWORD.encode() not in everything
    assert quote(PASSWORD, safe="").encode() not in everything
    assert everything.count(b"a *** b ***\n") == 3


def test_a_secret_that_is_no_text_by_itself_is_hidden(site: Site) -> None:
    """An environment is bytes."""
    settings = with_proxy(site, "http://me:caf\udce9-secret@proxy.test:3128")
    directory = kept(site, failed_one(site, b"said caf\xe9-secret!\n"), settings)
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
def test_the_password_of_a_proxy_is_hidden_however_it_is_written(site: Site, url: str) -> None:
    directory = kept(site, failed_one(site, b"with hunter2.\n"), with_proxy(site, url))
    assert (directory / "log").read_bytes() == b"with ***.\n"


@pytest.mark.parametrize("password", ["p/w?d#1", "a@b", "a:b", "[xy", "p%2Fw%3Fd", "ü&%"])
@pytest.mark.parametrize("encoded", [False, True])
def test_a_password_that_breaks_a_url_is_hidden_in_both_ways(
    site: Site, password: str, *, encoded: bool
) -> None:
    other = quote(password, safe="")
    settings = with_proxy(site, f"http://me:{other if encoded else password}@proxy.test:3128")
    log = f"1 {password} 2 {other} 3\n".encode()
    directory = kept(site, failed_one(site, log), settings)
    assert (directory / "log").read_bytes() == b"1 *** 2 *** 3\n"


@pytest.mark.parametrize(
    "url", ["http://proxy.test:3128", "localhost,127.0.0.1,::1", "http://me@x"]
)
def test_a_proxy_without_a_password_hides_nothing(site: Site, url: str) -> None:
    log = b"localhost proxy.test 3128 me http x\n"
    directory = kept(site, failed_one(site, log), with_proxy(site, url))
    assert (directory / "log").read_bytes() == log


def test_secret_inside_another_secret_is_hidden(site: Site) -> None:
    site.env.update(DOCKER_USERNAME="me", DOCKER_PASSWORD="hunter2-and-more")  # noqa: S106
    settings = with_proxy(site, "http://me:hunter2@proxy.test")
    directory = kept(site, failed_one(site, b"hunter2-and-more hunter2\n"), settings)
    assert (directory / "log").read_bytes() == b"*** ***\n"


def test_each_line_of_a_key_is_hidden_and_a_mere_brace_is_not(site: Site) -> None:
    site.write("key.json", '{\n  "private_key": "abcdefgh"\n}\n')
    site.env.update(DOCKER_USERNAME="_json_key", DOCKER_PASSWORD_FILE="key.json")  # noqa: S106
    directory = kept(site, failed_one(site, b'{\n  "private_key": "abcdefgh"\n}\n'))
    assert (directory / "log").read_bytes() == b"{\n***\n}\n"


@pytest.mark.parametrize(
    ("line", "kept_as"),
    [
        (b"from 'https://me:tok@git.test/x.git'", b"from 'https://***@git.test/x.git'"),
        (b"from https://ghp_0123@git.test/x", b"from https://***@git.test/x"),
        (b"https://git.test/a@b and me@mail.test", b"https://git.test/a@b and me@mail.test"),
        (b'"ssh://a:b@c@host/" https://x', b'"ssh://***@host/" https://x'),
    ],
)
def test_an_account_in_any_url_is_hidden(site: Site, line: bytes, kept_as: bytes) -> None:
    """A channel's, which no setting tells of."""
    assert (kept(site, failed_one(site, line)) / "log").read_bytes() == kept_as


def test_the_secrets_of_a_build_cache_are_hidden(site: Site) -> None:
    site.env["BUILDX_CACHE_FROM"] = (
        "type=s3,bucket=b,access_key_id=AKIA,secret_access_key=hunter2,session_token=t0k "
        "type=gha,token=t1k,scope=main"
    )
    text = (kept(site, failed_one(site)) / "settings").read_text()
    assert not [each for each in ("AKIA", "hunter2", "t0k", "t1k") if each in text]
    assert "bucket=b,access_key_id=***" in text
    assert "token=***,scope=main" in text


def test_build_arguments_are_in_none_of_its_files(site: Site) -> None:
    site.env["BUILD_ARGS"] = "TOKEN=hunter2"
    assert b"hunter2" not in content(kept(site, failed_one(site)))


def test_a_secret_is_in_no_file_name(site: Site) -> None:
    settings = with_proxy(site, "http://me:hello-1.0@proxy.test")
    directory = kept(site, failed_one(site, points_to(DRV), **{DRV: gzip.compress(b"x")}), settings)
    assert b"hello-1.0" not in content(directory)


@STEADY
@given(
    st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="*"), min_size=3),
    st.text("ab:/@?#%[] "),
)
def test_no_password_gets_through(
    tmp_path_factory: pytest.TempPathFactory, password: str, around: str
) -> None:
    site = Site(tmp_path_factory.getbasetemp() / "secrets", FakeEngine())
    settings = with_proxy(site, f"http://me:{password}@proxy.test:3128")
    log = f"{around}{password}{around}\nhttp://me:{password}@proxy.test:3128\n".encode()
    failed = Failure("pull", "none", b"", io.BytesIO(log))
    directory = save_diagnostics(site.engine, settings, failed)
    assert directory
    assert password.encode() not in (directory / "log").read_bytes()
    shutil.rmtree(directory)


# --- Where it cannot be written -------------------------------------------------------------


def test_two_failures_in_one_second_leave_two_directories(site: Site, still: str) -> None:
    failed = failed_one(site)
    names = [kept(site, failed).name for _ in range(3)]
    assert names == [f"install-{still}", f"install-{still}-2", f"install-{still}-3"]
    assert left(site) == names


def test_directory_that_cannot_be_created_is_not_an_error(site: Site) -> None:
    site.write("out", "a file")
    assert save_diagnostics(site.engine, site.settings(), failed_one(site)) is None


def full_disk(path: Path, *_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_a_full_disk_leaves_nothing_half_done(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "write_bytes", full_disk)
    assert save_diagnostics(site.engine, site.settings(), failed_one(site)) is None
    assert left(site) == []


def test_unreadable_log_is_not_an_error(site: Site) -> None:
    class Broken(io.BytesIO):
        def seek(self, offset: int, whence: int = 0) -> int:
            raise OSError(errno.ENOSPC, f"{offset} {whence}")

    failed = replace(failed_one(site), log=Broken())
    assert save_diagnostics(site.engine, site.settings(), failed) is None
    assert left(site) == []


def test_ctrl_c_leaves_nothing_half_done(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(site.engine, "copy_out", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_diagnostics(site.engine, site.settings(), failed_one(site, points_to(DRV)))
    assert left(site) == []


def test_lost_engine_does_not_prevent_the_log(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> bytes:
        raise EngineError("the engine does not answer")

    for name in ("info", "copy_out"):
        monkeypatch.setattr(site.engine, name, gone)
    directory = kept(site, failed_one(site, points_to(DRV)))
    assert {each.name for each in directory.iterdir()} == {"log", "command", "settings"}
