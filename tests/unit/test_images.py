"""Images of stages: seals, tags, keys and platforms."""

from __future__ import annotations

import os
import shutil
import socket
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
from fake_engine import (
    BASE_IMAGE,
    DETERMINISTIC,
    IMAGE,
    PROFILE,
    BufferConsole,
    FakeContainer,
    FakeEngine,
    FakeRegistry,
    Output,
    Site,
    channel,
    new_site,
    publish_base,
    serial_executor,
)
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from guix_tasks import files
from guix_tasks.engine.api import Image
from guix_tasks.errors import UsageError
from guix_tasks.oci.labels import BASE_DIGEST
from guix_tasks.stages import base as base_stage
from guix_tasks.stages import container, images
from guix_tasks.stages.images import (
    HAND_MADE,
    INPUTS_LABEL,
    KEY_LABEL,
    LAYERS_LABEL,
    LAYERS_MAX,
    PREVIOUS,
    STAGE_LABEL,
    STAGES,
    check_layers,
    inputs_of,
    is_child,
    key_of,
    proven_stage,
    seal,
    stage_key,
    stage_labels,
)
from guix_tasks.stages.make import run_stage
from guix_tasks.stages.stage import Stage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from guix_tasks.engine.api import BuildSpec

# --- Seals ----------------------------------------------------------------------------------

LAYERS = st.lists(st.text("abc", min_size=1, max_size=3), max_size=5).map(tuple)


def sealed_image(layers: tuple[str, ...], parent: tuple[str, ...], count: int) -> Image:
    config = seal_config(parent, count, {STAGE_LABEL: "pull"})
    return Image("x", layers, config, 0, "", "linux/amd64")


def seal_config(parent: tuple[str, ...], count: int, labels: dict[str, str]) -> dict[str, Any]:
    """Return a sealed configuration of an image."""
    config = {"Labels": labels, "Cmd": ["bash"]}
    return {**config, "Labels": {**labels, LAYERS_LABEL: seal(parent, count, config)}}


@DETERMINISTIC
@given(LAYERS, st.text("abc", min_size=1))
def test_stage_with_or_without_an_own_layer_is_proven(parent: tuple[str, ...], layer: str) -> None:
    parent_image = Image("y", parent, {}, 0, "", "")
    for image in (sealed_image((*parent, layer), parent, 1), sealed_image(parent, parent, 0)):
        assert proven_stage(image) == "pull"
        assert is_child(image, parent_image)


@DETERMINISTIC
@given(LAYERS, st.integers(0, 1), LAYERS.filter(bool))
def test_image_derived_from_a_stage_is_not_proven(
    parent: tuple[str, ...], count: int, added: tuple[str, ...]
) -> None:
    stage = (*parent, "layer")[: len(parent) + count]
    assert proven_stage(sealed_image((*stage, *added), parent, count)) is None


@DETERMINISTIC
@given(LAYERS, LAYERS)
def test_stage_is_a_child_only_of_its_parent(
    parent: tuple[str, ...], other_parent: tuple[str, ...]
) -> None:
    stage = sealed_image((*parent, "layer"), parent, 1)
    assert is_child(stage, Image("y", other_parent, {}, 0, "", "")) == (parent == other_parent)


@pytest.mark.parametrize("label", [None, "", "1", "1 sha256:0", "x y z"])
def test_malformed_seal_proves_no_stage(label: str | None) -> None:
    image = sealed_image(("a",), ("a",), 0)
    labels = {STAGE_LABEL: "pull", **({} if label is None else {LAYERS_LABEL: label})}
    assert proven_stage(replace(image, config={"Labels": labels})) is None
    assert proven_stage(replace(image, config={"Labels": None})) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Cmd", ["other"]), ("Entrypoint", ["/x"]), ("Env", ["A=1"]), ("User", "me"),
        ("WorkingDir", "/x"), ("ExposedPorts", {"80/tcp": {}}), ("Volumes", {"/x": {}}),
        ("StopSignal", "SIGINT"), ("Healthcheck", {"Test": ["NONE"]}), ("Shell", ["/bin/x"]),
        ("OnBuild", ["RUN x"]),
    ],
)  # fmt: skip
def test_image_with_a_changed_configuration_is_not_proven(name: str, value: object) -> None:
    image = sealed_image(("a",), ("a",), 0)
    assert proven_stage(image) == "pull"
    assert proven_stage(replace(image, config={**image.config, name: value})) is None
    labels = {**image.labels, "mine": "1"}
    assert proven_stage(replace(image, config={**image.config, "Labels": labels})) is None


def test_image_without_inputs_has_no_key() -> None:
    image = sealed_image((), (), 0)
    assert inputs_of(image) == {}
    assert key_of(image) == ""


@pytest.mark.parametrize(
    "text",
    ["", "{", "no", "5", "null", "[1]", '[["a", "b"]]', '{"a": 1}', '{"a": ["b"]}', "[" * 99_999],
)
def test_malformed_inputs_label_is_ignored(text: str) -> None:
    assert inputs_of(Image("x", (), {"Labels": {INPUTS_LABEL: text}}, 0, "", "")) == {}


INPUTS = st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=4)


@DETERMINISTIC
@given(INPUTS, INPUTS, st.text(max_size=2), st.text(max_size=2))
def test_key_depends_on_stage_parent_and_inputs(
    inputs: dict[str, str], other_inputs: dict[str, str], name: str, parent: str
) -> None:
    key = stage_key("pull", "parent", inputs)
    assert key == stage_key("pull", "parent", dict(reversed(inputs.items())))
    assert (key == stage_key("pull", "parent", other_inputs)) == (inputs == other_inputs)
    assert (key == stage_key(name, "parent", inputs)) == (name == "pull")
    assert (key == stage_key("pull", parent, inputs)) == (parent == "parent")
    labels = stage_labels("pull", "parent", inputs)
    image = Image("x", (), {"Labels": labels}, 0, "", "")
    assert (key_of(image), inputs_of(image)) == (key, inputs)


# --- Tags -----------------------------------------------------------------------------------


def derive_image(site: Site, image: Image, tag: str, *, layer: bool = True) -> Image:
    """Make an image as a Dockerfile with ``FROM`` does: with a file, or only with a variable."""
    if layer:
        return site.engine.make_image(image.config, {"/mine": b"x"}, parent=image, tag=tag)
    config = {**image.config, "Env": [*image.config["Env"], "MINE=1"]}
    return site.engine.make_image(config, {}, parent=image, tag=tag)


@pytest.mark.parametrize(
    ("platform", "suffix"),
    [
        ("", ""),
        ("linux/amd64", ""),
        ("linux/arm64", "-linux-arm64"),
        ("linux/arm/v7", "-linux-arm-v7"),
    ],
)
def test_tag_names_a_platform_other_than_that_of_the_engine(
    site: Site, platform: str, suffix: str
) -> None:
    site.env["PLATFORMS"] = platform
    assert str(site.ledger.image) == f"{IMAGE}{suffix}"
    assert site.ledger.tag("pull") == f"{IMAGE}-pull{suffix}"
    assert site.ledger.tag(PREVIOUS) == f"{IMAGE}-{PREVIOUS}{suffix}"


@pytest.mark.parametrize("layer", [True, False])
@pytest.mark.parametrize("stage", STAGES)
def test_image_derived_from_a_stage_is_not_its_image(
    built_site: Site, stage: str, *, layer: bool
) -> None:
    image = built_site.image(stage)
    derive_image(built_site, image, built_site.ledger.tag(stage), layer=layer)
    assert built_site.ledger.find(stage) is None
    built_site.engine.tag(image.id, built_site.ledger.tag(stage))
    stage_image = built_site.ledger.find(stage)
    assert stage_image
    assert stage_image.id == image.id


def test_image_of_another_stage_is_ignored(built_site: Site) -> None:
    built_site.engine.tag(built_site.image("pull").id, built_site.ledger.tag("install"))
    assert built_site.ledger.find("install") is None


def test_newest_stage_is_the_last_existing_one(built_site: Site) -> None:
    for stage in reversed(STAGES):
        newest = built_site.ledger.newest()
        assert newest
        assert proven_stage(newest) == stage
        built_site.engine.untag(built_site.ledger.tag(stage))
    assert built_site.ledger.newest() is None


def test_image_that_points_to_an_earlier_stage_is_repaired(built_site: Site) -> None:
    for stage in ("base", "pull"):
        built_site.engine.untag(built_site.ledger.tag(PREVIOUS))
        built_site.engine.tag(built_site.image(stage).id, IMAGE)
        built_site.ledger.repair()
        assert built_site.image().id == built_site.image("install").id
    built_site.engine.untag(IMAGE)
    built_site.ledger.repair()
    assert built_site.image().id == built_site.image("install").id


def test_image_of_another_tool_is_not_repaired(built_site: Site) -> None:
    for image in (
        built_site.engine.make_image({}, {"/other": b""}),
        derive_image(built_site, built_site.image("install"), ""),
        derive_image(built_site, built_site.image("install"), "", layer=False),
    ):
        built_site.engine.tag(image.id, IMAGE)
        built_site.ledger.repair()
        assert built_site.image().id == image.id


def test_rolled_back_image_is_not_repaired(built_site: Site) -> None:
    initial_image = built_site.image()
    built_site.make("install", packages=("other",))
    assert built_site.image().id != initial_image.id
    assert built_site.ledger.roll_back()
    built_site.ledger.repair()
    assert built_site.image().id == initial_image.id
    assert built_site.ledger.roll_back()
    assert built_site.image().id == built_site.image("install").id


def test_project_without_images_has_no_rollback(site: Site) -> None:
    assert site.ledger.roll_back() is None


def test_replaced_image_of_a_commit_is_reported(built_site: Site) -> None:
    hand_made = derive_image(built_site, built_site.image(), IMAGE)
    config = seal_config(hand_made.layers, 0, {STAGE_LABEL: HAND_MADE})
    hand_made = built_site.engine.make_image(config, {}, parent=hand_made, tag=IMAGE)
    console = BufferConsole()
    built_site.ledger.point_image(console)
    assert "replaced the image of `inv commit`" in console.text
    assert built_site.image().id == built_site.image("install").id
    assert built_site.image(PREVIOUS).id == hand_made.id
    console = BufferConsole()
    built_site.ledger.point_image(console)
    assert console.text == ""


# --- Keys -----------------------------------------------------------------------------------

# Every input of every stage has one line here: a change of it, the stages that use it, and the name
# that `why` must contain.


@dataclass(frozen=True)
class Change:
    """One change of an input of stages, which depends on a text."""

    name: str
    make: Callable[[Site, str], object]
    stages: tuple[str, ...]
    names: str
    """Names of the input, one of which a stage uses, separated by bars."""

    def matches(self, text: str) -> bool:
        return any(name in text for name in self.names.split("|"))


ALL, WORK = STAGES, ("pull", "install")


def write(name: str) -> Callable[[Site, str], object]:
    return lambda site, text: site.write(name, text)


def set_env(name: str, value: str) -> Callable[[Site, str], object]:
    return lambda site, text: site.env.update({name: value.format(as_word(text))})


def as_word(text: str) -> str:
    return f"w{text.encode().hex()}"


def as_commit(text: str) -> str:
    return text.encode().hex().ljust(40, "0")[:40]


def write_lock(site: Site, text: str) -> None:
    locked = (
        channel("guix", "https://guix.test", as_commit(text)),
        channel("mine", "https://m.test"),
    )
    site.write("channels.lock.scm", f"(list {' '.join(locked)})\n")


def rebuild_base_image(site: Site, text: str) -> None:
    site.engine.make_image({}, {PROFILE: text.encode()}, tag=BASE_IMAGE)


def retarget_link(site: Site, text: str) -> None:
    path = site.directory / "context" / "link"
    path.unlink()
    path.symlink_to(as_word(text))


CHANGES = (
    Change("the cache volume", set_env("CACHE_VOLUME", ""), ("pull", "install"), "caches"),
    Change("the Dockerfile", write("Dockerfile"), ("base",), "Dockerfile"),
    Change("a file", write("context/file"), ("base",), "build context"),
    Change("a file in a directory", write("context/directory/deep"), ("base",), "build context"),
    Change("a new file", lambda s, t: s.write(f"context/{as_word(t)}", ""), ("base",), "context"),
    Change(
        "a removed file",
        lambda s, t: (s.directory / "context/file").unlink(),
        ("base",),
        "build context",
    ),
    Change(
        "the name of a file",
        lambda s, t: (s.directory / "context/file").rename(s.directory / "context" / as_word(t)),
        ("base",),
        "build context",
    ),
    Change(
        "an executable file",
        lambda s, t: (s.directory / "context/file").chmod(0o755),
        ("base",),
        "build context",
    ),
    Change(
        "a file writable by others",
        lambda s, t: (s.directory / "context/file").chmod(0o666),
        ("base",),
        "build context",
    ),
    Change("the target of a link", retarget_link, ("base",), "build context"),
    Change("a build argument", set_env("BUILD_ARGS", "A={}"), ("base",), "build arguments"),
    Change("an argument's name", set_env("BUILD_ARGS", "{}=1"), ("base",), "build arguments"),
    Change("another argument", set_env("BUILD_ARGS", "A=1 {}=1"), ("base",), "build arguments"),
    Change(
        "the binary tarball",
        lambda s, t: s.env.update(
            GUIX_BINARY_URL=f"https://a.test/{as_word(t)}", GUIX_BINARY_SHA256="0" * 64
        ),
        ("base",),
        "build arguments",
    ),
    Change("BASE_IMAGE", set_env("BASE_IMAGE", "registry.test/base:{}"), ("base",), "BASE_IMAGE"),
    Change("the content of BASE_IMAGE", rebuild_base_image, ("base",), "BASE_IMAGE"),
    Change("image/entry-point.sh", write("image/entry-point.sh"), ALL, "entry point|image/"),
    Change("image/prepare.sh", write("image/prepare.sh"), ("base",), "image/"),
    Change("the lock", write_lock, ("pull",), "channels.scm|channels.lock.scm"),
    Change("the manifest", write("manifest.scm"), ("install",), "manifest.scm"),
    Change("no manifest", set_env("GUIX_MANIFEST", ""), ("install",), "manifest.scm|GUIX_MANIFEST"),
    Change("the packages", set_env("GUIX_PACKAGES", "hello {}"), ("install",), "packages"),
    Change("no packages", set_env("GUIX_PACKAGES", ""), ("install",), "packages"),
    Change("a key", write("a.pub"), WORK, "substitute keys"),
    Change("no key", set_env("GUIX_SUBSTITUTE_KEYS", ""), WORK, "substitute keys"),
    Change("a mounted file", write("mounted/file"), WORK, "mount /mnt"),
    Change("another mounted file", write("mounted/more"), WORK, "mount /mnt"),
    Change("the target of a mount", set_env("MOUNTS", "mounted:/{}"), WORK, "mount /mnt"),
    Change("another mount", set_env("MOUNTS", "mounted:/mnt context:/{}"), WORK, "mount /w"),
)

FULL = {
    "BUILD_ARGS": "A=1",
    "GUIX_MANIFEST": "manifest.scm",
    "GUIX_SUBSTITUTE_KEYS": "a.pub",
    "MOUNTS": "mounted:/mnt",
}


def full_site(directory: Path, registry: FakeRegistry) -> Site:
    """Create a project that uses every kind of input."""
    site = new_site(directory, registry, **FULL)
    site.write("manifest.scm", '(specifications->manifest \'("tar"))')
    site.write("a.pub", "key")
    site.write("mounted/file", "mounted")
    site.write("context/directory/deep", "deep")
    (site.directory / "context" / "link").symlink_to("file")
    channels = (channel("guix", "https://guix.test"), channel("mine", "https://m.test"))
    site.write("channels.scm", f"(list {' '.join(channels)})\n")
    return site


class Baseline:
    """A project with all stages, which is restored after each change."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.keys = site.keys()
        self._env = dict(site.env)
        self._base = site.engine.tags[BASE_IMAGE]
        self._files = {path: read_state(path) for path in self._paths()}

    def _paths(self) -> list[Path]:
        return [path for path in self.site.directory.rglob("*") if is_file(path)]

    def restore(self) -> Site:
        for path in self._paths():
            if self._files.get(path) != read_state(path):
                path.unlink()
        for path, (content, mode) in self._files.items():
            if not is_file(path):
                if mode is None:
                    path.symlink_to(content.decode())
                else:
                    path.write_bytes(content)
                    path.chmod(mode)
        self.site.env = dict(self._env)
        self.site.engine.tags[BASE_IMAGE] = self._base
        return self.site


def is_file(path: Path) -> bool:
    return path.is_symlink() or path.is_file()


def read_state(path: Path) -> tuple[bytes, int | None]:
    """Return the content and the mode of a file, or the target of a link."""
    if path.is_symlink():
        return os.fsencode(path.readlink()), None
    return path.read_bytes(), path.stat().st_mode


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Baseline]:
    directory = tmp_path_factory.mktemp("project")
    shutil.copytree(container.RESOURCES, directory / "image")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "ThreadPoolExecutor", serial_executor)
        patch.setattr(container, "RESOURCES", directory / "image")
        patch.setattr(base_stage, "RESOURCES", directory / "image")
        site = full_site(directory, FakeRegistry())
        site.engine.pull(BASE_IMAGE, None)
        site.make(*STAGES)
        yield Baseline(site)


def test_table_has_every_input_of_every_stage(baseline: Baseline) -> None:
    """Each input in the label of a stage has a line of the table."""
    for stage in STAGES:
        changes = [change for change in CHANGES if stage in change.stages]
        inputs = set(inputs_of(baseline.site.image(stage)))
        # The profile contains only the name of the manifest, the command of pull is constant, and
        # the platform has separate tests.
        missing = {name for name in inputs if not any(change.matches(name) for change in changes)}
        assert missing <= {"profile.scm", "command", "platform"}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.name)
def test_changed_input_changes_the_key_and_is_named(baseline: Baseline, change: Change) -> None:
    site = baseline.restore()
    images = {stage: site.image(stage) for stage in STAGES}
    change.make(site, "é 1")
    first = STAGES.index(change.stages[0])
    for number, (stage, state) in enumerate(site.states().items()):
        assert (state.key == baseline.keys[stage]) == (number < first), stage
        if number < first:
            assert state.why is None
        elif number == first:
            assert state.why is not None
            assert change.matches(state.why)
        else:
            assert state.why is not None
            assert STAGES[number - 1] in state.why or change.matches(state.why)
    # The change alone makes a stage stale, because its parent may be an image of a cache.
    lifecycle = site.lifecycle
    for stage, image in images.items():
        inputs = lifecycle._inputs(stage, image, ())
        assert (inputs != inputs_of(image)) == (stage in change.stages), stage


def touch(site: Site) -> None:
    for path in site.directory.rglob("*"):
        os.utime(path, (1, 1), follow_symlinks=False)


def recreate_files(site: Site) -> None:
    """Recreate the files in another order."""
    for path in sorted(site.directory.rglob("*"), reverse=True):
        if path.is_file() and not path.is_symlink():
            content, mode = path.read_bytes(), path.stat().st_mode
            path.unlink()
            path.write_bytes(content)
            path.chmod(mode)


NEUTRAL: dict[str, Callable[[Site], object]] = {
    "times": touch,
    "order": recreate_files,
    "writable by the group": lambda site: (site.directory / "mounted/file").chmod(0o664),
    "substitute servers": lambda site: site.env.update(GUIX_SUBSTITUTE_URLS="https://s.test"),
    "network": lambda site: site.env.update(NETWORK="host"),
    "cores": lambda site: site.env.update(GUIX_CORES="3", GUIX_MAX_JOBS="2"),
    "memory": lambda site: site.env.update(STAGE_MEMORY="2g"),
    "time": lambda site: site.env.update(STAGE_TIMEOUT="2h"),
    "credentials": lambda site: site.env.update(DOCKER_USERNAME="me", DOCKER_PASSWORD="x"),  # noqa: S106
    "tags": lambda site: site.env.update(TAGS="1.0 stable"),
    "a release's address": lambda site: site.env.update(RELEASE_URL="https://a.test/v1"),
    "a cache": lambda site: site.env.update(CACHE_IMAGE="registry.test/cache"),
    "a read-only mount": lambda site: site.env.update(MOUNTS="mounted:/mnt:ro"),
    "a build secret": lambda site: site.env.update(BUILD_SECRETS="id=a.pub"),
    "a file outside the context": lambda site: site.write("README", "x"),
    "a comment in GUIX_CHANNELS": lambda site: site.write(
        "channels.scm", (site.directory / "channels.scm").read_text() + "; a comment\n"
    ),
}


@hypothesis_settings(DETERMINISTIC, max_examples=20)
@given(names=st.sets(st.sampled_from(sorted(NEUTRAL)), min_size=1))
def test_other_changes_do_not_change_a_key(baseline: Baseline, names: set[str]) -> None:
    site = baseline.restore()
    for name in sorted(names):
        NEUTRAL[name](site)
    states = site.states()
    assert {stage: state.key for stage, state in states.items()} == baseline.keys
    assert [state.why for state in states.values()] == [None] * 3


@pytest.mark.parametrize("mounted", [".", "out"])
def test_output_of_tasks_does_not_change_a_key(baseline: Baseline, mounted: str) -> None:
    """The mounted directory of an example can be the directory of the logs."""
    site = baseline.restore()
    site.write("out/substitutes", "x")
    site.env["MOUNTS"] = f"{mounted}:/mnt"
    keys = site.keys()
    for name in ("logs/pull.log", "failed/pull-1/log", "digests/linux-amd64.json"):
        site.write(f"out/{name}", "x")
    assert site.keys() == keys
    site.write("out/substitutes", "y")
    assert site.keys() != keys


def test_lock_in_a_mount_does_not_make_its_pull_stale(tmp_path: Path) -> None:
    site = new_site(tmp_path, MOUNTS=".:/src")
    site.make("base", "pull", "install")
    assert site.why("install") is None


def test_input_edited_during_the_run_makes_the_stage_stale(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image has the earlier content, or parts of both."""
    build, behaviour = site.engine.build, site.engine.behaviour

    def edited_build(spec: BuildSpec, output: Callable[[bytes], None]) -> str:
        image = build(spec, output)
        site.write("context/file", "edited")
        return image

    def edited_run(box: FakeContainer) -> Output:
        site.write("mounted/file", "edited")
        yield from behaviour(box)

    monkeypatch.setattr(site.engine, "build", edited_build)
    site.make("base")
    assert site.why("base") == "build context changed"
    monkeypatch.undo()
    site.make("base")
    site.write("mounted/file", "content")
    site.env["MOUNTS"] = "mounted:/mnt:ro"
    site.engine.behaviour = edited_run
    site.make("pull")
    assert site.why("pull") == "mount /mnt changed"


def test_mount_that_a_stage_writes_to_does_not_make_it_stale(site: Site) -> None:
    behaviour = site.engine.behaviour

    def run(box: FakeContainer) -> Output:
        site.write("mounted/cache", "made by the stage")
        yield from behaviour(box)

    site.write("mounted/file", "content")
    site.env["MOUNTS"] = "mounted:/mnt"
    site.engine.behaviour = run
    site.make("base", "pull")
    assert site.why("pull") is None


def test_stage_on_too_many_layers_fails_before_it_runs(site: Site) -> None:
    parent = site.engine.make_image({}, {"/file": b""})
    parent = replace(parent, layers=(*parent.layers,) * LAYERS_MAX)
    stage = Stage("pull", [("true",)], ("true",), lambda _: {})

    def run() -> None:
        with pytest.raises(UsageError, match=r"has 125 layers, and 1 more .*; squash BASE_IMAGE"):
            run_stage(site.project(), stage, parent)

    assert site.trace_stages(run) == []
    check_layers(site.engine, replace(parent, layers=parent.layers[1:]))
    with pytest.raises(UsageError, match="has 124 layers, and 2 more would"):
        check_layers(site.engine, replace(parent, layers=parent.layers[1:]), 2)
    docker = site.engine.details
    for about in (replace(docker, uses_containerd=True), replace(docker, product="Podman")):
        site.engine.details = about
        check_layers(site.engine, parent)


def test_base_of_too_many_layers_leaves_no_image(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "LAYERS_MAX", 0)
    before = set(site.engine.all_images)
    with pytest.raises(UsageError, match="squash BASE_IMAGE, combine steps of the Dockerfile"):
        site.make("base")
    assert set(site.engine.all_images) == before


def test_socket_can_be_mounted(site: Site) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(site.directory / "socket"))
    site.env["MOUNTS"] = "socket:/run/socket"
    site.make("base", "pull")
    assert site.why("pull") is None


def test_environment_does_not_change_a_key(
    baseline: Baseline, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = baseline.restore()
    for name in ("HOME", "LANG", "USER", "https_proxy", "HTTP_PROXY", "SOURCE_DATE_EPOCH", "TZ"):
        monkeypatch.setenv(name, "http://elsewhere")
    assert site.keys() == baseline.keys


def test_checkouts_on_two_engines_have_the_same_keys(tmp_path: Path) -> None:
    """Directories, image IDs, layers and dates differ; one engine already has the base image."""
    registry = FakeRegistry()
    first = full_site(tmp_path / "one", registry)
    second = full_site(tmp_path / "two/deep", registry)
    second.engine.pull(BASE_IMAGE, None)
    for site in (first, second):
        site.make(*STAGES)
    assert first.keys() == second.keys()
    for stage in STAGES:
        assert key_of(first.image(stage)) == key_of(second.image(stage))
        assert first.image(stage).layers != second.image(stage).layers
        assert first.why(stage) is None


def test_platform_changes_the_keys(built_site: Site) -> None:
    keys = built_site.keys()
    images = {stage: built_site.image(stage) for stage in STAGES}
    built_site.env["PLATFORMS"] = "linux/arm64"
    lifecycle = built_site.lifecycle
    for stage, key in built_site.keys().items():
        assert key
        assert key != keys[stage]
        assert lifecycle._inputs(stage, images[stage], ()) != inputs_of(images[stage])


def test_platform_of_the_engine_changes_the_keys(tmp_path: Path) -> None:
    registry = FakeRegistry()
    publish_base(registry)
    first = new_site(tmp_path / "one", registry)
    second = Site(tmp_path / "two", FakeEngine(registry, platform="linux/arm64"))
    assert first.keys()["base"] != second.keys()["base"]


def test_engine_platform_is_the_default(built_site: Site) -> None:
    keys = built_site.keys()
    built_site.env["PLATFORMS"] = "linux/amd64"
    assert built_site.keys() == keys


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        pytest.param("BUILD_ARGS", "A=1 B=2", "B=2 A=1", id="build arguments"),
        pytest.param("GUIX_SUBSTITUTE_KEYS", "a.pub b.pub", "b.pub a.pub", id="keys"),
    ],
)
def test_irrelevant_order_does_not_change_a_key(
    site: Site, name: str, first: str, second: str
) -> None:
    site.write("a.pub", "a")
    site.write("b.pub", "b")
    site.env[name] = first
    site.make(*STAGES)
    keys = site.keys()
    site.env[name] = second
    assert site.keys() == keys


def test_missing_base_image_does_not_make_stages_stale(built_site: Site) -> None:
    """The check needs neither the base image nor its registry."""
    built_site.engine.registry.refusal = "connection refused"
    assert [built_site.why(stage) for stage in STAGES] == [None] * 3


def test_push_of_the_base_image_does_not_change_a_key(site: Site) -> None:
    site.env["BASE_IMAGE"] = "registry.test/custom:1"
    site.engine.make_image({}, {PROFILE: b"certs"}, tag="registry.test/custom:1")
    site.make("base")
    key = site.keys()["base"]
    site.engine.push("registry.test/custom:1", None)
    assert site.keys()["base"] == key


def test_empty_fields_of_the_base_image_do_not_change_a_key(site: Site) -> None:
    """Podman reports more of them than Docker."""
    site.env["BASE_IMAGE"] = "registry.test/custom:1"
    image = site.engine.make_image({"Env": ["A=b"]}, {}, tag="registry.test/custom:1")
    key = site.keys()["base"]
    config = {**image.config, "Hostname": "", "Tty": False, "OnBuild": None}
    site.engine.all_images[image.id] = replace(image, config=config)
    assert site.keys()["base"] == key


def test_base_image_with_other_compression_does_not_change_a_key(site: Site) -> None:
    """The containerd store gives every image a digest, even if no registry has it."""
    engine, reference = site.engine, "registry.test/custom:1"
    engine.details = replace(engine.details, uses_containerd=True)
    site.env["BASE_IMAGE"] = reference
    content = engine.make_image({}, {PROFILE: b"certs"}, tag=reference)

    def load(manifest: str) -> None:
        image = replace(content, id=manifest, digests=(f"registry.test/custom@{manifest}",))
        engine.all_images[manifest] = image
        engine.tags[reference] = manifest

    load("sha256:gzip")
    site.make("base")
    base = site.image("base")
    assert BASE_DIGEST not in base.labels
    load("sha256:uncompressed")
    assert site.make("base") == "base: up to date\n"
    # The digest of a registry can be used on any machine.
    engine.push(reference, None)
    digest = engine.remote_digest(reference)
    assert digest is not None
    engine.all_images["sha256:gzip"] = replace(content, digests=(f"registry.test/custom@{digest}",))
    engine.tags[reference] = "sha256:gzip"
    assert site.why("base") is None
    site.make("base", force=True)
    assert site.image("base").labels[BASE_DIGEST] == digest


def test_lock_written_by_pull_does_not_make_base_stale(site: Site) -> None:
    del site.env["BUILD_CONTEXT"]
    site.make(*STAGES)
    assert site.why("install") is None


def test_lock_in_a_context_with_another_path_does_not_make_base_stale(site: Site) -> None:
    site.env["BUILD_CONTEXT"] = f"../{site.directory.name}"
    site.make(*STAGES)
    assert site.why("install") is None


def test_file_that_dockerignore_excludes_does_not_change_the_key(site: Site) -> None:
    site.write("context/.dockerignore", "*.log\n")
    key = site.keys()["base"]
    site.write("context/a.log", "x")
    assert site.keys()["base"] == key


@pytest.mark.parametrize(
    ("rules", "name"),
    [
        ("build\n", "Build/a.txt"),
        ("*\n!**/*.py\n", "src/app/mod.py"),
        ("readme.md\n", "README.md"),
        ("[a-c]\n", "d"),
    ],
)
def test_file_that_dockerignore_includes_changes_the_key(site: Site, rules: str, name: str) -> None:
    site.write("context/.dockerignore", rules)
    key = site.keys()["base"]
    site.write(f"context/{name}", "x")
    assert site.keys()["base"] != key


def test_malformed_dockerignore_is_an_error_with_a_line_number(site: Site) -> None:
    site.write("context/.dockerignore", "a\n[\n")
    with pytest.raises(UsageError, match=r"context/\.dockerignore:2: malformed pattern \["):
        site.make("base")


def test_stage_labels_contain_the_key(built_site: Site) -> None:
    for stage, key in built_site.keys().items():
        assert built_site.image(stage).labels[KEY_LABEL] == key


# --- Platforms ------------------------------------------------------------------------------


def test_tags_of_platforms_are_distinct(site: Site) -> None:
    site.env["PLATFORMS"] = "linux/amd64 linux/arm64 linux/386"
    ledgers = [project.ledger for project in site.project().each_platform()]
    tags = [str(ledger.image) for ledger in ledgers]
    tags += [ledger.tag(stage) for ledger in ledgers for stage in (*STAGES, PREVIOUS)]
    assert len(tags) == len(set(tags)) == 15


def test_stages_of_two_platforms_are_independent(site: Site) -> None:
    site.env.update(PLATFORMS="linux/amd64", GUIX_SANDBOX="nochroot")
    site.make(*STAGES)
    native = site.image("install")
    keys = site.keys()
    site.env["PLATFORMS"] = "linux/arm64"
    assert site.ledger.last_stage() is None
    site.make(*STAGES)
    assert site.image("install").id != native.id
    assert not set(keys.values()) & set(site.keys().values())
    assert site.engine.tags[IMAGE] == native.id
    assert site.engine.tags[f"{IMAGE}-linux-arm64"] == site.image("install").id
