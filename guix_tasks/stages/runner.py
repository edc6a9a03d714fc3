"""Run a stage in a work container and commit it."""

from __future__ import annotations

import itertools
import threading
import time
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, Any

from guix_tasks import guix
from guix_tasks.engine.retry import retried
from guix_tasks.errors import EngineError, StageError, full_disk
from guix_tasks.guix.progress import Activity, BuildSteps, Noise
from guix_tasks.oci.labels import oci_annotations
from guix_tasks.stages.channel_access import lent_access
from guix_tasks.stages.container import (
    FOLDER,
    PROJECT_LABEL,
    Work,
    common_inputs,
    fill,
    proxy_out_of_reach,
    refuse_second,
    time_limit,
    work_container,
)
from guix_tasks.stages.diagnostics import Failed, keep_failure, kept_log, log_path
from guix_tasks.stages.images import (
    IMAGE_LABEL,
    LAYERS_LABEL,
    is_child,
    key_of,
    proven_stage,
    seal,
    stage_labels,
)
from guix_tasks.stages.log_faults import Faults, Lines
from guix_tasks.stages.ownership import take_back
from guix_tasks.stages.stage import Stage, stage_files
from guix_tasks.stages.volumes import check_volumes
from guix_tasks.ui.console import Display
from guix_tasks.ui.format import human_size, human_time, pasteable, printable
from guix_tasks.ui.log import Log
from guix_tasks.ui.redact import clean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from guix_tasks.engine.api import Image
    from guix_tasks.stages.project import Project
    from guix_tasks.ui.console import Step


STAGE_TRIES = 3
"""How often a stage is run where the network fails it."""

_SAID_MOST = 200
"""Characters that are told of an error of Guix."""

_LOOKED_EACH = 1.0
"""Seconds after which an engine is asked again what came over a container's network."""


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

    With ``commit=False`` the container is left for ``inv commit``.  None where there is no new
    image, because it is left or because, without ``force``, what came out is what is there.
    Raises ``StageError`` when a command fails; then nothing is committed and no tag has moved, and
    the container is left only with ``keep_failed``.
    """
    check_volumes(project.settings, parent)
    project = project.settled(parent, as_root=stage.as_root)
    console, settings = project.console, project.settings
    if not commit or keep_failed:
        refuse_second(project.engine, settings)
    with (
        console.step(stage.name) as step,
        _container(project, stage, parent, keep=not commit, keep_failed=keep_failed) as (
            container,
            work,
        ),
    ):
        console.detail(f"{stage.name}: in a {settings.guix_sandbox.value} container")
        for command in stage.commands:
            console.detail(pasteable(command))
        report = run_again(project, container, work).strip()
        step.tell(lambda: "committing")
        if stage.check:
            stage.check(report)
        if not commit:
            console.say(f"{stage.name}: done and left as it is; `inv commit` makes it the image")
            return None
        # A dry run has no report, and so settles nothing.
        settled = stage.settled(report) if stage.settled and report else stage
        inputs = settled.inputs(common_inputs(project.engine, settings))
        labels = {**stage_labels(stage.name, key_of(parent), inputs), **stage.labels(report)}
        there = project.ledger.find(stage.name)
        if not force and there and _is_same(there, parent, labels):
            console.say(f"{stage.name}: nothing new")
            return None
        tag = project.ledger.tag(stage.name)
        return commit_image(project, container, parent, tag, labels)


@contextmanager
def _container(
    project: Project, stage: Stage, parent: Image, *, keep: bool, keep_failed: bool
) -> Iterator[tuple[str, Work]]:
    """A container of ``parent`` with all that the stage is lent, and what it is to do."""
    engine, settings = project.engine, project.settings
    with lent_access(engine, settings, stage.fetches) as access:
        work = Work(
            stage.name,
            (f"{FOLDER}/stage",),
            {**stage_files(stage), **access.files},
            keep=keep,
            keep_failed=keep_failed,
            nearby=project.nearby(stage.name),
            binds=access.binds,
        )
        with work_container(engine, settings, parent.id, work) as container:
            yield container, work


def run_again(project: Project, container: str, work: Work) -> str:
    """Run a work in its container, and again after a fault of the network; its output.

    It goes on in the same container, so what is fetched is not fetched again.  Its command
    is its file ``stage``.  Raises ``StageError``, which says where the logs are kept.
    """
    starts = itertools.count()
    started = time.monotonic()

    def once() -> str:
        spent = 0.0
        if next(starts):
            # The entry point has removed what it was given for the first start.
            fill(project.engine, project.settings, container, work)
            spent = time.monotonic() - started
        return perform(project, container, work.name, log, spent)

    with project.console.step(work.name) as step, kept_log(project.settings, work.name) as log:
        step.log_file = log_path(project.settings, work.name)
        try:
            return retried(project.console, work.name, once, tries=STAGE_TRIES)
        except StageError as error:
            raise _with_bundle(project, container, work, log, error) from None


@contextmanager
def build_log(project: Project, name: str) -> Iterator[Log]:
    """What the log of a build of a Dockerfile goes to: it is shown as it comes, and kept."""
    building = BuildSteps()
    with project.console.step(name) as step, kept_log(project.settings, name) as kept:
        step.log_file = log_path(project.settings, name)
        step.tell(lambda: building.text)

        def show(lines: list[bytes]) -> None:
            step.log(lines)
            building.look(lines)

        log = Log(show, kept)
        try:
            yield log
        finally:
            log.end()


def _with_bundle(
    project: Project, container: str, work: Work, log: IO[bytes], error: StageError
) -> StageError:
    """The error, with where it is kept what one needs to look into it."""
    failed = Failed(work.name, container, work.files["stage"], log)
    kept = keep_failure(project.engine, project.settings, failed)
    said = str(error) + (f"; {kept} has the logs" if kept else "")
    if work.keep_failed:
        said += (
            f"; `docker commit {container[:12]} failed && docker run --rm -it --privileged "
            "--entrypoint sh failed` enters what it left, `inv clean --work` drops it"
        )
    return StageError(said)


def _is_same(image: Image, parent: Image, labels: Mapping[str, str]) -> bool:
    return is_child(image, parent) and labels.items() <= image.labels.items()


def say_done(project: Project, name: str, started: float) -> None:
    """The line that ends a stage: its tag, its size, the seconds since ``started``.

    A dry run has ended none.
    """
    if project.engine.is_dry:
        return
    tag = project.ledger.tag(name)
    image = project.engine.image(tag)
    size = f", {human_size(image.size)}" if image else ""
    project.console.say(f"{name}: {tag}{size}, {human_time(time.monotonic() - started)}")


def perform(
    project: Project,
    container: str,
    name: str,
    kept: IO[bytes] | None = None,
    spent: float = 0,
) -> str:
    """Run a work container to its end, its log shown, and ``kept``, as it comes; its output.

    ``spent`` are the seconds of ``STAGE_TIMEOUT`` that earlier tries have taken.  Raises
    ``StageError`` where its command fails or takes longer than that, and where no substitute
    server answers, unless ``GUIX_FALLBACK`` lets it build from source.
    """
    output, lines, faults = bytearray(), Lines(), Faults(project.settings)
    activity, logs_builds = Activity(), project.settings.output.logs_builds

    def look(line: str) -> None:
        activity.look(line)
        # What a build says may be anything; of builds themselves only Guix's own lines count.
        said_by_build = logs_builds and activity.is_building and not guix.build_fault(line)
        if not said_by_build and faults.look(line):
            project.engine.stop(container, seconds=10)

    with (
        project.console.step(name) as step,
        _limit(project, container, name, spent) as timed_out,
        _metered(project, container, activity, step),
    ):
        log = Log(_shown(project, step), kept)
        for is_log, data in project.engine.run(container):
            if not is_log:
                output += data
                continue
            log.add(data)
            for line in lines.add(data):
                look(line)
        log.end()
        for line in lines.add(b"\n"):
            look(line)
        status = project.engine.wait(container)
    if timed_out.is_set():
        raise _too_long(project, name)
    if faults.servers.were_silent:
        raise faults.silence(f"{name}: ", _proxy_fault(project))
    if status:
        raise _failed(project, name, status, faults)
    return output.decode(errors="replace")


def _shown(project: Project, step: Step) -> Callable[[list[bytes]], None]:
    """What shows the lines of a log: a plain one is not read as it comes, but as a page."""
    if project.console.display is not Display.PLAIN:
        return step.log
    noise = Noise()
    return lambda lines: step.log(noise.without(lines))


def _failed(project: Project, name: str, status: int, faults: Faults) -> StageError:
    """The error where a command failed: what Guix said last, else its exit status."""
    # Cut only when the secrets are out of it: a part of one would not be known again.
    said = printable(clean(guix.last_error(faults.last)))[:_SAID_MOST]
    mend = (
        guix.fetch_mend(faults.last)
        or guix.package_mend(said)
        or (faults.network_failed and _proxy_fault(project))
        or f"the output above says {'more' if said else 'why'}"
    )
    error = StageError(
        f"{name}: {said or f'the command failed with exit status {status}'}, and nothing was "
        f"committed{full_disk(faults.last) or f'; {mend}'}"
    )
    error.passes = faults.network_failed
    return error


def _proxy_fault(project: Project) -> str:
    # Where the engine is gone, the error that is under way is the one to tell.
    with suppress(EngineError):
        return proxy_out_of_reach(project.engine, project.settings)
    return ""


@contextmanager
def _metered(project: Project, container: str, activity: Activity, step: Step) -> Iterator[None]:
    """Show what Guix does in a container, with what comes over its network, where that is drawn."""
    step.tell(lambda: activity.text)
    if not step.is_live or project.engine.is_dry:
        yield
        return
    ended = threading.Event()

    def ask() -> None:
        # Where the engine is gone, whoever waits for the container hears of it.
        with suppress(EngineError):
            while not ended.wait(_LOOKED_EACH):
                total = project.engine.received(container)
                if total is not None:
                    activity.receive(total, time.monotonic())

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        # Where the engine does not answer, it is not waited for.
        thread.join(_LOOKED_EACH)


def _too_long(project: Project, name: str) -> StageError:
    limit = human_time(project.settings.stage_timeout or 0)
    return StageError(f"{name}: stopped after STAGE_TIMEOUT ({limit}); nothing was committed")


@contextmanager
def _limit(project: Project, container: str, name: str, spent: float) -> Iterator[threading.Event]:
    """``STAGE_TIMEOUT`` for a container; the event says that its time was up."""
    limit = project.settings.stage_timeout
    # With less than a second the container might be stopped before it has started.
    if limit and spent and limit - spent < 1:
        raise _too_long(project, name)
    left = limit - spent if limit else None
    with time_limit(project.engine, container, left, grace=10) as timed_out:
        yield timed_out


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
    """Commit a container of ``parent`` with more labels and the configuration of its parent.

    The labels of OCI are added, which say when and of which revision it was made.

    ``like`` is the image whose configuration it is to have, where that is another.  The label
    that proves a stage is made before the commit.  Where it turns out wrong, since Docker gives
    no layer to a container that changed nothing, it is made again of what came out.  Only what
    is proven gets the tag.
    """
    engine = project.engine
    ours = {**oci_annotations(project.settings.folder), IMAGE_LABEL: str(project.settings.image)}
    config = committed_config(like or parent, {**ours, **labels})
    if not engine.is_dry and take_back(engine, container):
        # A commit takes the container's user where the image has none, which is root.
        config["User"] = config.get("User") or "root"
    for _ in range(2):
        config["Labels"][LAYERS_LABEL] = seal(parent.layers, own_layers, config)
        committed = engine.commit(container, config)
        image = engine.image(committed)
        if image is None and engine.is_dry:
            engine.tag(committed, tag)
            return parent
        if image and proven_stage(image):
            engine.tag(image.id, tag)
            return image
        if image:
            own_layers = len(image.layers) - len(parent.layers)
            config = {**config, **committed_config(image, {})}
            engine.drop(image.id)
    raise EngineError(f"the engine commits {tag} in a way that is not understood")


def committed_config(image: Image, labels: Mapping[str, str]) -> dict[str, Any]:
    """The configuration for a commit that is to be like an image, but for some labels.

    A commit takes from the container what is left open here, so nothing is: the stage's command
    must not become the image's.  The container's label of the project cannot be taken out, only
    emptied; left as it is, it would make every container of the image look like one of ours.
    """
    return {
        **image.config,
        "Entrypoint": image.config.get("Entrypoint") or [],
        "Cmd": image.config.get("Cmd") or [],
        "Labels": {**image.labels, **labels, PROJECT_LABEL: ""},
    }
