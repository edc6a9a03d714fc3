"""The BuildKit way: pull and install as insecure steps of one build, sent where it is wanted.

Three calls of bake, each of which finds the work of the one before in BuildKit's cache: the base
and what is to be known of it, the steps with their reports, and the image with the labels that the
reports give it.  So the channels are locked, and the labels say what is in the image, as with run
and commit; and nothing is pushed unless all of it is made.
"""

from __future__ import annotations

import itertools
import json
import re
import secrets
import time
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from guix_tasks.buildkit import buildx as buildx_command
from guix_tasks.buildkit.bakefile import (
    ASKED_TARGET,
    CREATED,
    DIGEST_KEY,
    IMAGE_TARGET,
    REPORTS_TARGET,
    RESOLVE,
    WORK,
    Definition,
    Recipe,
    bake_file,
    dockerfile,
    label_argument,
    resolve_script,
)
from guix_tasks.buildkit.builder import (
    builder_name,
    find_builder,
    native_platforms,
    needed_syntax,
    refuse_platform,
)
from guix_tasks.buildkit.buildx import Builder, csv_field, refuse_without_accounts, with_accounts
from guix_tasks.buildkit.context import (
    hand_over,
    only_here,
    write_environment,
    write_mounts,
    write_secrets,
    write_step,
)
from guix_tasks.engine.credentials import accounts_for, credentials_for, remote_digest
from guix_tasks.engine.retry import TRIES, retried
from guix_tasks.errors import BuilderError, StageError, UsageError
from guix_tasks.files import temporary_directory
from guix_tasks.guix import commits
from guix_tasks.oci import labels as oci
from guix_tasks.oci.platform import Platform
from guix_tasks.oci.reference import quoted
from guix_tasks.settings import Driver, Output, Sandbox
from guix_tasks.stages.base import base_spec, other_platform
from guix_tasks.stages.channel_access import agent_socket, by_ssh, programs
from guix_tasks.stages.container import IMAGE_FOLDER, cache_prefix, network, project_digest
from guix_tasks.stages.install import install_stage
from guix_tasks.stages.log_faults import Steps
from guix_tasks.stages.pull import (
    lock_text,
    pull_stage,
    stage_to_run,
    uncompared_lock,
    wanted_text,
    write_lock,
)
from guix_tasks.stages.push_records import Pushed, save
from guix_tasks.stages.runner import STAGE_TRIES, build_log
from guix_tasks.stages.stage import stage_files
from guix_tasks.ui.format import human_size, human_time

if TYPE_CHECKING:
    from pathlib import Path

    from guix_tasks.buildkit.buildx import Buildx
    from guix_tasks.settings import Settings
    from guix_tasks.stages.project import Project
    from guix_tasks.stages.stage import Stage


_WITH_ATTESTATIONS = (Output.REGISTRY, Output.OCI)


@dataclass(frozen=True)
class BuildWishes:
    """How the image is to be built, where that differs from the usual."""

    pull: bool = True
    update: bool = False
    """With the channels as they are now, whatever the lock says."""
    force: bool = False
    """Every step of Guix again, whatever the builder's cache has."""
    by_digest: bool = False
    """Pushed by digest alone, for ``inv manifest`` to join."""
    authenticate: bool = True
    """Only channels that somebody vouches for."""


def build(project: Project, buildx: Buildx, wishes: BuildWishes) -> str:
    """Build the image and put it where ``BUILDX_OUTPUT`` says.

    The answer is the reference with its digest, the path of an archive, or the tag that was
    loaded; empty on a dry run.  Raises ``BuilderError``, ``StageError`` or ``RegistryError``.
    """
    started = time.monotonic()
    settings = project.settings
    if settings.stage_memory:
        project.console.warn(
            "STAGE_MEMORY is for work containers; a builder's memory is an option of its nodes, "
            "as BUILDX_NODES=...,memory=4g"
        )
    if settings.guix_require_substitutes:
        project.console.warn(
            "GUIX_REQUIRE_SUBSTITUTES is for work containers; `inv weather` asks for BuildKit, too"
        )
    if project.own:
        names = " and ".join(own.name for own in project.own)
        project.console.warn(
            f"{names} will not be in it: buildx.build makes the built-in stages, and "
            "`inv push` pushes what run and commit made"
        )
    # A lock that does not fit, and nothing to do, are told of before anything is built.
    if not wishes.pull:
        install_stage(settings)
    else:
        stage_to_run(settings, update=wishes.update, authenticate=wishes.authenticate)
        if not wishes.update and (line := uncompared_lock(settings)):
            project.console.say(line)
    _refuse(project, wishes)
    accounts = accounts_for(project.engine, settings)
    if settings.buildx_output is Output.REGISTRY:
        refuse_without_accounts(buildx, accounts, settings.image.registry)
    buildx = with_accounts(buildx, accounts)
    builder = _builder(project, buildx)
    for platform in settings.platforms:
        refuse_platform(settings, builder, platform)
    with temporary_directory() as folder:
        baking = _Baking(project, buildx, builder, folder, wishes)
        answer = baking.bake()
    took = human_time(time.monotonic() - started)
    if answer:
        project.console.say(f"buildx.build: {answer}, {took}")
    return answer


def _builder(project: Project, buildx: Buildx) -> Builder:
    """The builder, started where none of its nodes can say what it is.

    A dry run goes on without one: it may be what the task before would have made.
    """
    settings = project.settings
    name = builder_name(settings, buildx)
    if not buildx.perform and buildx_command.inspect(buildx, name) is None:
        project.console.say(f"buildx.build: there is no builder {name} yet")
        return Builder(name, settings.buildx_driver.value, ())
    builder = find_builder(settings, buildx)
    if any(node.platforms for node in builder.nodes):
        return builder
    buildx.change("inspect", "--bootstrap", builder.name)
    return find_builder(settings, buildx)


def _refuse(project: Project, wishes: BuildWishes) -> None:
    """Refuse what no builder can do, before anything is done."""
    settings = project.settings
    if wishes.by_digest and settings.buildx_output is not Output.REGISTRY:
        raise UsageError("--by-digest is a way to push; set BUILDX_OUTPUT=registry")
    several = len(settings.platforms) > 1
    if several and settings.buildx_output in (Output.LOAD, Output.DOCKER):
        raise UsageError(
            f"BUILDX_OUTPUT={settings.buildx_output.value} holds one platform; name one in "
            "PLATFORMS, or set BUILDX_OUTPUT to registry or oci"
        )
    if settings.buildx_output is Output.LOAD:
        project.engine.info()  # raises where there is none to load it into
    if settings.buildx_output is Output.REGISTRY and settings.builds_beside_engine:
        # Better now than after hours; the builder is where the engine is.
        reference = str(settings.image)
        account = credentials_for(project.engine, settings, reference)
        project.engine.greet_registry(reference, account)


@dataclass(frozen=True)
class _Baking:
    """One build: the folder that it is made from, and the calls of bake."""

    project: Project
    buildx: Buildx
    builder: Builder
    folder: Path
    wishes: BuildWishes

    @property
    def _settings(self) -> Settings:
        return self.project.settings

    @cached_property
    def _platforms(self) -> tuple[Platform, ...]:
        """Those of the settings, else the first node's own."""
        if self._settings.platforms:
            return self._settings.platforms
        native = next(native_platforms(self.builder), None)
        return (native or Platform.parse(self.project.engine.info().platform),)

    def bake(self) -> str:
        """Make it and put it where it is wanted; what that is."""
        settings, say = self._settings, self.project.console.say
        known = self.builder.nodes or self.buildx.perform
        syntax = needed_syntax(settings, self.buildx, self.builder.name) if known else None
        say(
            f"buildx.build: {', '.join(map(str, self._platforms))} with {self.builder.name} "
            f"({self.builder.driver})"
            + (", builds not isolated" if settings.guix_sandbox is Sandbox.NOCHROOT else "")
        )
        say(f"base: {settings.dockerfile} on {settings.base_image}")
        definition = self._definition(syntax)
        self._call(definition, ASKED_TARGET)
        definition = self._with_stages(definition)
        self._call(definition, REPORTS_TARGET)
        for stage, platform in itertools.product(definition.recipe.stages, self._platforms):
            self._check(stage, self._answer(platform, stage.name))
        self._lock()
        return self._put(self._with_labels(definition))

    # --- what it is made from ---

    def _definition(self, syntax: str | None) -> Definition:
        settings, folder = self._settings, self.folder
        for each in ("empty", WORK):
            (folder / each).mkdir()
        write_environment(settings, folder)
        binds, contexts = write_mounts(settings, folder)
        if self._floats:
            self._write_resolve()
        channels = self._channels
        url = by_ssh(settings, channels or "")
        own = self.builder.driver == Driver.DOCKER.value
        reachable = network(self.project.engine, settings) if own else settings.network
        if reachable not in (None, "host", "none"):
            self.project.console.warn(
                f"NETWORK={reachable}: a build can join no network but host and none; it takes "
                "the builder's default"
            )
            reachable = None
        recipe = Recipe(
            platforms=self._platforms,
            resolve=self._floats,
            network=reachable,
            binds=binds,
            cache=cache_prefix(settings),
            ssh=bool(url),
        )
        return Definition(
            base=base_spec(settings, reachable),
            base_contexts={} if own else self._handed_over(),
            recipe=recipe,
            folder=folder,
            contexts={WORK: folder / WORK, **contexts},
            secrets=write_secrets(settings, folder, channels),
            ssh_agent=agent_socket(settings, url) if url else None,
            syntax=syntax,
            cache_from=[*settings.buildx_cache_from, *self._registry_cache()],
        )

    @cached_property
    def _floats(self) -> bool:
        """Whether no lock says which commits of the channels are to be pulled."""
        return self.wishes.pull and (self.wishes.update or not lock_text(self._settings))

    @property
    def _channels(self) -> str | None:
        """The channels file of what is to be fetched; None where nothing is."""
        if not self.wishes.pull:
            return None
        settings = self._settings
        return (None if self._floats else lock_text(settings)) or wanted_text(settings) or ""

    def _write_resolve(self) -> None:
        wanted = wanted_text(self._settings)
        files = {
            **programs(),
            "stage": resolve_script(
                channels=wanted is not None, authenticate=self.wishes.authenticate
            ),
            "resolve.scm": (IMAGE_FOLDER / "resolve.scm").read_bytes(),
            **({"channels.scm": wanted.encode()} if wanted is not None else {}),
        }
        write_step(self._settings, self.folder, RESOLVE, files, again=True)

    def _handed_over(self) -> dict[str, str]:
        settings, reference = self._settings, self._settings.base_image
        image = only_here(self.project.engine, settings)
        if image is None:
            return {}
        self.project.console.say(
            f"base: handing {reference} ({human_size(image.size)}) to the builder, since its "
            "registry does not have it"
        )
        others = [str(each) for each in self._platforms if str(each) != image.platform]
        if others:
            raise BuilderError(other_platform(str(reference), image, ", ".join(others)))
        if not self.buildx.perform:
            return {}
        return {str(reference): hand_over(self.project.engine, image, reference, self.folder)}

    def _registry_cache(self, *more: str) -> list[str]:
        """``CACHE_IMAGE`` as a build cache, where the builder can make one."""
        cache = self._settings.cache_image
        if cache is None or self.builder.driver == Driver.DOCKER.value:
            return []
        tag = f"buildx-{project_digest(self._settings)}"
        return [",".join(["type=registry", f"ref={cache.with_tag(tag)}", *more])]

    def _with_stages(self, definition: Definition) -> Definition:
        settings, console = self._settings, self.project.console
        stages = []
        if self.wishes.pull:
            stages.append(self._pull())
        if settings.guix_manifest or settings.guix_packages or not stages:
            stages.append(install_stage(settings))
        for stage in stages:
            console.say(f"{stage.name}: in an insecure step")
            for argv in stage.commands:
                console.command(argv)
            files = {**stage_files(stage), **(programs() if stage.fetches is not None else {})}
            write_step(settings, self.folder, stage.name, files, again=self.wishes.force)
        recipe = replace(definition.recipe, stages=stages, user=self._user(), resolve=False)
        return replace(definition, recipe=recipe)

    def _pull(self) -> Stage:
        """The stage that pulls what the lock says, or what was just resolved.

        A pull of floating channels is so the same step as the one of their lock, from then on.
        """
        trust = self.wishes.authenticate
        if not self._floats:
            return stage_to_run(self._settings, authenticate=trust)
        resolved = self._resolved()
        stage = pull_stage(resolved, wanted_text(self._settings), authenticate=trust)
        self._check(stage, resolved)
        return stage

    @staticmethod
    def _check(stage: Stage, report: str) -> None:
        if stage.check:
            stage.check(report)

    # --- what came out ---

    def _resolved(self) -> str:
        return self._answer(self._platforms[0], f"{RESOLVE}d")

    def _user(self) -> str:
        """The user that the image of the base is for, if not root; its name where it can be one.

        It is the base that says so, and it goes into a Dockerfile.
        """
        first = self._platforms[0]
        uid, name = self._answer(first, "user"), self._answer(first, "name")
        if uid in ("", "0"):
            return ""
        said = [each for each in (name, uid) if re.fullmatch(r"\w[\w.@-]*", each, re.ASCII)]
        if not said:
            raise BuilderError(
                f"the user of {self._settings.base_image} has no name that can be one: "
                f"{quoted(name)}; mend its /etc/passwd, or use another BASE_IMAGE"
            )
        return said[0]

    def _lock(self) -> None:
        """Lock what was pulled, in the words that it was asked for in, so that nothing changes.

        The words are in the key of the step: others for the same would let it be run again.
        """
        report = self._answer(self._platforms[0], "pull")
        asked = self._resolved() if self._floats else lock_text(self._settings)
        same = asked and commits(asked) == commits(report)
        if write_lock(self._settings, asked if asked and same else report):
            lock = self._settings.guix_channels_lock
            self.project.console.say(f"pull: the channels are locked in {lock}")

    def _answer(self, platform: Platform, name: str) -> str:
        """What a platform's build has said; several platforms have a folder each."""
        reports = self.folder / "reports"
        own = reports / str(platform).replace("/", "_")
        path = (own if own.is_dir() else reports) / name
        return path.read_text().strip() if path.exists() else ""

    def _with_labels(self, definition: Definition) -> Definition:
        labels: dict[Platform, dict[str, str]] = {each: {} for each in self._platforms}
        for platform, own in labels.items():
            own.update(self._annotations(platform))
            for stage in definition.recipe.stages:
                own.update(stage.labels(self._answer(platform, stage.name)))
        names = sorted({name for each in labels.values() for name in each})
        values = {
            label_argument(platform, number): own.get(name, "")
            for platform, own in labels.items()
            for number, name in enumerate(names)
        }
        recipe = replace(definition.recipe, labels=names)
        return replace(definition, recipe=recipe, label_values=values)

    def _annotations(self, platform: Platform) -> dict[str, str]:
        settings, created = self._settings, self._answer(platform, CREATED)
        known = settings.builds_beside_engine
        base, engine = str(settings.base_image), self.project.engine
        digest = remote_digest(engine, settings, base) if known else None
        found = {
            **oci.oci_annotations(settings.folder),
            oci.CREATED: created,
            oci.BASE_NAME: str(settings.base_image),
            oci.BASE_DIGEST: digest or "",
        }
        return {name: text for name, text in found.items() if text}

    # --- where it goes ---

    def _put(self, definition: Definition) -> str:
        settings, output = self._settings, self._settings.buildx_output
        image = settings.image
        tags = settings.references
        definition = replace(
            definition,
            # Docker's own format has no place for them.
            attestations=settings.buildx_attestations if output in _WITH_ATTESTATIONS else (),
            cache_to=[*settings.buildx_cache_to, *self._registry_cache("mode=max")],
        )
        if output in (Output.OCI, Output.DOCKER):
            return self._archive(replace(definition, tags=tags), output)
        if output is Output.LOAD:
            return self._load(replace(definition, tags=tags, output="type=docker"))
        if self.wishes.by_digest:
            wanted = (
                f"type=image,name={image.name},push-by-digest=true,name-canonical=true,push=true"
            )
            digest = self._call(replace(definition, output=wanted), IMAGE_TARGET)
            if digest:
                made_of = commits(self._answer(self._platforms[0], "pull"))
                path = save(settings, Pushed(image.name, self._platforms, digest, made_of))
                self.project.console.say(
                    f"buildx.build: {path}; `inv manifest` joins it under {image}"
                )
            return f"{image.name}@{digest}" if digest else ""
        digest = self._call(replace(definition, tags=tags, output="type=registry"), IMAGE_TARGET)
        return f"{image}@{digest}" if digest else ""

    def _load(self, definition: Definition) -> str:
        """Let the engine have it where the stages would, and keep what was there before."""
        engine, ledger = self.project.engine, self.project.ledger
        image = str(ledger.image)
        if ledger.image != self._settings.image:
            definition = replace(definition, tags=[image])
        before = engine.image(image)
        self._call(definition, IMAGE_TARGET)
        if not self.buildx.perform:
            return ""
        now = engine.image(image)
        if before and now and before.id != now.id:
            ledger.keep(before)
        return image

    def _archive(self, definition: Definition, output: Output) -> str:
        image, folder = self._settings.image, self._settings.output_folder
        if self.buildx.perform:
            folder.mkdir(parents=True, exist_ok=True)
        name = f"{image.repository.rpartition('/')[2]}-{image.tag}.{output.value}.tar"
        unfinished = folder / f".{name}.{secrets.token_hex(4)}"
        try:
            wanted = f"type={output.value},{csv_field(f'dest={unfinished}')}"
            self._call(replace(definition, output=wanted), IMAGE_TARGET)
            if not self.buildx.perform:
                return ""
            unfinished.replace(folder / name)
        finally:
            unfinished.unlink(missing_ok=True)
        return str(folder / name)

    def _call(self, definition: Definition, target: str) -> str:
        """One call of bake; the digest of what was made, where there is one."""
        folder, console = self.folder, self.project.console
        (folder / "Dockerfile").write_text(dockerfile(definition.recipe))
        (folder / "bake.json").write_text(bake_file(definition))
        if not self.buildx.perform and target == IMAGE_TARGET:
            for file in ("Dockerfile", "bake.json"):
                console.say(f"--- {file}\n{(folder / file).read_text()}")
        metadata = folder / "metadata.json"
        environment = {
            **self.buildx.environment,
            "BUILDX_METADATA_PROVENANCE": "disabled",
        }
        # What bake may read and write is what its file says, and that is ours.
        allowed = ["security.insecure", "fs=*", *(["ssh"] if definition.ssh_agent else [])]
        if definition.recipe.network == "host":
            allowed.append("network.host")
        arguments = (
            "bake", f"--builder={self.builder.name}", f"--file={folder / 'bake.json'}",
            *(f"--allow={each}" for each in allowed),
            f"--metadata-file={metadata}", "--progress=plain", target,
        )  # fmt: skip
        limit = self._settings.stage_timeout
        whole = limit * max(1, len(definition.recipe.stages)) if limit else None
        started = time.monotonic()

        def once() -> None:
            left = whole - (time.monotonic() - started) if whole else None
            if left is not None and left <= 0:
                raise TimeoutError
            steps = Steps(self._settings)

            def output(data: bytes) -> None:
                log.add(data)
                steps.add(data)

            try:
                replace(self.buildx, environment=environment).stream(
                    *arguments, output=output, spec=definition.base, seconds=left
                )
            except StageError as error:
                error.passes = error.passes or steps.network_failed
                raise

        # What was made is in the builder's cache, so trying again goes on from there.
        tries = TRIES if target == IMAGE_TARGET else STAGE_TRIES
        try:
            with build_log(self.project, "buildx.build") as log:
                retried(console, "the build", once, tries, self._settings.image.registry)
        except TimeoutError:
            taken = human_time(limit or 0)
            raise StageError(
                f"buildx.build: stopped after STAGE_TIMEOUT ({taken} a stage); nothing was pushed"
            ) from None
        if not self.buildx.perform:
            return ""
        return str(json.loads(metadata.read_text()).get(target, {}).get(DIGEST_KEY, ""))
