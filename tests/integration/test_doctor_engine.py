"""Doctor on a real engine: what it says of it, and that it leaves nothing behind."""

from __future__ import annotations

import http.server
import json
import shutil
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from harness import PASSWORD, ROOT, USER, free_port

from guix_tasks.bootstrap.base_image import BASE_TAG

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from conftest import NewProject
    from harness import Project, Result

pytestmark = pytest.mark.engine

START = "ARG BASE_IMAGE\nFROM ${BASE_IMAGE}\n"
ACCOUNT = {"DOCKER_USERNAME": USER, "DOCKER_PASSWORD": PASSWORD}
CLONE = "guix repl: error: clone: Operation not permitted"


@dataclass(frozen=True)
class Examined:
    """What ``inv doctor`` found."""

    result: Result
    rows: list[dict[str, str]]

    def state(self, check: str) -> str:
        return self._one(check)["state"]

    def said(self, check: str) -> str:
        """The line of one check, of which there is but one."""
        row = self._one(check)
        return f"{row['state']}: {row['message']}; {row['fix']}"

    def _one(self, check: str) -> dict[str, str]:
        (row,) = (row for row in self.rows if row["check"] == check)
        return row

    @property
    def failed(self) -> set[str]:
        """The checks that failed, except the disk of this machine, which tests cannot change."""
        return {row["check"] for row in self.rows if row["state"] == "failed"} - {"disk"}


def examine(project: Project, **env: str) -> Examined:
    """Let the doctor look, who is to change nothing."""
    with project.unharmed():
        result = project.inv("doctor", "--json", env=env)
    assert "Traceback" not in result.stderr
    assert project.volumes() == []
    rows = json.loads(result.stdout)
    assert result.returncode == int(any(row["state"] == "failed" for row in rows)), result.stdout
    return Examined(result, rows)


# --- All well


def test_all_is_well_with_the_offline_example(new_project: NewProject) -> None:
    found = examine(new_project("base"))
    assert found.failed == set()
    assert found.said("sandbox") == "ok: rootless: Guix builds in a work container; "
    for check in ("settings", "engine", "clock", "base image", "mounts", "registry"):
        assert found.state(check) == "ok"
    assert found.state("channel guix") == found.state("substitutes") == "ok"


def test_a_line_is_a_finding(new_project: NewProject) -> None:
    project = new_project()
    with project.unharmed():
        result = project.inv("doctor")
    lines = result.stdout.splitlines()
    assert len(lines) > 8
    assert {line[:7] for line in lines} <= {"ok     ", "note   ", "failed "}
    assert project.docker.host in result.stdout


# --- The sandbox


def test_a_base_image_is_probed_before_there_is_a_stage(new_project: NewProject) -> None:
    assert examine(new_project()).state("sandbox") == "ok"


def test_guix_builds_without_privileges_where_it_does_not_isolate(new_project: NewProject) -> None:
    found = examine(new_project(GUIX_SANDBOX="nochroot"))
    assert found.said("sandbox") == "ok: nochroot: Guix builds in a work container; "


def probe(
    project: Project, directory: Path, options: Sequence[str], before: str = "true"
) -> Result:
    """Run the probe by the entry point, as the doctor does, in a container of one's own."""
    name, work = project.container_name(), directory / "var/guix/guix-tasks"
    work.mkdir(parents=True)
    for file in ("probe.sh", "probe.scm", "resources/entry-point.sh"):
        shutil.copy(ROOT / "guix_tasks" / "stages" / file, work)
        (work / file.rpartition("/")[2]).chmod(0o755)
    command = f"{before} && exec /var/guix/guix-tasks/probe.sh"
    project.docker.ok(
        "create", f"--name={name}", "--network=none", *options,
        "--entrypoint=/var/guix/guix-tasks/entry-point.sh", BASE_TAG, "sh", "-c", command,
    )  # fmt: skip
    project.docker.ok("cp", str(directory / "var"), f"{name}:/")
    return project.docker("start", "--attach", name)


def test_a_container_that_may_not_fork_fails_with_one_line(
    new_project: NewProject, tmp_path: Path
) -> None:
    result = probe(new_project(), tmp_path, ())
    assert result.returncode == 1
    lines = (result.stdout + result.stderr).splitlines()
    assert [line for line in lines if "error:" in line] == [CLONE]


def test_the_probe_really_builds(new_project: NewProject, tmp_path: Path) -> None:
    before = 'test -z "$(ls -d /gnu/store/*-guix-tasks-probe 2>/dev/null)"'
    result = probe(new_project(), tmp_path, ["--privileged"], before)
    assert result.returncode == 0
    assert "build-succeeded /gnu/store/" in result.stderr
    assert "substitute" not in result.stdout + result.stderr


def test_the_probe_needs_no_ldd(new_project: NewProject, tmp_path: Path) -> None:
    result = probe(new_project(), tmp_path, ["--privileged"], "rm $(command -v ldd)")
    assert result.returncode == 0, result.stderr


def test_a_base_stage_without_guix_is_a_failure(new_project: NewProject) -> None:
    project = new_project(GUIX_SUBSTITUTE_KEYS="")
    project.dockerfile(f"{START}RUN rm /usr/bin/guix*\n")
    project.ok("base")
    said = examine(project).said("sandbox")
    assert said.startswith("failed: ")
    assert "this image has no guix-daemon" in said
    # The same image as a base is none: a Dockerfile may bring Guix.
    other = new_project(GUIX_SUBSTITUTE_KEYS="", BASE_IMAGE=project.tag("base"))
    found = examine(other)
    assert found.said("sandbox").startswith("note: ")
    assert found.failed == set()


def test_a_key_that_is_none_is_a_failure(new_project: NewProject) -> None:
    project = new_project(GUIX_SUBSTITUTE_KEYS="junk.pub")
    (project.directory / "junk.pub").write_text("junk\n")
    found = examine(project)
    assert found.failed == {"sandbox"}
    assert found.said("sandbox").endswith(
        "cannot authorise the substitute key 0-junk.pub; correct GUIX_SUBSTITUTE_KEYS"
    )


def test_a_key_that_the_image_does_not_trust_is_a_failure(new_project: NewProject) -> None:
    found = examine(new_project("base", GUIX_SUBSTITUTE_KEYS=""))
    assert found.failed == {"substitutes"}
    assert "but the image does not trust its key; set GUIX_SUBSTITUTE_KEYS" in found.said(
        "substitutes"
    )


def test_a_base_image_that_is_not_to_be_had(new_project: NewProject) -> None:
    project = new_project()
    project.set(BASE_IMAGE=f"{project.repository}:nope")
    found = examine(project)
    assert found.failed == {"base image"}
    assert f"{project.repository}:nope is neither on the engine nor in its registry" in found.said(
        "base image"
    )
    assert found.state("sandbox") == "note"


# --- The registry


def registry_said(project: Project, **env: str) -> str:
    found = examine(project, **env)
    assert found.failed <= {"registry"}
    return found.said("registry")


def test_a_registry_that_is_down(new_project: NewProject) -> None:
    # The name proves that only what the registry says counts.
    place = f"localhost:{free_port()}"
    said = registry_said(new_project(repository=f"{place}/unknown/manifest-unknown"))
    assert said.startswith(f"failed: cannot look up {place}/unknown/manifest-unknown:t: ")
    assert "connection refused" in said
    assert "inv registry.up" in said


def test_a_registry_at_an_unknown_host(new_project: NewProject) -> None:
    said = registry_said(new_project(repository="unknown.invalid/x"))
    assert said.startswith("failed: ")
    # Without a network nobody knows that there is no such host.
    assert "there is no such registry: fix the reference" in said or "unreachable" in said


@pytest.mark.parametrize(
    "account", [{}, {**ACCOUNT, "DOCKER_PASSWORD": "wrong-one"}], ids=["nobody", "wrong-password"]
)
def test_a_registry_that_refuses_the_account(
    new_project: NewProject, locked: str, account: dict[str, str]
) -> None:
    found = examine(new_project(repository=f"{locked}/x"), **account)
    assert found.failed == {"registry"}
    assert "set DOCKER_USERNAME and DOCKER_PASSWORD" in found.said("registry")
    assert "wrong-one" not in found.result.stdout + found.result.stderr


def test_a_registry_that_knows_the_account(new_project: NewProject, locked: str) -> None:
    said = registry_said(new_project(repository=f"{locked}/x"), **ACCOUNT)
    assert said == f"ok: {locked} answers to DOCKER_USERNAME; "


def credential_helper(project: Project) -> dict[str, str]:
    """The environment of a Docker configuration whose credential helper is not there."""
    directory = project.directory / "docker"
    directory.mkdir()
    (directory / "config.json").write_text('{"credsStore": "nowhere"}')
    return {"DOCKER_CONFIG": str(directory)}


def test_a_credential_helper_that_is_missing_is_not_taken_for_a_dead_engine(
    new_project: NewProject, locked: str
) -> None:
    project = new_project(repository=f"{locked}/x")
    said = registry_said(project, **credential_helper(project))
    assert said.startswith("failed: ")
    assert "docker-credential-nowhere is not installed" in said
    assert "does not answer" not in said


def test_a_credential_helper_that_is_missing_is_not_needed_for_an_account(
    new_project: NewProject, locked: str
) -> None:
    project = new_project(repository=f"{locked}/x")
    assert registry_said(project, **credential_helper(project), **ACCOUNT).startswith("ok: ")
    wrong = {**ACCOUNT, "DOCKER_PASSWORD": "wrong-one"}
    again = {"DOCKER_CONFIG": str(project.directory / "docker")}
    assert "unauthorized" in registry_said(project, **again, **wrong).lower()


def error(code: str, message: str) -> str:
    return json.dumps({"errors": [{"code": code, "message": message}]})


@pytest.fixture
def serve() -> Iterator[Callable[[int, str], str]]:
    """Starts a registry that gives one answer to all but the greeting; its address."""
    servers: list[http.server.ThreadingHTTPServer] = []

    def start(status: int, body: str) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                kind = "application/json" if body.startswith("{") else "text/html"
                self.send_response(200 if self.path == "/v2/" else status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body.encode())

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return f"localhost:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "state"),
    [
        (404, error("MANIFEST_UNKNOWN", "manifest unknown"), "ok"),
        (404, error("NAME_UNKNOWN", "repository name not known to registry"), "ok"),
        (404, error("NOT_FOUND", "artifact x:t not found"), "ok"),
        (404, error("NOT_FOUND", "project x not found"), "failed"),
        (404, "<html>404 Not Found</html>", "failed"),
        (403, error("DENIED", "not yours"), "failed"),
        (429, error("TOOMANYREQUESTS", "later"), "failed"),
        (500, error("UNKNOWN", "unknown error"), "failed"),
        (503, "down for maintenance", "failed"),
        (200, "<html>Log in", "failed"),
    ],
)
def test_only_an_image_that_is_not_there_yet_is_no_fault(
    new_project: NewProject, serve: Callable[[int, str], str], status: int, body: str, state: str
) -> None:
    project = new_project(repository=f"{serve(status, body)}/x")
    assert registry_said(project).startswith(f"{state}: ")
