"""Tests of packed tarballs: their containers, and rejected inputs."""

from __future__ import annotations

import hashlib
import io
import tarfile
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from fake_engine import (
    FakeContainer,
    FakeEngine,
    Output,
    Site,
    console_text,
    new_built_site,
    outline,
)

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
SCRATCH_TEST = CustomTest("scratch", ("/bin/hello", "/test/tests/names"), inputs=("tests",))
DEBIAN_TEST = CustomTest("check", ("sh", "-euc", "hello"), "debian:stable-slim")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A project with a packed tarball, on an engine with an image of Debian."""
    site = new_built_site(tmp_path)
    site.write("tests/names", "Ada\n")
    write_tarball(site, "bin/hello")
    site.engine.make_image({}, {"/etc/debian_version": b"13"}, tag="debian:stable-slim")
    site.engine.behaviour = run_tarball
    return site


def write_tarball(site: Site, *names: str, **fields: Any) -> Packed:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    site.write(f"out/{FILE}", "")
    (site.directory / "out" / FILE).write_bytes(buffer.getvalue())
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    packed = replace(Packed(SYSTEM, TARBALL, FILE, digest, []), **fields)
    save(site.settings(), packed)
    return packed


def run_tarball(container: FakeContainer) -> Output:
    """Run the program of the tarball if it exists, in the command or by a shell."""
    exists = container.read("/bin/hello") is not None
    container.status = 0 if exists else 127
    yield False, (f"hello {container.text('/test/tests/names')}" if exists else "").encode()


def test_tarball_is_run_in_an_empty_image(site: Site) -> None:
    snapshot = outline(site.engine)
    project = site.project()
    run_pack_test(project, SCRATCH_TEST)
    spec = site.engine.specs[-1]
    assert spec.command == SCRATCH_TEST.command
    assert spec.network == "none"
    assert not spec.privileged
    assert spec.labels[PROJECT_LABEL] == str(project.settings.image)
    assert "hello Ada" in console_text(project)
    assert console_text(project).endswith("scratch: passed\n")
    # The container and the empty image are removed.
    assert outline(site.engine) == snapshot
    assert site.engine.all_containers == {}


def test_image_of_a_test_can_be_overridden(site: Site) -> None:
    run_pack_test(site.project(), DEBIAN_TEST)
    assert site.engine.specs[-1].image == "debian:stable-slim"
    site.engine.make_image({}, {}, tag="another:1")
    run_pack_test(site.project(), DEBIAN_TEST, "another:1")
    assert site.engine.specs[-1].image == "another:1"


def test_image_with_a_store_is_rejected(site: Site) -> None:
    site.engine.make_image({}, {"/gnu": b""}, tag="guix:1")
    with pytest.raises(UsageError, match="check: guix:1 contains /gnu"):
        run_pack_test(site.project(), DEBIAN_TEST, "guix:1")
    assert site.engine.all_containers == {}


def test_invalid_name_of_an_image_is_reported(site: Site) -> None:
    with pytest.raises(UsageError, match="invalid image 'A B'"):
        run_pack_test(site.project(), DEBIAN_TEST, "A B")


def test_failed_command_is_a_failed_check(site: Site) -> None:
    write_tarball(site, "bin/another")
    with pytest.raises(CheckError, match=r"scratch: /bin/hello .* ended with status 127"):
        run_pack_test(site.project(), SCRATCH_TEST)
    assert site.engine.all_containers == {}


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"sha256": "0" * 64}, "differs from the packed file; run `inv pack` again"),
        ({"file": "gone.tar.gz"}, "differs from the packed file"),
        ({"format": "docker"}, ""),
    ],
)
def test_only_a_packed_tarball_is_tested(site: Site, fields: dict[str, Any], error: str) -> None:
    write_tarball(site, "bin/hello", **fields)
    if error:
        with pytest.raises(UsageError, match=error):
            run_pack_test(site.project(), SCRATCH_TEST)
    else:  # a Docker archive in the same directory is ignored
        run_pack_test(site.project(), SCRATCH_TEST)


def test_missing_tarball_is_reported_with_a_hint(site: Site) -> None:
    (site.directory / f"out/build-{SYSTEM}.json").unlink()
    with pytest.raises(UsageError, match=f"contains no tarball for {SYSTEM}; run `inv pack` first"):
        run_pack_test(site.project(), SCRATCH_TEST)


def test_missing_input_is_reported(site: Site) -> None:
    with pytest.raises(UsageError, match=r"test scratch: cannot read the input .*gone"):
        run_pack_test(site.project(), replace(SCRATCH_TEST, inputs=("gone",)))


def test_dry_run_prints_the_commands(site: Site) -> None:
    project, snapshot = site.project(), outline(site.engine)
    dry = TracedEngine(site.engine, project.console, perform=False)
    run_pack_test(replace(project, engine=dry), SCRATCH_TEST)
    assert "docker start --attach" in console_text(project)
    assert "passed" not in console_text(project)
    assert outline(site.engine) == snapshot


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"name": "push"}, "push is already a task; choose another name for the test"),
        ({"name": "My"}, "'My' cannot name a test"),
        ({"command": ""}, "test check: the command must be"),
        ({"inputs": "../x"}, "test check: the input '../x' is not below"),
        ({"image": 1}, "the image must be a name"),
    ],
)
def test_invalid_declaration_of_a_test_is_reported(fields: dict[str, Any], error: str) -> None:
    declaration = {"name": "check", "command": "true", "image": "", "inputs": (), **fields}
    with pytest.raises(UsageError, match=error):
        declared_test(**declaration, taken=("push",))


def test_container_is_removed_however_its_run_ends(site: Site) -> None:
    spec = ContainerSpec("once", "debian:stable-slim", ("hello",))
    with pytest.raises(CheckError, match="127"):
        list(run_to_end(site.engine, spec, lambda status: CheckError(str(status))))
    assert site.engine.all_containers == {}

    def reject(_container: str) -> None:
        raise UsageError("not this one")

    with pytest.raises(UsageError, match="not this one"):
        list(run_to_end(site.engine, spec, lambda _status: CheckError(), reject))
    assert site.engine.all_containers == {}
    chunks = run_to_end(site.engine, spec, lambda _status: CheckError())
    next(chunks)
    chunks.close()  # type: ignore[attr-defined]
    assert site.engine.all_containers == {}


def test_account_of_another_registry_is_not_used_for_the_image(site: Site) -> None:
    registry, image = site.engine.registry, "elsewhere.test/debian:1"
    other = FakeEngine(registry)
    other.make_image({}, {"/etc/debian_version": b"13"}, tag=image)
    other.push(image, None)
    registry.used_credentials.clear()
    site.env.update(DOCKER_USERNAME="me", DOCKER_PASSWORD="hunter2")  # noqa: S106
    run_pack_test(site.project(), replace(DEBIAN_TEST, image=image))
    assert registry.used_credentials == [None]
