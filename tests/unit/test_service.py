from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from guix_tasks.bootstrap import service as service_module
from guix_tasks.bootstrap.service import Service, disk_errors_as, locked
from guix_tasks.errors import RegistryError

if not Path("/proc/self/exe").exists():
    pytest.skip("there is no /proc here", allow_module_level=True)


@pytest.fixture
def service(tmp_path: Path) -> Service:
    """A daemon that is a copy of a program of the machine, in a directory of its own."""
    program = tmp_path / "root" / "daemon"
    program.parent.mkdir()
    shutil.copy(os.path.realpath(shutil.which("sleep") or "/bin/sleep"), program)
    return Service(program, tmp_path / "pid", tmp_path / "log")


def runs(service: Service) -> bool:
    return service_module.wait_until(lambda: service.pid() is not None, 5)


def test_a_service_lives_in_its_own_session_and_is_stopped(service: Service) -> None:
    started = service.start(["600"])
    assert runs(service)
    assert service.pid() == started.pid
    assert os.getsid(started.pid) == started.pid
    assert service_module.processes_below(service.program.parent) == [started.pid]
    assert started.pid in service_module.children([os.getpid()])
    assert service.stop(5)
    assert service.pid() is None
    assert not service.pid_file.exists()
    started.wait()


def test_one_that_does_not_end_when_asked_is_killed(service: Service) -> None:
    shutil.copy(os.path.realpath("/bin/sh"), service.program)
    started = service.start(["-c", "trap '' TERM; while :; do read line; sleep 0.05; done"])
    assert runs(service)
    time.sleep(0.2)  # until it has said that it ignores the signal
    assert not service.stop(0.3)
    assert started.wait() == -9


@pytest.mark.parametrize("content", ["", "none", "-5", "99999999", "OUR PID", "1"])
def test_a_pid_file_alone_proves_nothing(service: Service, content: str) -> None:
    service.pid_file.write_text(content.replace("OUR PID", str(os.getpid())))
    assert service.pid() is None
    assert service.stop(1)
    assert not service.pid_file.exists()


def test_a_daemon_gets_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_PASSWORD", "swordfish")
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    env = Service(Path(shutil.which("env") or "env"), tmp_path / "pid", tmp_path / "log")
    env.start([], [tmp_path / "bin"]).wait()
    given = env.log.read_text()
    assert "swordfish" not in given
    assert "https_proxy=http://proxy.example:3128" in given
    assert f"PATH={tmp_path / 'bin'}{os.pathsep}" in given


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        ("", "its log is empty"),
        ('time="x" level=info msg="all is well"\n', "its log is empty"),
        ('level=error msg="a \\"b\\" c"\ntime="x" level=warning msg="w"\n', 'a "b" c'),
        ("level=info msg=x\nfailed to start daemon: no cgroups\n\n", "failed to start daemon: no"),
    ],
)
def test_error_line(service: Service, log: str, cause: str) -> None:
    service.log.write_text(log)
    assert service.error_line().startswith(cause)


def test_error_line_without_a_log(service: Service) -> None:
    assert service.error_line() == "its log is empty"


def test_only_one_holds_a_lock(tmp_path: Path) -> None:
    order: list[str] = []

    def second() -> None:
        with locked(tmp_path / "directory" / "lock"):
            order.append("second")

    with locked(tmp_path / "directory" / "lock"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.1)
        order.append("first")
    thread.join(5)
    assert order == ["first", "second"]


def test_trouble_with_the_disk_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with (
        pytest.raises(RegistryError, match=r"file: (File exists|Not a directory).*XDG_DATA_HOME"),
        disk_errors_as(RegistryError),
        locked(file / "lock"),
    ):
        pass
