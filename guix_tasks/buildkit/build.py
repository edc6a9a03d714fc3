"""Build of the pull and install stages with BuildKit, as insecure steps of one build.

There are three calls of bake. The first builds the base and queries its user and the commits of
floating channels. The second runs the steps and gets their reports. The third adds the labels
and variables that come from the reports, and outputs the image. Each call finds the results of the
previous one in BuildKit's cache. Channels are locked and images configured as by run and commit.
Nothing is pushed unless the complete image was built.
"""

from __future__ import annotations

import itertools
import os
import re
import secrets
import time
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from guix_tasks.buildkit import bakefile, context
from guix_tasks.buildkit import buildx as command
from guix_tasks.buildkit.bakefile import ASKED_TARGET, IMAGE_TARGET, REPORTS_TARGET, Definition
from guix_tasks.buildkit.builder import (
    builder_name,
    check_platform,
    find_builder,
    native_platforms,
    needed_syntax,
)
from guix_tasks.buildkit.buildx import Builder, csv_field, with_accounts
from guix_tasks.engine.accounts import accounts_for, credentials_for, remote_digest
from guix_tasks.engine.retry import TRIES, retry_call
from guix_tasks.errors import BuilderError, StageError, UsageError
from guix_tasks.files import cache_home, check_writable, temporary_directory, text_digest
from guix_tasks.guix import commits, with_search_paths
from guix_tasks.oci import labels as oci
from guix_tasks.oci.platform import Platform
from guix_tasks.oci.reference import quoted
from guix_tasks.settings.values import Driver, Output, Sandbox
from guix_tasks.stages import container, pull
from guix_tasks.stages.base import base_spec, other_platform
from guix_tasks.stages.channel_access import agent_socket, by_ssh, programs
from guix_tasks.stages.images import SEARCH_PATHS_LABEL
from guix_tasks.stages.install import install_stage
from guix_tasks.stages.log_faults import StepFaults
from guix_tasks.stages.push_records import Pushed, save
from guix_tasks.stages.runner import STAGE_TRIES, build_log
from guix_tasks.stages.stage import MISSING_ITEMS, stage_files, warm_stage_files
from guix_tasks.stages.store import SEED, result_directory, trust_inputs
from guix_tasks.ui.format import human_size, human_time

if TYPE_CHECKING:
    from pathlib import Path

    from guix_tasks.buildkit.buildx import Buildx
    from guix_tasks.settings import Settings
    from guix_tasks.stages.project import Project
    from guix_tasks.stages.stage import Stage


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Options of one `inv buildx.build` call."""

    pull: bool = True
    update: bool = False
    """Pull the current commits of the channels instead of those of the lock."""
    newest: bool = False
    """With ``update``, also take commits of Guix that no substitute server has built."""
    force: bool = False
    """Run every Guix step, even if the builder's cache has its result."""
    by_digest: bool = False
    """Push by digest, without a tag, for ``inv manifest``."""
    authenticate: bool = True
    """Require that Guix authenticates all channels."""


def build(project: Project, buildx: Buildx, options: BuildOptions) -> str:
    """Build the image and output it as set by ``BUILDX_OUTPUT``.

    Return the pushed reference with its digest, the path of an archive, or the loaded tag; empty
    in a dry run.

    Raise ``UsageError`` if the settings do not allow the build, ``BuilderError`` or ``StageError``
    if it fails, and ``RegistryError`` if the registry refuses it.
    """
    started = time.monotonic()
    settings = project.settings
    if settings.stage_memory:
        project.console.warn(
            "STAGE_MEMORY is for work containers; a builder's memory is an option of its nodes, "
            "for example BUILDX_NODES=...,memory=4g"
        )
    if settings.guix_require_substitutes:
        project.console.warn(
            "GUIX_REQUIRE_SUBSTITUTES is for work containers; with BuildKit, run `inv weather`"
        )
    if project.custom_stages:
        names = " and ".join(stage.name for stage in project.custom_stages)
        project.console.warn(
            f"{names} will not be in the image: buildx.build builds only the built-in stages; "
            "`inv push` pushes an image with all stages, built by run and commit"
        )
    # Errors of the lock and of the settings are raised before anything is built.
    if not options.pull:
        install_stage(settings)
    else:
        _pull_to_run(settings, options)
        if not options.update and (line := pull.uncompared_lock(settings)):
            project.console.print(line)
    _check_output(project, options)
    registry = settings.image.registry if settings.buildx_output is Output.REGISTRY else ""
    buildx = with_accounts(buildx, accounts_for(project.engine, settings), registry)
    builder = _builder(project, buildx)
    for platform in settings.platforms:
        check_platform(settings, builder, platform)
    with temporary_directory() as directory:
        output = _Build(project, buildx, builder, directory, options).run()
    if output:
        duration = human_time(time.monotonic() - started)
        project.console.print(f"buildx.build: {output}, {duration}")
    return output


def _pull_to_run(settings: Settings, options: BuildOptions) -> Stage:
    return pull.stage_to_run(
        settings, update=options.update, newest=options.newest, authenticate=options.authenticate
    )


def _builder(project: Project, buildx: Buildx) -> Builder:
    """Return the builder; start it if no node reports its platforms.

    A dry run continues without a builder, which a previous task of a real run may create.
    """
    settings = project.settings
    name = builder_name(settings, buildx)
    if not buildx.perform and command.inspect(buildx, name) is None:
        project.console.print(f"buildx.build: there is no builder {name} yet")
        return Builder(name, settings.buildx_driver.value, ())
    builder = find_builder(settings, buildx)
    if any(node.platforms for node in builder.nodes):
        return builder
    buildx.change("inspect", "--bootstrap", builder.name)
    return find_builder(settings, buildx)


def _check_output(project: Project, options: BuildOptions) -> None:
    """Raise an error for a ``BUILDX_OUTPUT`` that would fail after the build."""
    settings = project.settings
    if options.by_digest or settings.buildx_output in (Output.OCI, Output.DOCKER):
        check_writable(settings.output_directory)
    if options.by_digest and settings.buildx_output is not Output.REGISTRY:
        raise UsageError("--by-digest is a way to push; set BUILDX_OUTPUT=registry")
    if len(settings.platforms) > 1 and settings.buildx_output in (Output.LOAD, Output.DOCKER):
        raise UsageError(
            f"BUILDX_OUTPUT={settings.buildx_output.value} holds one platform; set PLATFORMS to "
            "one, or set BUILDX_OUTPUT to registry or oci"
        )
    if settings.buildx_output is Output.LOAD:
        project.engine.info()  # raises an error if there is no engine
    if settings.buildx_output is Output.REGISTRY and settings.builds_on_engine_host:
        # The account is checked before a build of hours; the builder is next to the engine.
        reference = str(settings.image)
        account = credentials_for(project.engine, settings, reference)
        project.engine.check_registry(reference, account)


@dataclass(frozen=True)
class _Build:
    """One build: the directory of its inputs and the calls of bake."""

    project: Project
    buildx: Buildx
    builder: Builder
    directory: Path
    options: BuildOptions

    @property
    def _settings(self) -> Settings:
        return self.project.settings

    @cached_property
    def _platforms(self) -> tuple[Platform, ...]:
        """The platforms of the settings, else the first node's native platform."""
        if self._settings.platforms:
            return self._settings.platforms
        native = next(native_platforms(self.builder), None)
        return (native or Platform.parse(self.project.engine.info().platform),)

    def run(self) -> str:
        """Build the image, output it, and return its reference or path."""
        settings, say = self._settings, self.project.console.print
        exists = self.builder.nodes or self.buildx.perform
        syntax = needed_syntax(settings, self.buildx, self.builder.name) if exists else None
        say(
            f"buildx.build: {', '.join(map(str, self._platforms))} with {self.builder.name} "
            f"({self.builder.driver})"
            + (", builds not isolated" if settings.guix_sandbox is Sandbox.NOCHROOT else "")
        )
        say(f"base: {settings.dockerfile} on {settings.base_image}")
        definition = self._definition(syntax)
        self._bake(definition, ASKED_TARGET)
        definition = self._with_stages(definition, force=self.options.force)
        try:
            self._bake(definition, REPORTS_TARGET)
        except (BuilderError, StageError) as error:
            if not re.search(rf"exit (code:|status) {MISSING_ITEMS}\b", str(error)):
                raise
            say("buildx.build: the builder's cache lacks store items; running all steps again")
            definition = self._with_stages(definition, force=True)
            self._bake(definition, REPORTS_TARGET)
        for stage, platform in itertools.product(definition.stages, self._platforms):
            if stage.check:
                stage.check(self._report(stage.name, platform))
        self._write_lock()
        return self._output(self._with_configuration(definition))

    # --- inputs ---

    def _definition(self, syntax: str | None) -> Definition:
        settings, directory = self._settings, self.directory
        for name in ("empty", bakefile.WORK):
            (directory / name).mkdir()
        context.write_environment(settings, directory)
        binds, contexts = context.write_mounts(settings, directory)
        if self._floats:
            self._write_resolve()
        channels = None
        if self.options.pull:
            channels = self._lock or pull.channels_text(settings) or ""
        url = by_ssh(settings, channels or "")
        is_engine = self.builder.driver == Driver.DOCKER.value
        build_network = settings.network
        if is_engine:
            build_network = container.network(self.project.engine, settings)
        if build_network not in (None, "host", "none"):
            self.project.console.warn(
                f"NETWORK={build_network}: a build can only join host and none; using the "
                "builder's default network"
            )
            build_network = None
        return Definition(
            base=base_spec(settings, build_network),
            base_contexts={} if is_engine else self._base_contexts(),
            platforms=self._platforms,
            directory=directory,
            resolve=self._floats,
            network=build_network,
            binds=binds,
            cache=container.cache_prefix(settings),
            contexts={bakefile.WORK: directory / bakefile.WORK, **contexts},
            secrets=context.write_secrets(settings, directory, channels),
            ssh_agent=agent_socket(settings, url) if url else None,
            syntax=syntax,
            cache_from=[*settings.buildx_cache_from, *self._registry_cache()],
        )

    @cached_property
    def _lock(self) -> str | None:
        """The lock that fixes the commits of the channels, if there is one."""
        return None if self.options.update else pull.lock_text(self._settings)

    @property
    def _floats(self) -> bool:
        """True if the build pulls channels and no lock fixes their commits."""
        return self.options.pull and not self._lock

    def _write_resolve(self) -> None:
        stage = _pull_to_run(self._settings, self.options)
        channels = (pull.BUILT_CHANNELS, "channels.scm")
        files = {
            **programs(),
            **stage.files,
            **container.resource_files(("resolve.scm",)),
            "stage": bakefile.resolve_script(
                next((name for name in channels if name in stage.files), None),
                authenticate=self.options.authenticate,
            ),
        }
        context.write_step(self._settings, self.directory, bakefile.RESOLVE, files, force=True)

    def _base_contexts(self) -> dict[str, str]:
        """Return the context that replaces a base image that only the engine has, if any."""
        settings, engine, reference = self._settings, self.project.engine, self._settings.base_image
        image = context.local_base_image(engine, settings)
        if image is None:
            return {}
        self.project.console.print(
            f"base: copying {reference} ({human_size(image.size)}) to the builder, because its "
            "registry does not have it"
        )
        others = [str(other) for other in self._platforms if str(other) != image.platform]
        if others:
            raise BuilderError(other_platform(str(reference), image, ", ".join(others)))
        if not self.buildx.perform:
            return {}
        kept = cache_home() / "base-images"
        return {str(reference): context.save_as_layout(engine, image, reference, kept)}

    def _registry_cache(self, *more: str) -> list[str]:
        """Return ``CACHE_IMAGE`` as a build cache; empty if the builder has no registry cache."""
        cache = self._settings.cache_image
        if cache is None or self.builder.driver == Driver.DOCKER.value:
            return []
        tag = f"buildx-{container.project_digest(self._settings)}"
        return [",".join(["type=registry", f"ref={cache.with_tag(tag)}", *more])]

    def _with_stages(self, definition: Definition, *, force: bool) -> Definition:
        settings, console = self._settings, self.project.console
        store = self._store()
        stages = [self._pull()] if self.options.pull else []
        if settings.guix_manifest or settings.guix_packages or not stages:
            stages.append(install_stage(settings))
        for stage in stages:
            console.print(f"{stage.name}: in an insecure step")
            for argv in stage.commands:
                console.command(argv)
            files = self._files(stage, warm=bool(store))
            files |= programs() if stage.fetches is not None else {}
            context.write_step(settings, self.directory, stage.name, files, force=force)
        return replace(definition, stages=stages, store=store, user=self._user(), resolve=False)

    def _store(self) -> str | None:
        """Return the ID of the cache mount with the warm store of these trust settings."""
        prefix, authenticate = container.cache_prefix(self._settings), self.options.authenticate
        keys = [self._report(bakefile.KEYS, platform) for platform in self._platforms]
        trust = trust_inputs(self._settings, " ".join(keys), authenticate=authenticate)
        return f"{prefix}-store-{text_digest(*trust)[:8]}" if prefix else None

    def _files(self, stage: Stage, *, warm: bool) -> dict[str, bytes]:
        """Return the files of a stage's steps."""
        if not warm:
            return stage_files(stage)
        # One step at a time has the store, so that the first name needs to differ from no other.
        result, directory = "new-buildkit", result_directory("")
        after = (
            "name=$(cat /proc/sys/kernel/random/uuid)",
            f'mv {directory}{result} "{directory}$name"',
            f"mkdir -p {bakefile.REPORTS}",
            f'echo "$name" >{bakefile.REPORTS}/{bakefile.RESULT}',
        )
        files = warm_stage_files(stage, f"{directory}{result}", check_roots=True, after=after)
        return {**files, **container.resource_files(SEED), "owner": b"0\n"}

    def _pull(self) -> Stage:
        """Return the stage that pulls the locked or the resolved commits.

        The step of resolved channels equals the step of their lock in later builds, so that its
        result is in the cache.
        """
        settings, authenticate = self._settings, self.options.authenticate
        if not self._floats:
            return pull.stage_to_run(settings, authenticate=authenticate)
        resolved, wanted = self._report(bakefile.RESOLVED), pull.channels_text(settings)
        stage = pull.pull_stage(resolved, wanted, authenticate=authenticate)
        if stage.check:
            stage.check(resolved)
        return stage

    # --- reports ---

    def _report(self, name: str, platform: Platform | None = None) -> str:
        """Return a report of the first or another platform's build, or an empty string."""
        directory = self.directory / "reports"
        # BuildKit writes a directory for each platform if there are several.
        subdirectory = directory / str(platform or self._platforms[0]).replace("/", "_")
        path = (subdirectory if subdirectory.is_dir() else directory) / name
        return path.read_text(encoding="utf-8").strip() if path.exists() else ""

    def _user(self) -> str:
        """Return the base image's user for a Dockerfile: name or UID, or empty for root.

        The base image controls this value, so it is validated.
        """
        uid, name = self._report("user"), self._report("name")
        if uid in ("", "0"):
            return ""
        for user in (name, uid):
            if re.fullmatch(r"\w[\w.@-]*", user, re.ASCII):
                return user
        raise BuilderError(
            f"the user of {self._settings.base_image} has an invalid name: {quoted(name)}; fix the "
            "image's /etc/passwd, or use another BASE_IMAGE"
        )

    def _write_lock(self) -> None:
        """Lock the pulled channels with the text of the request if it has the same commits.

        The text is in the cache key of the step, so another text would repeat the pull.
        """
        report = self._report("pull")
        request = self._lock or self._report(bakefile.RESOLVED)
        if request and commits(request) == commits(report):
            report = request
        if pull.write_lock(self._settings, report):
            lock = self._settings.guix_channels_lock
            self.project.console.print(f"pull: the channels are locked in {lock}")

    def _with_configuration(self, definition: Definition) -> Definition:
        settings, base = self._settings, str(self._settings.base_image)
        digest = None
        if settings.builds_on_engine_host:
            digest = remote_digest(self.project.engine, settings, base)
        labels: dict[Platform, dict[str, str]] = {}
        environment: dict[Platform, dict[str, str]] = {}
        for platform in self._platforms:
            annotations = {
                **oci.oci_annotations(settings.directory, os.environ, self.project.console.print),
                oci.CREATED: self._report(bakefile.CREATED, platform),
                oci.BASE_NAME: base,
                oci.BASE_DIGEST: digest or "",
            }
            labels[platform] = {name: text for name, text in annotations.items() if text}
            for stage in definition.stages:
                labels[platform].update(stage.labels(self._report(stage.name, platform)))
            base_lines = self._report(bakefile.BASE_ENVIRONMENT, platform).splitlines()
            lines = with_search_paths(base_lines, labels[platform].get(SEARCH_PATHS_LABEL, ""))
            new = (line.partition("=")[::2] for line in lines if line not in base_lines)
            environment[platform] = dict(new)
        return replace(definition, labels=labels, environment=environment)

    # --- output ---

    def _output(self, definition: Definition) -> str:
        settings, output = self._settings, self._settings.buildx_output
        image, tags = settings.image, settings.references
        can_attest = output in (Output.REGISTRY, Output.OCI)
        definition = replace(
            definition,
            # Docker's image format cannot store attestations.
            attestations=settings.buildx_attestations if can_attest else (),
            cache_to=[*settings.buildx_cache_to, *self._registry_cache("mode=max")],
        )
        if output in (Output.OCI, Output.DOCKER):
            return self._archive(replace(definition, tags=tags), output)
        if output is Output.LOAD:
            return self._load(replace(definition, tags=tags, output="type=docker"))
        if self.options.by_digest:
            by_digest = (
                f"type=image,name={image.name},push-by-digest=true,name-canonical=true,push=true"
            )
            digest = self._bake(replace(definition, output=by_digest), IMAGE_TARGET)
            if digest:
                channels = commits(self._report("pull"))
                path = save(settings, Pushed(image.name, self._platforms, digest, channels))
                self.project.console.print(
                    f"buildx.build: {path}; `inv manifest` joins it under {image}"
                )
            return f"{image.name}@{digest}" if digest else ""
        digest = self._bake(replace(definition, tags=tags, output="type=registry"), IMAGE_TARGET)
        return f"{image}@{digest}" if digest else ""

    def _load(self, definition: Definition) -> str:
        """Load the image into the engine under the stages' tag, and keep the previous image."""
        engine, ledger = self.project.engine, self.project.ledger
        image = str(ledger.image)
        if ledger.image != self._settings.image:
            definition = replace(definition, tags=[image])
        previous = engine.image(image)
        self._bake(definition, IMAGE_TARGET)
        if not self.buildx.perform:
            return ""
        current = engine.image(image)
        if previous and current and previous.id != current.id:
            ledger.keep(previous)
        return image

    def _archive(self, definition: Definition, output: Output) -> str:
        image, directory = self._settings.image, self._settings.output_directory
        if self.buildx.perform:
            directory.mkdir(parents=True, exist_ok=True)
        name = f"{image.repository.rpartition('/')[2]}-{image.tag}.{output.value}.tar"
        unfinished = directory / f".{name}.{secrets.token_hex(4)}"
        try:
            archive = f"type={output.value},{csv_field(f'dest={unfinished}')}"
            self._bake(replace(definition, output=archive), IMAGE_TARGET)
            if not self.buildx.perform:
                return ""
            unfinished.replace(directory / name)
        finally:
            unfinished.unlink(missing_ok=True)
        return str(directory / name)

    def _bake(self, definition: Definition, target: str) -> str:
        """Build a target with bake and return the image's digest, if it has one."""
        directory, console = self.directory, self.project.console
        (directory / "Dockerfile").write_text(bakefile.dockerfile(definition), encoding="utf-8")
        (directory / "bake.json").write_text(bakefile.bake_file(definition), encoding="utf-8")
        if not self.buildx.perform and target == IMAGE_TARGET:
            for file in ("Dockerfile", "bake.json"):
                console.print(f"--- {file}\n{(directory / file).read_text(encoding='utf-8')}")
        metadata = directory / "metadata.json"
        variables = {**self.buildx.environment, "BUILDX_METADATA_PROVENANCE": "disabled"}
        program = replace(self.buildx, environment=variables)
        # All paths are safe to allow, because the bake file is generated.
        allowed = ["security.insecure", "fs=*", *(["ssh"] if definition.ssh_agent else [])]
        if definition.network == "host":
            allowed.append("network.host")
        arguments = (
            "bake", f"--builder={self.builder.name}", f"--file={directory / 'bake.json'}",
            *(f"--allow={entitlement}" for entitlement in allowed),
            f"--metadata-file={metadata}", "--progress=plain", target,
        )  # fmt: skip
        limit = self._settings.stage_timeout
        deadline = time.monotonic() + limit * max(1, len(definition.stages)) if limit else None

        def attempt() -> None:
            remaining = deadline - time.monotonic() if deadline else None
            if remaining is not None and remaining <= 0:
                raise TimeoutError
            faults = StepFaults(self._settings)

            def output(data: bytes) -> None:
                faults.check(log.read(data))

            try:
                program.stream(*arguments, output=output, spec=definition.base, seconds=remaining)
            except StageError as error:
                error.is_transient = error.is_transient or faults.network_failed
                raise

        # A retry continues with the finished steps from the builder's cache.
        tries = TRIES if target == IMAGE_TARGET else STAGE_TRIES
        try:
            with build_log(self.project, "buildx.build") as log:
                retry_call(console, "the build", attempt, tries)
        except TimeoutError:
            raise StageError(
                f"buildx.build: stopped after STAGE_TIMEOUT ({human_time(limit or 0)} a stage); "
                "nothing was pushed"
            ) from None
        return command.built_digest(metadata, target)
