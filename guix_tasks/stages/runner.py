"""Run a stage's commands in a work container and commit the result."""

from __future__ import annotations

import itertools
import threading
import time
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, Any

from guix_tasks import guix
from guix_tasks.engine.retry import retry_call
from guix_tasks.errors import EngineError, StageError, full_disk
from guix_tasks.guix.progress import Activity, BuildSteps, Noise
from guix_tasks.oci.labels import oci_annotations
from guix_tasks.stages.channel_access import grant_access
from guix_tasks.stages.container import (
    PROJECT_LABEL,
    WORK_DIRECTORY,
    Work,
    check_no_kept_container,
    common_inputs,
    fill,
    proxy_error_line,
    time_limit,
    work_container,
)
from guix_tasks.stages.diagnostics import Failure, log_path, save_diagnostics, saved_log
from guix_tasks.stages.images import (
    IMAGE_LABEL,
    LAYERS_LABEL,
    is_child,
    key_of,
    proven_stage,
    seal,
    stage_labels,
)
from guix_tasks.stages.log_faults import LogFaults
from guix_tasks.stages.ownership import restore_ownership
from guix_tasks.stages.stage import Stage, stage_files
from guix_tasks.stages.volumes import check_volumes
from guix_tasks.ui.console import Display
from guix_tasks.ui.format import human_size, human_time, pasteable, printable
from guix_tasks.ui.log import LogReader
from guix_tasks.ui.redact import clean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from guix_tasks.engine.api import Image
    from guix_tasks.stages.project import Project
    from guix_tasks.ui.console import Step


STAGE_TRIES = 3
"""Number of times a stage runs if the network fails."""

_ERROR_LENGTH = 200
"""Maximum characters of an error of Guix in a message."""

_METER_INTERVAL = 1.0
"""Seconds between two readings of a container's network traffic."""


def run_stage(
    project: Project,
    stage: Stage,
    parent: Image,
    *,
    commit: bool = True,
    force: bool = False,
    keep_failed: bool = False,
) -> Image | None:
    """Run a stage's commands in a container of ``parent`` and commit it as the stage's image.

    Return None if nothing was committed: with ``commit=False`` the container is kept for
    ``inv commit``; without ``force`` a result that equals the current image is not committed.

    Raise ``StageError`` if a command fails. No tag moves in that case, and the container is
    removed unless ``keep_failed`` is true.
    """
    check_volumes(project.settings, parent)
    project = project.with_sandbox(parent, as_root=stage.as_root)
    console, settings = project.console, project.settings
    if not commit or keep_failed:
        check_no_kept_container(project.engine, settings)
    with (
        console.step(stage.name) as step,
        _stage_container(project, stage, parent, keep=not commit, keep_failed=keep_failed) as (
            container,
            work,
        ),
    ):
        console.detail(f"{stage.name}: in a {settings.guix_sandbox.value} container")
        for command in stage.commands:
            console.detail(pasteable(command))
        report = run_with_retries(project, container, work).strip()
        step.show_activity(lambda: "committing")
        if stage.check:
            stage.check(report)
        if not commit:
            console.print(f"{stage.name}: not committed; `inv commit` commits the container")
            return None

        # A dry run has no report to pin the stage by.
        pinned = stage.pinned(report) if stage.pinned and report else stage
        inputs = pinned.inputs(common_inputs(project.engine, settings))
        labels = {**stage_labels(stage.name, key_of(parent), inputs), **stage.labels(report)}
        current = None if force else project.ledger.find(stage.name)
        if current and is_child(current, parent) and labels.items() <= current.labels.items():
            console.print(f"{stage.name}: unchanged")
            return None
        return commit_image(project, container, parent, project.ledger.tag(stage.name), labels)


@contextmanager
def _stage_container(
    project: Project, stage: Stage, parent: Image, *, keep: bool, keep_failed: bool
) -> Iterator[tuple[str, Work]]:
    """Create the container of a stage, with access to its channels; yield its ID and its work."""
    engine, settings = project.engine, project.settings
    with grant_access(engine, settings, stage.fetches) as access:
        work = Work(
            stage.name,
            (f"{WORK_DIRECTORY}/stage",),
            {**stage_files(stage), **access.files},
            keep=keep,
            keep_failed=keep_failed,
            nearby=project.nearby(stage.name),
            binds=access.binds,
        )
        with work_container(engine, settings, parent.id, work) as container:
            yield container, work


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
                fill(project.engine, project.settings, container, work)
                elapsed = time.monotonic() - started
            return run_container(project, container, work.name, log_file=log, elapsed=elapsed)

        try:
            return retry_call(project.console, work.name, attempt, tries=STAGE_TRIES)
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
    server answers and ``GUIX_FALLBACK`` is off.
    """
    output, faults = bytearray(), LogFaults(project.settings)
    activity, logs_builds = Activity(), project.settings.output.logs_builds

    def read(line: str) -> None:
        activity.look(line)
        # A build can print anything, so only Guix's own report of a failed build counts.
        from_build = logs_builds and activity.is_building and not guix.build_fault(line)
        if not from_build and faults.look(line):
            project.engine.stop(container, seconds=10)

    with (
        project.console.step(name) as step,
        _stage_timeout(project, container, name, elapsed) as timed_out,
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
    if faults.servers.all_silent:
        raise faults.silence_error(f"{name}: ", _proxy_fault(project))
    if status:
        raise _command_error(project, name, status, faults)
    return output.decode(errors="replace")


@contextmanager
def _stage_timeout(
    project: Project, container: str, name: str, elapsed: float
) -> Iterator[threading.Event]:
    """Stop a container at ``STAGE_TIMEOUT``; the event is set if that happened."""
    limit = project.settings.stage_timeout
    # With less than a second left the container could be stopped before it has started.
    if limit and elapsed and limit - elapsed < 1:
        raise _timeout_error(project, name)
    remaining = limit - elapsed if limit else None
    with time_limit(project.engine, container, remaining, grace=10) as timed_out:
        yield timed_out


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


def _command_error(project: Project, name: str, status: int, faults: LogFaults) -> StageError:
    """Describe a failed command by the last error of Guix, or else by its exit status."""
    # Redact first: a part of a secret would not be recognised.
    message = printable(clean(guix.last_error(faults.tail)))[:_ERROR_LENGTH]
    hint = (
        guix.fetch_hint(faults.tail)
        or guix.package_hint(message)
        or (faults.network_failed and _proxy_fault(project))
        or ("see the output above for more" if message else "see the output above")
    )
    error = StageError(
        f"{name}: {message or f'the command failed with exit status {status}'}, and nothing was "
        f"committed{full_disk(faults.tail) or f'; {hint}'}"
    )
    error.is_transient = faults.network_failed
    return error


def _proxy_fault(project: Project) -> str:
    # A lost engine must not replace the error of the stage.
    with suppress(EngineError):
        return proxy_error_line(project.engine, project.settings)
    return ""


def commit_image(
    project: Project,
    container: str,
    parent: Image,
    tag: str,
    labels: Mapping[str, str],
    *,
    like: Image | None = None,
    own_layers: int = 1,
) -> Image:
    """Commit a container of ``parent`` with additional labels, and tag the image.

    The image gets the configuration of ``like``, by default of ``parent``, the annotations of OCI
    and the label that proves its layers (``images.seal``). ``own_layers`` is the expected number
    of layers on ``parent``. Only a proven image is tagged.

    Raise ``EngineError`` if the label cannot be proven.
    """
    engine = project.engine
    labels = {
        **oci_annotations(project.settings.directory),
        IMAGE_LABEL: str(project.settings.image),
        **labels,
    }
    config = committed_config(like or parent, labels)
    if not engine.is_dry and restore_ownership(engine, container):
        # If the image has no user, root, a commit takes that of the container.
        config["User"] = config.get("User") or "root"

    image_id = _sealed_commit(project, container, parent, config, own_layers)
    image = engine.image(image_id)
    if image is None and engine.is_dry:
        engine.tag(image_id, tag)
        return parent
    if image and not proven_stage(image):
        # Docker adds no layer if the container changed nothing, and may complete the
        # configuration. The seal has to match the image as the engine made it.
        engine.drop(image.id)
        own_layers = len(image.layers) - len(parent.layers)
        config |= committed_config(image, {})
        image = engine.image(_sealed_commit(project, container, parent, config, own_layers))
    if image and proven_stage(image):
        engine.tag(image.id, tag)
        return image
    if image:
        engine.drop(image.id)
    raise EngineError(
        f"cannot commit {tag}: the engine changes the layers or the configuration of its commits"
    )


def _sealed_commit(
    project: Project, container: str, parent: Image, config: Mapping[str, Any], own_layers: int
) -> str:
    """Commit a container with the label that proves its layers and ``config``."""
    labels = {**config["Labels"], LAYERS_LABEL: seal(parent.layers, own_layers, config)}
    return project.engine.commit(container, {**config, "Labels": labels})


def committed_config(image: Image, labels: Mapping[str, str]) -> dict[str, Any]:
    """Return the configuration for a commit: that of an image with additional labels.

    It leaves nothing open, because a commit takes the rest from the container, and the stage's
    command must not become the image's. The project label of work containers cannot be removed,
    so it is emptied: otherwise every container of the image would be taken for a work container.
    """
    return {
        **image.config,
        "Entrypoint": image.config.get("Entrypoint") or [],
        "Cmd": image.config.get("Cmd") or [],
        "Labels": {**image.labels, **labels, PROJECT_LABEL: ""},
    }


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


def print_result(project: Project, name: str, started: float) -> None:
    """Print the tag and the size of a stage's image and the time since ``started``.

    ``started`` is a value of ``time.monotonic``. A dry run prints nothing.
    """
    if project.engine.is_dry:
        return
    tag = project.ledger.tag(name)
    image = project.engine.image(tag)
    size = f", {human_size(image.size)}" if image else ""
    project.console.print(f"{name}: {tag}{size}, {human_time(time.monotonic() - started)}")
