"""Mounts and volumes where stages write are refused before any work is lost in them."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from fake_engine import BASE_IMAGE, IMAGE, PROFILE, Site, heard

from guix_tasks import guix
from guix_tasks.commands import commit, run, shell
from guix_tasks.commands.squash import squash
from guix_tasks.errors import SettingsError
from guix_tasks.guix.result_paths import conflict
from guix_tasks.settings import load_settings
from guix_tasks.stages import volumes
from guix_tasks.stages.container import CACHES, WORK_DIRECTORY, cache_volumes, tmpfs_directories
from guix_tasks.stages.images import STAGES
from guix_tasks.stages.volumes import check_volumes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.usefixtures("serial_hashing")


# --- The paths ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("/", "covers /gnu/store"),
        ("/gnu", "covers /gnu/store"),
        ("/gnu/store", "covers /gnu/store"),
        ("gnu/store", "covers /gnu/store"),
        ("//gnu///store//", "covers /gnu/store"),
        ("/srv/../gnu/./store", "covers /gnu/store"),
        ("/gnu/store/abc", "is in /gnu/store"),
        ("/var", "covers /var/guix"),
        ("/var/guix", "covers /var/guix"),
        ("/var/guix/profiles", "is in /var/guix"),
        ("/var/guix/daemon-socket", "is in /var/guix"),
        ("/root", "covers /root/.config/guix/channels.scm"),
        ("/root/.config", "covers /root/.config/guix/channels.scm"),
        ("/root/.config/guix", "covers /root/.config/guix/channels.scm"),
        ("/root/.config/guix/channels.scm", "covers /root/.config/guix/channels.scm"),
        ("/root/.config/guix/current", "covers /root/.config/guix/current"),
        ("/root/.guix-profile", "covers /root/.guix-profile"),
    ],
)
def test_target_over_a_result_is_a_conflict(target: str, expected: str) -> None:
    assert conflict(target) == expected


@pytest.mark.parametrize(
    "target",
    [
        *("/srv", "/data", "/gnu/other", "/gnu/store2", "/var/guix2", "/var/log/guix", "/var/run"),
        *("/root/.ssh", "/root/.cache", "/root/.cache/guix", "/root/.config/other", "/root2"),
        *("/root/.config/guix/other", "/etc/guix/machines.scm", "/var/guix/substitute"),
    ],
)
def test_other_target_is_no_conflict(target: str) -> None:
    assert conflict(target) is None


@pytest.mark.parametrize(
    "path", [guix.CHANNELS_FILE, guix.PROFILE, guix.CURRENT_GUIX, WORK_DIRECTORY]
)
def test_paths_that_stages_use_are_protected(path: str) -> None:
    assert conflict(path)


@pytest.mark.parametrize("path", CACHES.values())
def test_caches_are_not_protected(path: str) -> None:
    assert conflict(path) is None


# --- MOUNTS ---------------------------------------------------------------------------------


def test_all_conflicting_mounts_are_reported_with_their_line(site: Site) -> None:
    (site.directory / ".env").write_text("# mine\nMOUNTS=context:/gnu/store/:ro context:/root\n")
    with pytest.raises(SettingsError) as error:
        load_settings(site.directory, site.directory, {})
    first, second = error.value.problems
    assert first.startswith(".env:2: MOUNTS: '/gnu/store/' covers /gnu/store, ")
    assert second.startswith(".env:2: MOUNTS: '/root' covers /root/.config/guix/channels.scm, ")
    assert error.value.exit_code == 2


def test_mount_at_a_cache_is_the_cache(site: Site) -> None:
    site.env["MOUNTS"] = "context:/root/.cache"
    assert [*cache_volumes(site.settings()).values()] == ["/var/guix/substitute"]
    site.env |= {"PLATFORMS": "linux/386", "GUIX_SANDBOX": "nochroot"}
    assert tmpfs_directories(site.settings()) == ()


# --- VOLUME ---------------------------------------------------------------------------------


def declare(site: Site, *volumes: str, dockerfile: str = "FROM x\n") -> None:
    """Let the base image have volumes, as one built from this Dockerfile would."""
    config: dict[str, object] = {"Volumes": {volume: {} for volume in volumes}}
    site.engine.make_image(config, {PROFILE: b"certs"}, tag=BASE_IMAGE)
    site.write("Dockerfile", dockerfile)


def refused(action: Callable[[], object]) -> list[str]:
    with pytest.raises(SettingsError) as error:
        action()
    return error.value.problems


@pytest.mark.parametrize(
    ("dockerfile", "line"),
    [
        ("FROM x\nVOLUME /gnu/store\n", 2),
        ("FROM x\nRUN true\nvolume /a /gnu/store/ /b\n", 3),
        ('FROM x\nVOLUME ["/a",\\\n  "/gnu/store"]\n', 2),
        ("FROM x\n\nVOLUME /a \\\n# VOLUME /gnu/store\n\n  '/gnu/store'\n", 3),
        ("# escape=`\nFROM x\nVOLUME /a `\n /gnu/store\nVOLUME /b\n", 3),
        ("FROM x\nENV STORE=/gnu/store\nVOLUME /a\nVOLUME $STORE\n", 4),
        ("FROM x\nARG G=gnu\nVOLUME /$G/store\nVOLUME /data/$G\n", 3),
        ("FROM x\nARG G=gnu\nVOLUME /${G:-a}/store\n", 3),
        (f"FROM x\nVOLUME {'$A' * 1000}x\nVOLUME $STORE\n", 3),
        (f"FROM x\nVOLUME {'[' * 100_000}\nVOLUME /gnu/store\n", 3),
        ("FROM x\nRUN <<EOF\nVOLUME /gnu/store\nEOF\nVOLUME /gnu/store\n", 5),
        ("FROM x AS one\nVOLUME /gnu/store\nFROM --platform=a one AS two\nVOLUME /a\n", 2),
        ("FROM y\nVOLUME /gnu/store\nFROM x AS b\nVOLUME /gnu/store\nFROM b\nRUN true\n", 4),
        ("FROM x\nVOLUME /gnu/store\nVOLUME /a\nVOLUME /gnu/store\n", 4),
    ],
)
def test_volume_is_refused_with_its_line(site: Site, dockerfile: str, line: int) -> None:
    declare(site, "/gnu/store", "/a", "/b", dockerfile=dockerfile)
    (problem,) = refused(lambda: site.make("base"))
    assert problem.startswith(f"Dockerfile:{line}: VOLUME /gnu/store covers /gnu/store, ")


def test_all_volumes_are_reported(site: Site) -> None:
    declare(site, "/var/guix/db", "/root", dockerfile="FROM x\nVOLUME /var/guix/db\nVOLUME /root\n")
    first, second = refused(lambda: site.make("base"))
    assert first.startswith("Dockerfile:3: VOLUME /root covers /root/.config/guix/channels.scm, ")
    assert second.startswith("Dockerfile:2: VOLUME /var/guix/db is in /var/guix, ")


@pytest.mark.parametrize(
    ("dockerfile", "origin"),
    [
        (
            "ARG BASE_IMAGE\nFROM ${BASE_IMAGE}\nVOLUME /a\n",
            f"environment: BASE_IMAGE: {BASE_IMAGE}",
        ),
        ("FROM y\nVOLUME /gnu\nFROM $BASE_IMAGE\n", f"environment: BASE_IMAGE: {BASE_IMAGE}"),
        ("ARG BASE_IMAGE\n\nFROM example.org/x AS y\n", "Dockerfile:3: FROM example.org/x"),
    ],
)
def test_volume_of_the_base_image_is_refused(site: Site, dockerfile: str, origin: str) -> None:
    declare(site, "/gnu", dockerfile=dockerfile)
    (problem,) = refused(lambda: site.make("base"))
    assert problem.startswith(f"{origin}: its VOLUME /gnu covers /gnu/store, ")


def test_refused_base_leaves_no_image_and_no_container(site: Site) -> None:
    declare(site, "/gnu")
    before = dict(site.engine.tags), set(site.engine.all_images)
    refused(lambda: site.make("install"))
    assert (site.engine.tags, set(site.engine.all_images)) == before
    assert site.engine.all_containers == {}


def test_other_volumes_are_kept(site: Site) -> None:
    kept = ("/data", "/root/.ssh", "/root/.cache", "/var/guix/substitute")
    declare(site, *kept, dockerfile="FROM x\nVOLUME /data\n")
    site.make("base", "pull", "install")
    assert set(site.image().config["Volumes"]) == set(kept)


@contextmanager
def unchecked() -> Iterator[None]:
    """Let volumes pass, as an earlier version did."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(volumes, "conflict", lambda _: None)
        yield


@pytest.fixture
def old(site: Site) -> Site:
    """A project whose stages were made before such a volume was refused."""
    declare(site, "/gnu/store")
    with unchecked():
        site.make(*STAGES)
    return site


def test_stage_on_an_old_image_is_refused_before_it_starts(old: Site) -> None:
    ran = old.ran(lambda: refused(lambda: old.make("install", force=True)))
    assert ran == []


@pytest.mark.parametrize("keep", [True, False])
def test_run_is_refused_only_if_it_is_kept(old: Site, *, keep: bool) -> None:
    def run_it() -> int:
        return run.run(old.project(), ["true"], stage=None, keep=keep)

    if keep:
        assert old.ran(lambda: refused(run_it)) == []
    else:
        assert run_it() == 0


def test_shell_is_refused(old: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    refused(lambda: shell.shell(old.project(), ["docker"], {}, stage=None, fresh=False))
    assert old.engine.all_containers == {}


def test_commit_is_refused_and_leaves_its_container(old: Site) -> None:
    with unchecked():
        run.run(old.project(), ["make"], stage=None, keep=True)
    before = dict(old.engine.tags)
    refused(lambda: commit.commit(old.project()))
    assert old.engine.tags == before
    assert len(old.engine.all_containers) == 1


def test_squash_is_refused(old: Site) -> None:
    project = old.project()
    refused(lambda: squash(project))
    assert heard(project) == ""
    assert old.engine.all_containers == {}


def test_unreadable_dockerfile_does_not_hide_the_reason(old: Site) -> None:
    old.settings().dockerfile.unlink()
    (problem,) = refused(lambda: check_volumes(old.settings(), old.image()))
    assert problem.startswith(f"environment: BASE_IMAGE: {BASE_IMAGE}: its VOLUME /gnu/store ")
    assert IMAGE in old.engine.tags
