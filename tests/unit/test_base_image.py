from __future__ import annotations

import io
import os
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from guix_tasks.bootstrap import apt, base_image
from guix_tasks.bootstrap.base_image import container_argv, debian_rootfs, mmdebstrap_argv
from guix_tasks.errors import BuilderError
from guix_tasks.ui.console import Console

if TYPE_CHECKING:
    from pathlib import Path


def console() -> tuple[Console, io.StringIO]:
    heard = io.StringIO()
    return Console(err=heard), heard


def stream(script: str, to: Console) -> list[bytes]:
    return list(base_image._stream(["sh", "-c", script], dict(os.environ), to))


def test_what_is_written_is_handed_on_and_progress_is_said() -> None:
    to, heard = console()
    script = "echo 'I: extracting' >&2; echo 'I: running --setup-hook x' >&2; printf tar"
    assert b"".join(stream(script, to)) == b"tar"
    assert heard.getvalue() == "  extracting\n"


def test_a_failure_names_the_first_cause() -> None:
    to, heard = console()
    script = "printf half; printf 'Reading\\nE: no mirror\\nE: mmdebstrap failed\\n' >&2; exit 2"
    with pytest.raises(BuilderError, match=r"^mmdebstrap failed: no mirror; its output"):
        stream(script, to)
    assert "  Reading\n" in heard.getvalue()


def test_a_failure_without_a_word_names_the_code() -> None:
    with pytest.raises(BuilderError, match="exit code 7"):
        stream("exit 7", console()[0])


def test_where_nobody_reads_on_it_is_ended(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    script = (
        f"trap 'touch {gone}; exit 1' TERM; head -c 1048576 /dev/zero; while :; do sleep 0.05; done"
    )
    chunks = base_image._stream(["sh", "-c", script], dict(os.environ), console()[0])
    started = time.monotonic()
    assert len(next(chunks)) == 1 << 20
    chunks.close()  # type: ignore[attr-defined]
    assert gone.exists()
    assert time.monotonic() - started < 5


def test_not_root_and_no_user_namespaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apt, "host_suite", lambda: "bookworm")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuilderError, match=r"needs root, or newuidmap .*BASE_IMAGE"):
        next(debian_rootfs(console()[0]))


def test_not_debian(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apt, "host_suite", lambda: None)
    with pytest.raises(BuilderError, match="on Debian or in a Debian container"):
        next(debian_rootfs(console()[0]))


def test_only_the_way_to_the_mirror_is_taken_from_the_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dump = 'APT::Architecture "amd64";\nAcquire::http::Proxy "http://p.example";\nDir "/";\n'

    def run(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 0, dump, "")

    monkeypatch.setattr(subprocess, "run", run)
    assert base_image._machine_settings() == 'Acquire::http::Proxy "http://p.example";\n'


def test_the_shell_in_it_is_sound() -> None:
    hooks = [
        option.partition("=")[2]
        for option in mmdebstrap_argv(base_image.PACKAGES)
        if "-hook=" in option
    ]
    shell, flag, script = container_argv()
    assert (shell, flag, len(hooks)) == ("sh", "-c", 3)
    for text in (*hooks, script):
        subprocess.run([shell, "-n", "-c", text], check=True)


def test_hooks_do_what_they_say(tmp_path: Path) -> None:
    kept = ["usr/share/doc/x/copyright", "usr/lib/libx.so", "usr/share/guile/a.scm"]
    gone = ["usr/share/doc/x/README", "usr/share/man/man1/x.1", "usr/include/x.h", "usr/lib/x.a"]
    for name in (*kept, *gone):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for hook in (base_image._BEFOREHAND, base_image._AFTERWARDS):
        subprocess.run(["sh", "-c", hook, "hook", str(tmp_path)], check=True)
    assert [name for name in (*kept, *gone) if (tmp_path / name).exists()] == kept
    slim = (tmp_path / "etc/dpkg/dpkg.cfg.d/slim").read_text().splitlines()
    assert "path-exclude=/usr/share/man/*" in slim
    assert slim.index("path-exclude=/usr/share/doc/*") < slim.index(
        "path-include=/usr/share/doc/*/copyright"
    )


def test_options_of_programs_in_the_environment_do_not_reach_mmdebstrap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = {"TAR_OPTIONS": "--exclude=*", "SOURCE_DATE_EPOCH": "1", "PERL5OPT": "-Mx"}
    for name, value in {**hostile, "http_proxy": "http://p.test", "LANGUAGE": "de"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "mmdebstrap").mkdir()
    environment = base_image._mmdebstrap(apt.Apt(["sid"], directory=tmp_path), console()[0])
    assert not hostile.keys() & environment.keys()
    assert environment["http_proxy"] == "http://p.test"
    assert environment["LANGUAGE"] == "C"


def test_only_a_base_with_guix_gets_build_users() -> None:
    assert "guixbuild" in " ".join(mmdebstrap_argv(base_image.PACKAGES))
    assert "guixbuild" not in " ".join(mmdebstrap_argv(()))
