"""Base images from mmdebstrap."""

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


def new_console() -> tuple[Console, io.StringIO]:
    messages = io.StringIO()
    return Console(err=messages), messages


def stream(script: str, console: Console) -> list[bytes]:
    return list(base_image._stream(["sh", "-c", script], dict(os.environ), console))


def test_output_is_streamed_and_progress_is_printed() -> None:
    console, messages = new_console()
    script = "echo 'I: extracting' >&2; echo 'I: running --setup-hook x' >&2; printf tar"
    assert b"".join(stream(script, console)) == b"tar"
    assert messages.getvalue() == "  extracting\n"


def test_failure_names_the_first_error() -> None:
    console, messages = new_console()
    script = "printf half; printf 'Reading\\nE: no mirror\\nE: mmdebstrap failed\\n' >&2; exit 2"
    with pytest.raises(BuilderError, match=r"^mmdebstrap failed: no mirror; its output"):
        stream(script, console)
    assert "  Reading\n" in messages.getvalue()


def test_failure_without_output_names_the_exit_code() -> None:
    with pytest.raises(BuilderError, match="exit code 7"):
        stream("exit 7", new_console()[0])


def test_program_is_ended_if_its_output_is_not_read(tmp_path: Path) -> None:
    marker = tmp_path / "gone"
    loop = "head -c 1048576 /dev/zero; while :; do sleep 0.05; done"
    script = f"trap 'touch {marker}; exit 1' TERM; {loop}"
    chunks = base_image._stream(["sh", "-c", script], dict(os.environ), new_console()[0])
    start = time.monotonic()
    assert len(next(chunks)) == 1 << 20
    chunks.close()  # type: ignore[attr-defined]
    assert marker.exists()
    assert time.monotonic() - start < 5


def test_missing_root_and_user_namespaces_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apt, "host_suite", lambda: "bookworm")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuilderError, match=r"needs root, or newuidmap .*BASE_IMAGE"):
        next(debian_rootfs(new_console()[0]))


def test_host_other_than_debian_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apt, "host_suite", lambda: None)
    with pytest.raises(BuilderError, match="on Debian or in a Debian container"):
        next(debian_rootfs(new_console()[0]))


def test_only_network_settings_of_apt_are_inherited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dump = 'APT::Architecture "amd64";\nAcquire::http::Proxy "http://p.example";\nDir "/";\n'

    def run(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 0, dump, "")

    monkeypatch.setattr(subprocess, "run", run)
    assert base_image._machine_settings() == 'Acquire::http::Proxy "http://p.example";\n'


def test_shell_code_is_valid() -> None:
    hooks = [
        option.partition("=")[2]
        for option in mmdebstrap_argv(base_image.PACKAGES)
        if "-hook=" in option
    ]
    shell, flag, script = container_argv()
    assert (shell, flag, len(hooks)) == ("sh", "-c", 3)
    for text in (*hooks, script):
        subprocess.run([shell, "-n", "-c", text], check=True)


def test_hooks_remove_documentation_but_keep_licenses(tmp_path: Path) -> None:
    kept = ["usr/share/doc/x/copyright", "usr/lib/libx.so", "usr/share/guile/a.scm"]
    removed = ["usr/share/doc/x/README", "usr/share/man/man1/x.1", "usr/include/x.h", "usr/lib/x.a"]
    for name in (*kept, *removed):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for hook in (base_image._BEFOREHAND, base_image._AFTERWARDS):
        subprocess.run(["sh", "-c", hook, "hook", str(tmp_path)], check=True)
    assert [name for name in (*kept, *removed) if (tmp_path / name).exists()] == kept
    slim = (tmp_path / "etc/dpkg/dpkg.cfg.d/slim").read_text().splitlines()
    assert "path-exclude=/usr/share/man/*" in slim
    assert slim.index("path-exclude=/usr/share/doc/*") < slim.index(
        "path-include=/usr/share/doc/*/copyright"
    )


def test_environment_of_mmdebstrap_has_no_options_of_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = {"TAR_OPTIONS": "--exclude=*", "SOURCE_DATE_EPOCH": "1", "PERL5OPT": "-Mx"}
    for name, value in {**hostile, "http_proxy": "http://p.test", "LANGUAGE": "de"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "mmdebstrap").mkdir()
    environment = base_image._mmdebstrap(apt.Apt(["sid"], directory=tmp_path), new_console()[0])
    assert not hostile.keys() & environment.keys()
    assert environment["http_proxy"] == "http://p.test"
    assert environment["LANGUAGE"] == "C"


def test_build_users_are_created_only_with_guix() -> None:
    assert "guixbuild" in " ".join(mmdebstrap_argv(base_image.PACKAGES))
    assert "guixbuild" not in " ".join(mmdebstrap_argv(()))
