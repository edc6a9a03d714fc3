"""Stages that fail: for want of a network, and because something does not build."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import pytest
from harness import free_port, one_error

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import NewProject
    from harness import Project, Workshop

pytestmark = pytest.mark.engine

BROKEN = """
(use-modules (guix build-system trivial) (guix gexp) (guix packages) (guix profiles))
(packages->manifest
 (list (package
         (name "broken") (version "1") (source #f)
         (build-system trivial-build-system)
         (arguments
          (list #:builder #~(begin (display "connection refused, says its test\\n") (exit 1))))
         (home-page "") (synopsis "") (description "") (license #f))))
"""


def bundle(project: Project) -> Path:
    (directory,) = (project.directory / "out" / "failed").iterdir()
    return directory


def test_what_does_not_build_leaves_what_one_needs(new_project: NewProject) -> None:
    """And is not tried again; no secret is in it."""
    project = new_project("base", "pull", GUIX_PACKAGES="", BUILD_ARGS="TOKEN=hunter2")
    (project.directory / "broken.scm").write_text(BROKEN)
    project.set(GUIX_MANIFEST="broken.scm", DOCKER_USERNAME="me", DOCKER_PASSWORD="hunter2")  # noqa: S106
    result = project.inv("install", "--upstream")
    error = one_error(result, 4)
    assert project.containers() == []
    directory = bundle(project)
    assert directory.name.startswith("install-")
    assert f"the logs are in {directory}" in error
    assert "install: build of `/gnu/store/" in error
    assert "is retried" not in result.stderr
    assert "guix package --manifest=" in (directory / "command").read_text()
    assert "GUIX_MANIFEST=broken.scm" in (directory / "settings").read_text()
    assert "builder for" in (directory / "log").read_text()
    assert [each for each in directory.iterdir() if "broken-1.drv" in each.name]
    for each in directory.iterdir():
        assert b"hunter2" not in each.read_bytes()


def test_a_container_that_failed_can_be_looked_into(new_project: NewProject) -> None:
    project = new_project("base", "pull", GUIX_PACKAGES="no-such-package")
    error = one_error(project.inv("install", "--keep-failed"), 4)
    assert "install: no-such-package: unknown package" in error
    assert "`inv run -- guix search no-such-package`" in error
    (name,) = project.containers()
    assert "docker commit " in error
    assert "cannot commit " in one_error(project.inv("commit"), 2)
    project.ok("clean", "--work")
    assert project.containers() == [], name


class Substitutes(SimpleHTTPRequestHandler):
    """A substitute server that has not got the first thing that it is asked for."""

    missing: ClassVar[int] = 0
    """How often it has not."""
    first: ClassVar[str] = ""

    def do_GET(self) -> None:
        ours = type(self)
        if "/nar/" in self.path and not ours.first:
            ours.first = self.path
        if self.path == ours.first and ours.missing:
            ours.missing -= 1
            self.send_error(404)
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None: ...


class Moved(Substitutes):
    """A server whose first answer about each item names a file that it no longer has."""

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
def serving(
    directory: Path, missing: int = 0, kind: type[Substitutes] = Substitutes
) -> Iterator[str]:
    handler = type("Handler", (kind,), {"missing": missing, "seen": set()})
    with ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(handler, directory=str(directory))
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_fault_of_the_network_is_survived(new_project: NewProject, workshop: Workshop) -> None:
    """In the same container: what was fetched is not fetched again.

    Guix itself asks twice.
    """
    with serving(workshop.offline / "substitutes", missing=2) as server:
        project = new_project("base", NETWORK="host", GUIX_SUBSTITUTE_URLS=server)
        said = project.ok("pull", "--upstream").stderr
    assert said.count("pull is retried in") == 1
    assert not (project.directory / "out" / "failed").exists()
    assert project.containers() == []


@pytest.mark.both_stores
def test_a_stage_that_lacks_memory_names_that(new_project: NewProject) -> None:
    project = new_project("base", GUIX_SANDBOX="capabilities", STAGE_MEMORY="60m")
    error = one_error(project.inv("pull"), 4)
    assert "pull: a process was killed because memory ran out, and nothing was committed" in error
    assert "raise STAGE_MEMORY (62.9 MB)" in error


def test_what_a_server_has_no_more_is_asked_for_again(
    new_project: NewProject, workshop: Workshop
) -> None:
    """Guix itself would remember the answer for a day and a half."""
    with serving(workshop.offline / "substitutes", kind=Moved) as server:
        project = new_project("base", NETWORK="host", GUIX_SUBSTITUTE_URLS=server)
        said = project.ok("pull", "--upstream").stderr
    assert said.count("pull is retried in") == 1


def test_a_server_that_is_down_does_not_let_all_be_built(new_project: NewProject) -> None:
    server = f"http://127.0.0.1:{free_port()}"
    project = new_project("base", NETWORK="host", GUIX_SUBSTITUTE_URLS=server)
    with project.unharmed():
        result = project.inv("pull", "--upstream")
        error = one_error(result, 4)
    assert "no substitute server answers (127.0.0.1)" in error
    assert "GUIX_FALLBACK=yes" in error
    assert result.stderr.count("pull is retried in") == 2
    assert bundle(project)


@pytest.mark.parametrize("sandbox", ["rootless", "capabilities"])
@pytest.mark.parametrize("scheme", ["file", "http"])
def test_a_server_that_is_not_trusted_does_not_let_all_be_built(
    new_project: NewProject, workshop: Workshop, scheme: str, sandbox: str
) -> None:
    """The narinfos are in a directory, or in the cache of the daemon."""
    project = new_project("base", NETWORK="host", GUIX_SANDBOX=sandbox, GUIX_SUBSTITUTE_KEYS="")
    with serving(workshop.offline / "substitutes") as server, project.unharmed():
        if scheme == "http":
            project.set(GUIX_SUBSTITUTE_URLS=server)
        error = one_error(project.inv("pull", "--upstream"), 4)
    assert "pull: the image does not trust the key of the substitutes" in error
    assert "set GUIX_SUBSTITUTE_KEYS to the server's public key" in error
    assert "builder for" not in (bundle(project) / "log").read_text()
