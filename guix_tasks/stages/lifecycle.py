"""Order of a project's stages: decide which ones are up to date, and make the others.

``Lifecycle.make`` is the whole procedure; ``Lifecycle.state`` is the rule that decides whether a
stage is up to date.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from guix_tasks.engine.accounts import accounts_for
from guix_tasks.engine.retry import retry_call
from guix_tasks.errors import BuilderError, EngineError, GuixTasksError, UsageError
from guix_tasks.stages.base import (
    BASE_INPUT,
    base_annotations,
    base_image_input,
    base_platform_error,
    base_spec,
    file_inputs,
)
from guix_tasks.stages.commit import commit_image
from guix_tasks.stages.container import (
    INPUTS,
    check_native_platform,
    common_inputs,
    image_platform,
    network,
    sweep,
    unstarted_container,
)
from guix_tasks.stages.custom import custom_stage
from guix_tasks.stages.images import (
    ASSEMBLED_LABEL,
    CHANNELS_LABEL,
    FILES_LABEL,
    GUIX_KEY_LABEL,
    PACKAGES_LABEL,
    STAGES,
    check_layers,
    inputs_of,
    is_child,
    key_of,
    proven_stage,
    stage_key,
    stage_labels,
)
from guix_tasks.stages.install import given_packages, install_stage
from guix_tasks.stages.make import run_stage
from guix_tasks.stages.pull import (
    CHANNELS_INPUT,
    channels_text,
    is_authenticated,
    lock_mismatch,
    lock_mismatch_line,
    lock_text,
    pull_stage,
    stage_to_run,
    uncompared_lock,
    write_lock,
)
from guix_tasks.stages.runner import build_log, print_result
from guix_tasks.stages.store import TRUST_LABEL, guix_state
from guix_tasks.stages.substitutes import require_substitutes
from guix_tasks.stages.transfer import pull, push
from guix_tasks.stages.volumes import check_volumes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from guix_tasks.engine.api import Image
    from guix_tasks.settings import Settings
    from guix_tasks.stages.project import Project
    from guix_tasks.stages.stage import Stage


_NAMED_PACKAGES = 10
"""Maximum packages that the lines about a stage's result name for each kind of change."""


@dataclass(frozen=True, kw_only=True)
class StageOptions:
    """Options of one ``inv STAGE`` call."""

    force: bool = False
    """Run the stage even if it is up to date."""
    upstream: bool = False
    """Make stale parents first, instead of raising an error."""
    update: bool = False
    """Pull the current commits of the channels and ignore the lock."""
    newest: bool = False
    """With ``update``, also take commits of Guix that no substitute server has built."""
    commit: bool = True
    keep_failed: bool = False
    """Keep the container of a command that fails."""
    packages: tuple[str, ...] = ()
    """Packages to install in place of ``GUIX_PACKAGES``."""
    disable_authentication: bool = False
    """Pull channels without authenticating their commits."""


@dataclass(frozen=True)
class State:
    """A stage's current image, compared with the stage's current inputs."""

    stage: str
    image: Image | None
    key: str | None
    """Key of the current inputs, or None if only running the stage can tell."""
    reason: str = ""
    """Reason why the image is stale, or empty if the image is up to date or missing."""
    stale_stage: str = ""
    """The stage that the reason is about: this stage or one before it."""

    @property
    def why(self) -> str | None:
        """The reason, with the name of an earlier stage that it is about, or None."""
        if self.reason and self.stale_stage != self.stage:
            return f"{self.stale_stage}: {self.reason}"
        return self.reason or None

    @property
    def word(self) -> str:
        """``missing``, ``stale`` or ``up to date``."""
        return "missing" if not self.image else "stale" if self.reason else "up to date"

    @property
    def is_up_to_date(self) -> bool:
        return self.image is not None and self.key is not None and not self.reason


class _StaleError(Exception):
    """The image of a stage is stale, and no inputs are known that would reproduce it."""


class Lifecycle:
    """The stages of one project."""

    def __init__(self, project: Project) -> None:
        self._project = project
        self._ledger = project.ledger
        self._settings = project.settings
        self._custom = {stage.name: stage for stage in project.custom_stages}

    def make(self, name: str, options: StageOptions) -> None:
        """Bring a stage up to date, and its missing parents before it.

        An image with the right key is reused, first the local one, then one from
        ``CACHE_IMAGE``.  Otherwise the stage runs.
        """
        check_native_platform(self._project.engine, self._settings)
        sweep(self._project.engine, self._settings)
        self._ledger.drop_unnamed()
        state = self.state(name, options.packages)
        self._drop_cache_tag(name, state.image)

        reuse = not self._must_run(name, state.image, options)
        if reuse and (state.is_up_to_date or self._take_from_cache(name, state)):
            self._project.console.print(f"{name}: up to date")
        else:
            if state.why:
                self._project.console.print(f"{name}: stale: {state.why}")
            if name == "base":
                self._build_base()
            else:
                self._run(name, options)

        if options.commit:
            if name == "pull":
                self._write_lock()
            self._ledger.point_image(self._project.console)

    def _must_run(self, name: str, image: Image | None, options: StageOptions) -> bool:
        """Whether the options require a run even if no input has changed."""
        if options.force or not options.commit:
            return True
        if name == "pull":
            floating = options.update or self._settings.guix_channels_lock is None
            # Unauthenticated channels do not satisfy a pull that authenticates.
            return floating or not (options.disable_authentication or is_authenticated(image))
        # A label records the packages of `--package`, because `inv push` compares them.
        return name == "install" and options.packages != given_packages(image)

    def state(self, name: str, packages: tuple[str, ...] | None = None) -> State:
        """Compare a stage's image with its current inputs and its current parent.

        The image is up to date if the parent is, if the image's inputs and key equal the current
        ones, and if it was committed from the parent's current image.

        ``packages`` are the packages of ``install --package``; an empty tuple means
        ``GUIX_PACKAGES``. By default they are those that the image was made with, so that
        ``inv push`` accepts such an image.
        """
        image = self._ledger.find(name)
        if packages is None:
            packages = given_packages(image)

        def stale(key: str | None, reason: str, stage: str = name) -> State:
            return State(name, image, key, reason, stage) if image else State(name, None, key)

        try:
            inputs = self._inputs(name, image, packages)
        except _StaleError as error:
            return stale(None, str(error))
        if inputs is None:
            return State(name, image, key=None)
        parent_name = self.parent_of(name)
        parent = self.state(parent_name) if parent_name else State("", None, key="")
        if parent.key is None and not parent.image:
            return stale(None, f"{parent_name} is missing, and no lock names its channels")
        key = None if parent.key is None else stage_key(name, parent.key, inputs)
        if parent.reason:
            return stale(key, parent.reason, parent.stale_stage)
        if image is None or key is None:
            return State(name, image, key)
        changed = _changed_inputs(inputs_of(image), inputs)
        names = {_input_name(self._settings, name, input_name) for input_name in changed}
        reason = f"{', '.join(sorted(names))} changed" if names else ""
        # A parent that was made again has the same key.
        is_current = key_of(image) == key and (not parent.image or is_child(image, parent.image))
        if not reason and not is_current:
            reason = f"{parent_name} is newer"
        return State(name, image, key, reason, name)

    def _inputs(
        self, name: str, image: Image | None, packages: tuple[str, ...]
    ) -> dict[str, str] | None:
        """Return a stage's current inputs, or None if only running the stage can tell.

        Raise ``_StaleError`` if the settings no longer ask for what is in the image.
        """
        engine, settings = self._project.engine, self._settings
        if name == "base":
            known = inputs_of(image).get(BASE_INPUT, "") if image else ""
            base_image = base_image_input(engine, settings, known)
            return {**file_inputs(engine, settings), BASE_INPUT: base_image}
        if name in self._custom:
            stage = custom_stage(settings, self._custom[name])
        elif name == "pull":
            wanted = channels_text(settings)
            channels = lock_text(settings) or (image and image.labels.get(CHANNELS_LABEL))
            if not channels:
                return None
            if mismatch := lock_mismatch(wanted, channels):
                raise _StaleError(f"GUIX_CHANNELS changed ({mismatch})")
            # `--disable-authentication` is not a setting.  Only the image records it.
            stage = pull_stage(channels, wanted, authenticate=is_authenticated(image))
        elif packages or settings.guix_packages or settings.guix_manifest:
            stage = install_stage(settings, packages)
        else:
            raise _StaleError("no packages are specified")
        return stage.inputs(common_inputs(engine, settings))

    def parent_of(self, name: str) -> str | None:
        """Return the stage that a stage is made from, or None for base.

        The parent of install is base if no channels are configured, locked or pulled.
        """
        if name in self._custom:
            return self._custom[name].parent
        if name == "base":
            return None
        if name == "install":
            lock = self._settings.guix_channels_lock
            configured = self._settings.guix_channels or (lock and lock.exists())
            if not configured and not self._ledger.find("pull"):
                return "base"
        return STAGES[STAGES.index(name) - 1]

    def parent_image(self, name: str, options: StageOptions) -> Image:
        """Return the image that a stage starts from, and make it first if it is missing.

        A stale parent is made again with ``options.upstream``.  Raise ``UsageError`` without it.
        """
        parent = self.parent_of(name) or "base"
        state = self.state(parent)
        if state.image is None:
            self._project.console.print(
                f"{name}: {self._ledger.tag(parent)} is missing, so {parent} comes first"
            )
            self.make(parent, StageOptions(upstream=options.upstream))
        elif state.why:
            if not options.upstream:
                raise UsageError(
                    f"{parent} is stale ({state.why}); run `inv {parent}`, "
                    f"or `inv {name} --upstream`"
                )
            self.make(parent, StageOptions(upstream=True))
        image = self._ledger.find(parent)
        if image is None:
            raise EngineError(
                f"cannot find {self._ledger.tag(parent)}: the engine no longer has it; "
                f"run `inv {parent}`"
            )
        return image

    def _build_base(self) -> None:
        """Build the Dockerfile and commit the result with the labels of the base stage."""
        started = time.monotonic()
        project, settings = self._project, self._settings
        # Before the build, so that a file that is edited meanwhile makes the stage stale.
        inputs = file_inputs(project.engine, settings)
        accounts = accounts_for(project.engine, settings)
        spec = replace(base_spec(settings, network(project.engine, settings)), accounts=accounts)
        try:
            with build_log(project, "base") as log:
                project.console.detail(f"base: {settings.dockerfile} on {settings.base_image}")
                build = partial(project.engine.build, spec, log.add)
                image_id = retry_call(project.console, "the build", build)
                # Another client can remove it, for example with `docker system prune`.
                built = project.engine.image(image_id) or project.engine.image(build())
        except BuilderError:
            # The builder's message is only that it cannot get the base image.
            if reason := base_platform_error(project.engine, settings):
                raise BuilderError(reason) from None
            raise
        if built is None:
            raise EngineError(
                f"cannot find {image_id}, which the engine has built; run `inv base` again"
            )
        try:
            check_volumes(settings, built)
            # Docker's classic store refuses to commit it even without another layer.
            check_layers(project.engine, built)
        except UsageError:
            project.engine.drop(built.id)
            raise
        # The build has pulled the base image if it was missing, so its digest is known now.
        inputs[BASE_INPUT] = base_image_input(project.engine, settings, "")
        state, keys = guix_state(project, built) if settings.cache_volume else ("", "")
        labels = {
            **stage_labels("base", "", inputs),
            **base_annotations(settings, inputs),
            GUIX_KEY_LABEL: state,
            TRUST_LABEL: keys,
            ASSEMBLED_LABEL: "",
            FILES_LABEL: "",
        }
        # The label that proves a stage contains the layers, which exist only after the build.
        with (
            project.console.step("base", has_log=False) as step,
            unstarted_container(project.engine, settings, built.id) as container,
        ):
            step.show_activity(lambda: "committing")
            tag = self._ledger.tag("base")
            image = commit_image(project, container, built, tag, labels, own_layers=0)
        print_result(project, "base", started)
        self._push_to_cache("base", image)

    def _run(self, name: str, options: StageOptions) -> None:
        """Run a stage on its parent's image and replace the stage's image with the result."""
        project = self._project
        stage = self._stage(name, options)
        parent = self.parent_image(name, options)
        started = time.monotonic()
        if name == "install" and self._settings.guix_require_substitutes:
            require_substitutes(project, parent, options.packages)
        replaced = self._ledger.find(name) or self._take_newest_from_cache(name)
        image = run_stage(
            project,
            stage,
            parent,
            commit=options.commit,
            force=options.force,
            keep_failed=options.keep_failed,
        )
        if image is None:
            return
        print_result(project, name, started, replaced)
        for line in _package_changes(replaced or parent, image):
            project.console.print(f"{name}: {line}")
        self._ledger.point_image(project.console)
        if replaced:
            project.engine.drop(replaced.id)
        self._push_to_cache(name, image)

    def _stage(self, name: str, options: StageOptions) -> Stage:
        """Return a stage as it is to run now; raise ``UsageError`` if a lock does not fit."""
        settings, console = self._settings, self._project.console
        if name in self._custom:
            return custom_stage(settings, self._custom[name])
        if name == "install":
            return install_stage(settings, options.packages)
        stage = stage_to_run(
            settings,
            update=options.update,
            newest=options.newest,
            authenticate=not options.disable_authentication,
        )
        if not options.update and lock_text(settings):
            image = self._ledger.find("pull")
            if image is None:
                if line := uncompared_lock(settings):
                    console.print(line)
            elif stage.extra_inputs.get(CHANNELS_INPUT) != inputs_of(image).get(CHANNELS_INPUT):
                raise UsageError(
                    lock_mismatch_line(settings, "it computes its channels and has changed")
                )
        if settings.guix_channels_lock is None:
            console.print(
                "pull: the channels are not locked, so every `inv pull` fetches them; "
                "set GUIX_CHANNELS_LOCK to lock them"
            )
        return stage

    def _write_lock(self) -> None:
        """Write the channels of the pull stage to ``GUIX_CHANNELS_LOCK`` if they changed."""
        image = self._ledger.find("pull")
        channels = image.labels.get(CHANNELS_LABEL, "") if image else ""
        if write_lock(self._settings, channels):
            lock = self._settings.guix_channels_lock
            self._project.console.print(f"pull: the channels are locked in {lock}")

    def _take_from_cache(self, name: str, state: State) -> bool:
        """Tag the image with the state's key from ``CACHE_IMAGE``; return whether it exists."""
        reference = self._cache_reference(name, state.key)
        image = self._pull_stage(name, reference) if reference else None
        if reference is None or image is None:
            return False
        engine, is_valid = self._project.engine, key_of(image) == state.key
        if is_valid:
            parent = self.parent_of(name)
            parent_image = self._ledger.find(parent) if parent else None
            if parent and parent_image and not is_child(image, parent_image):
                # It has the same key but other layers, so the image would count as stale.
                engine.untag(self._ledger.tag(parent))
            engine.tag(image.id, self._ledger.tag(name))
            self._project.console.print(f"{name}: taken from {reference}")
        engine.untag(reference)
        return is_valid

    def _take_newest_from_cache(self, name: str) -> Image | None:
        """Take the newest image of a stage from ``CACHE_IMAGE``, to start from what it contains.

        Its key is that of other inputs, so the stage is stale.
        """
        reference = self._newest_cache_reference(name)
        if reference is None or not self._settings.cache_volume:
            return None
        image = self._pull_stage(name, reference)
        if image:
            self._project.console.print(f"{name}: starts from {reference}")
            self._project.engine.tag(image.id, self._ledger.tag(name))
            self._project.engine.untag(reference)
        return image

    def _pull_stage(self, name: str, reference: str) -> Image | None:
        """Pull a stage's image; None, without a tag, if it is missing or another image."""
        engine = self._project.engine
        try:
            pull(self._project, reference)
        except GuixTasksError:
            return None  # A missing image or an unreachable cache is not an error.
        image = engine.image(reference)
        if image and proven_stage(image) == name:
            return image
        if image and not image.layers:
            # Docker 28's containerd store does not fetch a layer that it has in another
            # compression, and then reports an image without layers and configuration.
            self._project.console.print(
                f"{name}: cannot use {reference}: the engine has its layers in another compression"
            )
        engine.untag(reference)
        return None

    def _push_to_cache(self, name: str, image: Image) -> None:
        """Push a stage to ``CACHE_IMAGE``, by its key and as the newest image of the stage."""
        engine, newest = self._project.engine, self._newest_cache_reference(name)
        for reference in (self._cache_reference(name, key_of(image)), newest):
            if reference is None:
                return
            engine.tag(image.id, reference)
            try:
                push(self._project, reference)
            except GuixTasksError as error:
                self._project.console.warn(f"{name} was not pushed to CACHE_IMAGE: {error}")
                return
            finally:
                engine.untag(reference)

    def _newest_cache_reference(self, name: str) -> str | None:
        platform = image_platform(self._project.engine, self._settings)
        return self._cache_reference(name, platform.replace("/", "-"))

    def _drop_cache_tag(self, name: str, image: Image | None) -> None:
        """Remove the ``CACHE_IMAGE`` tag that a killed run left on an image."""
        reference = self._cache_reference(name, key_of(image)) if image else None
        if image and reference in image.tags:
            self._project.engine.untag(str(reference))

    def _cache_reference(self, name: str, suffix: str | None) -> str | None:
        cache = self._settings.cache_image
        return str(cache.with_tag(f"{name}-{suffix}")) if cache and suffix else None


def make_each(project: Project, name: str, options: StageOptions) -> None:
    """Make a stage for each platform of a project in turn.

    An update applies to the first platform only.  The others pull the commits that the
    first one locked, so that all platforms have the same.
    """
    for single in project.each_platform():
        Lifecycle(single).make(name, options)
        options = replace(options, update=False, newest=False)


def _changed_inputs(recorded: Mapping[str, str], current: Mapping[str, str]) -> set[str]:
    """Return the names of the inputs that differ, without those that differ because of others."""
    names = recorded.keys() | current.keys()
    changed = {name for name in names if recorded.get(name) != current.get(name)}
    # A manifest that is added or removed also changes the command.
    if "manifest.scm" in recorded.keys() ^ current.keys():
        changed -= {"command", "profile.scm"}
    return changed


def _input_name(settings: Settings, stage: str, name: str) -> str:
    """Return the file or setting of a project that an input of a stage comes from."""
    files = {
        "Dockerfile": settings.dockerfile,
        "channels.scm": settings.guix_channels_lock,
        "manifest.scm": settings.guix_manifest,
    }
    if file := files.get(name):
        return settings.shown(file)
    names = {"manifest.scm": "GUIX_MANIFEST", "profile.scm": "packages"}
    if stage == "install":  # Its command lists GUIX_PACKAGES, or those of --package.
        names["command"] = "packages"
    return names.get(name, name.removeprefix(f"{INPUTS}/"))


def _package_changes(earlier: Image, image: Image) -> Iterator[str]:
    """Yield lines for the packages that an image has added, upgraded and removed."""
    before, after = _packages(earlier), _packages(image)
    changes = {
        "added": [after[name] for name in after.keys() - before.keys()],
        "upgraded": [
            f"{before[name]} to {after[name].rpartition('@')[2]}"
            for name in after.keys() & before.keys()
            if before[name] != after[name]
        ],
        # A stage without a report of its packages removes none.
        "removed": [before[name] for name in before.keys() - after.keys()] if after else [],
    }
    for change, packages in changes.items():
        if packages:
            more = len(packages) - _NAMED_PACKAGES
            names = ", ".join(sorted(packages)[:_NAMED_PACKAGES])
            yield f"{change} {names}{f' and {more} more' if more > 0 else ''}"
    if before and before == after:
        yield "the same packages in the same versions"


def _packages(image: Image) -> dict[str, str]:
    """Return an image's packages, ``NAME@VERSION`` by name."""
    packages = image.labels.get(PACKAGES_LABEL, "").split()
    return {package.partition("@")[0]: package for package in packages}
