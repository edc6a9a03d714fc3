"""Run the script of a stage in its work container, with retries, a log and diagnostics."""

from __future__ import annotations

import itertools
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import IO, TYPE_CHECKING

from guix_tasks import guix
from guix_tasks.engine.retry import retry_call
from guix_tasks.errors import (
    DamagedStoreError,
    EngineError,
    MissingItemsError,
    StageError,
    full_disk,
)
from guix_tasks.guix.progress import Activity, BuildSteps, Noise
from guix_tasks.stages.container import (
    WORK_DIRECTORY,
    Work,
    fill,
    proxy_error_line,
    time_limit,
)
from guix_tasks.stages.diagnostics import Failure, log_path, save_diagnostics, saved_log
from guix_tasks.stages.log_faults import LogFaults
from guix_tasks.stages.stage import MISSING_ITEMS, RETRY
from guix_tasks.stages.trust import SubstituteTrust
from guix_tasks.ui.console import Display
from guix_tasks.ui.format import human_size, human_time, printable
from guix_tasks.ui.log import LogReader
from guix_tasks.ui.redact import clean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from guix_tasks.engine.api import Image
    from guix_tasks.settings import Settings
    from guix_tasks.stages.project import Project
    from guix_tasks.ui.console import Step


STAGE_TRIES = 3
"""Number of times a stage runs if the network fails."""

_ERROR_LENGTH = 200
"""Maximum characters of an error of Guix in a message."""

_DAMAGED = (
    "database disk image is malformed",
    "file is not a database",
    # A run that was killed while it filled the volume leaves files of root to a rootless daemon.
    "attempt to write a readonly database",
)
"""Messages of SQLite about a database that a stage cannot use."""

_METER_INTERVAL = 1.0
"""Seconds between two readings of a container's network traffic."""


def run_with_retries(project: Project, container: str, work: Work) -> str:
    """Run a work's script, its file ``stage``, and return its standard output.

    After a network failure the same container is started again, so that nothing that Guix has
    downloaded is downloaded twice.

    Raise ``StageError`` with the path of the diagnostics.
    """
    starts = itertools.count()
    started = time.monotonic()

    with project.console.step(work.name) as step, saved_log(project.settings, work.name) as log:
        step.log_file = log_path(project.settings, work.name)

        def attempt() -> str:
            elapsed = 0.0
            if next(starts):
                # The entry point removed its files at the end of the first start.
                again = replace(work, files={**work.files, RETRY: b""})
                fill(project.engine, project.settings, container, again)
                elapsed = time.monotonic() - started
                limit = project.settings.stage_timeout
                # A container could be stopped before it has started.
                if limit and limit - elapsed < 1:
                    raise _timeout_error(project, work.name)
            return run_container(project, container, work.name, log_file=log, elapsed=elapsed)

        try:
            return retry_call(project.console, work.name, attempt, tries=STAGE_TRIES)
        except (MissingItemsError, DamagedStoreError):
            raise
        except StageError as error:
            failure = Failure(work.name, container, work.files["stage"], log)
            path = save_diagnostics(project.engine, project.settings, failure)
            hints = [f"the logs are in {path}"] if path else []
            if work.keep_failed:
                hints.append(
                    f"`docker commit {container[:12]} failed && docker run --rm -it --privileged "
                    "--entrypoint sh failed` opens a shell in a copy of the container, "
                    "`inv clean --work` removes the container"
                )
            raise StageError("; ".join([str(error), *hints])) from None


def run_container(
    project: Project,
    container: str,
    name: str,
    *,
    log_file: IO[bytes] | None = None,
    elapsed: float = 0,
) -> str:
    """Run a work container to its end, show its log, and return its standard output.

    ``log_file`` receives the log. ``elapsed`` is the part of ``STAGE_TIMEOUT``, in seconds, that
    earlier attempts took.

    Raise ``StageError`` if the command fails or exceeds ``STAGE_TIMEOUT``, or if no substitute
    server answers or none is trusted and ``GUIX_FALLBACK`` is off.
    """
    limit = project.settings.stage_timeout
    remaining = limit - elapsed if limit else None
    output, faults = bytearray(), LogFaults(project.settings)
    trust = SubstituteTrust(project, container, name)
    activity, logs_builds = Activity(), project.settings.output.logs_builds

    def read(line: str) -> None:
        activity.look(line)
        # A build can print anything, so only Guix's own report of a failed build counts.
        from_build = logs_builds and activity.is_building and not guix.build_fault(line)
        if not from_build and faults.look(line):
            project.engine.stop(container, seconds=10)
        trust.look(activity)

    with (
        project.console.step(name) as step,
        time_limit(project.engine, container, remaining, grace=10) as timed_out,
        _network_meter(project, container, activity, step),
    ):
        log = LogReader(_log_sink(project, step), log_file)
        for is_log, data in project.engine.run(container):
            if not is_log:
                output += data
                continue
            for line in log.read(data):
                read(line)
        for line in log.end():
            read(line)
        status = project.engine.wait(container)
    if timed_out.is_set():
        raise _timeout_error(project, name)
    if faults.all_silent:
        raise faults.silence_error(f"{name}: ", _proxy_fault(project))
    trust.raise_if_stopped()
    if status:
        raise _command_error(project, name, container, status, faults)
    return output.decode(errors="replace")


@contextmanager
def _network_meter(
    project: Project, container: str, activity: Activity, step: Step
) -> Iterator[None]:
    """Show Guix's activity in a container, on a terminal with the rate of its downloads."""
    step.show_activity(lambda: activity.text)
    if not step.is_live or project.engine.is_dry:
        yield
        return
    ended = threading.Event()

    def measure() -> None:
        # A lost engine is reported by the call that waits for the container.
        with suppress(EngineError):
            while not ended.wait(_METER_INTERVAL):
                total = project.engine.bytes_received(container)
                if total is not None:
                    activity.receive(total, time.monotonic())

    thread = threading.Thread(target=measure, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        # An engine that does not answer must not delay the end of the stage.
        thread.join(_METER_INTERVAL)


def _log_sink(project: Project, step: Step) -> Callable[[list[bytes]], None]:
    """Return the function that shows log lines; without a terminal it leaves out the noise."""
    if project.console.display is not Display.PLAIN:
        return step.log
    noise = Noise()
    return lambda lines: step.log(noise.without(lines))


def _timeout_error(project: Project, name: str) -> StageError:
    limit = human_time(project.settings.stage_timeout or 0)
    return StageError(f"{name}: stopped after STAGE_TIMEOUT ({limit}); nothing was committed")


def _command_error(
    project: Project, name: str, container: str, status: int, faults: LogFaults
) -> StageError:
    """Describe a failed command by the last error of Guix, or else by its exit status."""
    if project.engine.lacked_memory(container):
        limit = project.settings.stage_memory
        more = f"raise STAGE_MEMORY ({human_size(limit)})" if limit else "give the engine more"
        return StageError(
            f"{name}: a process was killed because memory ran out, and nothing was committed; "
            f"{more}, or build fewer packages at once with GUIX_MAX_JOBS=1"
        )
    # Redact first: a part of a secret would not be recognised.
    message = printable(clean(guix.last_error(faults.tail)))[:_ERROR_LENGTH]
    for path, file in _project_files(project.settings).items():
        message = message.replace(path, file)
    hint = (
        guix.fetch_hint(faults.tail)
        or guix.package_hint(message)
        or (faults.network_failed and _proxy_fault(project))
        or ("see the output above for more" if message else "see the output above")
    )
    kind = StageError
    if status == MISSING_ITEMS:
        kind = MissingItemsError
    elif any(text in message for text in _DAMAGED):
        kind = DamagedStoreError
    error = kind(
        f"{name}: {message or f'the command failed with exit status {status}'}, and nothing was "
        f"committed{full_disk(faults.tail) or f'; {hint}'}"
    )
    error.is_transient = faults.network_failed
    return error


def _project_files(settings: Settings) -> dict[str, str]:
    """Return the names of a project's files by their paths in a work container."""
    files = {
        "channels.scm": settings.guix_channels,
        "manifest.scm": settings.guix_manifest,
        "profile.scm": settings.guix_manifest,  # it loads the manifest
    }
    return {
        f"{WORK_DIRECTORY}/{name}": settings.shown(file) for name, file in files.items() if file
    }


def _proxy_fault(project: Project) -> str:
    # A lost engine must not replace the error of the stage.
    with suppress(EngineError):
        return proxy_error_line(project.engine, project.settings)
    return ""


@contextmanager
def build_log(project: Project, name: str) -> Iterator[LogReader]:
    """Yield the log for the build of a Dockerfile; it is shown and saved at ``log_path``."""
    steps = BuildSteps()
    with project.console.step(name) as step, saved_log(project.settings, name) as log_file:
        step.log_file = log_path(project.settings, name)
        step.show_activity(lambda: steps.text)

        def show(lines: list[bytes]) -> None:
            step.log(lines)
            steps.look(lines)

        log = LogReader(show, log_file)
        try:
            yield log
        finally:
            log.end()


def print_result(
    project: Project, name: str, started: float, replaced: Image | None = None
) -> None:
    """Print the tag of a stage's image, its size, the change of it, and the time of the stage.

    ``started`` is a value of ``time.monotonic``. A dry run prints nothing.
    """
    if project.engine.is_dry:
        return
    tag = project.ledger.tag(name)
    size = ""
    if image := project.engine.image(tag):
        size = f", {human_size(image.size)}"
        if replaced and (growth := image.size - replaced.size):
            size += f" ({'+' if growth > 0 else '-'}{human_size(abs(growth))})"
    project.console.print(f"{name}: {tag}{size}, {human_time(time.monotonic() - started)}")
