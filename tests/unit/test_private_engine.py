"""The private engine: its configuration, checks before the start, start and stop."""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from fake_engine import BufferConsole

from guix_tasks import files
from guix_tasks.bootstrap import apt, engine, service
from guix_tasks.bootstrap.engine import (
    PrivateEngine,
    answers,
    mounts_below,
    other_engine,
    private_engine,
)
from guix_tasks.errors import EngineError
from guix_tasks.settings.values import ImageStore


@pytest.fixture
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PrivateEngine:
    """A private engine in an empty directory, for root on Linux without another engine."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(engine, "other_engine", lambda: None)
    return PrivateEngine(tmp_path / "engine")


def install(private: PrivateEngine, daemon: str) -> None:
    program = private.directory / "root/usr/sbin/dockerd"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\n{daemon}\n")
    program.chmod(0o755)


def test_engine_is_in_the_data_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    private = private_engine()
    assert private.directory == files.data_home() / "engine"
    assert private.url == f"unix://{tmp_path}/guix-tasks/engine/docker.sock"
    assert not private.installed()
    assert not private.running()
    assert private.docker_path() is None
    assert private.buildx_path() is None
    assert list(tmp_path.iterdir()) == []


def test_configuration_does_not_change_the_host(private: PrivateEngine) -> None:
    configuration = private._configure(None)
    assert configuration["hosts"] == [private.url]
    assert configuration["bridge"] == "none"
    disabled = ("iptables", "ip6tables", "ip-forward")
    assert [configuration[name] for name in disabled] == [False] * 3
    for name in ("data-root", "exec-root", "pidfile", "init-path"):
        assert str(configuration[name]).startswith(f"{private.directory}/")


@pytest.mark.parametrize("store", ImageStore)
def test_image_store_is_the_default_or_that_of_the_settings(
    private: PrivateEngine, store: ImageStore
) -> None:
    assert "features" not in private._configure(None)
    uses_containerd = store is ImageStore.CONTAINERD
    assert private._configure(store)["features"] == {"containerd-snapshotter": uses_containerd}


def test_running_engine_does_not_change_its_store(
    private: PrivateEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PrivateEngine, "running", lambda _: True)
    monkeypatch.setattr(engine, "answers", lambda path: path == private.socket)
    private.directory.mkdir(parents=True, exist_ok=True)
    configuration = private._configure(ImageStore.CONTAINERD)
    (private.directory / "daemon.json").write_text(json.dumps(configuration))
    private.up(BufferConsole(), ImageStore.CONTAINERD)
    with pytest.raises(EngineError, match=r"image store overlay2; run `inv engine.down` first"):
        private.up(BufferConsole(), ImageStore.OVERLAY2)


def test_other_user_than_root_is_an_error(
    private: PrivateEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(EngineError, match=r"needs root.*or install Docker Engine"):
        private.up(BufferConsole())
    assert not private.directory.exists()


def test_other_system_than_linux_is_an_error(
    private: PrivateEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(EngineError, match="needs Linux; install Docker"):
        private.up(BufferConsole())


@pytest.mark.usefixtures("private")
def test_long_path_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"longer than 107 bytes.*XDG_DATA_HOME"):
        PrivateEngine(tmp_path / ("x" * 100)).up(BufferConsole())


def test_other_distribution_is_an_error(
    private: PrivateEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apt, "host_suite", lambda: None)
    with pytest.raises(EngineError, match="this host is not Debian; install Docker Engine"):
        private.up(BufferConsole())


def test_another_engine_is_an_error(
    private: PrivateEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(private, "exit 0")
    monkeypatch.setattr(engine, "other_engine", lambda: "process 7")
    with pytest.raises(EngineError, match=r"another Docker Engine \(process 7\)"):
        private.up(BufferConsole())
    assert not private._daemon.log.exists()


def test_docker0_is_detected_as_another_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "docker0")])
    assert other_engine() == "the network interface docker0"


def test_dockerd_in_the_same_network_is_detected_as_another_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    programs = {1: "/sbin/init", 8: "/usr/bin/dockerd", 9: "/usr/bin/dockerd"}
    monkeypatch.setattr(socket, "if_nameindex", list)
    monkeypatch.setattr(service, "processes", lambda: list(programs))
    monkeypatch.setattr(service, "program_of", lambda pid: Path(programs[pid]))
    monkeypatch.setattr(engine, "_network", lambda pid: "other" if pid == 8 else "own")
    assert other_engine() == "process 9"
    del programs[9]
    assert other_engine() is None


def test_failed_start_reports_the_error(private: PrivateEngine) -> None:
    install(
        private, "echo 'level=info msg=\"starting\"'; echo 'failed to start daemon: boom'; exit 1"
    )
    (private.directory / "docker.pid").write_text("1")
    private.socket.touch()
    with pytest.raises(
        EngineError, match="cannot start the private engine: failed to start daemon: boom; see /"
    ):
        private.up(BufferConsole())
    remaining = sorted(path.name for path in private.directory.iterdir())
    assert remaining == ["daemon.json", "dockerd.log", "lock", "root"]
    assert private.directory.stat().st_mode & 0o777 == 0o700


def test_started_engine_is_reported(
    private: PrivateEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(private, "exec sleep 600")
    pid = private.directory / "docker.pid"

    def answers(path: Path) -> bool:
        return path == private.socket and pid.exists() and pid.read_text().strip() != ""

    monkeypatch.setattr(engine, "answers", answers)
    monkeypatch.setattr(Path, "chmod", lambda *_: None)
    console = BufferConsole()
    try:
        private.up(console)
        hint = private.shell_hint()
        assert console.text == f"started the private engine: {private.url}\n{hint}\n"
    finally:
        os.kill(int(pid.read_text()), 9)


def test_running_engine_is_reported(
    private: PrivateEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PrivateEngine, "running", lambda _: True)
    monkeypatch.setattr(engine, "answers", lambda path: path == private.socket)
    console = BufferConsole()
    private.up(console)
    message = f"the private engine is already running: {private.url}"
    assert console.text == f"{message}\n{private.shell_hint()}\n"


def test_shell_hint_sets_host_and_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private = PrivateEngine(tmp_path / "an engine")
    hint = f"docker by hand: export DOCKER_HOST='unix://{private.socket}'"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert private.shell_hint() == hint
    program = private.directory / "root/usr/bin/docker"
    program.parent.mkdir(parents=True)
    program.touch(0o755)
    assert private.shell_hint() == f"{hint} PATH=\"$PATH\":'{program.parent}'"
    (tmp_path / "docker").touch(0o755)
    assert private.shell_hint() == hint


@pytest.mark.parametrize("directory", [True, False])
def test_down_without_an_engine_is_reported(private: PrivateEngine, directory: bool) -> None:
    if directory:
        private.directory.mkdir()
        (private.directory / "docker.pid").write_text("1")
    console = BufferConsole()
    private.down(console)
    assert console.text.startswith("no private engine is running")


def test_mounts_below_a_directory_are_innermost_first() -> None:
    table = "\n".join(
        f"{number} 1 0:1 / {point} rw - ext4 /dev/x rw"
        for number, point in enumerate(
            ["/", "/a", "/a/b", r"/a/b/with\040blank", "/a/b/with\\040blank/deep", "/ab", "/a/b/é"]
        )
    )
    points = ["/a/b/with blank/deep", "/a/b/with blank", "/a/b/é"]
    assert mounts_below(Path("/a/b"), table) == points


def test_mount_of_the_user_is_kept(private: PrivateEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    data = str(private.directory / "data")
    monkeypatch.setattr(
        engine,
        "mounts_below",
        lambda directory, _table: {private.directory: [data]}.get(directory, []),
    )
    (private.directory / "run").mkdir(parents=True)
    assert private._mounts() == []
    (private.directory / "run" / "unmount-on-shutdown").touch()
    assert private._mounts() == [data]


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nOK", True),
        (b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n", False),
        (b"", False),
        (b"nonsense\r\n\r\n", False),
    ],
)
def test_engine_answers_with_status_200(response: bytes, expected: bool) -> None:
    directory = Path(tempfile.gettempdir())
    path = directory / f"guix-tasks-test-{os.getpid()}.sock"
    path.unlink(missing_ok=True)
    assert not answers(path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(response)

        thread = threading.Thread(target=serve)
        thread.start()
        assert answers(path) is expected
        thread.join(5)
    path.unlink()
