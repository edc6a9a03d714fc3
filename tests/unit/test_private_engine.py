from __future__ import annotations

import io
import json
import os
import socket
import sys
import tempfile
import threading
from pathlib import Path

import pytest

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
from guix_tasks.ui.console import Console


class Heard(Console):
    """What was said."""

    def __init__(self) -> None:
        self.text = io.StringIO()
        super().__init__(out=self.text, err=self.text)


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PrivateEngine:
    """An engine in an empty directory, as root on a Linux that has no other."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(engine, "other_engine", lambda: None)
    return PrivateEngine(tmp_path / "engine")


def install(private: PrivateEngine, daemon: str) -> None:
    program = private.directory / "root/usr/sbin/dockerd"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\n{daemon}\n")
    program.chmod(0o755)


def test_it_is_in_the_users_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    private = private_engine()
    assert private.directory == files.data_home() / "engine"
    assert private.url == f"unix://{tmp_path}/guix-tasks/engine/docker.sock"
    assert not private.installed()
    assert not private.running()
    assert private.docker_path() is None
    assert private.buildx_path() is None
    assert list(tmp_path.iterdir()) == []


def test_its_configuration_leaves_the_host_alone(alone: PrivateEngine) -> None:
    configuration = alone._configure(None)
    assert configuration["hosts"] == [alone.url]
    assert configuration["bridge"] == "none"
    untouched = ("iptables", "ip6tables", "ip-forward")
    assert [configuration[name] for name in untouched] == [False] * 3
    for name in ("data-root", "exec-root", "pidfile", "init-path"):
        assert str(configuration[name]).startswith(f"{alone.directory}/")


@pytest.mark.parametrize("store", ImageStore)
def test_the_image_store_is_dockers_default_or_the_one_that_is_set(
    alone: PrivateEngine, store: ImageStore
) -> None:
    assert "features" not in alone._configure(None)
    uses_containerd = store is ImageStore.CONTAINERD
    assert alone._configure(store)["features"] == {"containerd-snapshotter": uses_containerd}


def test_a_running_engine_does_not_change_its_store(
    alone: PrivateEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PrivateEngine, "running", lambda _: True)
    monkeypatch.setattr(engine, "answers", lambda path: path == alone.socket)
    alone.directory.mkdir(parents=True, exist_ok=True)
    configuration = alone._configure(ImageStore.CONTAINERD)
    (alone.directory / "daemon.json").write_text(json.dumps(configuration))
    alone.up(Heard(), ImageStore.CONTAINERD)
    with pytest.raises(EngineError, match=r"image store overlay2; run `inv engine.down` first"):
        alone.up(Heard(), ImageStore.OVERLAY2)


def test_not_root(alone: PrivateEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(EngineError, match=r"needs root.*or install Docker Engine"):
        alone.up(Heard())
    assert not alone.directory.exists()


def test_not_linux(alone: PrivateEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(EngineError, match="needs Linux; install Docker"):
        alone.up(Heard())


@pytest.mark.usefixtures("alone")
def test_a_long_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"longer than 107 bytes.*XDG_DATA_HOME"):
        PrivateEngine(tmp_path / ("x" * 100)).up(Heard())


def test_not_debian(alone: PrivateEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apt, "host_suite", lambda: None)
    with pytest.raises(EngineError, match="this host is not Debian; install Docker Engine"):
        alone.up(Heard())


def test_beside_another_engine_it_does_not_start(
    alone: PrivateEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(alone, "exit 0")
    monkeypatch.setattr(engine, "other_engine", lambda: "process 7")
    with pytest.raises(EngineError, match=r"another Docker Engine \(process 7\)"):
        alone.up(Heard())
    assert not alone._daemon.log.exists()


def test_docker0_tells_of_another_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "docker0")])
    assert other_engine() == "the network interface docker0"


def test_a_dockerd_in_the_same_network_tells_of_another_engine(
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


def test_a_daemon_that_dies_says_why(alone: PrivateEngine) -> None:
    install(
        alone, "echo 'level=info msg=\"starting\"'; echo 'failed to start daemon: boom'; exit 1"
    )
    (alone.directory / "docker.pid").write_text("1")
    alone.socket.touch()
    with pytest.raises(
        EngineError, match="cannot start the private engine: failed to start daemon: boom; see /"
    ):
        alone.up(Heard())
    left = sorted(path.name for path in alone.directory.iterdir())
    assert left == ["daemon.json", "dockerd.log", "lock", "root"]
    assert alone.directory.stat().st_mode & 0o777 == 0o700


def test_one_that_answers_has_started(
    alone: PrivateEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(alone, "exec sleep 600")
    pid = alone.directory / "docker.pid"

    def answers(path: Path) -> bool:
        return path == alone.socket and pid.exists() and pid.read_text().strip() != ""

    monkeypatch.setattr(engine, "answers", answers)
    monkeypatch.setattr(Path, "chmod", lambda *_: None)
    heard = Heard()
    try:
        alone.up(heard)
        by_hand = alone.shell_hint()
        assert heard.text.getvalue() == f"started the private engine: {alone.url}\n{by_hand}\n"
    finally:
        os.kill(int(pid.read_text()), 9)


def test_one_that_runs_is_told_of(alone: PrivateEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrivateEngine, "running", lambda _: True)
    monkeypatch.setattr(engine, "answers", lambda path: path == alone.socket)
    heard = Heard()
    alone.up(heard)
    runs = f"the private engine is already running: {alone.url}"
    assert heard.text.getvalue() == f"{runs}\n{alone.shell_hint()}\n"


def test_a_shell_is_told_how_docker_reaches_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = PrivateEngine(tmp_path / "an engine")
    by_hand = f"docker by hand: export DOCKER_HOST='unix://{private.socket}'"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert private.shell_hint() == by_hand
    program = private.directory / "root/usr/bin/docker"
    program.parent.mkdir(parents=True)
    program.touch(0o755)
    assert private.shell_hint() == f"{by_hand} PATH=\"$PATH\":'{program.parent}'"
    (tmp_path / "docker").touch(0o755)
    assert private.shell_hint() == by_hand


@pytest.mark.parametrize("directory", [True, False])
def test_down_where_nothing_runs(alone: PrivateEngine, directory: bool) -> None:
    if directory:
        alone.directory.mkdir()
        (alone.directory / "docker.pid").write_text("1")
    heard = Heard()
    alone.down(heard)
    assert heard.text.getvalue().startswith("no private engine is running")


def test_mounts_below_a_folder_come_innermost_first() -> None:
    table = "\n".join(
        f"{number} 1 0:1 / {point} rw - ext4 /dev/x rw"
        for number, point in enumerate(
            ["/", "/a", "/a/b", r"/a/b/with\040blank", "/a/b/with\\040blank/deep", "/ab", "/a/b/é"]
        )
    )
    points = ["/a/b/with blank/deep", "/a/b/with blank", "/a/b/é"]
    assert mounts_below(Path("/a/b"), table) == points


def test_a_disk_that_the_user_put_there_stays(
    alone: PrivateEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = str(alone.directory / "data")
    monkeypatch.setattr(
        engine,
        "mounts_below",
        lambda directory, _table: {alone.directory: [data]}.get(directory, []),
    )
    (alone.directory / "run").mkdir(parents=True)
    assert alone._mounts() == []
    (alone.directory / "run" / "unmount-on-shutdown").touch()
    assert alone._mounts() == [data]


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nOK", True),
        (b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n", False),
        (b"", False),
        (b"nonsense\r\n\r\n", False),
    ],
)
def test_answers(response: bytes, expected: bool) -> None:
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
