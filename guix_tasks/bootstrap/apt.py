"""Debian's packages, downloaded and unpacked without being installed.

Everything that apt writes goes to a folder of ours; of the machine's own apt only the
configuration (proxies, certificates) and the address of the Debian mirror are used.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from guix_tasks.bootstrap.service import locked
from guix_tasks.errors import EngineError, GuixTasksError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

# The fields of an index target that tell Debian's own archive from its security archive and
# from third parties, and the address.
_TARGET = "$(ORIGIN)|$(LABEL)|$(COMPONENT)|$(REPO_URI)"


def on_debian() -> bool:
    """Whether Debian's packages can be downloaded and unpacked here."""
    return all(map(shutil.which, ("apt-get", "dpkg", "dpkg-deb")))


def host_suite() -> str | None:
    """The code name of the Debian release that runs here; None on anything else."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return None
    return release.get("VERSION_CODENAME") if release.get("ID") == "debian" else None


@dataclass(frozen=True)
class Apt:
    """A private apt that sees some suites of the machine's Debian mirror, and nothing else.

    ``status`` is a dpkg status file that says what counts as installed; without one nothing
    does.  ``failure`` is the kind of error to raise: it decides on the exit code.
    """

    folder: Path
    suites: Sequence[str]
    status: Path | None = None
    failure: type[GuixTasksError] = EngineError

    def update(self) -> None:
        """Fetch the package lists; call it before anything is downloaded."""
        if not on_debian():
            raise self.failure(
                "apt-get or dpkg-deb is not here, so Debian's packages cannot be unpacked: "
                "install Docker Engine in the way of your distribution"
            )
        with locked(self.folder / "lock"):
            (self.folder / "lists" / "partial").mkdir(parents=True, exist_ok=True)
            (self.folder / "status").touch()
            self._sources.write_text("".join(f"{self.source(suite)}\n" for suite in self.suites))
            self._configuration.write_text(self._configure())
            self._apt_get("update")

    def download(self, packages: Sequence[str], into: Path) -> list[Path]:
        """Download just these packages (``name`` or ``name/suite``)."""
        into.mkdir(parents=True, exist_ok=True)
        names = file_names(self._apt_get("download", "--print-uris", *packages))
        self._apt_get("download", *packages, cwd=into)
        return [into / name for name in names]

    def install_set(self, packages: Sequence[str], into: Path) -> list[Path]:
        """Download these packages and what must be installed with them."""
        (into / "partial").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            # apt locks the folder that the status file is in, which may be the machine's own.
            status = shutil.copyfile(self.status or self.folder / "status", f"{scratch}/status")
            install = (
                *("install", "--yes", "--no-install-recommends", "--download-only"),
                *("-o", f"Dir::State::status={status}"),
            )
            # Files that are there already are not listed, hence the listing for an empty folder.
            (Path(scratch) / "partial").mkdir()
            empty = ("-o", f"Dir::Cache::Archives={scratch}")
            names = file_names(self._apt_get(*install, *empty, "--print-uris", *packages))
            archives = ("-o", f"Dir::Cache::Archives={into.resolve()}")
            self._apt_get(*install, *archives, *packages)
        (into / "lock").unlink(missing_ok=True)
        shutil.rmtree(into / "partial")
        return [into / name for name in names]

    def unpacked(self, packages: Sequence[str], root: Path, *, closure: bool = False) -> None:
        """Download packages and unpack them as the folder ``root``, wholly or not at all."""
        self.update()
        # What an interrupted run left is not trusted; the rename makes the folder at once.
        unfinished = root.with_name(f"{root.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        download = self.install_set if closure else self.download
        unpack(download(packages, unfinished / "debs"), unfinished / "root", self.failure)
        (unfinished / "root").rename(root)
        shutil.rmtree(unfinished)

    def source(self, suite: str) -> str:
        """A suite of the machine's mirror, as a line of a sources list."""
        # Without the foreign architectures and the indexes that the machine may be set to.
        options = f"arch={self._architecture} target=Packages lang=none"
        signed_by = f" signed-by={KEYRING}" if KEYRING.exists() else ""
        return f"deb [{options}{signed_by}] {self.mirror} {suite} main"

    @cached_property
    def mirror(self) -> str:
        """The Debian mirror that this machine is configured for."""
        if not (address := self._machine_mirror()):
            # In a fresh container the machine's apt has no package lists, and then does not
            # know whose its sources are: fetch them, but into our own folder.
            lists = ("-o", f"Dir::State::Lists={self.folder / 'lists'}")
            _run(["apt-get", *lists, "-o", "APT::Sandbox::User=root", "update"])
            address = self._machine_mirror(*lists)
        if not address:
            raise self.failure(
                "this machine's apt knows no Debian mirror that answers: mend its sources "
                "until 'apt-get update' works, or install Docker Engine yourself"
            )
        return address

    @cached_property
    def _architecture(self) -> str:
        return _run(["dpkg", "--print-architecture"]).stdout.strip()

    def _machine_mirror(self, *options: str) -> str | None:
        argv = ["apt-get", *options, "indextargets", "--format", _TARGET]
        return debian_address(_run(argv).stdout)

    @property
    def _name(self) -> str:
        return "-".join(self.suites)

    @property
    def _configuration(self) -> Path:
        return self.folder / f"{self._name}.conf"

    @property
    def _sources(self) -> Path:
        return self.folder / f"{self._name}.list"

    def _configure(self) -> str:
        # Read after the machine's own configuration, and so stronger than it.
        return "\n".join(
            [
                "#clear APT::Update::Pre-Invoke;",  # what the machine hooks in is about itself
                "#clear APT::Update::Post-Invoke;",
                "#clear APT::Update::Post-Invoke-Success;",
                f'Dir::Etc::SourceList "{self._sources}";',
                'Dir::Etc::SourceParts "/dev/null";',
                'Dir::Etc::Preferences "/dev/null";',
                'Dir::Etc::PreferencesParts "/dev/null";',
                f'Dir::State "{self.folder}";',
                f'Dir::State::Lists "{self.folder}/lists";',
                f'Dir::State::status "{self.folder}/status";',
                f'Dir::Cache "{self.folder}";',
                f'Dir::Cache::pkgcache "{self._name}.bin";',
                'Dir::Cache::srcpkgcache "";',
                'APT::Default-Release "";',
                'APT::Update::Error-Mode "any";',  # else a mirror that is down is a mere warning
                'APT::Get::List-Cleanup "false";',  # the lists of other suites are in use too
                'APT::Sandbox::User "root";',  # _apt cannot read a folder of ours
                'Acquire::Check-Valid-Until "false";',  # a mirror may be a snapshot
                "",
            ]
        )

    def _apt_get(self, *arguments: str, cwd: Path | None = None) -> str:
        # An error of apt would not be told from a warning in another language.
        done = _run(["apt-get", "-qq", "-c", str(self._configuration), *arguments], cwd)
        if done.returncode:
            raise self.failure(
                f"apt-get {arguments[0]} failed for {' '.join(self.suites)}: "
                f"{complaint(done.stderr)}; see that 'apt-get update' works on this machine"
            )
        return done.stdout


def unpack(debs: Iterable[Path], root: Path, failure: type[GuixTasksError] = EngineError) -> None:
    """Lay the files of packages out below a folder, several packages at a time."""
    root.mkdir(parents=True, exist_ok=True)

    def one(deb: Path) -> None:
        done = _run(["dpkg-deb", "--extract", str(deb), str(root)])
        if done.returncode:
            raise failure(
                f"cannot unpack {deb}: {complaint(done.stderr)}; see that the disk has room"
            )

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(one, debs):
            pass


def debian_address(targets: str) -> str | None:
    """The address of Debian's own archive among index targets as ``_TARGET`` formats them."""
    for line in targets.splitlines():
        origin, label, component, address = line.split("|", 3)
        ours = (origin, label, component) == ("Debian", "Debian", "main")
        if ours and not address.startswith("cdrom:"):
            return address
    return None


def file_names(listing: str) -> list[str]:
    """The file names in what ``apt-get --print-uris`` says: 'URI' NAME SIZE HASH."""
    return [line.split("' ", 1)[1].split()[0] for line in listing.splitlines() if line[:1] == "'"]


def complaint(output: str) -> str:
    """The first error in the output of apt or dpkg, without its mark."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = (
        [line for line in lines if line.startswith(("E:", "Error:", "dpkg"))]
        or lines
        or ["no output"]
    )
    return errors[0].removeprefix("E:").removeprefix("Error:").strip()


def _run(argv: Sequence[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    # In another language errors could not be told from warnings.
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
    return subprocess.run(
        argv, capture_output=True, text=True, errors="replace", cwd=cwd, env=environment,
        stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
