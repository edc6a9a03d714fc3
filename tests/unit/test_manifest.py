"""Manifest: what is joined, what is refused, and how buildx is asked to do it."""

from __future__ import annotations

import base64
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fake_engine import Site, heard, new_site

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

STUB = """#!/bin/sh
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
    program.write_text(STUB)
    program.chmod(0o755)
    (directory / "answer").write_text(json.dumps({"digest": JOINED}))
    environment = {
        "STUB": str(directory),
        "PATH": os.environ["PATH"],
        "DOCKER_CONFIG": str(directory / "config"),
    }
    return Buildx(str(program), environment)


def calls(stub: Buildx) -> list[list[str]]:
    """The argument lists of all calls."""
    taken_down = Path(stub.environment["STUB"]) / "argv"
    text = taken_down.read_text() if taken_down.exists() else ""
    return [call.split("\n")[:-1] for call in text.split("--\n")[:-1]]


def pushed(
    site: Site, *platforms: str, digest: str = DIGESTS[0], name: str = NAME, **commits: str
) -> Path:
    each = tuple(Platform.parse(platform) for platform in platforms)
    return save(site.settings(), Pushed(name, each, digest, commits))


def project(tmp_path: Path, **env: str) -> tuple[Site, Project]:
    site = new_site(tmp_path, None, **env)
    return site, site.project()


def refusal(project: Project, stub: Buildx) -> str:
    with pytest.raises(UsageError) as caught:
        join(project, stub)
    assert calls(stub) == []
    return str(caught.value)


def test_what_was_pushed_is_joined_under_every_tag(tmp_path: Path, stub: Buildx) -> None:
    site, made = project(tmp_path, TAGS="1.0 stable")
    pushed(site, "linux/arm64", digest=DIGESTS[1])
    pushed(site, "linux/amd64")
    pushed(site, "linux/riscv64", name="registry.test/other", digest=DIGESTS[2])
    assert join(made, stub) == JOINED
    assert calls(stub) == [
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
    assert f"manifest: linux/arm64 is {NAME}@{DIGESTS[1]}\n" in heard(made)


def test_platforms_that_were_pushed_together_are_one_source(tmp_path: Path, stub: Buildx) -> None:
    site, made = project(tmp_path)
    pushed(site, "linux/amd64", "linux/arm64")
    pushed(site, "linux/riscv64", digest=DIGESTS[1])
    join(made, stub)
    assert [word for word in calls(stub)[0] if "@" in word] == [
        f"{NAME}@{DIGESTS[0]}",
        f"{NAME}@{DIGESTS[1]}",
    ]


def test_exactly_the_platforms_that_are_named_are_joined(tmp_path: Path, stub: Buildx) -> None:
    site, made = project(tmp_path, PLATFORMS="linux/arm64 linux/amd64")
    for digest, platform in zip(DIGESTS, ("amd64", "arm64", "riscv64"), strict=True):
        pushed(site, f"linux/{platform}", digest=digest)
    join(made, stub)
    assert calls(stub)[0][-2:] == [f"{NAME}@{DIGESTS[1]}", f"{NAME}@{DIGESTS[0]}"]


def test_a_platform_that_is_missing_is_named(tmp_path: Path, stub: Buildx) -> None:
    site, made = project(tmp_path, PLATFORMS="linux/amd64 linux/arm64 linux/riscv64")
    pushed(site, "linux/arm64")
    assert "no push record of linux/amd64, linux/riscv64: " in refusal(made, stub)


def test_what_comes_along_and_is_not_wanted_is_refused(tmp_path: Path, stub: Buildx) -> None:
    site, made = project(tmp_path, PLATFORMS="linux/amd64")
    place = pushed(site, "linux/amd64", "linux/arm64")
    assert refusal(made, stub).startswith(f"{place} also contains linux/arm64, which is not in ")


def test_nothing_to_join_is_said(tmp_path: Path, stub: Buildx) -> None:
    site, made = project(tmp_path)
    pushed(site, "linux/amd64", name="registry.test/other")
    assert f"contains no push record of {NAME}; " in refusal(made, stub)


def test_a_platform_in_two_files_is_refused(tmp_path: Path, stub: Buildx) -> None:
    site, made = project(tmp_path)
    one, two = pushed(site, "linux/amd64"), pushed(site, "linux/amd64", "linux/arm64")
    assert refusal(made, stub) == f"linux/amd64 is in {one} and in {two}; delete the older file"


def test_platforms_of_different_commits_are_refused(tmp_path: Path, stub: Buildx) -> None:
    site, made = project(tmp_path)
    pushed(site, "linux/amd64", guix="a" * 40, other="c" * 40)
    pushed(site, "linux/arm64", guix="b" * 40, other="c" * 40)
    assert refusal(made, stub) == (
        "linux/amd64 was built from guix at aaaaaaa, linux/arm64 at bbbbbbb; commit "
        "GUIX_CHANNELS_LOCK, which `inv pull` writes, and push all platforms again"
    )


def test_platforms_whose_commits_are_not_known_are_joined(tmp_path: Path, stub: Buildx) -> None:
    site, made = project(tmp_path)
    pushed(site, "linux/amd64")
    pushed(site, "linux/arm64", guix="b" * 40)
    pushed(site, "linux/riscv64", guix="b" * 40, other="c" * 40)
    assert join(made, stub) == JOINED


def test_a_dry_run_says_what_it_would_join(tmp_path: Path, stub: Buildx) -> None:
    site, made = project(tmp_path)
    pushed(site, "linux/amd64")
    assert join(made, replace(stub, shown_on=made.console, perform=False)) == ""
    assert calls(stub) == []
    assert f"imagetools create --builder=default --progress=none --tag={NAME}:1" in heard(made)


def test_a_dry_run_goes_on_where_nothing_was_pushed_yet(tmp_path: Path, stub: Buildx) -> None:
    _, made = project(tmp_path)
    assert join(made, replace(stub, shown_on=made.console, perform=False)) == ""
    assert "contains no push record yet" in heard(made)


def test_it_comes_with_the_account_that_is_set(tmp_path: Path, stub: Buildx) -> None:
    site, made = project(tmp_path, DOCKER_USERNAME="me", DOCKER_PASSWORD="hunter2")  # noqa: S106
    pushed(site, "linux/amd64")
    join(made, stub)
    directory = tmp_path / "stub"
    pair = base64.b64encode(b"me:hunter2").decode()
    shown = (directory / "accounts").read_text().splitlines()
    expected = {"auths": {"registry.test": {"auth": pair}}}
    assert [json.loads(each) for each in shown if each] == 2 * [expected]
    assert "hunter2" not in (directory / "argv").read_text() + heard(made)
    assert (directory / "config" / "config.json").read_text() == "{}"


def test_transient_failures_are_retried(
    tmp_path: Path, stub: Buildx, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    site, made = project(tmp_path)
    pushed(site, "linux/amd64")
    fault = "unexpected status from PUT request to http://r/v2/a/manifests/1: 502 Bad Gateway"
    (tmp_path / "stub" / "fault").write_text(f"ERROR: {fault}\n")
    assert join(made, stub) == JOINED
    assert len(waits) == 1
    assert f"cannot join {NAME}:1: {fault}; " in heard(made)


@pytest.mark.parametrize(
    ("log", "why"),
    [
        (f"ERROR: {NAME}@{DIGESTS[0]}: not found", f"{NAME}@{DIGESTS[0]}: not found"),
        ("ERROR: unexpected status: 401 Unauthorized", "unexpected status: 401 Unauthorized"),
        (
            'ERROR: failed to do request: Head "http://r/v2/": dial tcp: connection refused',
            'failed to do request: Head "http://r/v2/"',
        ),
    ],
)
def test_what_the_registry_refuses_is_its_error(
    tmp_path: Path, stub: Buildx, log: str, why: str
) -> None:
    site, made = project(tmp_path)
    pushed(site, "linux/amd64")
    (tmp_path / "stub" / "refusal").write_text(f"#1 [internal] x\n{log}\n")
    with pytest.raises(RegistryError) as caught:
        join(made, stub)
    assert str(caught.value).startswith(f"cannot join {NAME}:1: {why}")
    assert "BUILDX_NODES" not in str(caught.value)
    assert len(calls(stub)) == 1


@pytest.mark.parametrize(
    "answer", ["", "null", "[]", "{}", "not JSON", '{"digest"', '{"digest": null}']
)
def test_an_answer_without_a_digest_is_no_success(
    tmp_path: Path, stub: Buildx, answer: str
) -> None:
    site, made = project(tmp_path)
    pushed(site, "linux/amd64")
    (tmp_path / "stub" / "answer").write_text(answer)
    with pytest.raises(RegistryError, match=r"is joined, but the registry reports no digest"):
        join(made, stub)
