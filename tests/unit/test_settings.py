"""Settings: sources, values, and messages about mistakes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from fake_engine import STEADY, forget_contents
from hypothesis import given
from hypothesis import strategies as st

from guix_tasks.errors import SettingsError
from guix_tasks.oci.platform import Platform
from guix_tasks.oci.reference import ImageReference
from guix_tasks.settings import DECLARATIONS, Settings, load_isolated, load_settings
from guix_tasks.settings.values import (
    Driver,
    ImageStore,
    Listen,
    Mount,
    Node,
    Output,
    Sandbox,
    Secret,
)
from guix_tasks.stages.container import environment
from guix_tasks.stages.images import STAGES
from guix_tasks.ui import redact
from guix_tasks.ui.console import Display

ROOT = Path(__file__).parents[2]
HEX = "0123456789abcdef" * 4
PASSWORD = "hunter2-€-${IMAGE}"  # noqa: S105
USER = "DOCKER_USERNAME=me\n"  # a password is nothing without one

Overrides = Mapping[str, str | Sequence[str]]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with the files that the values below name."""
    names = ("channels.scm", "manifest.scm", "a.pub", "b.pub", "signing-key.sec", "with,comma")
    for name in names:
        (tmp_path / name).write_text(f"{name}\n")
    (tmp_path / "directory").mkdir()
    (tmp_path / "with space").mkdir()
    return tmp_path


def load(
    project: Path,
    text: str | bytes = "",
    environ: Mapping[str, str] | None = None,
    overrides: Overrides | None = None,
) -> Settings:
    forget_contents()
    (project / ".env").write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_settings(project, project, environ or {}, overrides or {})


def problems(
    project: Path,
    text: str | bytes = "",
    environ: Mapping[str, str] | None = None,
    overrides: Overrides | None = None,
) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load(project, text, environ, overrides)
    assert all(problem.isprintable() for problem in caught.value.problems)
    return caught.value.problems


# --- Valid values ---------------------------------------------------------------------------

LATEST = ImageReference("docker.io", "library/debian", "latest")
DIGEST = f"sha256:{HEX}"

AUTHORITY = Path(__file__).with_name("authority.pem")

# Settings without which a setting is invalid.
COMPANIONS = {
    "GUIX_BINARY_URL": f"GUIX_BINARY_SHA256={HEX}\n",
    "GUIX_BINARY_SHA256": "GUIX_BINARY_URL=https://a.example/x\n",
    "BUILDX_URL": f"BUILDX_SHA256={HEX}\n",
    "BUILDX_SHA256": "BUILDX_URL=https://a.example/x\n",
    "DOCKER_USERNAME": "DOCKER_PASSWORD=x\n",
    "DOCKER_PASSWORD": "DOCKER_USERNAME=me\n",
    "DOCKER_PASSWORD_FILE": "DOCKER_USERNAME=me\n",
}

# What is expected of a path is relative to the project.
GOOD: list[tuple[str, str, Any]] = [
    ("IMAGE", "team/app:1", ImageReference("docker.io", "team/app", "1")),
    ("IMAGE", "team/app", ImageReference("docker.io", "team/app", "latest")),
    ("IMAGE", f" a:{'x' * 100} ", ImageReference("docker.io", "library/a", "x" * 100)),
    ("TAGS", "1.0 stable 1.0", ("1.0", "stable")),
    ("PLATFORMS", "linux/arm/v7", (Platform("linux", "arm", "v7"),)),
    ("PLATFORMS", "linux/arm64 linux/aarch64", (Platform("linux", "arm64"),)),
    (
        "PLATFORMS",
        "linux/arm64 linux/x86_64",
        (Platform("linux", "arm64"), Platform("linux", "amd64")),
    ),
    ("BASE_IMAGE", "debian", LATEST),
    ("BASE_IMAGE", f"debian@{DIGEST}", ImageReference("docker.io", "library/debian", None, DIGEST)),
    ("DOCKERFILE", "docker/Dockerfile", Path("docker/Dockerfile")),
    ("BUILD_CONTEXT", "/srv", Path("/srv")),
    ("BUILD_ARGS", "A=1 B= 'C=x y' D=a=b", {"A": "1", "B": "", "C": "x y", "D": "a=b"}),
    ("BUILD_SECRETS", "key=a.pub x=b.pub", {"key": Path("a.pub"), "x": Path("b.pub")}),
    ("GUIX_BINARY_URL", "https://a.example/guix.tar.xz", "https://a.example/guix.tar.xz"),
    ("GUIX_BINARY_SHA256", HEX, HEX),
    ("GUIX_CHANNELS", "channels.scm", Path("channels.scm")),
    ("GUIX_CHANNELS_LOCK", "directory/lock.scm", Path("directory/lock.scm")),
    ("GUIX_MANIFEST", "manifest.scm", Path("manifest.scm")),
    ("GUIX_PACKAGES", "hello git:send-email", ("hello", "git:send-email")),
    ("GUIX_PACKAGES", "gcc-toolchain@12 gtk+@3.24:doc", ("gcc-toolchain@12", "gtk+@3.24:doc")),
    ("GUIX_SUBSTITUTE_URLS", "https://a.example:8080/x", ("https://a.example:8080/x",)),
    ("GUIX_SUBSTITUTE_URLS", "http://[::1]/ file:///nar", ("http://[::1]/", "file:///nar")),
    ("GUIX_SUBSTITUTE_KEYS", "a.pub b.pub", (Path("a.pub"), Path("b.pub"))),
    ("GUIX_FALLBACK", "yes", True),
    ("GUIX_REQUIRE_SUBSTITUTES", "yes", True),
    ("SUBSTITUTES_LISTEN", "10.0.0.1:8181", Listen("10.0.0.1", 8181)),
    ("SUBSTITUTES_LISTEN", "127.0.0.1:65535", Listen("127.0.0.1", 65535)),
    ("GUIX_FALLBACK", "no", False),
    ("GUIX_SANDBOX", "auto", Sandbox.AUTO),
    ("GUIX_SANDBOX", "rootless", Sandbox.ROOTLESS),
    ("GUIX_SANDBOX", "capabilities", Sandbox.CAPABILITIES),
    ("GUIX_SANDBOX", "privileged", Sandbox.PRIVILEGED),
    ("GUIX_SANDBOX", "nochroot", Sandbox.NOCHROOT),
    ("GUIX_CORES", "0", 0),
    ("GUIX_MAX_JOBS", "4", 4),
    (
        "MOUNTS",
        "directory:/a/ a.pub:/b/c:ro",
        (Mount(Path("directory"), "/a"), Mount(Path("a.pub"), "/b/c", read_only=True)),
    ),
    (
        "MOUNTS",
        "directory:/d:rw 'with space:/e'",
        (Mount(Path("directory"), "/d"), Mount(Path("with space"), "/e")),
    ),
    ("NETWORK", "host", "host"),
    ("STAGE_MEMORY", "512m", 512 << 20),
    ("STAGE_MEMORY", "6m", 6 << 20),
    ("STAGE_MEMORY", "2G", 2 << 30),
    ("STAGE_MEMORY", "8000000", 8_000_000),
    ("STAGE_TIMEOUT", "45", 45),
    ("STAGE_TIMEOUT", "90m", 5400),
    ("STAGE_TIMEOUT", "2h", 7200),
    ("CACHE_VOLUME", "my-cache", "my-cache"),
    ("CACHE_IMAGE", "team/cache", ImageReference("docker.io", "team/cache", "latest")),
    ("EXTRA_CA_FILE", str(AUTHORITY), AUTHORITY),
    (
        "GUIX_CHANNEL_MIRRORS",
        "https://a.test/=https://b.test/x/ ssh://git@c.test=file:///d",
        {"https://a.test/": "https://b.test/x/", "ssh://git@c.test": "file:///d"},
    ),
    (
        "GUIX_CHANNEL_CREDENTIALS",
        "https://a:b@c.test http://token@d.test:8/e",
        Secret("https://a:b@c.test http://token@d.test:8/e"),
    ),
    ("SSH_KNOWN_HOSTS", "/dev/null", Path("/dev/null")),
    ("BUILDX_BUILDER", "My-builder_1.x", "My-builder_1.x"),
    ("BUILDX_BUILDER", "defaults", "defaults"),
    ("BUILDX_DRIVER", "docker", Driver.DOCKER),
    ("BUILDX_DRIVER", "docker-container", Driver.CONTAINER),
    ("BUILDX_DRIVER", "kubernetes", Driver.KUBERNETES),
    (
        "BUILDX_NODES",
        "ssh://me@a unix:///b,platform=linux/arm64,memory=4g 'c,env.A=x y'",
        (
            Node("ssh://me@a"),
            Node("unix:///b", (Platform("linux", "arm64"),), (("memory", "4g"),)),
            Node("c", (), (("env.A", "x y"),)),
        ),
    ),
    ("ENGINE_IMAGE_STORE", "containerd", ImageStore.CONTAINERD),
    ("ENGINE_IMAGE_STORE", "overlay2", ImageStore.OVERLAY2),
    ("ENGINE_IMAGE_STORE", "", None),
    ("OUTPUT", "auto", Display.AUTO),
    ("OUTPUT", "plain", Display.PLAIN),
    ("OUTPUT", "quiet", Display.QUIET),
    ("OUTPUT", "verbose", Display.VERBOSE),
    ("OUTPUT", "live", Display.LIVE),
    ("BUILDX_OUTPUT", "registry", Output.REGISTRY),
    ("BUILDX_OUTPUT", "oci", Output.OCI),
    ("BUILDX_OUTPUT", "docker", Output.DOCKER),
    ("BUILDX_OUTPUT", "load", Output.LOAD),
    ("BUILDX_ATTESTATIONS", "sbom provenance sbom", ("sbom", "provenance")),
    (
        "BUILDX_CACHE_FROM",
        "type=registry,ref=a.example:5000/b:c type=gha",
        ("type=registry,ref=a.example:5000/b:c", "type=gha"),
    ),
    ("BUILDX_CACHE_TO", "type=local,dest=/srv/x,mode=max", ("type=local,dest=/srv/x,mode=max",)),
    ("BUILDX_CACHE_TO", "type=s3,region=,bucket=a=b", ("type=s3,region=,bucket=a=b",)),
    ("BUILDKIT_SYNTAX", "a/b", ImageReference("docker.io", "a/b", "latest")),
    (
        "BUILDKIT_SYNTAX",
        f"docker/dockerfile@{DIGEST}",
        ImageReference("docker.io", "docker/dockerfile", None, DIGEST),
    ),
    ("BUILDX_URL", "file:///srv/buildx", "file:///srv/buildx"),
    ("BUILDX_URL", "https://a.example/buildx", "https://a.example/buildx"),
    ("BUILDX_SHA256", HEX, HEX),
    ("RELEASE_URL", "https://a.example/v1/", "https://a.example/v1/"),
    ("DOCKER_USERNAME", "me", Secret("me")),
    ("DOCKER_PASSWORD", "a b", Secret("a b")),
]


def relative(value: Any, project: Path) -> Any:
    """The same value with the paths that lie in ``project`` relative to it."""
    if isinstance(value, Path):
        return value.relative_to(project) if value.is_relative_to(project) else value
    if isinstance(value, Mount):
        return replace(value, source=relative(value.source, project))
    if isinstance(value, tuple):
        return tuple(relative(item, project) for item in value)
    if isinstance(value, Mapping):
        return {name: relative(item, project) for name, item in value.items()}
    return value


@pytest.mark.parametrize(("name", "text", "expected"), GOOD)
def test_valid_value_is_parsed(project: Path, name: str, text: str, expected: Any) -> None:
    settings = load(project, f'{COMPANIONS.get(name, "")}{name}="{text}"\n')
    assert relative(getattr(settings, name.lower()), project) == expected


def test_the_table_above_has_every_setting() -> None:
    names = {entry.name.upper() for entry in fields(Settings) if "setting" in entry.metadata}
    assert names == {name for name, _, _ in GOOD}


def test_the_items_of_a_sequence_are_taken_as_they_are(project: Path) -> None:
    overrides = {"MOUNTS": ["with space:/a"], "BUILD_ARGS": ["A='x y'", "B=\\"]}
    settings = load(project, overrides=overrides)
    assert settings.mounts == (Mount(project / "with space", "/a"),)
    assert settings.build_args == {"A": "'x y'", "B": "\\"}


def test_settings_cannot_be_changed(project: Path) -> None:
    settings: Any = load(project, "BUILD_ARGS=A=1\nDOCKER_HOST=unix:///x\n")
    with pytest.raises(AttributeError):
        settings.image = None
    for name in ("build_args", "docker_environment", "proxies", "origins"):
        with pytest.raises(TypeError):
            getattr(settings, name)["A"] = "2"


def test_a_copy_with_another_value_keeps_the_rest(project: Path) -> None:
    settings = load(project, "TAGS=a\nFOREIGN=x\n", {"no_proxy": "x", "DOCKER_HOST": "unix:///x"})
    other = replace(settings, tags=("b",))
    for entry in fields(Settings):
        expected = ("b",) if entry.name == "tags" else getattr(settings, entry.name)
        assert getattr(other, entry.name) == expected
    assert other != settings == replace(other, tags=("a",))


# --- Invalid values ------------------------------------------------------------------------

BAD = [
    ("EXTRA_CA_FILE", "/dev/null", "contains no PEM certificates"),
    ("EXTRA_CA_FILE", "nowhere.pem", "No such file"),
    ("GUIX_CHANNEL_MIRRORS", "https://a.test", "is not URL=MIRROR"),
    ("GUIX_CHANNEL_MIRRORS", "https://a.test=https://me:x@b.test", "contains a user or a password"),
    ("GUIX_CHANNEL_CREDENTIALS", "https://a:b@c.test hunter2", "item 2 is not a URL with"),
    ("GUIX_CHANNEL_CREDENTIALS", "https://c.test", "item 1 is not a URL with"),
    ("GUIX_CHANNEL_CREDENTIALS", "https://a:b@", "item 1 is not a URL with"),
    ("SSH_KNOWN_HOSTS", "nowhere", "No such file"),
    ("IMAGE", "team/App", "write 'team/app'"),
    ("IMAGE", "", "is empty"),
    ("IMAGE", f"app@sha256:{HEX}", "has a digest"),
    ("IMAGE", "app:" + "x" * 101, "at most 100 characters"),
    ("IMAGE", "app:1-base", "ends in -base is reserved for a stage"),
    ("IMAGE", "app:1-pull-linux-arm-v7", "ends in -pull-linux-arm-v7 is reserved for a stage"),
    ("TAGS", "1.0 latest-install", "'latest-install' is reserved for a stage"),
    ("TAGS", "a/b", "'a/b' is not a tag"),
    ("TAGS", "a,b", "by spaces, not commas"),
    ("PLATFORMS", "linux/s390x", "linux/riscv64"),
    ("PLATFORMS", "linux/amd64,linux/arm64", "by spaces, not commas"),
    ("PLATFORMS", "linux/amd64 arm64", "Guix does not support the platform 'arm64'"),
    ("TAGS", "stable latest-linux-amd64", "'latest-linux-amd64' is reserved for a stage"),
    ("BASE_IMAGE", "a b", "is not a repository"),
    ("DOCKERFILE", "", "a path is empty"),
    ("BUILD_CONTEXT", "", "a path is empty"),
    ("BUILD_ARGS", "A", "write NAME=VALUE"),
    ("BUILD_ARGS", "1A=2", "write NAME=VALUE"),
    ("BUILD_ARGS", "A-B=2", "write NAME=VALUE"),
    ("BUILD_ARGS", "A=1 A=2", "'A' is set twice"),
    ("BUILD_ARGS", "A=1 'B=2", "a quote is not closed"),
    ("BUILD_SECRETS", "a.pub", "write ID=FILE"),
    ("BUILD_SECRETS", "a/b=a.pub", "write ID=FILE"),
    ("BUILD_SECRETS", "key=missing", "No such file"),
    ("BUILD_SECRETS", "key=", "a path is empty"),
    ("BUILD_SECRETS", "key=a.pub key=b.pub", "'key' is set twice"),
    ("BUILD_SECRETS", "key=with,comma", "contains a comma or a double quote, which ends a path"),
    ("BUILD_SECRETS", "'key=with\\\"quote'", "contains a comma or a double quote"),
    ("BUILD_SECRETS", "key=a.pub,x=b.pub", "by spaces, not commas"),
    ("GUIX_CHANNELS", "missing.scm", "No such file"),
    ("GUIX_CHANNELS", "directory", "is a directory"),
    ("GUIX_CHANNELS", "~/channels.scm", "write ${HOME}"),
    ("GUIX_MANIFEST", "missing.scm", "No such file"),
    ("GUIX_MANIFEST", "m" * 5000, "File name too long"),
    ("GUIX_PACKAGES", "-x", "'-x' is not a package"),
    ("GUIX_PACKAGES", "hello;ls", "is not a package"),
    ("GUIX_PACKAGES", "hello@", "is not a package"),
    ("GUIX_PACKAGES", "./hello", "is not a package"),
    ("GUIX_PACKAGES", "héllo", "is not a package"),
    ("GUIX_SUBSTITUTE_URLS", "ftp://a.example", "https:// or http:// or file://"),
    ("GUIX_SUBSTITUTE_URLS", "https://", "is not a supported URL"),
    ("GUIX_SUBSTITUTE_URLS", "file:", "is not a supported URL"),
    ("GUIX_SUBSTITUTE_URLS", "https://[x/", "is not a URL"),
    ("GUIX_SUBSTITUTE_URLS", "https://a.example:x/", "is not a URL"),
    ("GUIX_SUBSTITUTE_URLS", "https://a.example/$(ls)", "write %XX"),
    (
        "GUIX_SUBSTITUTE_URLS",
        "https://me:hunter2@a.example",
        "remove the part up to and including '@'",
    ),
    ("GUIX_SUBSTITUTE_KEYS", "signing-key.sec", "ends in .pub"),
    ("GUIX_SUBSTITUTE_KEYS", "c.pub", "No such file"),
    ("GUIX_BINARY_URL", "file:///x", "begins with https:// or http://"),
    ("GUIX_BINARY_SHA256", "ABC", "write 64 lower case hex digits"),
    ("GUIX_FALLBACK", "true", "is neither yes nor no"),
    ("GUIX_REQUIRE_SUBSTITUTES", "1", "is neither yes nor no"),
    *(
        ("SUBSTITUTES_LISTEN", text, "is not an IPv4 address with a port; write ADDRESS:PORT")
        for text in ("8181", ":8181", "localhost:8181", "1.2.3.4", "1.2.3.4:0", "1.2.3.4:65536")
    ),
    ("SUBSTITUTES_LISTEN", "[::]:8181", "is not an IPv4 address with a port"),
    ("GUIX_SANDBOX", "none", "write one of: auto, rootless, capabilities, privileged, nochroot"),
    ("GUIX_SANDBOX", "", "write one of: auto, rootless, capabilities, privileged, nochroot"),
    ("GUIX_CORES", "-1", "whole number of at least 0"),
    ("GUIX_CORES", "two", "whole number of at least 0"),
    ("GUIX_CORES", "2 3", "whole number of at least 0"),
    ("GUIX_CORES", "٣", "whole number of at least 0"),
    ("GUIX_MAX_JOBS", "0", "whole number of at least 1"),
    ("MOUNTS", "directory", "write SOURCE:TARGET"),
    ("MOUNTS", ":/a", "write SOURCE:TARGET"),
    ("MOUNTS", "directory:/a:rx", "write SOURCE:TARGET"),
    ("MOUNTS", "directory:a", "is not a path in a container"),
    ("MOUNTS", "directory:/", "is not a path in a container"),
    ("MOUNTS", "directory:/a/../..", "is not a path in a container"),
    ("MOUNTS", "missing:/a", "No such file"),
    ("MOUNTS", "directory:/a channels.scm://a/.", "'/a' is set twice"),
    ("NETWORK", "a b", "is not a network"),
    ("NETWORK", "-x", "is not a network"),
    ("STAGE_MEMORY", "4t", "an amount of at least 6m"),
    ("STAGE_MEMORY", "1k", "an amount of at least 6m"),
    ("STAGE_MEMORY", "9" * 5000, "an amount of at least 6m"),
    ("STAGE_TIMEOUT", "0", "is not a time"),
    ("STAGE_TIMEOUT", "1d", "is not a time"),
    ("CACHE_VOLUME", "-x", "is not a volume name"),
    ("CACHE_VOLUME", "x" * 62, "write at most 61 letters and digits"),
    ("CACHE_IMAGE", f"app@sha256:{HEX}", "has a digest, but a repository is required"),
    ("CACHE_IMAGE", "team/Cache", "'team/Cache' has capital letters"),
    ("BUILDX_BUILDER", "", "is not a builder name"),
    ("BUILDX_BUILDER", "x" * 51, "write at most 50 letters and digits"),
    ("BUILDX_BUILDER", "1x", "a letter first"),
    ("BUILDX_BUILDER", "--all", "a letter first"),
    ("BUILDX_BUILDER", "Default", "set BUILDX_DRIVER=docker"),
    ("BUILDX_DRIVER", "Docker", "write one of: docker, docker-container, remote, kubernetes"),
    ("BUILDX_NODES", "a ''", "'' is not an endpoint"),
    ("BUILDX_NODES", "tcp://a:1,tcp://b:1", "by spaces, not commas"),
    ("BUILDX_NODES", "a,platform=linux/s390x", "Guix does not support the platform 'linux/s390x'"),
    ("BUILDX_NODES", "'a\nb'", "contains a control character"),
    ("ENGINE_IMAGE_STORE", "vfs", "write one of: containerd, overlay2"),
    ("OUTPUT", "loud", "write one of: auto, plain, quiet, verbose, live"),
    ("BUILDX_OUTPUT", "tar", "write one of: registry, oci, docker, load"),
    ("BUILDX_ATTESTATIONS", "sbom none", "'none' is not an attestation"),
    ("BUILDX_ATTESTATIONS", "sbom,provenance", "by spaces, not commas"),
    ("BUILDX_CACHE_FROM", "a.example/b:c", "write type=KIND,NAME=VALUE"),
    ("BUILDX_CACHE_FROM", "ref=a,type=registry", "write type=KIND,NAME=VALUE"),
    ("BUILDX_CACHE_TO", "type=gha,mode", "write type=KIND,NAME=VALUE"),
    ("BUILDX_CACHE_TO", "'type=local,dest=a b'", "write type=KIND,NAME=VALUE"),
    ("BUILDX_CACHE_TO", "'type=local,dest=\\\"a'", "write type=KIND,NAME=VALUE"),
    ("BUILDX_CACHE_TO", "type=local,dest=", "a path is empty"),
    ("BUILDKIT_SYNTAX", "", "is empty"),
    ("BUILDKIT_SYNTAX", "docker/Dockerfile:1", "has capital letters"),
    ("BUILDX_URL", "ftp://a.example/x", "https:// or http:// or file://"),
    ("BUILDX_URL", "https://me:hunter2@a.example/x", "remove the part up to and including '@'"),
    ("BUILDX_SHA256", HEX.upper(), "write 64 lower case hex digits"),
    ("RELEASE_URL", "file:///srv", "begins with https:// or http://"),
    ("RELEASE_URL", "https://me:hunter2@a.example/x", "remove the part up to and including '@'"),
    ("DOCKER_PASSWORD_FILE", "missing", "No such file"),
    ("DOCKER_PASSWORD_FILE", "directory", "Is a directory"),
    ("DOCKER_HOST", "a\0b", "contains a NUL"),
]


@pytest.mark.parametrize(("name", "text", "message"), BAD)
def test_a_bad_value_is_one_line_with_its_place(
    project: Path, name: str, text: str, message: str
) -> None:
    (problem,) = problems(project, f'\n{name}="{text}"\n{COMPANIONS.get(name, "")}')
    assert problem.startswith(f".env:2: {name}: ")
    assert message in problem
    assert ";" in problem  # what is wrong; what would be right
    assert len(problem) < 300
    assert "hunter2" not in problem


@pytest.mark.parametrize("suffix", ["", "-linux-amd64", "-linux-arm-v7"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_tag_of_a_stage_is_no_tag_for_an_image(project: Path, stage: str, suffix: str) -> None:
    tag = f"1.0-{stage}{suffix}"
    (of_image,) = problems(project, f"IMAGE=app:{tag}\n")
    assert of_image.startswith(
        f".env:1: IMAGE: a tag that ends in -{stage}{suffix} is reserved for a stage; "
    )
    (of_tags,) = problems(project, "IMAGE=app:1.0\n", {"TAGS": f"1.0 {tag}"})
    assert of_tags == f"environment: TAGS: {tag!r} is reserved for a stage; use another tag"
    assert load(project, f"IMAGE=app:{stage}\nTAGS='{tag} 1x0-{stage} 1.0-my{stage}'\n").tags


@pytest.mark.parametrize(
    ("name", "text", "missing"),
    [
        ("GUIX_BINARY_URL", "https://a.example/x", "GUIX_BINARY_SHA256"),
        ("GUIX_BINARY_SHA256", HEX, "GUIX_BINARY_URL"),
        ("BUILDX_URL", "https://a.example/x", "BUILDX_SHA256"),
        ("BUILDX_SHA256", HEX, "BUILDX_URL"),
        ("DOCKER_USERNAME", "hunter2", "DOCKER_PASSWORD"),
        ("DOCKER_USERNAME_FILE", "a.pub", "DOCKER_PASSWORD"),
        ("DOCKER_PASSWORD", "hunter2", "DOCKER_USERNAME"),
        ("DOCKER_PASSWORD_FILE", "a.pub", "DOCKER_USERNAME"),
    ],
)
def test_half_of_a_pair_is_refused(project: Path, name: str, text: str, missing: str) -> None:
    expected = f"{name}: requires {missing}; set both or neither"
    assert problems(project, f"{name}={text}\n") == [f".env:1: {expected}"]
    # An empty value is none.
    assert problems(project, f"{missing}=\n", {name: text}) == [f"environment: {expected}"]


@pytest.mark.parametrize("lock", ["channels.scm", "directory/../channels.scm", "link.scm"])
def test_the_lock_is_not_the_channels_file(project: Path, lock: str) -> None:
    (project / "link.scm").symlink_to("channels.scm")
    text = f"GUIX_CHANNELS=channels.scm\nGUIX_CHANNELS_LOCK={lock}\n"
    (problem,) = problems(project, text)
    assert problem.startswith(".env:2: GUIX_CHANNELS_LOCK: pull would overwrite GUIX_CHANNELS; ")
    assert load(project, text, {"GUIX_CHANNELS_LOCK": "other.scm"}).guix_channels_lock


def test_the_default_lock_is_not_the_channels_file_either(project: Path) -> None:
    (project / "channels.lock.scm").touch()
    (problem,) = problems(project, "GUIX_CHANNELS=channels.lock.scm\n")
    assert problem.startswith("default: GUIX_CHANNELS_LOCK: pull would overwrite GUIX_CHANNELS; ")
    assert load(project, "GUIX_CHANNELS=channels.lock.scm\nGUIX_CHANNELS_LOCK=\n").guix_channels


def test_the_environment_and_options_are_named_as_places(project: Path) -> None:
    environ = {"GUIX_CORES": "x", "NETWORK": "a\udcffb"}
    overrides = {"IMAGE": "A", "GUIX_PACKAGES": ["hello", "-x"], "STAGE_TIMEOUT": "x"}
    assert [problem.split("; ")[0] for problem in problems(project, "", environ, overrides)] == [
        "option --image: repository 'A' has capital letters",
        "option --package: '-x' is not a package",
        "environment: GUIX_CORES: 'x' is not a whole number of at least 0",
        "environment: NETWORK: contains a NUL or a malformed character",
        "option --stage-timeout: 'x' is not a time",
    ]


def test_all_problems_are_reported_together(project: Path) -> None:
    (project / ".env.local").write_text("PLATFORMS=linux/z linux/y\nguix_cores=x\n")
    found = problems(project, "IMAGE=A:b:c\nB\nTAGS=-\n", {"ENV_FILE": "nowhere"}, {"NETWORK": "-"})
    assert [problem.split(": ")[0] for problem in found] == [
        ".env:2",
        ".env.local:2",
        "environment",
        ".env:1",
        ".env:3",
        ".env.local:1",
        ".env.local:1",
        "option --network",
    ]


def test_a_bad_value_that_a_later_source_replaces_does_no_harm(project: Path) -> None:
    assert load(project, "GUIX_CORES=x\n", {"GUIX_CORES": "2"}).guix_cores == 2


# --- Where a value comes from ---------------------------------------------------------------

# Five values of each setting; {} is a number from 1 to 5, in a list it picks.
VALUES: dict[str, str | list[str]] = {
    "IMAGE": "example.org/app:{}",
    "BASE_IMAGE": "example.org/base:{}",
    "TAGS": "{}",
    "PLATFORMS": ["linux/amd64", "linux/386", "linux/arm64", "linux/ppc64le", "linux/riscv64"],
    "DOCKERFILE": "/{}",
    "BUILD_CONTEXT": "/{}",
    "BUILD_ARGS": "A={}",
    "BUILD_SECRETS": "id{}=/dev/null",
    "GUIX_CHANNELS": "FILES/{}.pub",
    "GUIX_CHANNELS_LOCK": "/{}",
    "GUIX_MANIFEST": "FILES/{}.pub",
    "GUIX_PACKAGES": "hello@{}",
    "GUIX_SUBSTITUTE_URLS": "https://a.example/{}",
    "GUIX_SUBSTITUTE_KEYS": "FILES/{}.pub",
    "SUBSTITUTES_LISTEN": "127.0.0.1:{}",
    "GUIX_BINARY_URL": "https://a.example/{}",
    "GUIX_BINARY_SHA256": [str(number) * 64 for number in range(1, 6)],
    "GUIX_CORES": "{}",
    "GUIX_MAX_JOBS": "{}",
    "EXTRA_CA_FILE": "FILES/{}.pem",
    "GUIX_CHANNEL_MIRRORS": "https://a.example=https://b.example/{}",
    "GUIX_CHANNEL_CREDENTIALS": "https://me:{}@a.example",
    "SSH_KNOWN_HOSTS": "FILES/{}.pub",
    "MOUNTS": "/dev/null:/{}",
    "NETWORK": "{}",
    "STAGE_MEMORY": "{}g",
    "STAGE_TIMEOUT": "{}",
    "CACHE_VOLUME": "{}",
    "CACHE_IMAGE": "example.org/cache:{}",
    "BUILDX_BUILDER": "b{}",
    "BUILDX_NODES": "tcp://a:{}",
    "BUILDX_CACHE_FROM": "type=registry,ref=a:{}",
    "BUILDX_CACHE_TO": "type=registry,ref=a:{}",
    "BUILDKIT_SYNTAX": "example.org/frontend:{}",
    "BUILDX_URL": "https://a.example/{}",
    "BUILDX_SHA256": [str(number) * 64 for number in range(1, 6)],
    "RELEASE_URL": "https://a.example/{}",
    "DOCKER_USERNAME": "{}",
    "DOCKER_PASSWORD": "{}",
}


def test_later_source_wins_for_every_setting(project: Path) -> None:
    cwd = project / "directory"
    for number in range(1, 6):
        (cwd / f"{number}.pub").touch()
        shutil.copy(AUTHORITY, cwd / f"{number}.pem")

    def texts(number: int) -> dict[str, str]:
        """The values of one source."""
        return {
            name: (
                pattern[number - 1] if isinstance(pattern, list) else pattern.format(number)
            ).replace("FILES", str(cwd))
            for name, pattern in VALUES.items()
        }

    def write(path: Path, number: int) -> None:
        path.write_text("".join(f"{name}={text}\n" for name, text in texts(number).items()))

    environ: dict[str, str] = {}
    overrides: dict[str, str] = {}

    def now() -> dict[str, Any]:
        settings = load_settings(project, cwd, environ, overrides)
        return {name: getattr(settings, name.lower()) for name in VALUES}

    seen = [now()]
    write(project / ".env", 1)
    seen.append(now())
    write(project / ".env.local", 2)
    seen.append(now())
    write(cwd / "named.env", 3)
    assert now() == seen[-1]
    environ["ENV_FILE"] = "named.env"
    seen.append(now())
    environ |= texts(4)
    seen.append(now())
    overrides |= texts(5)
    seen.append(now())
    for name in VALUES:
        values = [each[name] for each in seen]
        assert all(one != other for n, one in enumerate(values) for other in values[:n]), name
    # Empty options and variables do not count.
    overrides |= dict.fromkeys(overrides, "")
    assert now() == seen[-2]
    environ |= dict.fromkeys(texts(4), "")
    assert now() == seen[-3]


def test_the_table_of_values_has_every_setting() -> None:
    few = {"GUIX_FALLBACK", "GUIX_REQUIRE_SUBSTITUTES", "GUIX_SANDBOX", "OUTPUT"}
    few |= {"BUILDX_DRIVER", "BUILDX_OUTPUT", "BUILDX_ATTESTATIONS", "ENGINE_IMAGE_STORE"}
    assert {*VALUES, *few} == {name for name, _, _ in GOOD}


def test_env_file_names_several_from_the_current_folder(project: Path) -> None:
    cwd = project / "directory"
    (cwd / "one.env").write_text("IMAGE=one/one:1\nTAGS=one\nGUIX_CORES=1\n")
    (project / "two.env").write_text("IMAGE=two/two:2\nTAGS=two\n")
    (project / ".env.local").write_text("IMAGE=local/local:0\nNETWORK=host\n")
    environ = {"ENV_FILE": "one.env, ../two.env,,", "TAGS": "three"}
    settings = load_settings(project, cwd, environ)
    assert str(settings.image) == "two/two:2"
    assert (settings.tags, settings.guix_cores, settings.network) == (("three",), 1, "host")
    assert settings.origin("IMAGE").endswith("two.env:1: IMAGE")
    assert settings.origin("TAGS") == "environment: TAGS"
    assert settings.origin("GUIX_CORES") == "one.env:3: GUIX_CORES"
    assert settings.origin("MOUNTS") == "default: MOUNTS"


def test_file_of_env_file_must_exist(project: Path) -> None:
    (problem,) = problems(project, "", {"ENV_FILE": "nowhere.env"})
    assert problem.startswith("environment: ENV_FILE: nowhere.env: No such file")
    for name in ("a\0b", "\ud800", "x" * 5000, "a\nb"):
        assert len(problems(project, "", {"ENV_FILE": name})) == 1


def test_env_file_in_an_env_file_is_a_mistake(project: Path) -> None:
    (problem,) = problems(project, "ENV_FILE=x\n")
    assert "set it in the environment" in problem


def test_relative_paths_start_where_they_are_written(project: Path) -> None:
    cwd = project / "directory"
    elsewhere = project / "elsewhere"
    elsewhere.mkdir()
    for directory in (cwd, elsewhere):
        (directory / "x").touch()
    (elsewhere / "env").write_text("GUIX_CHANNELS=x\nMOUNTS=./x:/x\nDOCKER_CERT_PATH=certs\n")
    environ = {"ENV_FILE": "../elsewhere/env", "GUIX_MANIFEST": "x", "DOCKER_CONFIG": "docker"}
    settings = load_settings(project, cwd, environ, {"BUILD_CONTEXT": "sub"})
    assert settings.dockerfile == project / "Dockerfile"
    assert settings.guix_channels is not None
    assert settings.guix_channels.resolve() == elsewhere / "x"
    assert settings.mounts[0].source.resolve() == elsewhere / "x"
    assert settings.guix_manifest == cwd / "x"
    assert settings.build_context == cwd / "sub"
    assert settings.docker_environment["DOCKER_CONFIG"] == str(cwd / "docker")
    assert Path(settings.docker_environment["DOCKER_CERT_PATH"]).resolve() == elsewhere / "certs"


def test_files_of_buildx_are_relative_to_where_they_are_written_too(project: Path) -> None:
    cwd = project / "directory"
    (cwd / "ca.pem").touch()
    (project / ".env").write_text(
        "BUILDX_DRIVER=remote\nBUILDX_NODES=tcp://a:1,cacert=directory/ca.pem\n"
        "BUILDX_CACHE_TO='type=local,mode=max,dest=x/y type=registry,dest=x'\n"
    )
    settings = load_settings(project, cwd, {"BUILDX_CACHE_FROM": "type=local,src=x type=gha"})
    (node,) = settings.buildx_nodes
    assert node.options == (("cacert", f"{cwd}/ca.pem"),)
    assert settings.buildx_cache_to == (
        f"type=local,mode=max,dest={project}/x/y",
        "type=registry,dest=x",
    )
    assert settings.buildx_cache_from == (f"type=local,src={cwd}/x", "type=gha")
    named = project / "with,comma.d"
    named.mkdir()
    (problem,) = problems(named, "BUILDX_CACHE_TO=type=local,dest=x\n")
    assert "contains a comma or a double quote, which ends a path in buildx; rename it" in problem


def test_nodes_are_checked_against_the_driver(project: Path) -> None:
    nodes = "BUILDX_NODES=tcp://a:1,memory=4g\n"
    assert load(project, nodes).buildx_nodes
    (of_docker,) = problems(project, nodes, {"BUILDX_DRIVER": "docker"})
    assert of_docker.startswith(".env:1: BUILDX_NODES: ")
    assert of_docker.endswith(
        "the driver docker uses the engine and has no nodes; unset BUILDX_NODES"
    )
    (of_none,) = problems(project, "", {"BUILDX_DRIVER": "remote"})
    assert of_none.startswith("default: BUILDX_NODES: the driver remote requires a node; ")
    assert len(problems(project, nodes, {"BUILDX_DRIVER": "wat"})) == 1


def test_each_platform_has_settings_of_its_own(project: Path) -> None:
    settings = load(project, "PLATFORMS='linux/arm64 linux/amd64'\nTAGS=a\n")
    each = settings.each_platform()
    assert [str(one.platform) for one in each] == ["linux/arm64", "linux/amd64"]
    assert [one.platforms for one in each] == [(platform,) for platform in settings.platforms]
    assert {one.tags for one in each} == {("a",)}
    assert [one.platform for one in load(project).each_platform()] == [None]


def test_an_empty_value_in_a_file_takes_a_value_away(project: Path) -> None:
    (project / ".env.local").write_text(
        "TAGS=\nNETWORK=''\nDOCKER_USERNAME=\nDOCKER_PASSWORD=\nDOCKER_HOST=\n"
        "GUIX_CHANNELS= # none\n"
    )
    settings = load(
        project,
        "TAGS=a\nNETWORK=host\nDOCKER_USERNAME=x\nDOCKER_PASSWORD=x\nDOCKER_HOST=y\n"
        "GUIX_CHANNELS=channels.scm\n",
    )
    assert settings.tags == ()
    assert (settings.network, settings.docker_password, settings.guix_channels) == (None,) * 3
    assert settings.docker_environment == {}


def test_dockers_own_variables(project: Path) -> None:
    text = "DOCKER_HOST=unix:///a\nDOCKER_CONTEXT=mine\nDOCKER_TLS_VERIFY=1\n"
    environ = {"DOCKER_HOST": "unix:///b", "DOCKER_CONTEXT": "", "DOCKER_BUILDKIT": "1"}
    assert load(project, text, environ).docker_environment == {
        "DOCKER_HOST": "unix:///b",
        "DOCKER_CONTEXT": "mine",
        "DOCKER_TLS_VERIFY": "1",
    }


def test_proxies_come_from_the_environment_alone(project: Path) -> None:
    proxies = {
        name: f"http://me:hunter2@{name.replace('_', '-')}.example"
        for lower in ("http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy")
        for name in (lower, lower.upper())
    }
    settings = load(project, "", {**proxies, "PROXY": "x", "rsync_proxy": "x"})
    assert settings.proxies == proxies
    assert "hunter2" not in repr(settings)
    # Guix reads the lower case, and others the upper.
    both = {"no_proxy": "*", "NO_PROXY": "*"}
    assert load(project, "HTTP_PROXY=x\n", {"NO_PROXY": "", "no_proxy": "*"}).proxies == both


def test_proxies_of_dockers_own_configuration_are_weaker(project: Path) -> None:
    """That is where the docker command line has those of containers from."""
    config = {"httpProxy": "http://a:hunter2@b.test", "noProxy": "c.test", "httpsProxy": 1}
    environ = {"DOCKER_CONFIG": str(project), "no_proxy": "d.test"}
    for content in ("[]", '{"proxies": {"default": []}}', '{"proxies": 1}', "["):
        (project / "config.json").write_text(content)
        assert load(project, "", environ).proxies.keys() == {"no_proxy", "NO_PROXY"}
    (project / "config.json").write_text(json.dumps({"proxies": {"default": config}}))
    found = load(project, "", environ).proxies
    assert (found["http_proxy"], found["no_proxy"]) == ("http://a:hunter2@b.test", "d.test")
    assert "https_proxy" not in found
    assert redact.clean("hunter2") == "***"
    # An env file can name the directory, too.
    del environ["DOCKER_CONFIG"]
    assert load(project, f"DOCKER_CONFIG={project}\n", environ).proxies == found


def test_work_containers_get_the_proxies_of_the_settings(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", "http://not-this-one.example")
    expected = {"GUIX_SANDBOX": "auto", "HOME": "/root", "USER": "root", "LOGNAME": "root"}
    assert environment(load(project)) == expected
    both = {"no_proxy": "*", "NO_PROXY": "*"}
    assert environment(load(project, "", {"no_proxy": "*"})) == {**expected, **both}


def test_isolated_reads_one_file_and_nothing_else(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / ".env").write_text("IMAGE=example.org/real:1\n")
    (project / ".env.local").write_text("IMAGE=example.org/real:2\n")
    for name in DECLARATIONS:
        monkeypatch.setenv(name, "example.org/real:3")
    monkeypatch.setenv("ENV_FILE", str(project / ".env"))
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    monkeypatch.setenv("FROM_OUTSIDE", "real")
    file = project / "directory" / "demo.env"
    file.write_text("TAGS=${FROM_OUTSIDE:-demo}\nGUIX_CHANNELS=../channels.scm\n")
    settings = load_isolated(file)
    assert str(settings.image) == "localhost:5055/guix-example:latest"
    assert settings.tags == ("demo",)
    assert settings.docker_environment == settings.proxies == {}
    assert settings.docker_password is None
    assert settings.dockerfile == project / "directory" / "Dockerfile"
    assert settings.guix_channels == project / "directory" / "../channels.scm"
    monkeypatch.chdir(project)
    assert load_isolated(Path("directory/demo.env")) == settings
    with pytest.raises(SettingsError, match=r"^nowhere\.env: No such file"):
        load_isolated(Path("nowhere.env"))


# --- Env files ------------------------------------------------------------------------------


def test_interpolation(project: Path) -> None:
    (project / ".env.local").write_text("TAGS=${V}-${W}-${X:-d}-${IMAGE_TAG}\n")
    text = "V=file\nIMAGE_TAG=7\nIMAGE=a/b:${IMAGE_TAG}\n"
    settings = load(project, text, {"V": "environ", "W": "outer", "X": ""})
    assert settings.tags == ("environ-outer-d-7",)
    assert settings.image.tag == "7"
    assert not any("not set" in note for note in settings.notes)


def test_ignored_platform_of_dockers_command_line_is_worth_a_note(project: Path) -> None:
    environment = {"DOCKER_DEFAULT_PLATFORM": "linux/arm64"}
    (note,) = load(project, "", environment).notes
    assert note.startswith("environment: DOCKER_DEFAULT_PLATFORM is ignored")
    assert load(project, "PLATFORMS=linux/amd64\n", environment).notes == ()


def test_a_variable_that_is_not_set_is_worth_a_note(project: Path) -> None:
    settings = load(project, "TAGS=1.${NOTHING}0\n")
    assert settings.tags == ("1.0",)
    assert settings.notes == (".env:1: TAGS: 'NOTHING' in ${...} is not set; using empty text",)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("IMAGE\n", [1]),
        ("GUIX_CORES=1\n\n# a comment\n\n  export GUIX_CORES=x\n", [5]),
        ('BUILD_ARGS="A=1\nB=2\n\nC=3"\nGUIX_CORES=x\n', [5]),
        ("A='1\n\n2'\n\n\nnot a line\n\nB\n", [6, 8]),
        ("IMAGE=\"open\n\nTAGS='open\n", [1, 3]),
        ("=\n 'x\n\nGUIX_CORES=x", [1, 2, 4]),
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_the_line_is_where_the_mistake_is(
    project: Path, text: str, lines: list[int], newline: str, mark: str
) -> None:
    found = problems(project, (mark + text).replace("\n", newline))
    assert [problem.split(":")[1] for problem in found] == [str(line) for line in lines]


def test_a_key_twice_in_one_file(project: Path) -> None:
    (problem,) = problems(project, "IMAGE=a\n\nTAGS=x\nIMAGE=b\n")
    assert problem == ".env:4: IMAGE: is also set on line 1; keep one"


def test_bad_encodings(project: Path) -> None:
    assert problems(project, b"A=1\nIMAGE=\xff\n") == [
        ".env:2: is not UTF-8; save the file as UTF-8"
    ]
    assert problems(project, "IMAGE=a\n".encode("utf-16"))[0].startswith(".env:1: is not UTF-8")
    assert str(load(project, "\ufeffIMAGE=a\r\n").image) == "a:latest"


def test_a_folder_is_no_env_file(project: Path) -> None:
    (project / ".env").mkdir()
    with pytest.raises(SettingsError, match=r"^\.env: Is a directory"):
        load_settings(project, project, {})


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("GUIX_PACKAGE", "GUIX_PACKAGES"),
        ("guix_packages", "GUIX_PACKAGES"),
        ("BUILDX_NODE", "BUILDX_NODES"),
    ],
)
def test_key_similar_to_a_setting_is_an_error(project: Path, key: str, meant: str) -> None:
    (problem,) = problems(project, f"{key}=x\n")
    assert problem == f".env:1: {key!r} is not a setting; did you mean {meant}?"


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("IMAGES", "IMAGE"),
        ("image", "IMAGE"),
        ("IMGE", "IMAGE"),
        ("PACKAGES", "GUIX_PACKAGES"),
        ("PLATFORM", "PLATFORMS"),
        ("TAG", "TAGS"),
        ("DOCKER_USER", "DOCKER_USERNAME"),
        ("DOCKER_PASSWORDFILE", "DOCKER_PASSWORD_FILE"),
    ],
)
def test_key_that_another_tool_can_read_is_a_note(project: Path, key: str, meant: str) -> None:
    settings = load(project, f"{key}=x\n")
    assert settings.notes == (f".env:1: {key!r} is not a setting; did you mean {meant}?",)


def test_other_unknown_key_is_a_note(project: Path) -> None:
    settings = load(project, "HTTP_PROXY=x\nCOMPOSE_PROJECT=y\n")
    assert settings.notes == (
        ".env:1: HTTP_PROXY: is not a setting of guix-tasks; ignored",
        ".env:2: COMPOSE_PROJECT: is not a setting of guix-tasks; ignored",
    )


# --- Secrets --------------------------------------------------------------------------------


def test_secrets_are_taken_literally(project: Path) -> None:
    settings = load(
        project, f"DOCKER_USERNAME='${{A}} me '\nDOCKER_PASSWORD={PASSWORD}\n", {"A": "b"}
    )
    assert settings.docker_username == Secret("${A} me ")
    assert settings.docker_password == Secret(PASSWORD)
    assert settings.notes == ()


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_secret_from_a_file(project: Path, end: str) -> None:
    (project / "password").write_bytes(f"{PASSWORD}{end}".encode())
    settings = load(project, f"DOCKER_PASSWORD_FILE=${{N}}\n{USER}", {"N": "password"})
    assert settings.docker_password == Secret(PASSWORD)
    assert settings.origin("DOCKER_PASSWORD") == ".env:1: DOCKER_PASSWORD_FILE"
    assert load(project, USER, {"DOCKER_PASSWORD_FILE": "password"}) == settings


@pytest.mark.parametrize("content", [b"", b"\n", b"hunter\0two", b"hunter2\xff"])
def test_a_file_without_a_secret(project: Path, content: bytes) -> None:
    (project / "password").write_bytes(content)
    (problem,) = problems(project, f"DOCKER_PASSWORD_FILE=password\n{USER}")
    assert problem.startswith(".env:1: DOCKER_PASSWORD_FILE: the file ")
    assert "hunter" not in problem


def test_a_secret_given_twice_in_one_source(project: Path) -> None:
    (project / "password").write_text("a")
    text = "DOCKER_PASSWORD_FILE=password\nDOCKER_PASSWORD=b\n"
    assert problems(project, text + USER) == [
        ".env:1: DOCKER_PASSWORD_FILE: DOCKER_PASSWORD is also set; keep one of the two"
    ]
    environ = {"DOCKER_USERNAME": "a", "DOCKER_USERNAME_FILE": "password"}
    (problem,) = problems(project, "DOCKER_PASSWORD=b\n", environ)
    assert problem.startswith("environment: DOCKER_USERNAME_FILE: ")


def test_a_secret_in_a_later_source_replaces_the_earlier_one(project: Path) -> None:
    (project / "password").write_text("from the file\n")
    in_file, literal = f"DOCKER_PASSWORD_FILE=password\n{USER}", f"DOCKER_PASSWORD=literal\n{USER}"
    environ = {"DOCKER_PASSWORD_FILE": "password"}
    assert load(project, literal, environ).docker_password == Secret("from the file")
    assert load(project, in_file, {"DOCKER_PASSWORD": "x"}).docker_password == Secret("x")
    assert load(project, in_file + "DOCKER_PASSWORD=\n").docker_password == Secret("from the file")
    (project / ".env.local").write_text("DOCKER_PASSWORD=\nDOCKER_USERNAME=\n")
    assert load(project, in_file).docker_password is None


def test_a_secret_shows_itself_only_when_asked() -> None:
    secret = Secret("hunter2")
    assert secret.reveal() == "hunter2"
    assert str(secret) == repr(secret) == f"{secret}" == "Secret(…)"
    assert not hasattr(secret, "__dict__")
    assert {secret: 1}[Secret("hunter2")] == 1


def test_no_secret_in_a_repr_or_in_an_error(project: Path) -> None:
    environ = {"DOCKER_USERNAME": "hunter1", "DOCKER_PASSWORD": "hunter2"}
    assert "hunter" not in repr(load(project, "", environ))
    texts = [
        "IMAGE=${DOCKER_USERNAME}/${DOCKER_PASSWORD}\n",
        "X=${DOCKER_PASSWORD}\nIMAGE=-${X}\n",
        'DOCKER_PASSWORD="hunter2\n',
        "DOCKER_PASSWORD hunter2\n",
        "DOCKER_PASSWORD=hunter\nhunter2\n",
        "DOCKER_PASSWORD=x\nDOCKER_PASSWORD=hunter2\n",
        "DOCKER_PASSWORD_FILE=hunter2\n",
        "GUIX_CHANNEL_CREDENTIAL=hunter2\n",
        "DOCKER_PASSWORD=hunter2\nDOCKER_PASSWORD_FILE=hunter2\n",
        'DOCKER_PASSWORD="hunter2\0"\n',
    ]
    for text in texts:
        forget_contents()
        (project / ".env").write_text(text)
        with pytest.raises(SettingsError) as caught:
            load_settings(project, project, environ if "${" in text else {})
        assert "hunter" not in repr((caught.value, caught.value.problems, caught.value.args))
        assert caught.value.__context__ is None


def test_the_second_line_of_a_secret_is_not_repeated_in_a_note(project: Path) -> None:
    notes = load(project, f"DOCKER_PASSWORD=aGVsbG8\nd29ybGQh=\n{USER}").notes
    assert notes == (".env:2: sets a name that is not a setting of guix-tasks; ignored",)


# --- No side effects ------------------------------------------------------------------------


class Untouchable(Mapping[str, str]):
    """An environment that nobody may look at."""

    def __getitem__(self, key: str) -> str:
        raise AssertionError(key)

    def __iter__(self) -> Any:
        raise AssertionError

    def __len__(self) -> int:
        raise AssertionError


def test_the_processs_environment_is_neither_read_nor_written(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:  # pytest itself needs it again afterwards
        patched.setattr(os, "environ", Untouchable())
        settings = load(project, "IMAGE=${A}/b\nTAGS=x\n", {"A": "a", "no_proxy": "x"})
        assert str(settings.image) == "a/b:latest"
        assert problems(project, "IMAGE=A\n")


def test_nothing_is_read_at_import(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("malformed")
    program = f"""
import sys, dotenv, dotenv.parser, dotenv.variables, os, urllib.parse, difflib, shlex
sys.path.insert(0, {str(ROOT)!r})
def hook(event, args):
    if event == "open" and ".py" not in str(args[0]):
        raise SystemExit(f"opens {{args[0]}}")
    if event in {{"subprocess.Popen", "socket.connect"}}:
        raise SystemExit(event)
class Environ:
    def __getattribute__(self, name):
        raise SystemExit("reads os.environ")
os.environ = Environ()
sys.addaudithook(hook)
import guix_tasks.settings
assert not {{"invoke", "docker"}} & set(sys.modules)
"""
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


# --- Whatever is thrown at it ---------------------------------------------------------------

_blocks = st.sampled_from(
    ["", "\n", "# comment", "  ", "A{}=1", "B{}='x\ny'", 'C{}="x\n\n#\n"', "D{}=x # y", "\t\x0c"]
)


@STEADY
@given(st.lists(_blocks), st.sampled_from(["\n", "\r\n", "\r"]))
def test_the_line_is_right_after_anything(
    tmp_path_factory: pytest.TempPathFactory, blocks: list[str], newline: str
) -> None:
    directory = tmp_path_factory.getbasetemp()
    above = "".join(f"{block.format(n)}\n" for n, block in enumerate(blocks))
    text = f"{above}GUIX_CORES=x\nmalformed line\nGUIX_MAX_JOBS=x\n".replace("\n", newline)
    line = above.count("\n") + 1
    assert [problem.split(": ")[0] for problem in problems(directory, text.encode())] == [
        f".env:{line + 1}",
        f".env:{line}",
        f".env:{line + 2}",
    ]


# --- Secrets that others would see ----------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "noted"),
    [
        ("https://me:hunter2@git.test/x", True),
        ("https://ghp_0123@git.test/x", True),
        ("ssh://me:hunter2@git.test/x", True),
        ("ssh://git@git.test/x", False),
        ("https://git.test/a@b", False),
    ],
)
def test_account_in_a_channel_url_is_reported_and_redacted(
    project: Path, url: str, *, noted: bool
) -> None:
    (project / "channels.scm").write_text(f'(list (channel (name \'x) (url "{url}")))\n')
    settings = load(project, "GUIX_CHANNELS=channels.scm\n")
    said = ".env:1: GUIX_CHANNELS: a URL contains a user or a password"
    assert [note.startswith(said) for note in settings.notes] == [True] * noted
    if noted and "hunter2" in url:
        assert redact.clean("said hunter2") == "said ***"


def test_secret_build_argument_is_reported(project: Path) -> None:
    settings = load(project, "BUILD_ARGS=A=1 npm_token=hunter2 EMPTY_SECRET=\n")
    (note,) = settings.notes
    assert note == (
        ".env:1: BUILD_ARGS: the history of the image shows npm_token to everyone who has the "
        "image; pass a secret in BUILD_SECRETS"
    )


def test_secrets_of_settings_are_redacted(project: Path) -> None:
    (project / "key").write_text("-----BEGIN-----\nabcdefghij\n{\n")
    load(
        project,
        "DOCKER_USERNAME=me\nDOCKER_PASSWORD='pass word'\nBUILD_SECRETS=key=key\n"
        "BUILD_ARGS=TOKEN=hunter1 VERSION=1.2.3\n"
        "BUILDX_CACHE_TO=type=s3,bucket=buck,secret_access_key=hunter3\n",
        {"https_proxy": "http://me:hunter4@proxy.test"},
    )
    said = redact.clean(
        "me pass%20word abcdefghij { hunter1 1.2.3 buck hunter3 hunter4 bWU6cGFzcyB3b3Jk"
    )
    assert said == "me *** *** { *** 1.2.3 buck *** *** ***"
