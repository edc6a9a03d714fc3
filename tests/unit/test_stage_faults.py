"""Failing stages: retries, early stops, messages and diagnostics."""

from __future__ import annotations

import errno
import gzip
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from fake_engine import (
    DETERMINISTIC,
    BufferConsole,
    FakeContainer,
    Output,
    Site,
    console_text,
    new_site,
)
from hypothesis import given
from hypothesis import strategies as st

from guix_tasks.commands import commit
from guix_tasks.engine.dry_run import TracedEngine
from guix_tasks.errors import FULL_DISK, EngineError, StageError, UsageError
from guix_tasks.stages.container import (
    ENTRY_POINT,
    WORK_DIRECTORY,
    Work,
    common_inputs,
    environment,
    guix_environment,
    kept_containers,
    work_container,
)
from guix_tasks.stages.log_faults import LogFaults
from guix_tasks.stages.make import run_stage
from guix_tasks.stages.project import Project
from guix_tasks.stages.runner import STAGE_TRIES, run_container
from guix_tasks.stages.stage import Stage
from guix_tasks.ui import redact
from guix_tasks.ui.console import Display
from guix_tasks.ui.log import LogReader

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from guix_tasks.engine.api import Image

STAGE = Stage("own", [("guix", "pull")], ("guix", "describe"), lambda report: {"report": report})

NO_NETWORK = b"guix pull: error: Git error: failed to resolve address for git.test\n"
NOT_BUILT = b"guix pull: error: build of `/gnu/store/x-hello.drv' failed\n"
SILENT = b"guix substitute: warning: %s: connection failed: Connection refused\n"
NOT_FOUND = b"guix substitute: warning: %s: host not found: Name or service not known\n"
QUOTED_LOG = b"entry-point: the last lines of the build log of /gnu/store/x-hello.drv:\n"


@dataclass
class Attempt:
    """The output and the exit status of one start of a container."""

    status: int = 0
    log: Sequence[bytes] = ()
    report: bytes = b"report\n"


@dataclass
class AttemptPlayer:
    """Behaviour that plays attempts; a stopped container prints nothing more."""

    attempts: list[Attempt]
    had_entry_point: list[bool] = field(default_factory=list)
    """Whether each start had an entry point."""

    def __call__(self, container: FakeContainer) -> Output:
        attempt = self.attempts.pop(0)
        self.had_entry_point.append(container.read(ENTRY_POINT) is not None)
        container.status = attempt.status
        for chunk in attempt.log:
            yield True, chunk
            if not container.running:
                break
        else:
            yield False, attempt.report
        container.remove_files("/var/guix/guix-tasks")


pytestmark = pytest.mark.usefixtures("serial_hashing")


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    seconds: list[float] = []
    monkeypatch.setattr("time.sleep", seconds.append)
    return seconds


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = new_site(tmp_path, GUIX_SANDBOX="privileged")
    site.env["GUIX_SUBSTITUTE_URLS"] = "https://a.test https://b.test"
    return site


def parent_image(site: Site) -> Image:
    return site.engine.make_image({}, {"/x": b""}, tag="parent:1")


def run(site: Site, *attempts: Attempt, **options: bool) -> Project:
    """Run a stage and return its project."""
    player = AttemptPlayer(list(attempts))
    site.engine.behaviour = player
    project = site.project()
    run_stage(project, STAGE, parent_image(site), **options)
    assert player.attempts == []
    return project


def fail(site: Site, *attempts: Attempt, **options: bool) -> str:
    with pytest.raises(StageError) as caught:
        run(site, *attempts, **options)
    return str(caught.value)


def count_attempts(site: Site) -> int:
    assert isinstance(site.engine.behaviour, AttemptPlayer)
    return len(site.engine.behaviour.had_entry_point)


def count_starts(site: Site) -> int:
    return [name for name, _ in site.engine.calls].count("run")


def diagnostics(site: Site) -> list[Path]:
    directory = site.directory / "out" / "failed"
    return sorted(directory.iterdir()) if directory.exists() else []


# --- Retries --------------------------------------------------------------------------------


def test_network_fault_is_retried_in_the_same_container(site: Site, waits: list[float]) -> None:
    project = run(site, Attempt(1, [NO_NETWORK], b"half of a rep"), Attempt())
    assert "own is retried in " in console_text(project)
    assert len(site.engine.specs) == 1
    assert (count_attempts(site), len(waits)) == (2, 1)
    assert diagnostics(site) == []
    assert site.engine.all_containers == {}


def test_report_is_only_that_of_the_successful_attempt(site: Site) -> None:
    run(site, Attempt(1, [NO_NETWORK], b"half of a rep"), Attempt(report=b"all of it\n"))
    assert site.image("own").labels["report"] == "all of it"


@pytest.mark.parametrize(
    "message",
    [
        "No space left on device",
        "Disk quota exceeded",
        "database or disk is full",
        "disk I/O error",
    ],
)
def test_full_disk_is_reported(site: Site, message: str) -> None:
    error = fail(site, Attempt(1, [f"guix pull: error: write failed: {message}\n".encode()]))
    assert FULL_DISK in error
    assert FULL_DISK not in fail(site, Attempt(1, [NOT_BUILT]))


@pytest.mark.parametrize(
    ("limit", "hint"),
    [("300m", "raise STAGE_MEMORY (315 MB)"), ("", "give the engine more")],
)
def test_lack_of_memory_is_reported(site: Site, limit: str, hint: str) -> None:
    site.env["STAGE_MEMORY"] = limit

    def run_out_of_memory(container: FakeContainer) -> Output:
        container.status, container.lacked_memory = 1, True
        yield True, NOT_BUILT

    site.engine.behaviour = run_out_of_memory
    with pytest.raises(StageError) as caught:
        run_stage(site.project(), STAGE, parent_image(site))
    assert "own: a process was killed because memory ran out, and nothing was" in str(caught.value)
    assert hint in str(caught.value)


def test_full_disk_is_not_retried(site: Site) -> None:
    """A substitute that cannot be stored looks like a failed download."""
    full = b"guix substitute: error: write: No space left on device\n"
    assert FULL_DISK in fail(site, Attempt(1, [NO_NETWORK, full]))


@pytest.mark.parametrize(
    "fault",
    [
        b"guix package: error: database disk image is malformed\n",
        b"guix package: error: setting journal mode: attempt to write a readonly database\n",
    ],
)
def test_volume_with_an_unusable_database_is_created_again(site: Site, fault: bytes) -> None:
    project = run(site, Attempt(1, [fault]), Attempt())
    assert " is damaged; recreating it" in console_text(project)
    assert "remove_volume" in [name for name, _ in site.engine.calls]
    assert site.image("own")


def test_each_attempt_has_its_files(site: Site) -> None:
    player = AttemptPlayer([Attempt(1, [NO_NETWORK]), Attempt(1, [NO_NETWORK]), Attempt()])
    site.engine.behaviour = player
    run_stage(site.project(), STAGE, parent_image(site))
    assert player.had_entry_point == [True] * 3


def test_lasting_network_fault_is_reported_after_the_last_attempt(site: Site) -> None:
    error = fail(site, *[Attempt(1, [b"try\n", NO_NETWORK])] * STAGE_TRIES)
    assert error.startswith("own: Git error: failed to resolve address for git.test, and nothing")
    (directory,) = diagnostics(site)
    assert f"the logs are in {directory}" in error
    assert (directory / "log").read_bytes().count(b"try\n") == STAGE_TRIES
    assert site.engine.all_containers == {}


@pytest.mark.parametrize("log", [b"", b"guix pull: error: x: unknown package\n", NOT_BUILT])
def test_other_fault_is_not_retried(site: Site, waits: list[float], log: bytes) -> None:
    fail(site, Attempt(1, [log]))
    assert (count_attempts(site), waits) == (1, [])


def test_network_fault_outside_the_last_lines_is_ignored(site: Site) -> None:
    fail(site, Attempt(1, [NO_NETWORK, *[b"building\n"] * 1000, b"guix pull: error: no space\n"]))


# --- Errors of Guix ---------------------------------------------------------------------------


def test_unknown_package_is_reported_with_a_search_command(site: Site) -> None:
    log = [b"guix package: warning: old\nguix package: error: helo", b"@1: unknown package\nend\n"]
    assert fail(site, Attempt(1, log)).startswith(
        "own: helo@1: unknown package, and nothing was committed; "
        "search for it with `inv run -- guix search helo`; "
    )


def test_load_failure_is_reported_only_without_a_better_error(site: Site) -> None:
    load = b"guix pack: error: failed to load '/x/pack.scm':\nThrow to key `quit'\n"
    assert fail(site, Attempt(1, [load])).startswith("own: failed to load '/x/pack.scm', and")
    log = b"guix pack: error: x: unknown package\n" + load
    assert fail(site, Attempt(1, [log])).startswith("own: x: unknown package, and")


def test_error_in_a_file_is_reported_with_its_line(site: Site) -> None:
    log = b"/x/manifest.scm:3:4: error: helo: unbound variable\nhint: Did you forget an import?\n"
    error = fail(site, Attempt(1, [log]))
    assert error.startswith("own: /x/manifest.scm:3:4: helo: unbound variable, and nothing was ")
    assert "see the output above for more" in error


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("{}/manifest.scm:3:1: missing closing parenthesis", "guix/m.scm:3:1: missing closing"),
        ("{}/manifest.scm:2:0: error: x: unbound variable", "guix/m.scm:2:0: x: unbound variable"),
        ("ice-9/eval.scm:223:20:\nerror: x: unbound variable\nhint: y", "x: unbound variable, and"),
        (
            "guix package: error: failed to load '{}/profile.scm':\nno code for module (nope)",
            "no code for module (nope), and",
        ),
        (
            "guix package: error: failed to load '{}/profile.scm':",
            "failed to load 'guix/m.scm', and",
        ),
        ("guix pull: error: failed to load '{}/channels.scm':", "failed to load 'c.scm', and"),
    ],
)
def test_error_in_a_file_of_the_project_has_its_name(site: Site, log: str, expected: str) -> None:
    (site.directory / "guix").mkdir()
    (site.directory / "guix/m.scm").touch()
    (site.directory / "c.scm").touch()
    site.env |= {"GUIX_MANIFEST": "guix/m.scm", "GUIX_CHANNELS": "c.scm"}
    output = log.replace("{}", WORK_DIRECTORY).encode()
    assert fail(site, Attempt(1, [output + b"\n"])).startswith(f"own: {expected}")


def test_failed_packages_are_named(site: Site) -> None:
    lines = [
        f"builder for `/gnu/store/{letter * 32}-{name}.drv' failed with exit code 1\n".encode()
        for letter, name in (("a", "motto-1.0"), ("b", "x+y-2"), ("a", "motto-1.0"))
    ]
    error = fail(site, Attempt(1, [*lines, NOT_BUILT]))
    assert error.startswith("own: the build of motto-1.0, x+y-2 failed, and nothing was committed")


def test_error_of_guix_is_shortened_redacted_and_printable(site: Site) -> None:
    redact.add("hunter2")
    log = b"guix pull: error: \x1b[31m" + b"a" * 180 + b"hunter2" * 9 + b"\n"
    error = fail(site, Attempt(1, [log]))
    assert "hunter" not in error
    assert "\x1b" not in error
    assert len(error.partition(", and nothing was committed")[0]) <= len("own: ") + 200


def test_output_of_a_build_is_not_an_error_of_guix(site: Site) -> None:
    quoted_line = b"guix build: error: of a test\n"
    assert fail(site, Attempt(1, [NOT_BUILT, QUOTED_LOG, quoted_line])).startswith(
        "own: build of `/gnu/store/"
    )


# --- Failed builds ----------------------------------------------------------------------------


@pytest.mark.parametrize("at_end", [False, True])
def test_build_that_mentions_the_network_is_not_retried(site: Site, *, at_end: bool) -> None:
    words = [b"In procedure connect: Connection refused\n", b"curl: (28) timed out\n", NO_NETWORK]
    fail(site, Attempt(1, [NOT_BUILT, *words] if at_end else [*words, NOT_BUILT]))


@pytest.mark.parametrize("size", [1, 7, 16, 1000])
def test_failed_build_is_detected_in_a_log_of_any_chunk_size(site: Site, size: int) -> None:
    log = NOT_BUILT + b"In procedure connect: refused\n" * 500
    fail(site, Attempt(1, [log[start : start + size] for start in range(0, len(log), size)]))


def test_quoted_build_log_is_not_a_network_fault(site: Site) -> None:
    """The tests of Guix, when it is built from source, print such lines."""
    quoted = NO_NETWORK + SILENT % b"a.test" + SILENT % b"b.test"
    error = fail(site, Attempt(1, [b"guix pull: error: something else\n", QUOTED_LOG, quoted]))
    assert error.startswith("own: something else, and nothing was committed; see the output above")
    assert "stop" not in site.engine.changing_calls()


def test_quoted_build_log_does_not_hide_a_network_fault(site: Site) -> None:
    """Guix stops other builds if a download fails."""
    run(site, Attempt(1, [NO_NETWORK, QUOTED_LOG, NOT_BUILT]), Attempt())


def test_last_line_without_newline_counts(site: Site) -> None:
    run(site, Attempt(1, [NO_NETWORK.rstrip()]), Attempt())
    fail(site, Attempt(1, [NO_NETWORK, NOT_BUILT.rstrip()]))


@DETERMINISTIC
@given(st.lists(st.sampled_from([b"a", b"\n", b"\r", b"\xc3", b"\xa9", b" b "])), st.integers(1, 5))
def test_lines_are_the_same_for_any_chunk_size(words: list[bytes], size: int) -> None:
    log = b"".join(words) + b"\n"
    reader = LogReader()
    chunks = [log[start : start + size] for start in range(0, len(log), size)]
    lines = [line for chunk in chunks for line in reader.read(chunk)]
    assert lines == LogReader().read(log)
    assert "\n".join(lines) == log[:-1].replace(b"\r", b"\n").decode(errors="replace")


# --- Silent servers ---------------------------------------------------------------------------


def test_stage_stops_if_no_server_answers(site: Site) -> None:
    log = [SILENT % b"a.test", NOT_FOUND % b"b.test", b"building everything\n"]
    error = fail(site, *[Attempt(0, log)] * STAGE_TRIES)
    assert error.startswith(
        "own: no substitute server answers (a.test, b.test), and Guix would build"
    )
    assert "GUIX_SUBSTITUTE_URLS" in error
    assert "GUIX_FALLBACK=yes" in error
    (directory,) = diagnostics(site)
    assert b"building" not in (directory / "log").read_bytes()
    assert site.engine.changing_calls().count("stop") == STAGE_TRIES


def test_missing_services_file_is_reported(site: Site) -> None:
    line = NOT_FOUND.replace(
        b"Name or service not known", b"Servname not supported for ai_socktype"
    )
    error = fail(site, *[Attempt(0, [line % b"a.test", line % b"b.test"])] * STAGE_TRIES)
    assert "no /etc/services" in error
    assert "install the package netbase in the Dockerfile" in error


def test_stage_succeeds_if_servers_answer_the_next_attempt(site: Site) -> None:
    log = [SILENT % b"a.test", SILENT % b"b.test"]
    run(site, Attempt(0, log), Attempt(0, log[:1]))
    assert count_attempts(site) == 2


def test_silent_servers_are_counted_per_attempt(site: Site) -> None:
    first = Attempt(1, [SILENT % b"a.test", NO_NETWORK])
    run(site, first, Attempt(0, [SILENT % b"b.test"]))


@pytest.mark.parametrize("silent", [b"a.test", b"b.test", b"c.test"])
def test_one_server_that_answers_is_enough(site: Site, silent: bytes) -> None:
    run(site, Attempt(0, [SILENT % silent, b"fetched\n"]))
    assert "stop" not in site.engine.changing_calls()


def test_fallback_lets_guix_build_from_source(site: Site) -> None:
    site.env["GUIX_FALLBACK"] = "yes"
    log = [SILENT % b"a.test", SILENT % b"b.test", b"building everything\n"]
    run(site, Attempt(0, log))


@pytest.mark.parametrize("size", [1, 5, 30, 100])
def test_warning_is_detected_for_any_chunk_size(site: Site, size: int) -> None:
    log = b"\r\x1b[K" + SILENT % b"a.test" + SILENT % b"b.test" + b"building\n"
    chunks = [log[start : start + size] for start in range(0, len(log), size)]
    assert "no substitute server" in fail(site, *[Attempt(0, chunks)] * STAGE_TRIES)


def all_are_silent(site: Site, urls: str, *hosts: bytes) -> bool:
    """Return whether all servers count as silent after warnings about some hosts."""
    site.env["GUIX_SUBSTITUTE_URLS"] = urls
    servers = LogFaults(site.settings())
    return any(servers.look((SILENT % host).decode()) for host in hosts)


def test_default_servers_are_those_of_guix(site: Site) -> None:
    assert all_are_silent(site, "", b"ci.guix.gnu.org", b"bordeaux.guix.gnu.org")
    assert not all_are_silent(site, "", b"ci.guix.gnu.org")


def test_server_is_identified_by_its_host(site: Site) -> None:
    assert all_are_silent(site, "https://A.Test:8443/sub?x=1", b"A.Test")
    assert all_are_silent(site, "http://[::1]:8080", b"::1")


def test_file_url_counts_as_a_server_that_answers(site: Site) -> None:
    assert not all_are_silent(site, "file:///srv/substitutes https://a.test", b"a.test")
    assert not all_are_silent(site, "file:///srv/substitutes", b"a.test")


def test_servers_are_ignored_without_a_network(site: Site) -> None:
    site.env["NETWORK"] = "none"
    assert not all_are_silent(site, "https://a.test", b"a.test")
    site.env["NETWORK"] = "host"
    assert all_are_silent(site, "https://a.test", b"a.test")


def test_two_servers_on_one_host_are_ignored(site: Site) -> None:
    assert not all_are_silent(site, "http://a.test:1 http://a.test:2", b"a.test")
    assert all_are_silent(site, "http://a.test:1 http://a.test:1", b"a.test")


def test_silence_is_reported_once(site: Site) -> None:
    servers = LogFaults(site.settings())
    lines = [(SILENT % host).decode() for host in (b"a.test", b"b.test", b"a.test")]
    assert [servers.look(line) for line in lines] == [False, True, False]


# --- STAGE_TIMEOUT ----------------------------------------------------------------------------


@dataclass
class Clock:
    """A clock that only sleeping advances."""

    now: float = 0
    limits: list[float] = field(default_factory=list)

    def timer(self, seconds: float, function: Callable[[], None]) -> threading.Timer:
        self.limits.append(seconds)
        timer = real_timer(1000, function)
        timer.cancel()
        return timer


real_timer = threading.Timer


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()

    def sleep(seconds: float) -> None:
        clock.now += seconds

    monkeypatch.setattr("time.sleep", sleep)
    monkeypatch.setattr("time.monotonic", lambda: clock.now)
    monkeypatch.setattr("random.uniform", lambda _lower, upper: upper)
    monkeypatch.setattr(threading, "Timer", clock.timer)
    return clock


def test_all_attempts_share_the_stage_timeout(site: Site, clock: Clock) -> None:
    site.env["STAGE_TIMEOUT"] = "100s"
    run(site, Attempt(1, [NO_NETWORK]), Attempt(1, [NO_NETWORK]), Attempt())
    assert clock.limits == [100, 98, 94]


def test_first_attempt_has_the_whole_timeout(
    site: Site, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time before the first attempt does not count."""

    def monotonic() -> float:
        clock.now += 0.01
        return clock.now

    monkeypatch.setattr("time.monotonic", monotonic)
    site.env["STAGE_TIMEOUT"] = "1s"
    run(site, Attempt())
    assert clock.limits == [1]


def test_stage_is_not_retried_after_its_timeout(site: Site, clock: Clock) -> None:
    site.env["STAGE_TIMEOUT"] = "2s"
    error = fail(site, Attempt(1, [NO_NETWORK]))
    assert error.startswith("own: stopped after STAGE_TIMEOUT (2.0 s)")
    assert len(diagnostics(site)) == 1
    assert clock.limits == [2]


def test_no_timeout_without_the_setting(site: Site, clock: Clock) -> None:
    run(site, Attempt(1, [NO_NETWORK]), Attempt())
    assert clock.limits == []


# --- Interrupts, lost engines and full disks ----------------------------------------------------


@pytest.mark.parametrize("keep_failed", [False, True])
def test_interrupt_between_attempts_leaves_nothing(
    site: Site, monkeypatch: pytest.MonkeyPatch, *, keep_failed: bool
) -> None:
    def interrupt(_seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(site, Attempt(1, [NO_NETWORK]), keep_failed=keep_failed)
    assert site.engine.all_containers == {}
    assert diagnostics(site) == []


@pytest.mark.parametrize("call", ["copy_in", "run", "wait", "stop"])
def test_engine_lost_in_a_later_attempt_is_reported(site: Site, call: str) -> None:
    def fault(_number: int, name: str, _when: str) -> None:
        if name == call and count_starts(site) >= 2 - (call in ("copy_in", "stop")):
            raise EngineError("the engine does not answer")

    site.engine.fault = fault
    log = [SILENT % b"a.test", SILENT % b"b.test"] if call == "stop" else [NO_NETWORK]
    with pytest.raises(EngineError, match="does not answer"):
        run(site, *[Attempt(1, log)] * 3)
    assert site.engine.all_containers == {}


def test_engine_lost_during_a_failure_does_not_hide_the_error(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = "/var/log/guix/drvs/ab/" + "c" * 30 + "-x.drv.gz"

    def behaviour(container: FakeContainer) -> Output:
        container.status = 1
        yield True, f"View build log at '{path}'.\n".encode()
        monkeypatch.setattr(site.engine, "info", fail_call)
        monkeypatch.setattr(site.engine, "copy_out", fail_call)
        monkeypatch.setattr(site.engine, "remove", fail_call)

    def fail_call(*_: object) -> None:
        raise EngineError("the engine does not answer")

    site.engine.behaviour = behaviour
    with pytest.raises(StageError, match="exit status 1") as caught:
        run_stage(site.project(), STAGE, parent_image(site))
    (directory,) = diagnostics(site)
    assert str(directory) in str(caught.value)


class FullDisk:
    """A log file that cannot be written and raises an error on every call."""

    def __init__(self, *, max_size: int) -> None:
        self.max_size = max_size

    def write(self, _data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def seek(self, _offset: int) -> int:
        return self.write(b"")

    def tell(self) -> int:
        return self.write(b"")

    def close(self) -> None:
        self.write(b"")


def test_full_disk_does_not_fail_a_stage(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.SpooledTemporaryFile", FullDisk)
    assert "a line\n" in console_text(run(site, Attempt(0, [b"a line\n"])))
    assert site.image("own")


def test_full_disk_does_not_hide_the_error_of_a_stage(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.SpooledTemporaryFile", FullDisk)
    error = fail(site, Attempt(1, [b"a line\n"]))
    assert error.endswith("see the output above")


def test_error_without_diagnostics_does_not_name_them(site: Site) -> None:
    site.write("out", "a file, not a directory")
    assert "the logs are in" not in fail(site, Attempt(1))


# --- Diagnostics and kept containers ------------------------------------------------------------


def test_logs_of_failed_builds_are_saved(site: Site) -> None:
    name = "c" * 30 + "-x.drv.gz"

    def behaviour(container: FakeContainer) -> Output:
        container.status = 1
        container.changes[f"/var/log/guix/drvs/ab/{name}"] = gzip.compress(b"no such file\n")
        yield True, f"View build log at '/var/log/guix/drvs/ab/{name}'.\n".encode()

    site.engine.behaviour = behaviour
    with pytest.raises(StageError):
        run_stage(site.project(), STAGE, parent_image(site))
    (directory,) = diagnostics(site)
    assert gzip.decompress((directory / f"ab{name}").read_bytes()) == b"no such file\n"
    assert "guix pull\n" in (directory / "command").read_text()


def test_failed_container_is_removed_without_keep_failed(site: Site) -> None:
    assert "docker commit" not in fail(site, Attempt(1))
    assert site.engine.all_containers == {}


def test_keep_failed_keeps_the_container_and_prints_a_hint(site: Site) -> None:
    error = fail(site, Attempt(1), keep_failed=True)
    (container,) = kept_containers(site.engine, site.settings())
    assert f"`docker commit {container.id[:12]} failed && docker run " in error
    assert "`inv clean --work` removes the container" in error
    assert "\n" not in error


def test_failed_container_is_not_committed(site: Site) -> None:
    fail(site, Attempt(1), keep_failed=True)
    with pytest.raises(UsageError, match=r"cannot commit .* ended with status 1"):
        commit.commit(site.project())
    assert len(site.engine.all_containers) == 1


@pytest.mark.parametrize("options", [{"keep_failed": True}, {"commit": False}], ids=str)
def test_second_container_is_an_error(site: Site, options: dict[str, bool]) -> None:
    fail(site, Attempt(1), keep_failed=True)
    with pytest.raises(UsageError, match=r"not committed yet; .*`inv clean --work` removes it"):
        run(site, Attempt(), **options)
    assert len(site.engine.all_containers) == 1


# --- Other tasks and dry runs -------------------------------------------------------------------


def test_command_of_another_task_is_not_retried(site: Site) -> None:
    parent_image(site)
    site.engine.behaviour = AttemptPlayer([Attempt(1, [NO_NETWORK])])
    project = site.project()
    work = Work("verify", ("verify",), {})
    with (
        pytest.raises(StageError, match="verify: Git error: ") as caught,
        work_container(site.engine, site.settings(), "parent:1", work) as container,
    ):
        run_container(project, container, "verify")
    assert caught.value.is_transient
    assert diagnostics(site) == []


def test_dry_run_changes_nothing(site: Site) -> None:
    project = site.project()
    traced = TracedEngine(site.engine, project.console, perform=False)
    calls = site.engine.changing_calls()
    dry_project = Project(project.settings, traced, project.console)
    run_stage(dry_project, STAGE, parent_image(site), keep_failed=True)
    assert site.engine.changing_calls() == calls
    assert diagnostics(site) == []


# --- Shown logs ---------------------------------------------------------------------------------

NOISE = (
    b".\n\nThe following build is still in progress:\n  /gnu/store/x-fonts-dir.drv\n\n"
    b"hint: Consider setting the necessary environment variables by running:\n\n"
    b'     GUIX_PROFILE="/root/.guix-profile"\n\n'
    b'Alternately, see `guix package --search-paths -p\n"/root/.guix-profile"\'.\n\n\n'
)


def test_plain_log_is_shown_without_noise_and_saved_completely(site: Site) -> None:
    log = b"one\n" + NOISE + b"two\n"
    output = console_text(run(site, Attempt(0, [log])))
    assert "one\ntwo\n" in output
    assert (site.directory / "out" / "logs" / "own.log").read_bytes() == log
    fail(site, Attempt(1, [log]))
    (directory,) = diagnostics(site)
    assert (directory / "log").read_bytes() == log


@pytest.mark.parametrize("display", [Display.VERBOSE, Display.QUIET])
def test_other_displays_show_the_whole_log(site: Site, display: Display) -> None:
    site.engine.behaviour = AttemptPlayer([Attempt(1, [NOISE])])
    project = site.project()
    project.console.display = display
    with pytest.raises(StageError):
        run_stage(project, STAGE, parent_image(site))
    assert NOISE.decode() in console_text(project)


# --- Saved logs ---------------------------------------------------------------------------------


def test_log_of_the_last_run_is_saved_without_secrets(site: Site) -> None:
    redact.add("hunter2")
    log = site.directory / "out" / "logs" / "own.log"
    run(site, Attempt(0, [b"the first\n"]))
    assert log.read_bytes() == b"the first\n"
    fail(site, Attempt(1, [b"says hun", b"ter2\r 10%\r 100%\n", b"and ends\xff"]))
    assert log.read_bytes() == b"says ***\r 10%\r 100%\nand ends\xff"
    assert [*log.parent.iterdir()] == [log]


def test_dry_run_keeps_the_existing_log(site: Site) -> None:
    run(site, Attempt(0, [b"the first\n"]))
    project = site.project(TracedEngine(site.engine, BufferConsole(), perform=False))
    run_stage(project, STAGE, parent_image(site), force=True)
    assert (site.directory / "out" / "logs" / "own.log").read_bytes() == b"the first\n"


def test_output_of_a_build_is_not_a_silent_server(site: Site) -> None:
    """With ``--verbose`` the log contains this output, and tests of Guix can print anything."""
    site.env["OUTPUT"] = "verbose"
    drv = b"/gnu/store/" + b"a" * 32 + b"-guix.drv"
    silent = [SILENT % host for host in (b"a.test", b"b.test")]
    building, built = b"building " + drv + b"...\n", b"successfully built " + drv + b"\n"
    run(site, Attempt(0, [building, *silent, built]))
    error = fail(site, *[Attempt(0, [building, built, *silent])] * STAGE_TRIES)
    assert "no substitute server answers" in error


@pytest.mark.parametrize(
    ("output", "fallback", "options"),
    [
        ("plain", "no", None),
        ("plain", "yes", "--fallback"),
        ("verbose", "no", "--verbosity=3"),
        ("live", "yes", "--fallback --verbosity=3"),
    ],
)
def test_output_changes_the_log_of_guix_and_no_key(
    site: Site, output: str, fallback: str, options: str | None
) -> None:
    inputs = STAGE.inputs(common_inputs(site.engine, site.settings()))
    site.env |= {"OUTPUT": output, "GUIX_FALLBACK": fallback}
    assert environment(site.settings()).get("GUIX_BUILD_OPTIONS") == options
    assert STAGE.inputs(common_inputs(site.engine, site.settings())) == inputs
    assert guix_environment(site.settings()).get("GUIX_BUILD_OPTIONS") in (None, "--fallback")
