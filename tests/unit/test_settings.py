"""Settings: values, sources, env files, secrets and error messages."""

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
from fake_engine import DETERMINISTIC, clear_file_cache
from hypothesis import given
from hypothesis import strategies as st

from guix_tasks.errors import SettingsError
from guix_tasks.oci.platform import Platform
from guix_tasks.oci.reference import ImageReference
from guix_tasks.settings import Settings, load_settings
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
USER = "DOCKER_USERNAME=me\n"  # a password requires it

Overrides = Mapping[str, str | Sequence[str]]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The directory of a project with the files of the values below."""
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
    clear_file_cache()
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

# Settings that another setting requires.
COMPANIONS = {
    "GUIX_BINARY_URL": f"GUIX_BINARY_SHA256={HEX}\n",
    "GUIX_BINARY_SHA256": "GUIX_BINARY_URL=https://a.example/x\n",
    "BUILDX_URL": f"BUILDX_SHA256={HEX}\n",
    "BUILDX_SHA256": "BUILDX_URL=https://a.example/x\n",
    "DOCKER_USERNAME": "DOCKER_PASSWORD=x\n",
    "DOCKER_PASSWORD": "DOCKER_USERNAME=me\n",
    "DOCKER_PASSWORD_FILE": "DOCKER_USERNAME=me\n",
}

# Expected paths are relative to the project.
VALID_VALUES: list[tuple[str, str, Any]] = [
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
    ("RUNTIME_IMAGE", "a/b", ImageReference("docker.io", "a/b", "latest")),
    ("RUNTIME_ENTRYPOINT", "hello -g 'a b' -g x", ("hello", "-g", "a b", "-g", "x")),
    ("RUNTIME_COMMAND", "", ()),
    ("RUNTIME_USER", "app:1000", ("app", 1000)),
    ("RUNTIME_USER", "root:0", ("root", 0)),
    ("RUNTIME_DIRECTORY", "/srv/app-1", "/srv/app-1"),
    ("RUNTIME_PORTS", "8080 53/udp", ("8080/tcp", "53/udp")),
    ("RUNTIME_LINKS", "/bin/sh=bin/sh", {"/bin/sh": "bin/sh"}),
    ("RUNTIME_LAYERS", "2", 2),
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


def make_relative(value: Any, project: Path) -> Any:
    """Make the paths of a value that are in ``project`` relative to it."""
    if isinstance(value, Path):
        return value.relative_to(project) if value.is_relative_to(project) else value
    if isinstance(value, Mount):
        return replace(value, source=make_relative(value.source, project))
    if isinstance(value, tuple):
        return tuple(make_relative(item, project) for item in value)
    if isinstance(value, Mapping):
        return {name: make_relative(item, project) for name, item in value.items()}
    return value


@pytest.mark.parametrize(("name", "text", "expected"), VALID_VALUES)
def test_valid_value_is_parsed(project: Path, name: str, text: str, expected: Any) -> None:
    settings = load(project, f'{COMPANIONS.get(name, "")}{name}="{text}"\n')
    assert make_relative(getattr(settings, name.lower()), project) == expected


def test_table_of_valid_values_has_every_setting() -> None:
    names = {entry.name.upper() for entry in fields(Settings) if "setting" in entry.metadata}
    assert names == {name for name, _, _ in VALID_VALUES}


def test_items_of_a_sequence_are_not_parsed(project: Path) -> None:
    overrides = {"MOUNTS": ["with space:/a"], "BUILD_ARGS": ["A='x y'", "B=\\"]}
    settings = load(project, overrides=overrides)
    assert settings.mounts == (Mount(project / "with space", "/a"),)
    assert settings.build_args == {"A": "'x y'", "B": "\\"}


def test_settings_are_immutable(project: Path) -> None:
    settings: Any = load(project, "BUILD_ARGS=A=1\nDOCKER_HOST=unix:///x\n")
    with pytest.raises(AttributeError):
        settings.image = None
    for name in ("build_args", "docker_environment", "proxies", "origins"):
        with pytest.raises(TypeError):
            getattr(settings, name)["A"] = "2"


def test_copy_with_another_value_keeps_the_other_values(project: Path) -> None:
    settings = load(project, "TAGS=a\nFOREIGN=x\n", {"no_proxy": "x", "DOCKER_HOST": "unix:///x"})
    other = replace(settings, tags=("b",))
    for entry in fields(Settings):
        expected = ("b",) if entry.name == "tags" else getattr(settings, entry.name)
        assert getattr(other, entry.name) == expected
    assert other != settings == replace(other, tags=("a",))


# --- Invalid values ------------------------------------------------------------------------

INVALID_VALUES = [
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
    ("BUILDX_BUILDER", "", "is not a builder name"),
    ("BUILDX_BUILDER", "x" * 51, "write at most 50 letters and digits"),
    ("BUILDX_BUILDER", "1x", "a letter first"),
    ("BUILDX_BUILDER", "--all", "a letter first"),
    ("BUILDX_BUILDER", "Default", "set BUILDX_DRIVER=docker"),
    ("BUILDX_DRIVER", "Docker", "write one of: docker, docker-container, remote, kubernetes"),
    ("BUILDX_NODES", "a ''", "'' is not an endpoint"),
    ("BUILDX_NODES", "tcp://a:1,tcp://b:1", "by spaces, not commas"),
    ("ENGINE_IMAGE_STORE", "vfs", "write one of: containerd, overlay2"),
    ("RUNTIME_IMAGE", f"a/b@{DIGEST}", "has a digest"),
    ("RUNTIME_ENTRYPOINT", "'a", "a quote is not closed"),
    ("RUNTIME_USER", "app", "'app' is not a user"),
    ("RUNTIME_USER", "root:1000", "'root:1000' is not a user"),
    ("RUNTIME_USER", "app:0", "'app:0' is not a user"),
    ("RUNTIME_USER", "app:9999999999", "is not a user"),
    ("RUNTIME_DIRECTORY", "srv", "'srv' is not a directory of an image"),
    ("RUNTIME_DIRECTORY", "/srv/..", "is not a directory of an image"),
    ("RUNTIME_PORTS", "0", "'0' is not a port"),
    ("RUNTIME_PORTS", "8080/sctp", "'8080/sctp' is not a port"),
    ("RUNTIME_LINKS", "/bin/sh", "'/bin/sh' is not a link"),
    ("RUNTIME_LINKS", "/bin/../sh=bin/sh", "is not a link"),
    ("RUNTIME_LINKS", "/sh=/bin/sh", "is not a link"),
    ("RUNTIME_LINKS", "/gnu/store=bin", "is not a link"),
    ("RUNTIME_LAYERS", "1", "at least 2"),
    ("RUNTIME_LAYERS", "101", "'101' is more than 100"),
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
    ("BUILDX_URL", "ftp://a.example/x", "https:// or http:// or file://"),
    ("BUILDX_URL", "https://me:hunter2@a.example/x", "remove the part up to and including '@'"),
    ("BUILDX_SHA256", HEX.upper(), "write 64 lower case hex digits"),
    ("RELEASE_URL", "file:///srv", "begins with https:// or http://"),
    ("RELEASE_URL", "https://me:hunter2@a.example/x", "remove the part up to and including '@'"),
    ("DOCKER_PASSWORD_FILE", "missing", "No such file"),
    ("DOCKER_PASSWORD_FILE", "directory", "Is a directory"),
    ("DOCKER_HOST", "a\0b", "contains a NUL"),
]


@pytest.mark.parametrize(("name", "text", "message"), INVALID_VALUES)
def test_invalid_value_is_reported_in_one_line_with_its_line(
    project: Path, name: str, text: str, message: str
) -> None:
    (problem,) = problems(project, f'\n{name}="{text}"\n{COMPANIONS.get(name, "")}')
    assert problem.startswith(f".env:2: {name}: ")
    assert message in problem
    assert ";" in problem  # the error; the hint
    assert len(problem) < 300
    assert "hunter2" not in problem


@pytest.mark.parametrize("suffix", ["", "-linux-amd64", "-linux-arm-v7"])
@pytest.mark.parametrize("stage", STAGES)
def test_tag_of_a_stage_is_reserved(project: Path, stage: str, suffix: str) -> None:
    tag = f"1.0-{stage}{suffix}"
    (image_problem,) = problems(project, f"IMAGE=app:{tag}\n")
    assert image_problem.startswith(
        f".env:1: IMAGE: a tag that ends in -{stage}{suffix} is reserved for a stage; "
    )
    (tags_problem,) = problems(project, "IMAGE=app:1.0\n", {"TAGS": f"1.0 {tag}"})
    assert tags_problem == f"environment: TAGS: {tag!r} is reserved for a stage; use another tag"
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
def test_setting_without_its_companion_is_an_error(
    project: Path, name: str, text: str, missing: str
) -> None:
    expected = f"{name}: requires {missing}; set both or neither"
    assert problems(project, f"{name}={text}\n") == [f".env:1: {expected}"]
    # An empty value is the same as no value.
    assert problems(project, f"{missing}=\n", {name: text}) == [f"environment: {expected}"]


@pytest.mark.parametrize("lock", ["channels.scm", "directory/../channels.scm", "link.scm"])
def test_channels_file_as_lock_is_an_error(project: Path, lock: str) -> None:
    (project / "link.scm").symlink_to("channels.scm")
    text = f"GUIX_CHANNELS=channels.scm\nGUIX_CHANNELS_LOCK={lock}\n"
    (problem,) = problems(project, text)
    assert problem.startswith(".env:2: GUIX_CHANNELS_LOCK: pull would overwrite GUIX_CHANNELS; ")
    assert load(project, text, {"GUIX_CHANNELS_LOCK": "other.scm"}).guix_channels_lock


def test_default_lock_as_channels_file_is_an_error(project: Path) -> None:
    (project / "channels.lock.scm").touch()
    (problem,) = problems(project, "GUIX_CHANNELS=channels.lock.scm\n")
    assert problem.startswith("default: GUIX_CHANNELS_LOCK: pull would overwrite GUIX_CHANNELS; ")
    assert load(project, "GUIX_CHANNELS=channels.lock.scm\nGUIX_CHANNELS_LOCK=\n").guix_channels


def test_problems_name_the_environment_and_options(project: Path) -> None:
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
    messages = problems(
        project, "IMAGE=A:b:c\nB\nTAGS=-\n", {"ENV_FILE": "nowhere"}, {"NETWORK": "-"}
    )
    assert [problem.split(": ")[0] for problem in messages] == [
        ".env:2",
        ".env.local:2",
        "environment",
        ".env:1",
        ".env:3",
        ".env.local:1",
        ".env.local:1",
        "option --network",
    ]


def test_replaced_invalid_value_is_ignored(project: Path) -> None:
    assert load(project, "GUIX_CORES=x\n", {"GUIX_CORES": "2"}).guix_cores == 2


# --- Sources of values ----------------------------------------------------------------------

# Five values of each setting; {} is a number from 1 to 5, which is the index of a list.
SOURCE_VALUES: dict[str, str | list[str]] = {
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
    "RUNTIME_IMAGE": "example.org/runtime:{}",
    "RUNTIME_ENTRYPOINT": "hello{}",
    "RUNTIME_COMMAND": "hello{}",
    "RUNTIME_USER": "app:{}",
    "RUNTIME_DIRECTORY": "/{}",
    "RUNTIME_PORTS": "{}",
    "RUNTIME_LINKS": "/bin/sh=bin/sh{}",
    "RUNTIME_LAYERS": "1{}",
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

    def source_values(number: int) -> dict[str, str]:
        """Return the values of one source."""
        return {
            name: (
                pattern[number - 1] if isinstance(pattern, list) else pattern.format(number)
            ).replace("FILES", str(cwd))
            for name, pattern in SOURCE_VALUES.items()
        }

    def write(path: Path, number: int) -> None:
        path.write_text("".join(f"{name}={text}\n" for name, text in source_values(number).items()))

    environ: dict[str, str] = {}
    overrides: dict[str, str] = {}

    def read_values() -> dict[str, Any]:
        settings = load_settings(project, cwd, environ, overrides)
        return {name: getattr(settings, name.lower()) for name in SOURCE_VALUES}

    snapshots = [read_values()]
    write(project / ".env", 1)
    snapshots.append(read_values())
    write(project / ".env.local", 2)
    snapshots.append(read_values())
    write(cwd / "named.env", 3)
    assert read_values() == snapshots[-1]
    environ["ENV_FILE"] = "named.env"
    snapshots.append(read_values())
    environ |= source_values(4)
    snapshots.append(read_values())
    overrides |= source_values(5)
    snapshots.append(read_values())
    for name in SOURCE_VALUES:
        values = [snapshot[name] for snapshot in snapshots]
        assert all(value not in values[:number] for number, value in enumerate(values)), name
    # Empty options and variables are ignored.
    overrides |= dict.fromkeys(overrides, "")
    assert read_values() == snapshots[-2]
    environ |= dict.fromkeys(source_values(4), "")
    assert read_values() == snapshots[-3]


def test_the_table_of_values_has_every_setting() -> None:
    choices = {"GUIX_FALLBACK", "GUIX_REQUIRE_SUBSTITUTES", "GUIX_SANDBOX", "OUTPUT"}
    choices |= {"BUILDX_DRIVER", "BUILDX_OUTPUT", "BUILDX_ATTESTATIONS", "ENGINE_IMAGE_STORE"}
    assert {*SOURCE_VALUES, *choices} == {name for name, _, _ in VALID_VALUES}


def test_env_file_names_several_files_in_the_current_directory(project: Path) -> None:
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


def test_env_file_setting_in_an_env_file_is_an_error(project: Path) -> None:
    (problem,) = problems(project, "ENV_FILE=x\n")
    assert "set it in the environment" in problem


def test_paths_are_relative_to_their_source(project: Path) -> None:
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


def test_paths_of_buildx_are_relative_to_their_source(project: Path) -> None:
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
    comma_directory = project / "with,comma.d"
    comma_directory.mkdir()
    (problem,) = problems(comma_directory, "BUILDX_CACHE_TO=type=local,dest=x\n")
    assert "contains a comma or a double quote, which ends a path in buildx; rename it" in problem


def test_nodes_are_checked_against_the_driver(project: Path) -> None:
    nodes = "BUILDX_NODES=tcp://a:1,memory=4g\n"
    assert load(project, nodes).buildx_nodes
    (docker_problem,) = problems(project, nodes, {"BUILDX_DRIVER": "docker"})
    assert docker_problem.startswith(".env:1: BUILDX_NODES: ")
    assert docker_problem.endswith(
        "the driver docker uses the engine and has no nodes; unset BUILDX_NODES"
    )
    (remote_problem,) = problems(project, "", {"BUILDX_DRIVER": "remote"})
    assert remote_problem.startswith("default: BUILDX_NODES: the driver remote requires a node; ")
    assert len(problems(project, nodes, {"BUILDX_DRIVER": "wat"})) == 1


def test_each_platform_has_a_copy_of_the_settings(project: Path) -> None:
    settings = load(project, "PLATFORMS='linux/arm64 linux/amd64'\nTAGS=a\n")
    copies = settings.each_platform()
    assert [str(copy.platform) for copy in copies] == ["linux/arm64", "linux/amd64"]
    assert [copy.platforms for copy in copies] == [(platform,) for platform in settings.platforms]
    assert {copy.tags for copy in copies} == {("a",)}
    assert [copy.platform for copy in load(project).each_platform()] == [None]


def test_empty_value_in_a_file_removes_a_value(project: Path) -> None:
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


def test_variables_of_docker_are_read_from_both_sources(project: Path) -> None:
    text = "DOCKER_HOST=unix:///a\nDOCKER_CONTEXT=mine\nDOCKER_TLS_VERIFY=1\n"
    environ = {"DOCKER_HOST": "unix:///b", "DOCKER_CONTEXT": "", "DOCKER_BUILDKIT": "1"}
    assert load(project, text, environ).docker_environment == {
        "DOCKER_HOST": "unix:///b",
        "DOCKER_CONTEXT": "mine",
        "DOCKER_TLS_VERIFY": "1",
    }


def test_proxies_are_read_only_from_the_environment(project: Path) -> None:
    proxies = {
        name: f"http://me:hunter2@{name.replace('_', '-')}.example"
        for lower in ("http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy")
        for name in (lower, lower.upper())
    }
    settings = load(project, "", {**proxies, "PROXY": "x", "rsync_proxy": "x"})
    assert settings.proxies == proxies
    assert "hunter2" not in repr(settings)
    # Guix reads the lower case names, and other programs the upper case names.
    no_proxy = {"no_proxy": "*", "NO_PROXY": "*"}
    assert load(project, "HTTP_PROXY=x\n", {"NO_PROXY": "", "no_proxy": "*"}).proxies == no_proxy


def test_environment_overrides_proxies_of_the_docker_configuration(project: Path) -> None:
    """The docker command reads the proxies of containers there."""
    config = {"httpProxy": "http://a:hunter2@b.test", "noProxy": "c.test", "httpsProxy": 1}
    environ = {"DOCKER_CONFIG": str(project), "no_proxy": "d.test"}
    for content in ("[]", '{"proxies": {"default": []}}', '{"proxies": 1}', "["):
        (project / "config.json").write_text(content)
        assert load(project, "", environ).proxies.keys() == {"no_proxy", "NO_PROXY"}
    (project / "config.json").write_text(json.dumps({"proxies": {"default": config}}))
    proxies = load(project, "", environ).proxies
    assert (proxies["http_proxy"], proxies["no_proxy"]) == ("http://a:hunter2@b.test", "d.test")
    assert "https_proxy" not in proxies
    assert redact.clean("hunter2") == "***"
    # An env file can also name the directory.
    del environ["DOCKER_CONFIG"]
    assert load(project, f"DOCKER_CONFIG={project}\n", environ).proxies == proxies


def test_work_containers_get_the_proxies_of_the_settings(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", "http://not-this-one.example")
    expected = environment(load(project))
    assert not [name for name in expected if name.endswith("proxy")]
    no_proxy = {"no_proxy": "*", "NO_PROXY": "*"}
    assert environment(load(project, "", {"no_proxy": "*"})) == {**expected, **no_proxy}


# --- Env files ------------------------------------------------------------------------------


def test_variables_are_interpolated(project: Path) -> None:
    (project / ".env.local").write_text("TAGS=${V}-${W}-${X:-d}-${IMAGE_TAG}\n")
    text = "V=file\nIMAGE_TAG=7\nIMAGE=a/b:${IMAGE_TAG}\n"
    settings = load(project, text, {"V": "environ", "W": "outer", "X": ""})
    assert settings.tags == ("environ-outer-d-7",)
    assert settings.image.tag == "7"
    assert not any("not set" in note for note in settings.notes)


def test_ignored_platform_of_docker_is_reported(project: Path) -> None:
    environment = {"DOCKER_DEFAULT_PLATFORM": "linux/arm64"}
    (note,) = load(project, "", environment).notes
    assert note.startswith("environment: DOCKER_DEFAULT_PLATFORM is ignored")
    assert load(project, "PLATFORMS=linux/amd64\n", environment).notes == ()


def test_unset_variable_is_reported(project: Path) -> None:
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
def test_problem_has_the_line_of_its_cause(
    project: Path, text: str, lines: list[int], newline: str, mark: str
) -> None:
    messages = problems(project, (mark + text).replace("\n", newline))
    assert [problem.split(":")[1] for problem in messages] == [str(line) for line in lines]


def test_key_that_is_set_twice_is_an_error(project: Path) -> None:
    (problem,) = problems(project, "IMAGE=a\n\nTAGS=x\nIMAGE=b\n")
    assert problem == ".env:4: IMAGE: is also set on line 1; keep one"


def test_other_encoding_than_utf8_is_an_error(project: Path) -> None:
    assert problems(project, b"A=1\nIMAGE=\xff\n") == [
        ".env:2: is not UTF-8; save the file as UTF-8"
    ]
    assert problems(project, "IMAGE=a\n".encode("utf-16"))[0].startswith(".env:1: is not UTF-8")
    assert str(load(project, "\ufeffIMAGE=a\r\n").image) == "a:latest"


def test_directory_as_env_file_is_an_error(project: Path) -> None:
    (project / ".env").mkdir()
    with pytest.raises(SettingsError, match=r"^\.env: Is a directory"):
        load_settings(project, project, {})


@pytest.mark.parametrize(
    ("key", "setting"),
    [
        ("GUIX_PACKAGE", "GUIX_PACKAGES"),
        ("guix_packages", "GUIX_PACKAGES"),
        ("BUILDX_NODE", "BUILDX_NODES"),
    ],
)
def test_key_similar_to_a_setting_is_an_error(project: Path, key: str, setting: str) -> None:
    (problem,) = problems(project, f"{key}=x\n")
    assert problem == f".env:1: {key!r} is not a setting; did you mean {setting}?"


@pytest.mark.parametrize(
    ("key", "setting"),
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
def test_key_that_another_tool_can_read_is_a_note(project: Path, key: str, setting: str) -> None:
    settings = load(project, f"{key}=x\n")
    assert settings.notes == (f".env:1: {key!r} is not a setting; did you mean {setting}?",)


def test_other_unknown_key_is_a_note(project: Path) -> None:
    settings = load(project, "HTTP_PROXY=x\nCOMPOSE_PROJECT=y\n")
    assert settings.notes == (
        ".env:1: HTTP_PROXY: is not a setting of guix-tasks; ignored",
        ".env:2: COMPOSE_PROJECT: is not a setting of guix-tasks; ignored",
    )


# --- Secrets --------------------------------------------------------------------------------


def test_secrets_are_not_interpolated(project: Path) -> None:
    settings = load(
        project, f"DOCKER_USERNAME='${{A}} me '\nDOCKER_PASSWORD={PASSWORD}\n", {"A": "b"}
    )
    assert settings.docker_username == Secret("${A} me ")
    assert settings.docker_password == Secret(PASSWORD)
    assert settings.notes == ()


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_secret_is_read_from_a_file(project: Path, end: str) -> None:
    (project / "password").write_bytes(f"{PASSWORD}{end}".encode())
    settings = load(project, f"DOCKER_PASSWORD_FILE=${{N}}\n{USER}", {"N": "password"})
    assert settings.docker_password == Secret(PASSWORD)
    assert settings.origin("DOCKER_PASSWORD") == ".env:1: DOCKER_PASSWORD_FILE"
    assert load(project, USER, {"DOCKER_PASSWORD_FILE": "password"}) == settings


@pytest.mark.parametrize("content", [b"", b"\n", b"hunter\0two", b"hunter2\xff"])
def test_file_without_a_secret_is_an_error(project: Path, content: bytes) -> None:
    (project / "password").write_bytes(content)
    (problem,) = problems(project, f"DOCKER_PASSWORD_FILE=password\n{USER}")
    assert problem.startswith(".env:1: DOCKER_PASSWORD_FILE: the file ")
    assert "hunter" not in problem


def test_secret_that_is_set_twice_in_one_source_is_an_error(project: Path) -> None:
    (project / "password").write_text("a")
    text = "DOCKER_PASSWORD_FILE=password\nDOCKER_PASSWORD=b\n"
    assert problems(project, text + USER) == [
        ".env:1: DOCKER_PASSWORD_FILE: DOCKER_PASSWORD is also set; keep one of the two"
    ]
    environ = {"DOCKER_USERNAME": "a", "DOCKER_USERNAME_FILE": "password"}
    (problem,) = problems(project, "DOCKER_PASSWORD=b\n", environ)
    assert problem.startswith("environment: DOCKER_USERNAME_FILE: ")


def test_secret_of_a_later_source_wins(project: Path) -> None:
    (project / "password").write_text("from the file\n")
    in_file, literal = f"DOCKER_PASSWORD_FILE=password\n{USER}", f"DOCKER_PASSWORD=literal\n{USER}"
    environ = {"DOCKER_PASSWORD_FILE": "password"}
    assert load(project, literal, environ).docker_password == Secret("from the file")
    assert load(project, in_file, {"DOCKER_PASSWORD": "x"}).docker_password == Secret("x")
    assert load(project, in_file + "DOCKER_PASSWORD=\n").docker_password == Secret("from the file")
    (project / ".env.local").write_text("DOCKER_PASSWORD=\nDOCKER_USERNAME=\n")
    assert load(project, in_file).docker_password is None


def test_secret_has_no_readable_repr() -> None:
    secret = Secret("hunter2")
    assert secret.reveal() == "hunter2"
    assert str(secret) == repr(secret) == f"{secret}" == "Secret(…)"
    assert not hasattr(secret, "__dict__")
    assert {secret: 1}[Secret("hunter2")] == 1


def test_repr_and_errors_have_no_secret(project: Path) -> None:
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
        clear_file_cache()
        (project / ".env").write_text(text)
        with pytest.raises(SettingsError) as caught:
            load_settings(project, project, environ if "${" in text else {})
        assert "hunter" not in repr((caught.value, caught.value.problems, caught.value.args))
        assert caught.value.__context__ is None


def test_second_line_of_a_secret_is_not_in_a_note(project: Path) -> None:
    notes = load(project, f"DOCKER_PASSWORD=aGVsbG8\nd29ybGQh=\n{USER}").notes
    assert notes == (".env:2: sets a name that is not a setting of guix-tasks; ignored",)


# --- No side effects ------------------------------------------------------------------------


class Untouchable(Mapping[str, str]):
    """An environment that raises an error on every access."""

    def __getitem__(self, key: str) -> str:
        raise AssertionError(key)

    def __iter__(self) -> Any:
        raise AssertionError

    def __len__(self) -> int:
        raise AssertionError


def test_process_environment_is_not_accessed(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:  # pytest uses the environment later
        patch.setattr(os, "environ", Untouchable())
        settings = load(project, "IMAGE=${A}/b\nTAGS=x\n", {"A": "a", "no_proxy": "x"})
        assert str(settings.image) == "a/b:latest"
        assert problems(project, "IMAGE=A\n")


def test_import_reads_nothing(tmp_path: Path) -> None:
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


# --- Any env file ---------------------------------------------------------------------------

BLOCKS = st.sampled_from(
    ["", "\n", "# comment", "  ", "A{}=1", "B{}='x\ny'", 'C{}="x\n\n#\n"', "D{}=x # y", "\t\x0c"]
)


@DETERMINISTIC
@given(st.lists(BLOCKS), st.sampled_from(["\n", "\r\n", "\r"]))
def test_problem_has_the_right_line_after_any_text(
    tmp_path_factory: pytest.TempPathFactory, blocks: list[str], newline: str
) -> None:
    directory = tmp_path_factory.getbasetemp()
    prefix = "".join(f"{block.format(n)}\n" for n, block in enumerate(blocks))
    text = f"{prefix}GUIX_CORES=x\nmalformed line\nGUIX_MAX_JOBS=x\n".replace("\n", newline)
    line = prefix.count("\n") + 1
    assert [problem.split(": ")[0] for problem in problems(directory, text.encode())] == [
        f".env:{line + 1}",
        f".env:{line}",
        f".env:{line + 2}",
    ]


# --- Redacted secrets -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "is_reported"),
    [
        ("https://me:hunter2@git.test/x", True),
        ("https://ghp_0123@git.test/x", True),
        ("ssh://me:hunter2@git.test/x", True),
        ("ssh://git@git.test/x", False),
        ("https://git.test/a@b", False),
    ],
)
def test_account_in_a_channel_url_is_reported_and_redacted(
    project: Path, url: str, *, is_reported: bool
) -> None:
    (project / "channels.scm").write_text(f'(list (channel (name \'x) (url "{url}")))\n')
    settings = load(project, "GUIX_CHANNELS=channels.scm\n")
    note_start = ".env:1: GUIX_CHANNELS: a URL contains a user or a password"
    assert [note.startswith(note_start) for note in settings.notes] == [True] * is_reported
    if is_reported and "hunter2" in url:
        assert redact.clean("with hunter2") == "with ***"


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
    output = redact.clean(
        "me pass%20word abcdefghij { hunter1 1.2.3 buck hunter3 hunter4 bWU6cGFzcyB3b3Jk"
    )
    assert output == "me *** *** { *** 1.2.3 buck *** *** ***"
