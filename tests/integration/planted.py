"""Secrets that every project of the tests has, and the look for them in all that comes out of it.

They are where nothing that a test tests is changed by them: in the address of a proxy for FTP,
which nobody speaks, in an account of the docker command line for a registry that there is not, in a
variable of the environment that is none of guix-tasks' own.
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
class Planted:
    """The planted secrets, and what has been looked through for them."""

    secrets: set[bytes] = field(default_factory=set)
    """In each way in which they could be written."""
    number: int = 0
    outputs: int = 0
    images: set[str] = field(default_factory=set)
    containers: set[str] = field(default_factory=set)
    files: int = 0
    layers: int = 0
    command_lines: int = 0

    def plant(self) -> str:
        """A secret of its own, which is nowhere else."""
        secret = f"planted-{secrets.token_hex(12)}"
        self.know(secret)
        return secret

    def know(self, secret: str) -> None:
        self.number += 1
        self.secrets |= {secret.encode(), base64.b64encode(secret.encode())}

    def look(self, where: str, text: str | bytes) -> None:
        """Fail where one of them is in a text."""
        data = text.encode(errors="surrogateescape") if isinstance(text, str) else text
        for secret in self.secrets:
            place = data.find(secret)
            assert place < 0, (
                f"a planted secret is in {where}: {data[max(0, place - 200) : place]!r}"
            )

    def look_at_output(self, what: str, *texts: str | bytes) -> None:
        self.outputs += 1
        for text in texts:
            self.look(f"the output of {what}", text)

    def look_at_file(self, path: Path) -> None:
        """A file of any size, and its name."""
        self.files += 1
        self.look("the name of a file", str(path))
        longest = max(map(len, self.secrets))
        with path.open("rb") as file:
            end = b""
            while piece := file.read(_CHUNK):
                self.look(str(path), end + piece)
                end = piece[-longest:]

    @property
    def told(self) -> str:
        return (
            f"{self.outputs} outputs, {self.files} files, {len(self.images)} images with their "
            f"histories, {len(self.containers)} containers, {self.layers} archives of all layers "
            f"and {self.command_lines} command lines scanned for {self.number} planted secrets: "
            "none found"
        )


PLANTED = Planted()

_PROXY, _ACCOUNT, _VARIABLE = PLANTED.plant(), PLANTED.plant(), PLANTED.plant()

ENVIRONMENT = {
    "ftp_proxy": f"http://somebody:{_PROXY}@127.0.0.1:9",
    "GITHUB_TOKEN": _VARIABLE,
}


def write_account(home: Path) -> None:
    """An account as `docker login` leaves it, for a registry that nobody asks."""
    account = base64.b64encode(f"somebody:{_ACCOUNT}".encode()).decode()
    PLANTED.secrets.add(account.encode())
    directory = home / ".docker"
    directory.mkdir()
    auths = {"auths": {"planted.invalid": {"auth": account}}}
    (directory / "config.json").write_text(json.dumps(auths))
