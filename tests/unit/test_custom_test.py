"""Trial: where a tarball is tried, and what is refused before."""

from __future__ import annotations

import hashlib
import io
import tarfile
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from fake_engine import FakeContainer, FakeEngine, Output, Site, heard, made_site, outline

from guix_tasks.commands.custom_test import run_pack_test
from guix_tasks.commands.pack_records import Packed, save
from guix_tasks.engine.api import ContainerSpec, run_to_end
from guix_tasks.engine.dry_run import TracedEngine
from guix_tasks.errors import CheckError, UsageError
from guix_tasks.guix import TARBALL
from guix_tasks.stages.container import PROJECT_LABEL
from guix_tasks.stages.declarations import CustomTest, declared_test

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("serial_hashing")

SYSTEM, FILE = "x86_64-linux", "hello-1.0-x86_64-linux.tar.gz"
BARE = CustomTest("bare", ("/bin/hello", "/test/tests/names"), inputs=("tests",))
CHECK = CustomTest("check", ("sh", "-euc", "hello"), "debian:stable-slim")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A project that has packed a tarball, and an engine that has a Debian."""
    site = made_site(tmp_path)
    site.write("tests/names", "Ada\n")
    put(site, "bin/hello")
    site.engine.make_image({}, {"/etc/debian_version": b"13"}, tag="debian:stable-slim")
    site.engine.behaviour = runs
    return site


def put(site: Site, *names: str, **changed: Any) -> Packed:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    site.write(f"out/{FILE}", "")
    (site.directory / "out" / FILE).write_bytes(buffer.getvalue())
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    packed = replace(Packed(SYSTEM, TARBALL, FILE, digest, []), **changed)
    save(site.settings(), packed)
    return packed


def runs(container: FakeContainer) -> Output:
    """Run what is there: the program of the tarball, in the command or by a shell."""
    found = container.read("/bin/hello") is not None
    container.status = 0 if found else 127
    yield False, (f"hello {container.text('/test/tests/names')}" if found else "").encode()


def test_the_tarball_is_unpacked_where_there_is_nothing_else(site: Site) -> None:
    before = outline(site.engine)
    project = site.project()
    run_pack_test(project, BARE)
    spec = site.engine.specs[-1]
    assert spec.command == BARE.command
    assert spec.network == "none"
    assert not spec.privileged
    assert spec.labels[PROJECT_LABEL] == str(project.settings.image)
    assert "hello Ada" in heard(project)
    assert heard(project).endswith("bare: passed\n")
    # Neither the container nor the image that has nothing is left.
    assert outline(site.engine) == before
    assert site.engine.all_containers == {}


def test_an_image_can_be_named_there_and_at_each_call(site: Site) -> None:
    run_pack_test(site.project(), CHECK)
    assert site.engine.specs[-1].image == "debian:stable-slim"
    site.engine.make_image({}, {}, tag="another:1")
    run_pack_test(site.project(), CHECK, "another:1")
    assert site.engine.specs[-1].image == "another:1"


def test_an_image_that_has_a_store_proves_nothing(site: Site) -> None:
    site.engine.make_image({}, {"/gnu": b""}, tag="guix:1")
    with pytest.raises(UsageError, match="check: guix:1 contains /gnu"):
        run_pack_test(site.project(), CHECK, "guix:1")
    assert site.engine.all_containers == {}


def test_a_name_that_is_none_is_told(site: Site) -> None:
    with pytest.raises(UsageError, match="invalid image 'A B'"):
        run_pack_test(site.project(), CHECK, "A B")


def test_a_command_that_fails_is_a_check_that_failed(site: Site) -> None:
    put(site, "bin/another")
    with pytest.raises(CheckError, match=r"bare: /bin/hello .* ended with status 127"):
        run_pack_test(site.project(), BARE)
    assert site.engine.all_containers == {}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"sha256": "0" * 64}, "differs from the packed file; run `inv pack` again"),
        ({"file": "gone.tar.gz"}, "differs from the packed file"),
        ({"format": "docker"}, ""),
    ],
)
def test_only_what_was_packed_is_tried(site: Site, changed: dict[str, Any], said: str) -> None:
    put(site, "bin/hello", **changed)
    if said:
        with pytest.raises(UsageError, match=said):
            run_pack_test(site.project(), BARE)
    else:  # a docker archive beside it is in nobody's way
        run_pack_test(site.project(), BARE)


def test_without_a_tarball_it_says_how_to_make_one(site: Site) -> None:
    (site.directory / f"out/build-{SYSTEM}.json").unlink()
    with pytest.raises(UsageError, match=f"contains no tarball for {SYSTEM}; run `inv pack` first"):
        run_pack_test(site.project(), BARE)


def test_an_input_that_is_not_there_is_told(site: Site) -> None:
    with pytest.raises(UsageError, match=r"test bare: cannot read the input .*gone"):
        run_pack_test(site.project(), replace(BARE, inputs=("gone",)))


def test_a_dry_run_shows_what_it_would_do(site: Site) -> None:
    project, before = site.project(), outline(site.engine)
    dry = TracedEngine(site.engine, project.console, perform=False)
    run_pack_test(replace(project, engine=dry), BARE)
    assert "docker start --attach" in heard(project)
    assert "passed" not in heard(project)
    assert outline(site.engine) == before


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ({"name": "push"}, "push is already a task; choose another name for the test"),
        ({"name": "My"}, "'My' cannot name a test"),
        ({"command": ""}, "test check: the command must be"),
        ({"inputs": "../x"}, "test check: the input '../x' is not below"),
        ({"image": 1}, "the image must be a name"),
    ],
)
def test_what_can_be_no_test(what: dict[str, Any], said: str) -> None:
    given = {"name": "check", "command": "true", "image": "", "inputs": (), **what}
    with pytest.raises(UsageError, match=said):
        declared_test(**given, taken=("push",))


def test_a_container_that_is_run_to_its_end_is_gone_however_it_ends(site: Site) -> None:
    spec = ContainerSpec("once", "debian:stable-slim", ("hello",))
    with pytest.raises(CheckError, match="127"):
        list(run_to_end(site.engine, spec, lambda status: CheckError(str(status))))
    assert site.engine.all_containers == {}

    def refuse(_container: str) -> None:
        raise UsageError("not this one")

    with pytest.raises(UsageError, match="not this one"):
        list(run_to_end(site.engine, spec, lambda _status: CheckError(), refuse))
    assert site.engine.all_containers == {}
    pieces = run_to_end(site.engine, spec, lambda _status: CheckError())
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert site.engine.all_containers == {}


def test_the_image_of_a_test_is_pulled_without_another_registrys_account(site: Site) -> None:
    registry, image = site.engine.registry, "elsewhere.test/debian:1"
    other = FakeEngine(registry)
    other.make_image({}, {"/etc/debian_version": b"13"}, tag=image)
    other.push(image, None)
    registry.seen.clear()
    site.env.update(DOCKER_USERNAME="me", DOCKER_PASSWORD="hunter2")  # noqa: S106
    run_pack_test(site.project(), replace(CHECK, image=image))
    assert registry.seen == [None]
