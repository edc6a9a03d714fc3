"""Image references and platforms: parsing, errors and canonical text."""

from __future__ import annotations

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guix_tasks.oci.platform import Platform
from guix_tasks.oci.reference import ImageReference, is_loopback, quoted

SHA256 = "sha256:" + "0123456789abcdef" * 4

# text: registry, repository, tag, digest and canonical text
VALID_REFERENCES = {
    "debian": ("docker.io", "library/debian", None, None, "debian"),
    "debian:12": ("docker.io", "library/debian", "12", None, "debian:12"),
    "docker.io/debian": ("docker.io", "library/debian", None, None, "debian"),
    "docker.io/library/debian:12": ("docker.io", "library/debian", "12", None, "debian:12"),
    "index.docker.io/debian": ("docker.io", "library/debian", None, None, "debian"),
    "metacall/guix:latest": ("docker.io", "metacall/guix", "latest", None, "metacall/guix:latest"),
    "docker.io/metacall/guix": ("docker.io", "metacall/guix", None, None, "metacall/guix"),
    "docker.io/library/a/b": ("docker.io", "library/a/b", None, None, "library/a/b"),
    # A host is followed by a slash; this is a tag.
    "example.org:5000": ("docker.io", "library/example.org", "5000", None, "example.org:5000"),
    "localhost:5055": ("docker.io", "library/localhost", "5055", None, "localhost:5055"),
    "localhost/app": ("localhost", "app", None, None, "localhost/app"),
    "localhost:5055/app": ("localhost:5055", "app", None, None, "localhost:5055/app"),
    "localhost:5055/a/b:T-1": ("localhost:5055", "a/b", "T-1", None, "localhost:5055/a/b:T-1"),
    "host:80/app": ("host:80", "app", None, None, "host:80/app"),
    "example.org/app": ("example.org", "app", None, None, "example.org/app"),
    # A namespace has no capital letters, so this is a host of the local domain.
    "BUILDHOST/app": ("BUILDHOST", "app", None, None, "BUILDHOST/app"),
    "127.0.0.1:5055/app:x": ("127.0.0.1:5055", "app", "x", None, "127.0.0.1:5055/app:x"),
    "[::1]/app": ("[::1]", "app", None, None, "[::1]/app"),
    "[2001:db8::1]:5055/a:b": ("[2001:db8::1]:5055", "a", "b", None, "[2001:db8::1]:5055/a:b"),
    f"debian@{SHA256}": ("docker.io", "library/debian", None, SHA256, f"debian@{SHA256}"),
    f"x.y/a:t@{SHA256}": ("x.y", "a", "t", SHA256, f"x.y/a:t@{SHA256}"),
    "a__b/c---d.e_f:_x.Y-z": (
        "docker.io",
        "a__b/c---d.e_f",
        "_x.Y-z",
        None,
        "a__b/c---d.e_f:_x.Y-z",
    ),
    # A reference keeps its registry if Docker would parse the short form as another reference.
    "docker.io/my.site/app": ("docker.io", "my.site/app", None, None, "docker.io/my.site/app"),
    "docker.io/localhost/a": ("docker.io", "localhost/a", None, None, "docker.io/localhost/a"),
    f"docker.io/library/{'a' * 64}": (
        "docker.io",
        f"library/{'a' * 64}",
        None,
        None,
        f"docker.io/library/{'a' * 64}",
    ),
}

INVALID_REFERENCES = {
    "": "is empty",
    "a" * 64: "an image ID",
    "https://example.org/app": "not a URL",
    "Debian": "repository 'Debian' has capital letters; write 'debian'",
    "example.org/team/App:1": "write 'team/app'",
    "team/App": "has capital letters",
    "debian:": "'' is not a tag",
    "debian:-x": "'-x' is not a tag",
    "debian:a:b": "is not a tag",
    "debian:" + "x" * 129: "1 to 128",
    "debian:é": "is not a tag",
    "debian\n": "is not a repository",
    "debian:12\n": "is not a tag",
    "debian@": "'' is not a digest",
    "debian@sha256:abc": "is not a digest",
    "debian@md5:" + "a" * 32: "is not a digest",
    "debian@" + SHA256.upper(): "is not a digest",
    f"debian@{SHA256}\n": "is not a digest",
    f"@{SHA256}": "is not a repository",
    ":tag": "is not a repository",
    "/app": "is not a repository",
    "app/": "is not a repository",
    "a//b": "is not a repository",
    "a..b": "is not a repository",
    "a/-b": "is not a repository",
    "a___b": "is not a repository",
    "a b": "is not a repository",
    "example.org/" + "a" * 244: "has 256 characters; write at most 255",
    "-x.org/app": "is not a registry",
    "host:/app": "is not a registry",
    "host:80x/app": "is not a registry",
    "[::1/app": "is not a registry",
    "[fe80::1%eth0]/app": "is not a registry",
    "fc00::1:5055/app": "is not a registry",
}


@pytest.mark.parametrize(("text", "expected"), VALID_REFERENCES.items())
def test_references_are_parsed_like_those_of_docker(
    text: str, expected: tuple[str, str, str | None, str | None, str]
) -> None:
    registry, repository, tag, digest, canonical = expected
    reference = ImageReference.parse(text)
    assert reference == ImageReference(registry, repository, tag, digest)
    assert str(reference) == canonical
    assert ImageReference.parse(str(reference)) == reference


@pytest.mark.parametrize(("text", "message"), INVALID_REFERENCES.items())
def test_invalid_reference_is_explained(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        ImageReference.parse(text)
    assert message in str(caught.value)
    assert str(caught.value).isprintable()


def test_error_does_not_repeat_a_password_in_a_url() -> None:
    with pytest.raises(ValueError) as caught:
        ImageReference.parse("https://user:hunter2@example.org/app")
    assert "hunter2" not in str(caught.value)


def test_longest_name_and_tag_are_valid() -> None:
    text = f"example.org/{'a' * 243}:{'t' * 128}"
    assert str(ImageReference.parse(text)) == text


def test_name_has_no_tag_and_no_digest() -> None:
    assert ImageReference.parse(f"debian:12@{SHA256}").name == "debian"
    assert ImageReference.parse("localhost:5055/a:b").name == "localhost:5055/a"


def test_with_tag_replaces_tag_and_digest() -> None:
    reference = ImageReference.parse(f"localhost:5055/app:1@{SHA256}")
    assert str(reference.with_tag("1-pull")) == "localhost:5055/app:1-pull"
    with pytest.raises(ValueError, match="is not a tag"):
        reference.with_tag("a/b")


def test_reference_of_the_constructor_is_checked() -> None:
    with pytest.raises(ValueError, match="is 'library/debian'"):
        ImageReference("docker.io", "debian")


_labels = st.from_regex(r"[a-z0-9](-[a-z0-9]+)?", fullmatch=True)
_ports = st.one_of(st.just(""), st.integers(1, 65535).map(lambda port: f":{port}"))
_registries = st.one_of(
    st.just("docker.io"),
    st.builds("{}.{}{}".format, _labels, _labels, _ports),
    st.builds("localhost{}".format, _ports),
    st.builds("[{}]{}".format, st.ip_addresses(v=6).map(str), _ports),
)
_components = st.from_regex(r"[a-z0-9]{1,5}(([._]|__|-{1,3})[a-z0-9]{1,5}){0,2}", fullmatch=True)
_repositories = st.lists(_components, min_size=2, max_size=4).map("/".join)
_tags = st.none() | st.text(string.ascii_letters + string.digits + "_", min_size=1, max_size=128)
_digests = st.none() | st.just(SHA256)


@settings(max_examples=50)  # generating text from regular expressions is slow
@given(_registries, _repositories, _tags, _digests)
def test_text_of_a_reference_is_parsed_back(
    registry: str, repository: str, tag: str | None, digest: str | None
) -> None:
    reference = ImageReference(registry, repository, tag, digest)
    assert ImageReference.parse(str(reference)) == reference
    suffix = str(reference).removeprefix(reference.name)
    assert ImageReference.parse(f"{registry}/{repository}{suffix}") == reference


PLATFORMS = {
    "linux/amd64": ("x86_64-linux", "linux-amd64"),
    "linux/386": ("i686-linux", "linux-386"),
    "linux/arm64": ("aarch64-linux", "linux-arm64"),
    "linux/arm/v7": ("armhf-linux", "linux-arm-v7"),
    "linux/ppc64le": ("powerpc64le-linux", "linux-ppc64le"),
    "linux/riscv64": ("riscv64-linux", "linux-riscv64"),
}


@pytest.mark.parametrize(("text", "names"), PLATFORMS.items())
def test_platform_has_guix_system_and_tag_suffix(text: str, names: tuple[str, str]) -> None:
    platform = Platform.parse(text)
    assert (platform.guix_system, platform.tag_suffix) == names
    assert str(platform) == text
    assert "/".join(filter(None, (platform.os, platform.architecture, platform.variant))) == text


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("linux/arm64/v8", "linux/arm64"),
        ("linux/aarch64", "linux/arm64"),
        ("linux/aarch64/v8", "linux/arm64"),
        ("linux/x86_64", "linux/amd64"),
        ("Linux/AMD64", "linux/amd64"),
        ("linux/i686", "linux/386"),
        ("linux/arm", "linux/arm/v7"),
        ("linux/armv7l", "linux/arm/v7"),
    ],
)
def test_other_spellings_of_a_platform_are_parsed(text: str, canonical: str) -> None:
    assert Platform.parse(text) == Platform.parse(canonical)


@pytest.mark.parametrize(
    "text",
    [
        "", "linux", "amd64", "linux/", "//linux/amd64", "linux//amd64", "linux/s390x",
        "windows/amd64", "linux/arm/v6", "a/b/c/d",
    ],
)  # fmt: skip
def test_unsupported_platform_is_reported_with_the_supported_ones(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        Platform.parse(text)
    assert all(platform in str(caught.value) for platform in PLATFORMS)


@given(st.text())
def test_quoted_is_printable_and_short(text: str) -> None:
    assert quoted(text).isprintable()
    assert quoted("x" * 1000).endswith("...'")


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True), ("localhost:5055", True), ("127.0.0.1:80", True),
        ("docker.io", False), ("localhost.test:5055", False), ("[::1]:80", True),
        ("127.test", False),
    ],
)  # fmt: skip
def test_loopback_hosts_are_recognised(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
