"""Names of images, as Docker and the OCI write them.

Text becomes one of these values at the edge; a value that exists is well-formed.
Every error is a ``ValueError`` of one line: what is wrong, then what would be right.
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
    """Foreign text for an error message: in quotes, printable, and never longer than a line."""
    return repr(text if len(text) <= 80 else f"{text[:77]}...")  # noqa: PLR2004


@dataclass(frozen=True)
class ImageReference:
    """An image reference with its registry and repository written out, as Docker resolves it.

    ``debian`` is registry ``docker.io``, repository ``library/debian``, no tag, no digest.
    The rules are those of github.com/distribution/reference (``ParseNormalizedNamed``).
    Raises ``ValueError`` when a part does not fit the grammar.
    """

    registry: str
    repository: str
    tag: str | None = None
    digest: str | None = None

    def __post_init__(self) -> None:
        _check_registry(self.registry)
        _check_repository(self.repository)
        if self.registry == _HUB and "/" not in self.repository:
            raise ValueError(f"{self.repository!r} on {_HUB} is {_OFFICIAL + self.repository!r}")
        if self.tag is not None:
            check_tag(self.tag)
        if self.digest is not None:
            _check_digest(self.digest)

    @classmethod
    def parse(cls, text: str) -> ImageReference:
        """``[REGISTRY/]REPOSITORY[:TAG][@DIGEST]``, as on Docker's command line."""
        if not text:
            raise ValueError("an image reference is empty; write REGISTRY/REPOSITORY:TAG")
        if _IDENTIFIER.fullmatch(text):
            raise ValueError("64 hex digits are an image's ID; write its name, REPOSITORY:TAG")
        if "://" in text:
            # Not shown: a URL may have a password in it.
            raise ValueError("an image reference is not a URL; leave out all up to the '//'")
        named, at, digest = text.partition("@")
        registry, named = _split_registry(named)
        repository, colon, tag = named.partition(":")
        return cls(registry, repository, tag if colon else None, digest if at else None)

    def with_tag(self, tag: str) -> ImageReference:
        """Another tag of the same repository; a digest is dropped, for it names one image."""
        return replace(self, tag=tag, digest=None)

    @property
    def canonical(self) -> str:
        """The reference with nothing left out: ``docker.io/library/debian:12``."""
        return f"{self.registry}/{self.repository}{self._suffix}"

    @property
    def name(self) -> str:
        """Registry and repository as Docker shows them, without tag and digest."""
        full = f"{self.registry}/{self.repository}"
        if self.registry != _HUB:
            return full
        short = self.repository
        if short.startswith(_OFFICIAL) and short.count("/") == 1:
            short = short.removeprefix(_OFFICIAL)
        # docker.io/my.site/app must keep its registry, or it would be read back as an image
        # of the registry my.site; Docker shortens it all the same.
        reads_back = _split_registry(short) == (_HUB, self.repository)
        return short if reads_back and not _IDENTIFIER.fullmatch(short) else full

    def __str__(self) -> str:
        return self.name + self._suffix

    @property
    def _suffix(self) -> str:
        tag = "" if self.tag is None else f":{self.tag}"
        return tag if self.digest is None else f"{tag}@{self.digest}"


def check_tag(tag: str) -> None:
    """Raise ``ValueError`` unless ``tag`` can be an image's tag."""
    if not _TAG.fullmatch(tag):
        raise ValueError(
            f"{quoted(tag)} is not a tag; write 1 to 128 of letters, digits, '_', '.' and '-', "
            "the first of them not '.' or '-'"
        )


def _split_registry(name: str) -> tuple[str, str]:
    """Tell the registry from the rest, by Docker's rule (``splitDockerDomain``)."""
    first, slash, rest = name.partition("/")
    # A namespace has no dot, no colon and no capital, so what has one is a registry.
    registry = first == "localhost" or any(c in ".:" for c in first) or first != first.lower()
    if not slash or not registry:
        first, rest = _HUB, name
    elif first == _LEGACY_HUB:
        first = _HUB
    return first, _OFFICIAL + rest if first == _HUB and "/" not in rest else rest


def _check_registry(registry: str) -> None:
    if not _REGISTRY.fullmatch(registry):
        raise ValueError(
            f"{quoted(registry)} is not a registry; write HOST or HOST:PORT, "
            "an IPv6 address in brackets"
        )


def _check_repository(repository: str) -> None:
    # Docker's own prefix would only puzzle the person who wrote "Foo".
    shown = quoted(repository.removeprefix(_OFFICIAL))
    if len(repository) > _REPOSITORY_MAX:
        raise ValueError(
            f"a repository's name has {len(repository)} characters; write at most {_REPOSITORY_MAX}"
        )
    if _REPOSITORY.fullmatch(repository):
        return
    if _REPOSITORY.fullmatch(repository.lower()):
        raise ValueError(f"repository {shown} has capital letters; write {shown.lower()}")
    raise ValueError(
        f"{shown} is not a repository; write lower case letters and digits, "
        "with single '.', '_' or '-' between them and '/' between the parts"
    )


def _check_digest(digest: str) -> None:
    algorithm, _, encoded = digest.partition(":")
    digits = _DIGEST_DIGITS.get(algorithm)
    if digits is None or not re.fullmatch(f"[a-f0-9]{{{digits}}}", encoded):
        raise ValueError(
            f"{quoted(digest)} is not a digest; write sha256: and 64 lower case hex digits"
        )
