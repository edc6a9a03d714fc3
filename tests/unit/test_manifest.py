"""The task ``manifest``: joined platforms, errors and the commands of buildx."""

from __future__ import annotations

import base64
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fake_engine import Site, console_text, new_site

from guix_tasks.buildkit.buildx import Buildx
from guix_tasks.commands.manifest import join
from guix_tasks.errors import RegistryError, UsageError
from guix_tasks.oci.platform import Platform
from guix_tasks.stages.push_records import Pushed, save

if TYPE_CHECKING:
    from guix_tasks.stages.project import Project

NAME = "registry.test/team/app"
DIGESTS = [f"sha256:{letter * 64}" for letter in "abc"]
JOINED = f"sha256:{'d' * 64}"

BUILDX_STUB = """#!/bin/sh
printf '%s\\n' "$@" -- >>"$STUB/argv"
printf '%s\n' "$DOCKER_AUTH_CONFIG" >>"$STUB/accounts"
case $2 in
  create)
    [ -f "$STUB/refusal" ] && { cat "$STUB/refusal" >&2; exit 1; }
    [ -f "$STUB/fault" ] && { cat "$STUB/fault" >&2; rm "$STUB/fault"; exit 1; } ;;
  inspect) cat "$STUB/answer" ;;
esac
exit 0
"""


@pytest.fixture
def stub(tmp_path: Path) -> Buildx:
    directory = tmp_path / "stub"
    (directory / "config").mkdir(parents=True)
    (directory / "config" / "config.json").write_text("{}")
    program = directory / "docker-buildx"
    program.write_text(BUILDX_STUB)
    program.chmod(0o755)
    (directory / "answer").write_text(json.dumps({"digest": JOINED}))
    environment = {
        "STUB": str(directory),
        "PATH": os.environ["PATH"],
        "DOCKER_CONFIG": str(directory / "config"),
    }
    return Buildx(str(program), environment)


def read_calls(stub: Buildx) -> list[list[str]]:
    """Return the argument lists of all calls."""
    record = Path(stub.environment["STUB"]) / "argv"
    text = record.read_text() if record.exists() else ""
    return [call.split("\n")[:-1] for call in text.split("--\n")[:-1]]


def save_record(
    site: Site, *platforms: str, digest: str = DIGESTS[0], name: str = NAME, **commits: str
) -> Path:
    parsed = tuple(Platform.parse(platform) for platform in platforms)
    return save(site.settings(), Pushed(name, parsed, digest, commits))


def create_project(tmp_path: Path, **env: str) -> tuple[Site, Project]:
    site = new_site(tmp_path, None, **env)
    return site, site.project()


def check_error(project: Project, stub: Buildx) -> str:
    with pytest.raises(UsageError) as caught:
        join(project, stub)
    assert read_calls(stub) == []
    return str(caught.value)


def test_pushed_platforms_are_joined_under_every_tag(tmp_path: Path, stub: Buildx) -> None:
    site, project = create_project(tmp_path, TAGS="1.0 stable")
    save_record(site, "linux/arm64", digest=DIGESTS[1])
    save_record(site, "linux/amd64")
    save_record(site, "linux/riscv64", name="registry.test/other", digest=DIGESTS[2])
    assert join(project, stub) == JOINED
    assert read_calls(stub) == [
        [
            "imagetools", "create", "--builder=default", "--progress=none",
            f"--tag={NAME}:1", f"--tag={NAME}:1.0", f"--tag={NAME}:stable",
            f"{NAME}@{DIGESTS[0]}", f"{NAME}@{DIGESTS[1]}",
        ],
        [
            "imagetools", "inspect", "--builder=default", "--format={{json .Manifest}}",
            f"{NAME}:1",
        ],
    ]  # fmt: skip
    assert f"manifest: linux/arm64 is {NAME}@{DIGESTS[1]}\n" in console_text(project)


def test_platforms_pushed_together_are_one_source(tmp_path: Path, stub: Buildx) -> None:
    site, project = create_project(tmp_path)
    save_record(site, "linux/amd64", "linux/arm64")
    save_record(site, "linux/riscv64", digest=DIGESTS[1])
    join(project, stub)
    assert [word for word in read_calls(stub)[0] if "@" in word] == [
        f"{NAME}@{DIGESTS[0]}",
        f"{NAME}@{DIGESTS[1]}",
    ]


def test_only_the_platforms_of_the_settings_are_joined(tmp_path: Path, stub: Buildx) -> None:
    site, project = create_project(tmp_path, PLATFORMS="linux/arm64 linux/amd64")
    for digest, platform in zip(DIGESTS, ("amd64", "arm64", "riscv64"), strict=True):
        save_record(site, f"linux/{platform}", digest=digest)
    join(project, stub)
    assert read_calls(stub)[0][-2:] == [f"{NAME}@{DIGESTS[1]}", f"{NAME}@{DIGESTS[0]}"]


def test_missing_platform_is_reported(tmp_path: Path, stub: Buildx) -> None:
    site, project = create_project(tmp_path, PLATFORMS="linux/amd64 linux/arm64 linux/riscv64")
    save_record(site, "linux/arm64")
    assert "no push record of linux/amd64, linux/riscv64: " in check_error(project, stub)


def test_record_with_another_platform_is_an_error(tmp_path: Path, stub: Buildx) -> None:
    site, project = create_project(tmp_path, PLATFORMS="linux/amd64")
    record = save_record(site, "linux/amd64", "linux/arm64")
    assert check_error(project, stub).startswith(
        f"{record} also contains linux/arm64, which is not in "
    )


def test_missing_push_records_are_reported(tmp_path: Path, stub: Buildx) -> None:
    site, project = create_project(tmp_path)
    save_record(site, "linux/amd64", name="registry.test/other")
    assert f"contains no push record of {NAME}; " in check_error(project, stub)


def test_platform_in_two_files_is_an_error(tmp_path: Path, stub: Buildx) -> None:
    site, project = create_project(tmp_path)
    older, newer = save_record(site, "linux/amd64"), save_record(site, "linux/amd64", "linux/arm64")
    assert (
        check_error(project, stub)
        == f"linux/amd64 is in {older} and in {newer}; delete the older file"
    )


def test_platforms_of_different_commits_are_an_error(tmp_path: Path, stub: Buildx) -> None:
    site, project = create_project(tmp_path)
    save_record(site, "linux/amd64", guix="a" * 40, other="c" * 40)
    save_record(site, "linux/arm64", guix="b" * 40, other="c" * 40)
    assert check_error(project, stub) == (
        "linux/amd64 was built from guix at aaaaaaa, linux/arm64 at bbbbbbb; commit "
        "GUIX_CHANNELS_LOCK, which `inv pull` writes, and push all platforms again"
    )


def test_platforms_with_unknown_commits_are_joined(tmp_path: Path, stub: Buildx) -> None:
    site, project = create_project(tmp_path)
    save_record(site, "linux/amd64")
    save_record(site, "linux/arm64", guix="b" * 40)
    save_record(site, "linux/riscv64", guix="b" * 40, other="c" * 40)
    assert join(project, stub) == JOINED


def test_dry_run_shows_the_platforms(tmp_path: Path, stub: Buildx) -> None:
    site, project = create_project(tmp_path)
    save_record(site, "linux/amd64")
    assert join(project, replace(stub, shown_on=project.console, perform=False)) == ""
    assert read_calls(stub) == []
    assert f"imagetools create --builder=default --progress=none --tag={NAME}:1" in console_text(
        project
    )


def test_dry_run_without_push_records_succeeds(tmp_path: Path, stub: Buildx) -> None:
    _, project = create_project(tmp_path)
    assert join(project, replace(stub, shown_on=project.console, perform=False)) == ""
    assert "contains no push record yet" in console_text(project)


def test_buildx_gets_the_account_of_the_settings(tmp_path: Path, stub: Buildx) -> None:
    site, project = create_project(tmp_path, DOCKER_USERNAME="me", DOCKER_PASSWORD="hunter2")  # noqa: S106
    save_record(site, "linux/amd64")
    join(project, stub)
    directory = tmp_path / "stub"
    pair = base64.b64encode(b"me:hunter2").decode()
    lines = (directory / "accounts").read_text().splitlines()
    expected = {"auths": {"registry.test": {"auth": pair}}}
    assert [json.loads(line) for line in lines if line] == 2 * [expected]
    assert "hunter2" not in (directory / "argv").read_text() + console_text(project)
    assert (directory / "config" / "config.json").read_text() == "{}"


def test_transient_failures_are_retried(
    tmp_path: Path, stub: Buildx, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    site, project = create_project(tmp_path)
    save_record(site, "linux/amd64")
    fault = "unexpected status from PUT request to http://r/v2/a/manifests/1: 502 Bad Gateway"
    (tmp_path / "stub" / "fault").write_text(f"ERROR: {fault}\n")
    assert join(project, stub) == JOINED
    assert len(waits) == 1
    assert f"cannot join {NAME}:1: {fault}; " in console_text(project)


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (f"ERROR: {NAME}@{DIGESTS[0]}: not found", f"{NAME}@{DIGESTS[0]}: not found"),
        ("ERROR: unexpected status: 401 Unauthorized", "unexpected status: 401 Unauthorized"),
        (
            'ERROR: failed to do request: Head "http://r/v2/": dial tcp: connection refused',
            'failed to do request: Head "http://r/v2/"',
        ),
    ],
)
def test_error_of_the_registry_is_reported(
    tmp_path: Path, stub: Buildx, log: str, reason: str
) -> None:
    site, project = create_project(tmp_path)
    save_record(site, "linux/amd64")
    (tmp_path / "stub" / "refusal").write_text(f"#1 [internal] x\n{log}\n")
    with pytest.raises(RegistryError) as caught:
        join(project, stub)
    assert str(caught.value).startswith(f"cannot join {NAME}:1: {reason}")
    assert "BUILDX_NODES" not in str(caught.value)
    assert len(read_calls(stub)) == 1


@pytest.mark.parametrize(
    "answer", ["", "null", "[]", "{}", "not JSON", '{"digest"', '{"digest": null}']
)
def test_answer_without_a_digest_is_an_error(tmp_path: Path, stub: Buildx, answer: str) -> None:
    site, project = create_project(tmp_path)
    save_record(site, "linux/amd64")
    (tmp_path / "stub" / "answer").write_text(answer)
    with pytest.raises(RegistryError, match=r"is joined, but the registry reports no digest"):
        join(project, stub)
