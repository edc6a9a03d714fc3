"""Which image answers to a stage, and what its key is made of."""

from __future__ import annotations

import os
import shutil
import socket
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
from fake_engine import (
    BASE_IMAGE,
    IMAGE,
    PROFILE,
    STEADY,
    FakeContainer,
    FakeEngine,
    FakeRegistry,
    Heard,
    Output,
    Site,
    channel,
    new_site,
    publish_base,
    serial,
)
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from guix_tasks import files
from guix_tasks.engine.api import Image
from guix_tasks.errors import UsageError
from guix_tasks.oci.labels import BASE_DIGEST
from guix_tasks.stages import base as base_stage
from guix_tasks.stages import container
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

# --- The seal -------------------------------------------------------------------------------

LAYERS = st.lists(st.text("abc", min_size=1, max_size=3), max_size=5).map(tuple)


def sealed(layers: tuple[str, ...], parent: tuple[str, ...], own: int) -> Image:
    return Image("x", layers, seal_of(parent, own, {STAGE_LABEL: "pull"}), 0, "", "linux/amd64")


def seal_of(parent: tuple[str, ...], own: int, labels: dict[str, str]) -> dict[str, Any]:
    """A configuration that is sealed."""
    config = {"Labels": labels, "Cmd": ["bash"]}
    return {**config, "Labels": {**labels, LAYERS_LABEL: seal(parent, own, config)}}


@STEADY
@given(LAYERS, st.text("abc", min_size=1))
def test_a_stage_is_proven_with_and_without_a_layer_of_its_own(
    parent: tuple[str, ...], layer: str
) -> None:
    below = Image("y", parent, {}, 0, "", "")
    for image in (sealed((*parent, layer), parent, 1), sealed(parent, parent, 0)):
        assert proven_stage(image) == "pull"
        assert is_child(image, below)


@STEADY
@given(LAYERS, st.integers(0, 1), LAYERS.filter(bool))
def test_what_is_made_from_a_stage_is_not_the_stage(
    parent: tuple[str, ...], own: int, more: tuple[str, ...]
) -> None:
    stage = (*parent, "layer")[: len(parent) + own]
    assert proven_stage(sealed((*stage, *more), parent, own)) is None


@STEADY
@given(LAYERS, LAYERS)
def test_a_stage_is_the_child_of_no_other_image(
    parent: tuple[str, ...], other: tuple[str, ...]
) -> None:
    stage = sealed((*parent, "layer"), parent, 1)
    assert is_child(stage, Image("y", other, {}, 0, "", "")) == (parent == other)


@pytest.mark.parametrize("label", [None, "", "1", "1 sha256:0", "x y z"])
def test_a_label_that_is_none_of_ours_proves_nothing(label: str | None) -> None:
    image = sealed(("a",), ("a",), 0)
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
def test_what_a_dockerfile_changes_without_a_layer_is_not_the_stage(
    name: str, value: object
) -> None:
    image = sealed(("a",), ("a",), 0)
    assert proven_stage(image) == "pull"
    assert proven_stage(replace(image, config={**image.config, name: value})) is None
    labels = {**image.labels, "mine": "1"}
    assert proven_stage(replace(image, config={**image.config, "Labels": labels})) is None


def test_inputs_that_cannot_be_read_are_none() -> None:
    image = sealed((), (), 0)
    assert inputs_of(image) == {}
    assert key_of(image) == ""
    broken = replace(image, config={"Labels": {"org.guix-tasks.inputs": "{"}})
    assert inputs_of(broken) == {}


INPUTS = st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=4)


@STEADY
@given(INPUTS, INPUTS, st.text(max_size=2), st.text(max_size=2))
def test_a_key_is_that_of_its_stage_its_parent_and_its_inputs(
    one: dict[str, str], other: dict[str, str], name: str, parent: str
) -> None:
    key = stage_key("pull", "parent", one)
    assert key == stage_key("pull", "parent", dict(reversed(one.items())))
    assert (key == stage_key("pull", "parent", other)) == (one == other)
    assert (key == stage_key(name, "parent", one)) == (name == "pull")
    assert (key == stage_key("pull", parent, one)) == (parent == "parent")
    labels = stage_labels("pull", "parent", one)
    image = Image("x", (), {"Labels": labels}, 0, "", "")
    assert (key_of(image), inputs_of(image)) == (key, one)


# --- Tags -----------------------------------------------------------------------------------


def from_image(site: Site, image: Image, tag: str, *, layer: bool = True) -> Image:
    """What a user's ``FROM`` makes of an image: with a file, or with a variable alone."""
    if layer:
        return site.engine.make_image(image.config, {"/mine": b"x"}, parent=image, tag=tag)
    config = {**image.config, "Env": [*image.config["Env"], "MINE=1"]}
    return site.engine.make_image(config, {}, parent=image, tag=tag)


@pytest.mark.parametrize(
    ("platform", "tag"),
    [
        ("", f"{IMAGE}-pull"),
        ("linux/amd64", f"{IMAGE}-pull"),
        ("linux/arm64", f"{IMAGE}-pull-linux-arm64"),
        ("linux/arm/v7", f"{IMAGE}-pull-linux-arm-v7"),
    ],
)
def test_a_stages_tag_names_a_platform_that_is_not_the_engines(
    site: Site, platform: str, tag: str
) -> None:
    site.env["PLATFORMS"] = platform
    assert site.ledger.tag("pull") == tag


@pytest.mark.parametrize("layer", [True, False])
@pytest.mark.parametrize("stage", STAGES)
def test_what_is_made_from_a_stage_is_not_found_as_the_stage(
    made: Site, stage: str, *, layer: bool
) -> None:
    image = made.image(stage)
    from_image(made, image, made.ledger.tag(stage), layer=layer)
    assert made.ledger.find(stage) is None
    made.engine.tag(image.id, made.ledger.tag(stage))
    found = made.ledger.find(stage)
    assert found
    assert found.id == image.id


def test_one_stage_is_not_found_as_another(made: Site) -> None:
    made.engine.tag(made.image("pull").id, made.ledger.tag("install"))
    assert made.ledger.find("install") is None


def test_the_newest_stage_is_the_last_that_is_there(made: Site) -> None:
    for stage in reversed(STAGES):
        newest = made.ledger.newest()
        assert newest
        assert proven_stage(newest) == stage
        made.engine.untag(made.ledger.tag(stage))
    assert made.ledger.newest() is None


def test_image_that_was_not_reached_is_repaired(made: Site) -> None:
    for stage in ("base", "pull"):
        made.engine.untag(made.ledger.tag(PREVIOUS))
        made.engine.tag(made.image(stage).id, IMAGE)
        made.ledger.repair()
        assert made.image().id == made.image("install").id
    made.engine.untag(IMAGE)
    made.ledger.repair()
    assert made.image().id == made.image("install").id


def test_what_others_made_of_image_is_not_repaired(made: Site) -> None:
    for image in (
        made.engine.make_image({}, {"/other": b""}),
        from_image(made, made.image("install"), ""),
    ):
        made.engine.tag(image.id, IMAGE)
        made.ledger.repair()
        assert made.image().id == image.id


def test_what_others_made_of_image_without_a_layer_is_not_repaired(made: Site) -> None:
    image = from_image(made, made.image("install"), IMAGE, layer=False)
    made.ledger.repair()
    assert made.image().id == image.id


def test_what_was_rolled_back_to_is_not_repaired(made: Site) -> None:
    before = made.image()
    made.make("install", packages=("other",))
    assert made.image().id != before.id
    assert made.ledger.roll_back()
    made.ledger.repair()
    assert made.image().id == before.id
    assert made.ledger.roll_back()
    assert made.image().id == made.image("install").id


def test_there_is_nothing_to_roll_back_to_at_first(site: Site) -> None:
    assert site.ledger.roll_back() is None


def test_a_hand_made_image_that_is_left_behind_is_said(made: Site) -> None:
    hand_made = from_image(made, made.image(), IMAGE)
    config = seal_of(hand_made.layers, 0, {STAGE_LABEL: HAND_MADE})
    hand_made = made.engine.make_image(config, {}, parent=hand_made, tag=IMAGE)
    console = Heard()
    made.ledger.point_image(console)
    assert "replaced the image of `inv commit`" in console.text
    assert made.image().id == made.image("install").id
    assert made.image(PREVIOUS).id == hand_made.id
    console = Heard()
    made.ledger.point_image(console)
    assert console.text == ""


# --- Keys -----------------------------------------------------------------------------------

# Every input of every stage has one line here: what changes it, the stages that it is an input
# of, and the name that `why` must say.


@dataclass(frozen=True)
class Change:
    """One change of what a stage is made from; it takes any text that is new."""

    name: str
    make: Callable[[Site, str], object]
    stages: tuple[str, ...]
    said: str
    """Where a stage has another name for it: one of these, with bars between."""

    def is_said(self, text: str) -> bool:
        return any(word in text for word in self.said.split("|"))


ALL, WORK = STAGES, ("pull", "install")


def edit(name: str) -> Callable[[Site, str], object]:
    return lambda site, text: site.write(name, text)


def set_to(name: str, value: str) -> Callable[[Site, str], object]:
    return lambda site, text: site.env.update({name: value.format(word(text))})


def word(text: str) -> str:
    return f"w{text.encode().hex()}"


def commit(text: str) -> str:
    return text.encode().hex().ljust(40, "0")[:40]


def lock(site: Site, text: str) -> None:
    locked = (channel("guix", "https://guix.test", commit(text)), channel("mine", "https://m.test"))
    site.write("channels.lock.scm", f"(list {' '.join(locked)})\n")


def rebuild_base_image(site: Site, text: str) -> None:
    site.engine.make_image({}, {PROFILE: text.encode()}, tag=BASE_IMAGE)


def link(site: Site, text: str) -> None:
    path = site.directory / "context" / "link"
    path.unlink()
    path.symlink_to(word(text))


CHANGES = (
    Change("where caches are", set_to("CACHE_VOLUME", ""), ("pull", "install"), "caches"),
    Change("the Dockerfile", edit("Dockerfile"), ("base",), "Dockerfile"),
    Change("a file", edit("context/file"), ("base",), "build context"),
    Change("a file in a directory", edit("context/directory/deep"), ("base",), "build context"),
    Change("a new file", lambda s, t: s.write(f"context/{word(t)}", ""), ("base",), "context"),
    Change(
        "a file that goes",
        lambda s, t: (s.directory / "context/file").unlink(),
        ("base",),
        "build context",
    ),
    Change(
        "a file's name",
        lambda s, t: (s.directory / "context/file").rename(s.directory / "context" / word(t)),
        ("base",),
        "build context",
    ),
    Change(
        "a file that becomes a program",
        lambda s, t: (s.directory / "context/file").chmod(0o755),
        ("base",),
        "build context",
    ),
    Change(
        "a file that others may write",
        lambda s, t: (s.directory / "context/file").chmod(0o666),
        ("base",),
        "build context",
    ),
    Change("where a link leads", link, ("base",), "build context"),
    Change("a build argument", set_to("BUILD_ARGS", "A={}"), ("base",), "build arguments"),
    Change("its name", set_to("BUILD_ARGS", "{}=1"), ("base",), "build arguments"),
    Change("one more", set_to("BUILD_ARGS", "A=1 {}=1"), ("base",), "build arguments"),
    Change(
        "the binary tarball",
        lambda s, t: s.env.update(
            GUIX_BINARY_URL=f"https://a.test/{word(t)}", GUIX_BINARY_SHA256="0" * 64
        ),
        ("base",),
        "build arguments",
    ),
    Change("BASE_IMAGE", set_to("BASE_IMAGE", "registry.test/base:{}"), ("base",), "BASE_IMAGE"),
    Change("what BASE_IMAGE is", rebuild_base_image, ("base",), "BASE_IMAGE"),
    Change("image/entry-point.sh", edit("image/entry-point.sh"), ALL, "entry point|image/"),
    Change("image/prepare.sh", edit("image/prepare.sh"), ("base",), "image/"),
    Change("the lock", lock, ("pull",), "channels.scm|channels.lock.scm"),
    Change("the manifest", edit("manifest.scm"), ("install",), "manifest.scm"),
    Change("no manifest", set_to("GUIX_MANIFEST", ""), ("install",), "manifest.scm|GUIX_MANIFEST"),
    Change("the packages", set_to("GUIX_PACKAGES", "hello {}"), ("install",), "packages"),
    Change("no packages", set_to("GUIX_PACKAGES", ""), ("install",), "packages"),
    Change("a key", edit("a.pub"), WORK, "substitute keys"),
    Change("no key", set_to("GUIX_SUBSTITUTE_KEYS", ""), WORK, "substitute keys"),
    Change("what is mounted", edit("mounted/file"), WORK, "mount /mnt"),
    Change("more is mounted", edit("mounted/more"), WORK, "mount /mnt"),
    Change("where it is mounted", set_to("MOUNTS", "mounted:/{}"), WORK, "mount /mnt"),
    Change("one more mount", set_to("MOUNTS", "mounted:/mnt context:/{}"), WORK, "mount /w"),
)

FULL = {
    "BUILD_ARGS": "A=1",
    "GUIX_MANIFEST": "manifest.scm",
    "GUIX_SUBSTITUTE_KEYS": "a.pub",
    "MOUNTS": "mounted:/mnt",
}


def full_site(directory: Path, registry: FakeRegistry) -> Site:
    """A project that has something of everything."""
    site = new_site(directory, registry, **FULL)
    site.write("manifest.scm", '(specifications->manifest \'("tar"))')
    site.write("a.pub", "key")
    site.write("mounted/file", "mounted")
    site.write("context/directory/deep", "deep")
    (site.directory / "context" / "link").symlink_to("file")
    wanted = (channel("guix", "https://guix.test"), channel("mine", "https://m.test"))
    site.write("channels.scm", f"(list {' '.join(wanted)})\n")
    return site


class Kept:
    """A project whose stages are made, that is put back after each change."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.keys = site.keys()
        self._env = dict(site.env)
        self._base = site.engine.tags[BASE_IMAGE]
        self._files = {path: look(path) for path in self._paths()}

    def _paths(self) -> list[Path]:
        return [each for each in self.site.directory.rglob("*") if is_file(each)]

    def restore(self) -> Site:
        for path in self._paths():
            if self._files.get(path) != look(path):
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


def look(path: Path) -> tuple[bytes, int | None]:
    """What a file holds and its mode, or where a link leads."""
    if path.is_symlink():
        return os.fsencode(path.readlink()), None
    return path.read_bytes(), path.stat().st_mode


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    directory = tmp_path_factory.mktemp("project")
    shutil.copytree(container.RESOURCES, directory / "image")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "ThreadPoolExecutor", serial)
        patch.setattr(container, "RESOURCES", directory / "image")
        patch.setattr(base_stage, "RESOURCES", directory / "image")
        site = full_site(directory, FakeRegistry())
        site.engine.pull(BASE_IMAGE, None)
        site.make(*STAGES)
        yield Kept(site)


def test_the_table_has_every_input_of_every_stage(kept: Kept) -> None:
    """What a stage's label names is told apart by a line of the table, and nothing is left out."""
    for stage in STAGES:
        changes = [change for change in CHANGES if stage in change.stages]
        inputs = set(inputs_of(kept.site.image(stage)))
        # The profile is made of the manifest's name alone, the command of pull is always the
        # same, and the platform has tests of its own.
        missing = {name for name in inputs if not any(each.is_said(name) for each in changes)}
        assert missing <= {"profile.scm", "command", "platform"}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.name)
def test_a_change_of_an_input_changes_the_key_and_is_named(kept: Kept, change: Change) -> None:
    site = kept.restore()
    images = {stage: site.image(stage) for stage in STAGES}
    change.make(site, "é 1")
    first = STAGES.index(change.stages[0])
    for number, (stage, state) in enumerate(site.states().items()):
        assert (state.key == kept.keys[stage]) == (number < first), stage
        if number < first:
            assert state.why is None
        elif number == first:
            assert state.why is not None
            assert change.is_said(state.why)
        else:
            assert state.why is not None
            assert STAGES[number - 1] in state.why or change.is_said(state.why)
    # A stage is not only stale because of its parent, as the parent may come from elsewhere.
    lifecycle = site.lifecycle
    for stage, image in images.items():
        inputs = lifecycle._inputs(stage, image, ())
        assert (inputs != inputs_of(image)) == (stage in change.stages), stage


def touch(site: Site) -> None:
    for path in site.directory.rglob("*"):
        os.utime(path, (1, 1), follow_symlinks=False)


def shuffle(site: Site) -> None:
    """Make the files again in another order."""
    for path in sorted(site.directory.rglob("*"), reverse=True):
        if path.is_file() and not path.is_symlink():
            content, mode = path.read_bytes(), path.stat().st_mode
            path.unlink()
            path.write_bytes(content)
            path.chmod(mode)


NEUTRAL: dict[str, Callable[[Site], object]] = {
    "times": touch,
    "order": shuffle,
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
    "what is no part of the context": lambda site: site.write("README", "x"),
    "GUIX_CHANNELS, where the lock says the same": lambda site: site.write(
        "channels.scm", (site.directory / "channels.scm").read_text() + "; a comment\n"
    ),
}


@hypothesis_settings(STEADY, max_examples=20)
@given(names=st.sets(st.sampled_from(sorted(NEUTRAL)), min_size=1))
def test_nothing_else_changes_a_key(kept: Kept, names: set[str]) -> None:
    site = kept.restore()
    for name in sorted(names):
        NEUTRAL[name](site)
    states = site.states()
    assert {stage: state.key for stage, state in states.items()} == kept.keys
    assert [state.why for state in states.values()] == [None] * 3


@pytest.mark.parametrize("mounted", [".", "out"])
def test_what_tasks_write_while_they_work_changes_no_key(kept: Kept, mounted: str) -> None:
    """As where the mounted directory of an example is the one that logs are put into."""
    site = kept.restore()
    site.write("out/substitutes", "x")
    site.env["MOUNTS"] = f"{mounted}:/mnt"
    before = site.keys()
    for name in ("logs/pull.log", "failed/pull-1/log", "digests/linux-amd64.json"):
        site.write(f"out/{name}", "x")
    assert site.keys() == before
    site.write("out/substitutes", "y")
    assert site.keys() != before


def test_lock_in_a_mount_does_not_make_the_pull_stale_that_wrote_it(tmp_path: Path) -> None:
    site = new_site(tmp_path, MOUNTS=".:/src")
    site.make("base", "pull", "install")
    assert site.why("install") is None


def test_input_that_is_edited_during_the_run_makes_the_stage_stale(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image has the earlier content, or some of each."""
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


def test_stage_on_too_many_layers_is_refused_before_it_runs(site: Site) -> None:
    parent = site.engine.make_image({}, {"/file": b""})
    parent = replace(parent, layers=(*parent.layers,) * LAYERS_MAX)
    stage = Stage("pull", [("true",)], ("true",), lambda _: {})

    def run() -> None:
        with pytest.raises(UsageError, match=r"has 125 layers, and 1 more .*; squash BASE_IMAGE"):
            run_stage(site.project(), stage, parent)

    assert site.ran(run) == []
    check_layers(site.engine, replace(parent, layers=parent.layers[1:]))
    with pytest.raises(UsageError, match="has 124 layers, and 2 more would"):
        check_layers(site.engine, replace(parent, layers=parent.layers[1:]), 2)
    docker = site.engine.about
    for other in (replace(docker, uses_containerd=True), replace(docker, product="Podman")):
        site.engine.about = other
        check_layers(site.engine, parent)


def test_socket_can_be_mounted(site: Site) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(site.directory / "socket"))
    site.env["MOUNTS"] = "socket:/run/socket"
    site.make("base", "pull")
    assert site.why("pull") is None


def test_the_environment_does_not_change_a_key(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    site = kept.restore()
    for name in ("HOME", "LANG", "USER", "https_proxy", "HTTP_PROXY", "SOURCE_DATE_EPOCH", "TZ"):
        monkeypatch.setenv(name, "http://elsewhere")
    assert site.keys() == kept.keys


def test_two_checkouts_on_two_engines_have_the_same_keys(tmp_path: Path) -> None:
    """They differ in directory, image IDs, layers and dates; one has the base image already."""
    registry = FakeRegistry()
    one, other = full_site(tmp_path / "one", registry), full_site(tmp_path / "two/deep", registry)
    other.engine.pull(BASE_IMAGE, None)
    for site in (one, other):
        site.make(*STAGES)
    assert one.keys() == other.keys()
    for stage in STAGES:
        assert key_of(one.image(stage)) == key_of(other.image(stage))
        assert one.image(stage).layers != other.image(stage).layers
        assert one.why(stage) is None


def test_another_platform_is_another_key(made: Site) -> None:
    before = made.keys()
    images = {stage: made.image(stage) for stage in STAGES}
    made.env["PLATFORMS"] = "linux/arm64"
    lifecycle = made.lifecycle
    for stage, key in made.keys().items():
        assert key
        assert key != before[stage]
        assert lifecycle._inputs(stage, images[stage], ()) != inputs_of(images[stage])


def test_engines_of_two_platforms_have_two_keys(tmp_path: Path) -> None:
    registry = FakeRegistry()
    publish_base(registry)
    one = new_site(tmp_path / "one", registry)
    other = Site(tmp_path / "two", FakeEngine(registry, platform="linux/arm64"))
    assert one.keys()["base"] != other.keys()["base"]


def test_the_engines_own_platform_need_not_be_said(made: Site) -> None:
    before = made.keys()
    made.env["PLATFORMS"] = "linux/amd64"
    assert made.keys() == before


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        pytest.param("BUILD_ARGS", "A=1 B=2", "B=2 A=1", id="build arguments"),
        pytest.param("GUIX_SUBSTITUTE_KEYS", "a.pub b.pub", "b.pub a.pub", id="keys"),
    ],
)
def test_an_order_that_means_nothing_changes_no_key(
    site: Site, name: str, one: str, other: str
) -> None:
    site.write("a.pub", "a")
    site.write("b.pub", "b")
    site.env[name] = one
    site.make(*STAGES)
    before = site.keys()
    site.env[name] = other
    assert site.keys() == before


def test_a_base_image_that_is_gone_is_still_known(made: Site) -> None:
    """It need not be here, nor its registry be up, to tell that nothing changed."""
    made.engine.registry.refusal = "connection refused"
    assert [made.why(stage) for stage in STAGES] == [None] * 3


def test_a_push_of_the_base_image_changes_no_key(site: Site) -> None:
    site.env["BASE_IMAGE"] = "registry.test/own:1"
    site.engine.make_image({}, {PROFILE: b"certs"}, tag="registry.test/own:1")
    site.make("base")
    before = site.keys()["base"]
    site.engine.push("registry.test/own:1", None)
    assert site.keys()["base"] == before


def test_a_base_image_of_equal_content_and_other_packing_changes_no_key(site: Site) -> None:
    """The containerd store gives every image a digest, as if it were in a registry."""
    engine, reference = site.engine, "registry.test/own:1"
    engine.about = replace(engine.about, uses_containerd=True)
    site.env["BASE_IMAGE"] = reference
    content = engine.make_image({}, {PROFILE: b"certs"}, tag=reference)

    def load(manifest: str) -> None:
        image = replace(content, id=manifest, digests=(f"registry.test/own@{manifest}",))
        engine.all_images[manifest] = image
        engine.tags[reference] = manifest

    load("sha256:gzip")
    site.make("base")
    base = site.image("base")
    assert BASE_DIGEST not in base.labels
    load("sha256:uncompressed")
    assert site.make("base") == "base: up to date\n"
    # Once a registry has it, and says so, any machine can ask for it.
    engine.push(reference, None)
    digest = engine.remote_digest(reference)
    assert digest is not None
    engine.all_images["sha256:gzip"] = replace(content, digests=(f"registry.test/own@{digest}",))
    engine.tags[reference] = "sha256:gzip"
    assert site.why("base") is None
    site.make("base", force=True)
    assert site.image("base").labels[BASE_DIGEST] == digest


def test_the_lock_that_pull_writes_does_not_make_base_stale(site: Site) -> None:
    del site.env["BUILD_CONTEXT"]
    site.make(*STAGES)
    assert site.why("install") is None


def test_nor_does_it_where_the_context_is_named_in_another_way(site: Site) -> None:
    site.env["BUILD_CONTEXT"] = f"../{site.directory.name}"
    site.make(*STAGES)
    assert site.why("install") is None


def test_what_dockerignore_names_is_no_part_of_the_key(site: Site) -> None:
    site.write("context/.dockerignore", "*.log\n")
    before = site.keys()["base"]
    site.write("context/a.log", "x")
    assert site.keys()["base"] == before


@pytest.mark.parametrize(
    ("rules", "name"),
    [
        ("build\n", "Build/a.txt"),
        ("*\n!**/*.py\n", "src/app/mod.py"),
        ("readme.md\n", "README.md"),
        ("[a-c]\n", "d"),
    ],
)
def test_what_dockerignore_leaves_is_part_of_the_key(site: Site, rules: str, name: str) -> None:
    site.write("context/.dockerignore", rules)
    before = site.keys()["base"]
    site.write(f"context/{name}", "x")
    assert site.keys()["base"] != before


def test_dockerignore_that_is_malformed_is_an_error_with_its_line(site: Site) -> None:
    site.write("context/.dockerignore", "a\n[\n")
    with pytest.raises(UsageError, match=r"context/\.dockerignore:2: malformed pattern \["):
        site.make("base")


def test_labels_of_stage_say_its_key(made: Site) -> None:
    for stage, key in made.keys().items():
        assert made.image(stage).labels[KEY_LABEL] == key


# --- Platforms ------------------------------------------------------------------------------


def test_the_engines_own_platform_has_the_plain_tags(site: Site) -> None:
    plain = (str(site.ledger.image), site.ledger.tag("base"))
    site.env["PLATFORMS"] = "linux/amd64"
    assert (str(site.ledger.image), site.ledger.tag("base")) == plain == (IMAGE, f"{IMAGE}-base")


def test_another_platform_has_tags_of_its_own(site: Site) -> None:
    site.env["PLATFORMS"] = "linux/arm/v7"
    assert str(site.ledger.image) == f"{IMAGE}-linux-arm-v7"
    assert site.ledger.tag("base") == f"{IMAGE}-base-linux-arm-v7"
    assert site.ledger.tag(PREVIOUS) == f"{IMAGE}-{PREVIOUS}-linux-arm-v7"


def test_each_platform_has_tags_that_no_other_has(site: Site) -> None:
    site.env["PLATFORMS"] = "linux/amd64 linux/arm64 linux/386"
    ledgers = [each.ledger for each in site.project().each_platform()]
    tags = [str(each.image) for each in ledgers]
    tags += [each.tag(stage) for each in ledgers for stage in (*STAGES, PREVIOUS)]
    assert len(tags) == len(set(tags)) == 15


def test_the_stages_of_two_platforms_do_not_answer_for_one_another(site: Site) -> None:
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


@pytest.mark.parametrize(
    "text", ["", "no", "5", "null", "[1]", '[["a", "b"]]', '{"a": 1}', '{"a": ["b"]}', "[" * 99_999]
)
def test_a_label_that_is_not_of_ours_says_nothing(made: Site, text: str) -> None:
    image = made.image("pull")
    config = {**image.config, "Labels": {**image.labels, INPUTS_LABEL: text}}
    assert inputs_of(replace(image, config=config)) == {}
