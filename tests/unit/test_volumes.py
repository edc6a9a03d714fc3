"""Mounts and volumes over directories of results, which are an error before a stage runs."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from fake_engine import BASE_IMAGE, IMAGE, PROFILE, Site, console_text

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


# --- Paths ----------------------------------------------------------------------------------


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
def test_other_target_is_not_a_conflict(target: str) -> None:
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
    """Declare volumes of the base image, as an image of this Dockerfile does."""
    config: dict[str, object] = {"Volumes": {volume: {} for volume in volumes}}
    site.engine.make_image(config, {PROFILE: b"certs"}, tag=BASE_IMAGE)
    site.write("Dockerfile", dockerfile)


def problems(action: Callable[[], object]) -> list[str]:
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
def test_conflicting_volume_is_reported_with_its_line(
    site: Site, dockerfile: str, line: int
) -> None:
    declare(site, "/gnu/store", "/a", "/b", dockerfile=dockerfile)
    (problem,) = problems(lambda: site.make("base"))
    assert problem.startswith(f"Dockerfile:{line}: VOLUME /gnu/store covers /gnu/store, ")


def test_all_conflicting_volumes_are_reported(site: Site) -> None:
    declare(site, "/var/guix/db", "/root", dockerfile="FROM x\nVOLUME /var/guix/db\nVOLUME /root\n")
    first, second = problems(lambda: site.make("base"))
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
def test_volume_of_the_base_image_is_reported(site: Site, dockerfile: str, origin: str) -> None:
    declare(site, "/gnu", dockerfile=dockerfile)
    (problem,) = problems(lambda: site.make("base"))
    assert problem.startswith(f"{origin}: its VOLUME /gnu covers /gnu/store, ")


def test_conflicting_volume_leaves_no_image_and_no_container(site: Site) -> None:
    declare(site, "/gnu")
    initial_state = dict(site.engine.tags), set(site.engine.all_images)
    problems(lambda: site.make("install"))
    assert (site.engine.tags, set(site.engine.all_images)) == initial_state
    assert site.engine.all_containers == {}


def test_other_volumes_are_kept(site: Site) -> None:
    declared = ("/data", "/root/.ssh", "/root/.cache", "/var/guix/substitute")
    declare(site, *declared, dockerfile="FROM x\nVOLUME /data\n")
    site.make("base", "pull", "install")
    assert set(site.image().config["Volumes"]) == set(declared)


@contextmanager
def disable_check() -> Iterator[None]:
    """Disable the check of volumes, which an earlier version lacked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(volumes, "conflict", lambda _: None)
        yield


@pytest.fixture
def old_site(site: Site) -> Site:
    """A project whose stages were made without the check of volumes."""
    declare(site, "/gnu/store")
    with disable_check():
        site.make(*STAGES)
    return site


def test_stage_on_an_old_image_fails_before_it_starts(old_site: Site) -> None:
    calls = old_site.trace_stages(lambda: problems(lambda: old_site.make("install", force=True)))
    assert calls == []


@pytest.mark.parametrize("keep", [True, False])
def test_run_on_an_old_image_fails_only_with_keep(old_site: Site, *, keep: bool) -> None:
    def run_true() -> int:
        return run.run(old_site.project(), ["true"], stage=None, keep=keep)

    if keep:
        assert old_site.trace_stages(lambda: problems(run_true)) == []
    else:
        assert run_true() == 0


def test_shell_on_an_old_image_is_an_error(old_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    problems(lambda: shell.shell(old_site.project(), ["docker"], {}, stage=None, fresh=False))
    assert old_site.engine.all_containers == {}


def test_commit_on_an_old_image_keeps_its_container(old_site: Site) -> None:
    with disable_check():
        run.run(old_site.project(), ["make"], stage=None, keep=True)
    tags = dict(old_site.engine.tags)
    problems(lambda: commit.commit(old_site.project()))
    assert old_site.engine.tags == tags
    assert len(old_site.engine.all_containers) == 1


def test_squash_of_an_old_image_is_an_error(old_site: Site) -> None:
    project = old_site.project()
    problems(lambda: squash(project))
    assert console_text(project) == ""
    assert old_site.engine.all_containers == {}


def test_unreadable_dockerfile_does_not_hide_the_reason(old_site: Site) -> None:
    old_site.settings().dockerfile.unlink()
    (problem,) = problems(lambda: check_volumes(old_site.settings(), old_site.image()))
    assert problem.startswith(f"environment: BASE_IMAGE: {BASE_IMAGE}: its VOLUME /gnu/store ")
    assert IMAGE in old_site.engine.tags
