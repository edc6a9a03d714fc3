"""Secrets that are planted in each test project, and the search for them in all results.

The secrets do not influence the tests: they are in the address of a proxy for FTP, which no program
uses, in an account of the docker command line for a registry that does not exist, and in an
environment variable that guix-tasks does not read.
"""

from __future__ import annotations

import base64
import json
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_CHUNK = 1 << 24


@dataclass
class PlantedSecrets:
    """The planted secrets, and counts of what was searched for them."""

    secrets: set[bytes] = field(default_factory=set)
    """All encodings of the secrets."""
    number: int = 0
    outputs: int = 0
    images: set[str] = field(default_factory=set)
    containers: set[str] = field(default_factory=set)
    files: int = 0
    layers: int = 0
    command_lines: int = 0

    def plant(self) -> str:
        """Create a unique secret."""
        secret = f"planted-{secrets.token_hex(12)}"
        self.add(secret)
        return secret

    def add(self, secret: str) -> None:
        self.number += 1
        self.secrets |= {secret.encode(), base64.b64encode(secret.encode())}

    def check(self, source: str, text: str | bytes) -> None:
        """Fail if a text contains a planted secret."""
        data = text.encode(errors="surrogateescape") if isinstance(text, str) else text
        for secret in self.secrets:
            start = data.find(secret)
            assert start < 0, (
                f"a planted secret is in {source}: {data[max(0, start - 200) : start]!r}"
            )

    def check_output(self, source: str, *texts: str | bytes) -> None:
        self.outputs += 1
        for text in texts:
            self.check(f"the output of {source}", text)

    def check_file(self, path: Path) -> None:
        """Check the name and the content of a file of any size."""
        self.files += 1
        self.check("the name of a file", str(path))
        longest = max(map(len, self.secrets))
        with path.open("rb") as file:
            end = b""
            while chunk := file.read(_CHUNK):
                self.check(str(path), end + chunk)
                end = chunk[-longest:]

    @property
    def summary(self) -> str:
        return (
            f"{self.outputs} outputs, {self.files} files, {len(self.images)} images with their "
            f"histories, {len(self.containers)} containers, {self.layers} archives of all layers "
            f"and {self.command_lines} command lines scanned for {self.number} planted secrets: "
            "none found"
        )


PLANTED_SECRETS = PlantedSecrets()

_PROXY, _ACCOUNT, _VARIABLE = (PLANTED_SECRETS.plant() for _ in range(3))

ENVIRONMENT = {
    "ftp_proxy": f"http://somebody:{_PROXY}@127.0.0.1:9",
    "GITHUB_TOKEN": _VARIABLE,
}


def write_account(home: Path) -> None:
    """Write an account for a registry that does not exist, as `docker login` writes it."""
    account = base64.b64encode(f"somebody:{_ACCOUNT}".encode()).decode()
    PLANTED_SECRETS.secrets.add(account.encode())
    directory = home / ".docker"
    directory.mkdir()
    auths = {"auths": {"planted.invalid": {"auth": account}}}
    (directory / "config.json").write_text(json.dumps(auths))
