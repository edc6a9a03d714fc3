"""The stages of a project in their order: which is up to date, and making those that are not."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from guix_tasks.engine.credentials import accounts_for
from guix_tasks.engine.retry import retried
from guix_tasks.errors import BuilderError, EngineError, GuixTasksError, SettingsError, UsageError
from guix_tasks.stages.base import base_annotations, base_inputs, base_spec, other_platform_only
from guix_tasks.stages.container import (
    INPUTS,
    common_inputs,
    network,
    refuse_emulated,
    sweep,
    unstarted_container,
)
from guix_tasks.stages.custom import own_stage
from guix_tasks.stages.images import (
    CHANNELS_LABEL,
    PACKAGES_LABEL,
    STAGES,
    inputs_of,
    is_child,
    key_of,
    proven_stage,
    stage_key,
    stage_labels,
)
from guix_tasks.stages.install import given_packages, install_stage
from guix_tasks.stages.pull import (
    CHANNELS_INPUT,
    is_authenticated,
    lock_misfits,
    lock_text,
    misfit,
    pull_stage,
    stage_to_run,
    uncompared_lock,
    wanted_text,
    write_lock,
)
from guix_tasks.stages.runner import build_log, commit_image, run_stage, say_done
from guix_tasks.stages.substitutes import require_substitutes
from guix_tasks.stages.transfer import pull, push
from guix_tasks.stages.volumes import check_volumes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from guix_tasks.engine.api import Image
    from guix_tasks.settings import Settings
    from guix_tasks.stages.project import Project
    from guix_tasks.stages.stage import Stage


@dataclass(frozen=True)
class Wishes:
    """How a stage is to be made, where that differs from the usual."""

    force: bool = False
    """Although nothing changed."""
    upstream: bool = False
    """With stale parents brought up to date first."""
    update: bool = False
    """With the channels as they are now, whatever the lock says."""
    commit: bool = True
    keep_failed: bool = False
    """With the container of a command that failed left."""
    packages: tuple[str, ...] = ()
    """Instead of ``GUIX_PACKAGES``."""
    disable_authentication: bool = False
    """With channels that nobody vouches for."""


@dataclass(frozen=True)
class State:
    """A stage, as it is and as it should be."""

    image: Image | None
    key: str | None
    """What its inputs come to now; None where only a run can tell."""
    why: str | None
    """Why the image does not answer to it; None where it does, or where there is none."""


class _UntoldError(Exception):
    """What a stage is made from cannot be told before it is run."""


class Lifecycle:
    """The stages of one project."""

    def __init__(self, project: Project) -> None:
        self._project = project
        self._ledger = project.ledger
        self._settings = project.settings
        self._own = {own.name: own for own in project.own}

    def parent_of(self, name: str) -> str | None:
        """The stage that a stage is made from.

        ``install`` starts from base only where neither channels nor a lock are set and none
        were pulled.
        """
        if name in self._own:
            return self._own[name].parent
        if name == "base":
            return None
        if name == "install":
            lock = self._settings.guix_channels_lock
            asked = self._settings.guix_channels or (lock and lock.exists())
            if not asked and not self._ledger.find("pull"):
                return "base"
        return STAGES[STAGES.index(name) - 1]

    def state(self, name: str, packages: tuple[str, ...] | None = None) -> State:
        """Compare a stage's image with its inputs, and with the parent that it was made from.

        ``packages`` are those of ``install --package``; where they are not said, those that the
        image was made with: whoever pushes what was installed so has not forgotten about it.
        """
        image = self._ledger.find(name)
        try:
            inputs = self._inputs(
                name, image, given_packages(image) if packages is None else packages
            )
        except _UntoldError as why:
            return State(image, None, str(why) or None if image else None)
        parent = self.parent_of(name)
        above = self.state(parent) if parent else State(None, "", None)
        if above.key is None:
            return State(image, None, above.why and f"{parent}: {above.why}")
        key = stage_key(name, above.key, inputs)
        return State(image, key, self._why(image, key, inputs, parent, above) if image else None)

    def _why(
        self, image: Image, key: str, inputs: Mapping[str, str], parent: str | None, above: State
    ) -> str | None:
        if above.why:
            return above.why if ": " in above.why else f"{parent}: {above.why}"
        before = inputs_of(image)
        changed = [each for each in {**before, **inputs} if before.get(each) != inputs.get(each)]
        if changed:
            names = sorted({_named(self._settings, each) for each in changed})
            return f"{', '.join(names)} changed"
        if key_of(image) != key or (above.image and not is_child(image, above.image)):
            return f"{parent} is newer"
        return None

    def _inputs(self, name: str, image: Image | None, packages: tuple[str, ...]) -> dict[str, str]:
        """What a stage is made from now.  ``_UntoldError`` says why that cannot be told."""
        engine, settings = self._project.engine, self._settings
        if name == "base":
            return base_inputs(engine, settings, inputs_of(image) if image else {})
        if name in self._own:
            stage = own_stage(settings, self._own[name])
        elif name == "pull":
            stage = pull_stage(
                self._channels_to_come(image),
                wanted_text(settings),
                # Whoever asked for it to be disabled has not forgotten about it.
                authenticate=is_authenticated(image),
            )
        elif packages or settings.guix_packages or settings.guix_manifest:
            stage = install_stage(settings, packages)
        else:
            raise _UntoldError("nothing is asked for any more")
        return stage.inputs(common_inputs(engine, settings))

    def _channels_to_come(self, image: Image | None) -> str:
        """The channels that a pull would get: those of the lock, or those that it got before."""
        wanted, lock = wanted_text(self._settings), lock_text(self._settings)
        channels = lock or (image.labels.get(CHANNELS_LABEL) if image else None)
        if not channels:
            raise _UntoldError
        if problem := misfit(wanted, channels):
            raise _UntoldError(f"GUIX_CHANNELS changed ({problem})")
        return channels

    def make(self, name: str, wishes: Wishes) -> None:
        """Make a stage and the parents that it lacks, unless it is up to date."""
        refuse_emulated(self._project.engine, self._settings)
        sweep(self._project.engine, self._settings)
        self._ledger.drop_unnamed()
        state = self.state(name, wishes.packages)
        self._drop_cache_tag(name, state.image)
        again = wishes.force or not wishes.commit or self._is_floating(name, wishes)
        # Who asked for the packages is on the label, and what push compares.
        again = again or (name == "install" and wishes.packages != given_packages(state.image))
        # What was pulled without authentication does for nobody who wants it authenticated.
        trusts = wishes.disable_authentication or is_authenticated(state.image)
        again = again or (name == "pull" and not trusts)
        if not again and (self._up_to_date(state) or self._from_cache(name, state)):
            self._project.console.say(f"{name}: up to date")
        elif name == "base":
            self._build()
        else:
            self._run(name, wishes)
        if name == "pull" and wishes.commit:
            self._write_lock()
        if wishes.commit:
            self._ledger.point_image(self._project.console)

    @staticmethod
    def _up_to_date(state: State) -> bool:
        return state.image is not None and state.key is not None and state.why is None

    def _is_floating(self, name: str, wishes: Wishes) -> bool:
        if name != "pull":
            return False
        return wishes.update or self._settings.guix_channels_lock is None

    def _run(self, name: str, wishes: Wishes) -> None:
        started = time.monotonic()
        stage = self._stage(name, wishes)
        parent = self.parent_image(name, wishes)
        if name == "install" and self._settings.guix_require_substitutes:
            require_substitutes(self._project, parent, wishes.packages)
        before = self._ledger.find(name)
        image = run_stage(
            self._project,
            stage,
            parent,
            commit=wishes.commit,
            force=wishes.force,
            keep_failed=wishes.keep_failed,
        )
        if image:
            self._say_what_went(name, before, image)
            say_done(self._project, name, started)
            self._ledger.point_image(self._project.console)
            if before:
                self._project.engine.drop(before.id)
            self._to_cache(name, image)

    def _stage(self, name: str, wishes: Wishes) -> Stage:
        if name in self._own:
            return own_stage(self._settings, self._own[name])
        if name == "install":
            return install_stage(self._settings, wishes.packages)
        stage = stage_to_run(
            self._settings,
            update=wishes.update,
            authenticate=not wishes.disable_authentication,
        )
        if not wishes.update and lock_text(self._settings):
            if changed := self._changed_program():
                raise UsageError(lock_misfits(self._settings, changed))
            if not self._ledger.find("pull") and (line := uncompared_lock(self._settings)):
                self._project.console.say(line)
        if self._settings.guix_channels_lock is None:
            self._project.console.say("pull: the channels float; GUIX_CHANNELS_LOCK would spare it")
        return stage

    def _changed_program(self) -> str | None:
        """Whether channels that are computed are computed otherwise than when they were locked."""
        image = self._ledger.find("pull")
        before = inputs_of(image).get(CHANNELS_INPUT) if image else None
        now = pull_stage("", wanted_text(self._settings)).given.get(CHANNELS_INPUT)
        return "it computes its channels, and has changed" if image and now != before else None

    def parent_image(self, name: str, wishes: Wishes) -> Image:
        """The image that a stage starts from; made first, with a line that says so, if missing.

        A stale one is brought up to date if that is wished, and is a ``UsageError`` if not.
        """
        parent = self.parent_of(name) or "base"
        state = self.state(parent)
        if state.image is None:
            self._project.console.say(
                f"{name}: {self._ledger.tag(parent)} is missing, so {parent} comes first"
            )
            self.make(parent, Wishes(upstream=wishes.upstream))
        elif state.why:
            if not wishes.upstream:
                raise UsageError(
                    f"{parent} is stale ({state.why}); run `inv {parent}`, "
                    f"or `inv {name} --upstream`"
                )
            self.make(parent, Wishes(upstream=True))
        image = self._ledger.find(parent)
        if image is None:
            raise EngineError(f"the engine has lost {self._ledger.tag(parent)}; run it again")
        return image

    def _build(self) -> None:
        """Build the base stage."""
        started = time.monotonic()
        project, settings = self._project, self._settings
        accounts = accounts_for(project.engine, settings)
        spec = replace(base_spec(settings, network(project.engine, settings)), accounts=accounts)
        try:
            with build_log(project, "base") as log:
                project.console.detail(f"base: {settings.dockerfile} on {settings.base_image}")
                build = partial(project.engine.build, spec, log.add)
                host = settings.base_image.registry
                built = retried(project.console, "the build", build, host=host)
        except BuilderError:
            # The builder says only that it cannot get the image.
            if why := other_platform_only(project.engine, settings):
                raise BuilderError(why) from None
            raise
        parent = project.engine.image(built)
        if parent is None:
            raise EngineError(f"the engine built {built} and does not have it; run it again")
        try:
            check_volumes(settings, parent)
        except SettingsError:
            project.engine.drop(built)
            raise
        # Asked for after the build, which has brought the base image if it was not here.
        inputs = base_inputs(project.engine, settings, {})
        labels = {**stage_labels("base", "", inputs), **base_annotations(settings, inputs)}
        # The label that proves a stage names the layers, which are known only now.
        with (
            project.console.step("base", has_log=False) as step,
            unstarted_container(project.engine, settings, built) as container,
        ):
            step.tell(lambda: "committing")
            tag = self._ledger.tag("base")
            image = commit_image(project, container, parent, tag, labels, own_layers=0)
        say_done(project, "base", started)
        self._to_cache("base", image)

    def _write_lock(self) -> None:
        """Write what the pull stage got to ``GUIX_CHANNELS_LOCK``, where it is not there yet."""
        image = self._ledger.find("pull")
        channels = image.labels.get(CHANNELS_LABEL, "") if image else ""
        if write_lock(self._settings, channels):
            lock = self._settings.guix_channels_lock
            self._project.console.say(f"pull: the channels are locked in {lock}")

    def _say_what_went(self, name: str, before: Image | None, after: Image) -> None:
        there, found = _packages(after), _packages(before)
        gone = [found[package] for package in found.keys() - there.keys()]
        if gone and there:
            self._project.console.say(f"{name}: no longer in it: {' '.join(sorted(gone))}")

    def _from_cache(self, name: str, state: State) -> bool:
        """Take a finished stage from ``CACHE_IMAGE``, where one with this key is there."""
        reference = self._cache_reference(name, state.key)
        if reference is None:
            return False
        project = self._project
        try:
            pull(project, reference)
        except GuixTasksError:
            return False  # a cache that misses, or is out of reach, is no error
        image = project.engine.image(reference)
        taken = image is not None and proven_stage(image) == name and key_of(image) == state.key
        if image and taken:
            self._forget_strangers(name, image)
            project.engine.tag(image.id, self._ledger.tag(name))
            project.console.say(f"{name}: taken from {reference}")
        project.engine.untag(reference)
        return taken

    def _forget_strangers(self, name: str, image: Image) -> None:
        """Untag the parent that is here, if it is not the one that this image was made from."""
        parent = self.parent_of(name)
        here = self._ledger.find(parent) if parent else None
        if parent and here and not is_child(image, here):
            self._project.engine.untag(self._ledger.tag(parent))

    def _to_cache(self, name: str, image: Image) -> None:
        project = self._project
        reference = self._cache_reference(name, key_of(image))
        if reference is None:
            return
        project.engine.tag(image.id, reference)
        try:
            push(project, reference)
        except GuixTasksError as error:
            project.console.warn(f"{name} was not put into CACHE_IMAGE: {error}")
        finally:
            project.engine.untag(reference)

    def _drop_cache_tag(self, name: str, image: Image | None) -> None:
        """Remove what a run that was killed on its way to ``CACHE_IMAGE`` has left."""
        reference = self._cache_reference(name, key_of(image)) if image else None
        if image and reference in image.tags:
            self._project.engine.untag(str(reference))

    def _cache_reference(self, name: str, key: str | None) -> str | None:
        cache = self._settings.cache_image
        return str(cache.with_tag(f"{name}-{key}")) if cache and key else None


def make_each(project: Project, name: str, wishes: Wishes) -> None:
    """Make a stage for every platform of a project, one after the other.

    The channels are asked for anew once: the other platforms pull what the first one locked, even
    if there is something newer by then.
    """
    for each in project.each_platform():
        Lifecycle(each).make(name, wishes)
        wishes = replace(wishes, update=False)


def _named(settings: Settings, name: str) -> str:
    """What a stage is made from, by the name that it has in the project."""
    files = {
        "Dockerfile": settings.dockerfile,
        "channels.scm": settings.guix_channels_lock,
        "manifest.scm": settings.guix_manifest,
    }
    if file := files.get(name):
        inside = file.is_relative_to(settings.folder)
        return str(file.relative_to(settings.folder) if inside else file)
    # What reads the manifest is no file of the project's.
    ours = {"manifest.scm": "GUIX_MANIFEST", "profile.scm": "command"}
    return ours.get(name, name.removeprefix(f"{INPUTS}/"))


def _packages(image: Image | None) -> dict[str, str]:
    """The packages in an image by name, whatever their versions are."""
    found = image.labels.get(PACKAGES_LABEL, "").split() if image else ()
    return {package.partition("@")[0]: package for package in found}
