"""Services: daemons with a PID file and a log, locks and errors of the disk."""

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
    pytest.skip("this system has no /proc", allow_module_level=True)


@pytest.fixture
def service(tmp_path: Path) -> Service:
    """A daemon in a separate directory that is a copy of a program of the machine."""
    program = tmp_path / "root" / "daemon"
    program.parent.mkdir()
    shutil.copy(os.path.realpath(shutil.which("sleep") or "/bin/sleep"), program)
    return Service(program, tmp_path / "pid", tmp_path / "log")


def wait_until_running(service: Service) -> bool:
    return service_module.wait_until(lambda: service.pid() is not None, 5)


def test_service_has_a_separate_session_and_is_stopped(service: Service) -> None:
    process = service.start(["600"])
    assert wait_until_running(service)
    assert service.pid() == process.pid
    assert os.getsid(process.pid) == process.pid
    assert service_module.processes_below(service.program.parent) == [process.pid]
    assert process.pid in service_module.children([os.getpid()])
    assert service.stop(5)
    assert service.pid() is None
    assert not service.pid_file.exists()
    process.wait()


def test_service_that_ignores_sigterm_is_killed(service: Service) -> None:
    shutil.copy(os.path.realpath("/bin/sh"), service.program)
    process = service.start(["-c", "trap '' TERM; while :; do read line; sleep 0.05; done"])
    assert wait_until_running(service)
    time.sleep(0.2)  # until the shell ignores the signal
    assert not service.stop(0.3)
    assert process.wait() == -9


@pytest.mark.parametrize("content", ["", "none", "-5", "99999999", "OUR PID", "1"])
def test_pid_of_another_process_is_ignored(service: Service, content: str) -> None:
    service.pid_file.write_text(content.replace("OUR PID", str(os.getpid())))
    assert service.pid() is None
    assert service.stop(1)
    assert not service.pid_file.exists()


def test_daemon_gets_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_PASSWORD", "swordfish")
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    env = Service(Path(shutil.which("env") or "env"), tmp_path / "pid", tmp_path / "log")
    env.start([], [tmp_path / "bin"]).wait()
    environment = env.log.read_text()
    assert "swordfish" not in environment
    assert "https_proxy=http://proxy.example:3128" in environment
    assert f"PATH={tmp_path / 'bin'}{os.pathsep}" in environment


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("", "its log is empty"),
        ('time="x" level=info msg="all is well"\n', "its log is empty"),
        ('level=error msg="a \\"b\\" c"\ntime="x" level=warning msg="w"\n', 'a "b" c'),
        ("level=info msg=x\nfailed to start daemon: no cgroups\n\n", "failed to start daemon: no"),
    ],
)
def test_error_line_is_the_last_error_of_the_log(service: Service, log: str, expected: str) -> None:
    service.log.write_text(log)
    assert service.error_line().startswith(expected)


def test_missing_log_is_an_empty_log(service: Service) -> None:
    assert service.error_line() == "its log is empty"


def test_lock_has_one_holder(tmp_path: Path) -> None:
    order: list[str] = []

    def append_second() -> None:
        with locked(tmp_path / "directory" / "lock"):
            order.append("second")

    with locked(tmp_path / "directory" / "lock"):
        thread = threading.Thread(target=append_second)
        thread.start()
        time.sleep(0.1)
        order.append("first")
    thread.join(5)
    assert order == ["first", "second"]


def test_error_of_the_disk_is_reported_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with (
        pytest.raises(RegistryError, match=r"file: (File exists|Not a directory).*XDG_DATA_HOME"),
        disk_errors_as(RegistryError),
        locked(file / "lock"),
    ):
        pass
