"""Image references with the syntax of Docker and the OCI.

Each ``ImageReference`` is well-formed. Errors are instances of ``ValueError`` with one line, the
cause and a hint.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

DEFAULT_TAG = "latest"

_HUB = "docker.io"
_LEGACY_HUB = "index.docker.io"
_OFFICIAL = "library/"

# The grammar of github.com/distribution/reference, regexp.go; its \w is ASCII.
_COMPONENT = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_REGISTRY = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[a-fA-F0-9:]+\])(?::[0-9]+)?")
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,127}")
_IDENTIFIER = re.compile(r"[a-f0-9]{64}")
_REPOSITORY_MAX = 255

# Hex digits of each digest algorithm that the OCI image specification registers.
_DIGEST_DIGITS = {"sha256": 64, "sha384": 96, "sha512": 128}


def quoted(text: str) -> str:
    """Quote text for an error message; the result is printable and fits on a line."""
    return repr(text if len(text) <= 80 else f"{text[:77]}...")  # noqa: PLR2004


def is_loopback(host: str) -> bool:
    """Return True if a host, with or without a port, is the machine itself, by name or address."""
    return bool(re.fullmatch(r"(localhost|127\.[0-9.]+|\[::1\])(:[0-9]+)?", host))


@dataclass(frozen=True)
class ImageReference:
    """Image reference with explicit registry and repository, as resolved by Docker.

    For example, ``debian`` is registry ``docker.io``, repository ``library/debian``, no tag and
    no digest. The rules are those of github.com/distribution/reference (``ParseNormalizedNamed``).
    Raise ``ValueError`` if a part does not match the grammar.
    """

    registry: str
    repository: str
    tag: str | None = None
    digest: str | None = None

    def __post_init__(self) -> None:
        if not _REGISTRY.fullmatch(self.registry):
            raise ValueError(
                f"{quoted(self.registry)} is not a registry; write HOST or HOST:PORT, "
                "an IPv6 address in brackets"
            )
        _check_repository(self.registry, self.repository)
        if self.registry == _HUB and "/" not in self.repository:
            raise ValueError(f"{self.repository!r} on {_HUB} is {_OFFICIAL + self.repository!r}")
        if self.tag is not None:
            check_tag(self.tag)
        if self.digest is not None:
            algorithm, _, encoded = self.digest.partition(":")
            digits = _DIGEST_DIGITS.get(algorithm)
            if digits is None or not re.fullmatch(f"[a-f0-9]{{{digits}}}", encoded):
                raise ValueError(
                    f"{quoted(self.digest)} is not a digest; write sha256: and 64 lower case hex "
                    "digits"
                )

    @classmethod
    def parse(cls, text: str) -> ImageReference:
        """Parse ``[REGISTRY/]REPOSITORY[:TAG][@DIGEST]``, as on Docker's command line."""
        if not text:
            raise ValueError("an image reference is empty; write REGISTRY/REPOSITORY:TAG")
        if _IDENTIFIER.fullmatch(text):
            raise ValueError("64 hex digits are an image ID; write its name, REPOSITORY:TAG")
        if "://" in text:
            # The error does not repeat the URL, which can contain a password.
            raise ValueError("an image reference is not a URL; remove the part up to and with '//'")
        name, at, digest = text.partition("@")
        registry, name = _split_registry(name)
        repository, colon, tag = name.partition(":")
        return cls(registry, repository, tag if colon else None, digest if at else None)

    def with_tag(self, tag: str) -> ImageReference:
        """Return another tag of the same repository, without a digest."""
        return replace(self, tag=tag, digest=None)

    @property
    def name(self) -> str:
        """Registry and repository as displayed by Docker, without tag and digest."""
        full = f"{self.registry}/{self.repository}"
        if self.registry != _HUB:
            return full
        short = self.repository
        if short.startswith(_OFFICIAL) and short.count("/") == 1:
            short = short.removeprefix(_OFFICIAL)
        # The registry in docker.io/my.site/app is necessary, although Docker omits it: without it,
        # my.site would be the registry.
        is_equivalent = _split_registry(short) == (_HUB, self.repository)
        return short if is_equivalent and not _IDENTIFIER.fullmatch(short) else full

    def __str__(self) -> str:
        tag = "" if self.tag is None else f":{self.tag}"
        digest = "" if self.digest is None else f"@{self.digest}"
        return f"{self.name}{tag}{digest}"


def check_tag(tag: str) -> None:
    """Raise ``ValueError`` unless ``tag`` is a valid tag of an image."""
    if not _TAG.fullmatch(tag):
        raise ValueError(
            f"{quoted(tag)} is not a tag; write 1 to 128 letters, digits, '_', '.' and '-', "
            "not beginning with '.' or '-'"
        )


def _split_registry(name: str) -> tuple[str, str]:
    """Split a name into registry and repository by Docker's rule (``splitDockerDomain``)."""
    first, slash, rest = name.partition("/")
    # Only a registry can contain a dot, a colon or a capital letter.
    is_registry = first == "localhost" or any(c in ".:" for c in first) or first != first.lower()
    if not slash or not is_registry:
        first, rest = _HUB, name
    elif first == _LEGACY_HUB:
        first = _HUB
    return first, _OFFICIAL + rest if first == _HUB and "/" not in rest else rest


def _check_repository(registry: str, repository: str) -> None:
    # The user wrote "Foo", not "library/Foo".
    name = quoted(repository.removeprefix(_OFFICIAL))
    # The registry counts for Podman and for Docker before 25 (OCI distribution specification).
    if (length := len(f"{registry}/{repository}")) > _REPOSITORY_MAX:
        raise ValueError(
            f"a repository name with its registry has {length} characters; write at most "
            f"{_REPOSITORY_MAX}"
        )
    if _REPOSITORY.fullmatch(repository):
        return
    if _REPOSITORY.fullmatch(repository.lower()):
        raise ValueError(f"repository {name} has capital letters; write {name.lower()}")
    raise ValueError(
        f"{name} is not a repository; write lower case letters and digits, "
        "with single '.', '_' or '-' between them and '/' between the parts"
    )
