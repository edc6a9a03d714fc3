"""Owners of Guix's directories: changed to the daemon's user and back to root."""

from __future__ import annotations

import copy
import io
import tarfile
from dataclasses import replace
from pathlib import PurePosixPath
from typing import IO, TYPE_CHECKING, cast

import pytest
from fake_engine import Site, new_built_site

from guix_tasks.engine.api import ContainerSpec, EngineInfo
from guix_tasks.stages import commit, ownership
from guix_tasks.stages.container import (
    ROOTLESS_CACHES,
    WORK_DIRECTORY,
    Work,
    cache_volumes,
    work_container,
)
from guix_tasks.stages.images import STAGE_LABEL
from guix_tasks.stages.ownership import grant_ownership, restore_ownership

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from guix_tasks.engine.api import Engine

ROOT_ONLY = "root:x:0:0:root:/root:/bin/sh\n"


class Disk:
    """The file system of a container, as far as an engine copies files in and out."""

    details = EngineInfo("unix:///x", "test", "test", "28", "linux/amd64", "overlay2", True)

    def __init__(self, *directories: str, **files: str) -> None:
        self.entries: dict[str, tuple[tarfile.TarInfo, bytes]] = {}
        self.written: list[str] = []
        self.read: list[str] = []
        for path in directories:
            header = tarfile.TarInfo(path.lstrip("/"))
            header.type, header.mode = tarfile.DIRTYPE, 0o750
            self.entries[path] = (header, b"")
        for path, text in files.items():
            header = tarfile.TarInfo(path.lstrip("/"))
            header.mode, header.size = 0o640, len(text)
            self.entries[path] = (header, text.encode())

    def info(self) -> EngineInfo:
        return self.details

    def copy_in(self, _container: str, archive: bytes | IO[bytes]) -> None:
        assert isinstance(archive, bytes)
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            for member in tar:
                file = tar.extractfile(member) if member.isfile() else None
                self.entries[f"/{member.name}"] = (member, file.read() if file else b"")
                self.written.append(f"/{member.name}")

    def copy_out(self, _container: str, path: str) -> Iterator[bytes]:
        self.read.append(path)
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name, (header, content) in sorted(self.entries.items()):
                if name == path or name.startswith(f"{path}/"):
                    member = copy.copy(header)
                    # Docker names members relative to the parent of the requested path.
                    member.name = str(PurePosixPath(name).relative_to(PurePosixPath(path).parent))
                    member.uid += self.details.first_id
                    tar.addfile(member, io.BytesIO(content))
        yield from (
            buffer.getvalue()[start : start + 700] for start in range(0, buffer.tell(), 700)
        )

    def owners(self) -> dict[str, int]:
        return {path: header.uid for path, (header, _) in self.entries.items()}

    def text(self, path: str) -> str:
        return self.entries[path][1].decode()

    def as_engine(self) -> Engine:
        return cast("Engine", self)


@pytest.fixture
def disk() -> Disk:
    files = {
        "/etc/passwd": ROOT_ONLY,
        "/etc/group": "root:x:0:\nstaff:x:60706:\n",
        "/gnu/store/a-guix": "item",
        "/var/guix/db/db.sqlite": "database",
        "/var/guix/db/reserved": "room",
        "/etc/guix/acl": "keys",
    }
    return Disk("/gnu", "/gnu/store", "/root", "/var/guix", "/var/guix/db", "/etc/guix", **files)


def test_daemon_owns_its_state_and_the_store_directories(disk: Disk) -> None:
    user = grant_ownership(disk.as_engine(), "x", ["/tmp/cache"])  # noqa: S108
    owners = disk.owners()
    granted = ("/gnu/store", "/gnu/store/.links", "/root", "/var/guix", "/var/guix/db/db.sqlite")
    for path in (*granted, "/etc/guix/acl", "/var/log/guix", "/tmp/cache"):  # noqa: S108
        assert owners[path] == user, path
    assert disk.text("/var/guix/db/db.sqlite") == "database"
    assert disk.entries["/var/guix/db/db.sqlite"][0].mode == 0o640


def test_unread_directory_is_created_private_to_the_user(disk: Disk) -> None:
    directory = "/var/lib/secret"
    user = grant_ownership(disk.as_engine(), "x", unread=[directory])
    header, _ = disk.entries[directory]
    assert (header.uid, header.mode) == (user, 0o700)
    assert directory not in disk.read


def test_store_items_keep_their_owner(disk: Disk) -> None:
    """A file whose owner changes is stored again in the layer of a commit."""
    grant_ownership(disk.as_engine(), "x")
    assert not {"/gnu/store/a-guix", "/var/guix/db/reserved"} & {*disk.written}


def test_root_owns_every_directory_after_a_restore(disk: Disk) -> None:
    initial_owners = disk.owners()
    grant_ownership(disk.as_engine(), "x")
    assert restore_ownership(disk.as_engine(), "x")
    assert initial_owners.items() <= disk.owners().items()
    assert set(disk.owners().values()) == {0}
    assert not restore_ownership(disk.as_engine(), "x")


def test_owners_with_userns_remap_are_those_in_the_container(disk: Disk) -> None:
    disk.details = replace(disk.details, first_id=200000)
    user = grant_ownership(disk.as_engine(), "x")
    assert disk.owners()["/var/guix/db/db.sqlite"] == disk.owners()["/root"] == user
    assert restore_ownership(disk.as_engine(), "x")
    assert set(disk.owners().values()) == {0}


def test_account_is_created_once_with_a_free_id(disk: Disk) -> None:
    user = grant_ownership(disk.as_engine(), "x")
    assert user == 60707  # 60706 is the ID of a group in this image
    assert disk.text("/etc/passwd").startswith(ROOT_ONLY)
    assert f"\n{ownership.USER}:x:60707:60707:" in disk.text("/etc/passwd")
    accounts = disk.text("/etc/passwd")
    restore_ownership(disk.as_engine(), "x")
    assert grant_ownership(disk.as_engine(), "x") == user
    assert disk.text("/etc/passwd") == accounts


def test_account_of_the_image_is_used() -> None:
    accounts = f"{ROOT_ONLY}{ownership.USER}:x:123:123::/:/bin/false\n"
    disk = Disk("/var/guix", **{"/etc/passwd": accounts})
    assert grant_ownership(disk.as_engine(), "x") == 123
    assert disk.text("/etc/passwd") == accounts
    assert disk.owners()["/var/guix"] == 123


def test_files_of_another_user_keep_their_owner(disk: Disk) -> None:
    header = disk.entries["/var/guix/db"][0]
    header.uid = header.gid = 5
    grant_ownership(disk.as_engine(), "x")
    assert disk.owners()["/var/guix/db"] == 5
    restore_ownership(disk.as_engine(), "x")
    assert disk.owners()["/var/guix/db"] == 5


def test_image_without_guix_is_accepted() -> None:
    disk = Disk()
    assert not restore_ownership(disk.as_engine(), "x")
    assert disk.written == []
    assert grant_ownership(disk.as_engine(), "x") == 60706


def test_links_keep_their_targets(disk: Disk) -> None:
    header = tarfile.TarInfo("var/guix/profile")
    header.type, header.linkname = tarfile.SYMTYPE, "../../gnu/store/a-guix"
    disk.entries["/var/guix/link"] = (header, b"")
    grant_ownership(disk.as_engine(), "x")
    assert disk.entries["/var/guix/link"][0].linkname == "../../gnu/store/a-guix"


# --- Work containers ------------------------------------------------------------------------


def test_rootless_container_has_the_daemon_user_and_no_capability(tmp_path: Path) -> None:
    site = new_built_site(tmp_path)
    site.env["GUIX_SANDBOX"] = "rootless"
    site.make("install", force=True)
    spec = site.engine.specs[-1]
    assert (spec.user, spec.privileged, spec.capabilities) == (ownership.USER, False, ())
    assert spec.unmasked
    assert "no-new-privileges" in spec.security
    assert [option.partition("=")[0] for option in spec.security[1:]] == ["seccomp"]


def test_committed_image_has_the_user_root(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a user in the configuration, a commit uses that of the container."""
    monkeypatch.setattr(commit, "restore_ownership", lambda *_: True)
    site.env["GUIX_SANDBOX"] = "rootless"
    project, parent = site.project(), site.engine.make_image({}, {"/a": b""})
    spec = ContainerSpec("x", parent.id, ("true",), user=ownership.USER)
    container = site.engine.create(spec)
    image = commit.commit_image(project, container, parent, "a/b:c", {STAGE_LABEL: "pull"})
    assert image.config["User"] == "root"


def test_security_modules_of_the_engine_are_disabled(site: Site) -> None:
    site.env["GUIX_SANDBOX"] = "rootless"
    site.engine.details = replace(site.engine.details, security=("apparmor", "seccomp"))
    site.make("base", "pull")
    assert "apparmor=unconfined" in site.engine.specs[-1].security
    assert "label=disable" not in site.engine.specs[-1].security


def test_files_of_a_rootless_container_belong_to_the_daemon(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.env["GUIX_SANDBOX"] = "rootless"
    site.make("base")
    owners: dict[str, int] = {}
    copy_in = site.engine.copy_in

    def record_owners(container: str, archive: bytes) -> None:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            owners.update({f"/{member.name}": member.uid for member in tar})
        copy_in(container, archive)

    monkeypatch.setattr(site.engine, "copy_in", record_owners)
    image, work = site.image("base").id, Work("x", (), {"a": b""})
    with work_container(site.engine, site.settings(), image, work) as container:
        environment = site.engine._container(container).text(f"{WORK_DIRECTORY}/environment")
    assert owners[WORK_DIRECTORY] == owners[f"{WORK_DIRECTORY}/a"] == owners["/var/guix"] == 60706
    assert "HOME=/root\n" in environment
    assert f"XDG_CACHE_HOME={ROOTLESS_CACHES['rootless']}\n" in environment


def test_rootless_container_has_separate_cache_volumes(site: Site) -> None:
    root_volumes = cache_volumes(site.settings())
    site.env["GUIX_SANDBOX"] = "rootless"
    rootless_volumes = cache_volumes(site.settings())
    assert list(rootless_volumes.values()) == list(ROOTLESS_CACHES.values())
    assert not {*root_volumes} & {*rootless_volumes}
