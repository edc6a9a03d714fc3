"""Stages that fail because of the network, or because a package does not build."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import pytest
from harness import expect_error, free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import NewProject
    from harness import Project, ProjectFactory

pytestmark = pytest.mark.engine

BROKEN = """
(use-modules (guix build-system trivial) (guix gexp) (guix packages) (guix profiles))
(packages->manifest
 (list (package
         (name "broken") (version "1") (source #f)
         (build-system trivial-build-system)
         (arguments
          (list #:builder
                #~(begin (mkdir #$output) (display "connection refused: a test\\n") (exit 1))))
         (home-page "") (synopsis "") (description "") (license #f))))
"""


def diagnostics(project: Project) -> Path:
    (directory,) = (project.directory / "out" / "failed").iterdir()
    return directory


def test_failed_build_writes_diagnostics(new_project: NewProject) -> None:
    """They contain no secret, and the stage is not retried."""
    project = new_project("base", "pull", GUIX_PACKAGES="", BUILD_ARGS="TOKEN=hunter2")
    (project.directory / "broken.scm").write_text(BROKEN)
    project.set(GUIX_MANIFEST="broken.scm", DOCKER_USERNAME="me", DOCKER_PASSWORD="hunter2")  # noqa: S106
    result = project.inv("install", "--upstream")
    error = expect_error(result, 4)
    assert project.containers() == []
    directory = diagnostics(project)
    assert directory.name.startswith("install-")
    assert f"the logs are in {directory}" in error
    assert "install: the build of broken-1 failed, and nothing was committed" in error
    assert "\nconnection refused: a test\n" in result.stderr
    assert "is retried" not in result.stderr
    assert "guix package --manifest=" in (directory / "command").read_text()
    assert "GUIX_MANIFEST=broken.scm" in (directory / "settings").read_text()
    assert "builder for" in (directory / "log").read_text()
    assert [file for file in directory.iterdir() if "broken-1.drv" in file.name]
    for file in directory.iterdir():
        assert b"hunter2" not in file.read_bytes()


def test_container_of_a_failed_stage_can_be_kept(new_project: NewProject) -> None:
    project = new_project("base", "pull", GUIX_PACKAGES="no-such-package")
    error = expect_error(project.inv("install", "--keep-failed"), 4)
    assert "install: no-such-package: unknown package" in error
    assert "`inv run -- guix search no-such-package`" in error
    (name,) = project.containers()
    assert "docker commit " in error
    assert "cannot commit " in expect_error(project.inv("commit"), 2)
    project.ok("clean", "--work")
    assert project.containers() == [], name


class Substitutes(SimpleHTTPRequestHandler):
    """A substitute server that answers the first requests for one file with 404."""

    missing: ClassVar[int] = 0
    """Number of these answers."""
    first: ClassVar[str] = ""

    def do_GET(self) -> None:
        server = type(self)
        if "/nar/" in self.path and not server.first:
            server.first = self.path
        if self.path == server.first and server.missing:
            server.missing -= 1
            self.send_error(404)
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None: ...


class MovedSubstitutes(Substitutes):
    """A substitute server whose first narinfo of each item names a missing file."""

    seen: ClassVar[set[str]] = set()

    def do_GET(self) -> None:
        if not self.path.endswith(".narinfo") or self.path in self.seen:
            super().do_GET()
            return
        try:
            text = Path(self.translate_path(self.path)).read_bytes()
        except OSError:
            self.send_error(404)
            return
        self.seen.add(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.replace(b"URL: nar/", b"URL: gone/"))


@contextmanager
def serve(
    directory: Path, missing: int = 0, kind: type[Substitutes] = Substitutes
) -> Iterator[str]:
    handler = type("Handler", (kind,), {"missing": missing, "seen": set()})
    with ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(handler, directory=str(directory))
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_network_fault_is_retried(new_project: NewProject, factory: ProjectFactory) -> None:
    """The retry runs in the same container, which keeps the downloads. Guix itself asks twice."""
    with serve(factory.offline / "substitutes", missing=2) as server:
        project = new_project("base", NETWORK="host", GUIX_SUBSTITUTE_URLS=server)
        output = project.ok("pull", "--upstream").stderr
    assert output.count("pull is retried in") == 1
    assert not (project.directory / "out" / "failed").exists()
    assert project.containers() == []


@pytest.mark.both_stores
def test_lack_of_memory_is_reported(new_project: NewProject) -> None:
    project = new_project("base", GUIX_SANDBOX="capabilities", STAGE_MEMORY="60m")
    error = expect_error(project.inv("pull"), 4)
    assert "pull: a process was killed because memory ran out, and nothing was committed" in error
    assert "raise STAGE_MEMORY (62.9 MB)" in error


def test_stale_narinfo_is_fetched_again(new_project: NewProject, factory: ProjectFactory) -> None:
    """Guix itself would cache the narinfo for 36 hours."""
    with serve(factory.offline / "substitutes", kind=MovedSubstitutes) as server:
        project = new_project("base", NETWORK="host", GUIX_SUBSTITUTE_URLS=server)
        output = project.ok("pull", "--upstream").stderr
    assert output.count("pull is retried in") == 1


def test_packages_are_not_built_if_no_server_answers(new_project: NewProject) -> None:
    server = f"http://127.0.0.1:{free_port()}"
    project = new_project("base", NETWORK="host", GUIX_SUBSTITUTE_URLS=server)
    with project.assert_unchanged():
        result = project.inv("pull", "--upstream")
        error = expect_error(result, 4)
    assert "no substitute server answers (127.0.0.1)" in error
    assert "GUIX_FALLBACK=yes" in error
    assert result.stderr.count("pull is retried in") == 2
    assert diagnostics(project)


@pytest.mark.parametrize("sandbox", ["rootless", "capabilities"])
@pytest.mark.parametrize("scheme", ["file", "http"])
def test_packages_are_not_built_if_the_server_is_not_trusted(
    new_project: NewProject, factory: ProjectFactory, scheme: str, sandbox: str
) -> None:
    """The narinfos are in a directory or in the cache of the daemon."""
    project = new_project("base", NETWORK="host", GUIX_SANDBOX=sandbox, GUIX_SUBSTITUTE_KEYS="")
    with serve(factory.offline / "substitutes") as server, project.assert_unchanged():
        if scheme == "http":
            project.set(GUIX_SUBSTITUTE_URLS=server)
        error = expect_error(project.inv("pull", "--upstream"), 4)
    assert "pull: the image does not trust the key of the substitutes" in error
    assert "set GUIX_SUBSTITUTE_KEYS to the server's public key" in error
    assert "builder for" not in (diagnostics(project) / "log").read_text()
