"""Download and unpack Debian packages without installing them.

apt writes only to a private directory.  From the machine's apt it takes only the configuration
(proxies, certificates) and the address of the Debian mirror.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from guix_tasks.bootstrap.service import kept_environment, locked
from guix_tasks.errors import EngineError, GuixTasksError
from guix_tasks.files import cache_home

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

ENGLISH = {"LC_ALL": "C.UTF-8", "LANGUAGE": "C"}
"""Variables without which errors and warnings cannot be distinguished."""

# Fields of an index target that distinguish Debian's main archive from its security archive and
# third parties, and the address.
_TARGET = "$(ORIGIN)|$(LABEL)|$(COMPONENT)|$(REPO_URI)"


def on_debian() -> bool:
    """Return True if this machine has the programs to download and unpack Debian packages."""
    return all(map(shutil.which, ("apt-get", "dpkg", "dpkg-deb")))


def host_suite() -> str | None:
    """Return the code name of this machine's Debian release, or None on another system."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return None
    return release.get("VERSION_CODENAME") if release.get("ID") == "debian" else None


def required_suite(product: str, hint: str, failure: type[GuixTasksError]) -> str:
    """Return the code name of this machine's Debian release, from which a product is unpacked."""
    suite = host_suite()
    if suite is None:
        raise failure(
            f"cannot unpack {product} from Debian's packages: this host is not Debian; {hint}"
        )
    return suite


@dataclass(frozen=True)
class Apt:
    """Private apt for some suites of the machine's Debian mirror.

    ``status`` is a dpkg status file with the packages that count as installed (default: none).
    ``failure`` is the exception class to raise, which determines the exit code.
    """

    suites: Sequence[str]
    status: Path | None = None
    failure: type[GuixTasksError] = EngineError
    directory: Path = field(default_factory=lambda: cache_home() / "apt")

    def update(self) -> None:
        """Fetch the package lists; required before a download."""
        if not on_debian():
            raise self.failure(
                "cannot unpack Debian packages: apt-get, dpkg or dpkg-deb is not installed; "
                "install Docker Engine with the packages of your distribution"
            )
        with locked(self.directory / "lock"):
            (self.directory / "lists" / "partial").mkdir(parents=True, exist_ok=True)
            (self.directory / "status").touch()
            sources = "".join(f"{self.source(suite)}\n" for suite in self.suites)
            self._file("list").write_text(sources, encoding="utf-8")
            self._file("conf").write_text(self._configure(), encoding="utf-8")
            self._apt_get("update")

    def download(self, packages: Sequence[str], into: Path) -> None:
        """Download these packages (``name`` or ``name/suite``) without dependencies."""
        into.mkdir(parents=True, exist_ok=True)
        self._apt_get("download", *packages, cwd=into)

    def install_set(self, packages: Sequence[str], into: Path) -> None:
        """Download these packages and their dependencies."""
        (into / "partial").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.directory) as scratch:
            # apt locks the directory of the status file, which may be the machine's.
            status = shutil.copyfile(self.status or self.directory / "status", f"{scratch}/status")
            self._apt_get(
                *("install", "--yes", "--no-install-recommends", "--download-only"),
                *("-o", f"Dir::State::status={status}"),
                *("-o", f"Dir::Cache::Archives={into.resolve()}"),
                *packages,
            )
        (into / "lock").unlink(missing_ok=True)
        shutil.rmtree(into / "partial")

    def unpack(self, packages: Sequence[str], root: Path, *, closure: bool = False) -> None:
        """Download packages and unpack them to the new directory ``root`` atomically.

        ``closure`` includes their dependencies.
        """
        self.update()
        # An interrupted run may have left an incomplete directory.
        unfinished = root.with_name(f"{root.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        download = self.install_set if closure else self.download
        download(packages, unfinished / "debs")
        debs = sorted((unfinished / "debs").glob("*.deb"))
        unpack(debs, unfinished / "root", self.failure)
        (unfinished / "root").rename(root)
        shutil.rmtree(unfinished)

    def source(self, suite: str) -> str:
        """Return the line of a sources list for a suite of the machine's mirror."""
        # The machine may be configured for foreign architectures and other indexes.
        options = f"arch={self._architecture} target=Packages lang=none"
        signed_by = f" signed-by={KEYRING}" if KEYRING.exists() else ""
        return f"deb [{options}{signed_by}] {self.mirror} {suite} main"

    @cached_property
    def mirror(self) -> str:
        """Address of the Debian mirror in this machine's configuration."""
        listing = ("indextargets", "--format", _TARGET)
        address = debian_address(_run(["apt-get", *listing]).stdout)
        if not address:
            # In a fresh container the machine's apt has no package lists and does not know the
            # origin of its sources.  Fetch the lists, but into the private directory.
            lists = ("-o", f"Dir::State::Lists={self.directory / 'lists'}")
            _run(["apt-get", *lists, "-o", "APT::Sandbox::User=root", "update"])
            address = debian_address(_run(["apt-get", *lists, *listing]).stdout)
        if not address:
            raise self.failure(
                "cannot find a Debian mirror that answers in this machine's apt sources; fix them "
                "until 'apt-get update' works, or install Docker Engine yourself"
            )
        return address

    @cached_property
    def _architecture(self) -> str:
        return _run(["dpkg", "--print-architecture"]).stdout.strip()

    def _file(self, suffix: str) -> Path:
        return self.directory / f"{'-'.join(self.suites)}.{suffix}"

    def _configure(self) -> str:
        sources, index = self._file("list"), self._file("bin").name
        # apt reads this after the machine's configuration, so these values override it.
        return "\n".join(
            [
                "#clear APT::Update::Pre-Invoke;",  # hooks of the machine do not apply here
                "#clear APT::Update::Post-Invoke;",
                "#clear APT::Update::Post-Invoke-Success;",
                f'Dir::Etc::SourceList "{sources}";',
                'Dir::Etc::SourceParts "/dev/null";',
                'Dir::Etc::Preferences "/dev/null";',
                'Dir::Etc::PreferencesParts "/dev/null";',
                f'Dir::State "{self.directory}";',
                f'Dir::State::Lists "{self.directory}/lists";',
                f'Dir::State::status "{self.directory}/status";',
                f'Dir::Cache "{self.directory}";',
                f'Dir::Cache::pkgcache "{index}";',
                'Dir::Cache::srcpkgcache "";',
                'APT::Default-Release "";',
                'APT::Update::Error-Mode "any";',  # else an unreachable mirror is only a warning
                'APT::Get::List-Cleanup "false";',  # keep the lists of other suites
                'APT::Sandbox::User "root";',  # the user _apt cannot read the private directory
                'Acquire::Check-Valid-Until "false";',  # a mirror may be a snapshot
                "",
            ]
        )

    def _apt_get(self, *arguments: str, cwd: Path | None = None) -> None:
        process = _run(["apt-get", "-qq", "-c", str(self._file("conf")), *arguments], cwd)
        if process.returncode:
            raise self.failure(
                f"apt-get {arguments[0]} failed for {' '.join(self.suites)}: "
                f"{error_line(process.stderr)}; check that 'apt-get update' works on this machine"
            )


def unpack(debs: Iterable[Path], root: Path, failure: type[GuixTasksError] = EngineError) -> None:
    """Unpack packages to a directory, several packages in parallel."""
    root.mkdir(parents=True, exist_ok=True)

    def unpack_one(deb: Path) -> None:
        process = _run(["dpkg-deb", "--extract", str(deb), str(root)])
        if process.returncode:
            raise failure(
                f"cannot unpack {deb}: {error_line(process.stderr)}; check the free disk space"
            )

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(unpack_one, debs))


def debian_address(targets: str) -> str | None:
    """Return the address of Debian's main archive from index targets in the format ``_TARGET``."""
    for line in targets.splitlines():
        *archive, address = line.split("|", 3)
        if archive == ["Debian", "Debian", "main"] and not address.startswith("cdrom:"):
            return address
    return None


def error_line(output: str) -> str:
    """Return the first error in the output of apt or dpkg, without its prefix."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("E:", "Error:", "dpkg"))]
    first = (errors or lines or ["no output"])[0]
    return first.removeprefix("E:").removeprefix("Error:").strip()


def _run(argv: Sequence[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**kept_environment(), **ENGLISH, "DEBIAN_FRONTEND": "noninteractive"}
    return subprocess.run(
        argv, capture_output=True, encoding="utf-8", errors="replace", cwd=cwd, env=environment,
        stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
