"""Doctor on a real engine: its findings, and that it changes nothing."""

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
class Findings:
    """The findings of ``inv doctor``."""

    result: Result
    rows: list[dict[str, str]]

    def state(self, check: str) -> str:
        return self._one(check)["state"]

    def line(self, check: str) -> str:
        """Return the only finding of a check as a line."""
        row = self._one(check)
        return f"{row['state']}: {row['message']}; {row['fix']}"

    def _one(self, check: str) -> dict[str, str]:
        (row,) = (row for row in self.rows if row["check"] == check)
        return row

    @property
    def failed(self) -> set[str]:
        """The checks that failed, except the disk of this machine, which tests cannot change."""
        return {row["check"] for row in self.rows if row["state"] == "failed"} - {"disk"}


def run_doctor(project: Project, **env: str) -> Findings:
    """Run doctor, and check that it changes nothing."""
    with project.assert_unchanged():
        result = project.inv("doctor", "--json", env=env)
    assert "Traceback" not in result.stderr
    assert project.volumes() == []
    rows = json.loads(result.stdout)
    assert result.returncode == int(any(row["state"] == "failed" for row in rows)), result.stdout
    return Findings(result, rows)


# --- Without failures


def test_offline_example_has_no_failure(new_project: NewProject) -> None:
    findings = run_doctor(new_project("base"))
    assert findings.failed == set()
    assert findings.line("sandbox") == "ok: rootless: Guix builds in a work container; "
    for check in ("settings", "engine", "clock", "base image", "mounts", "registry"):
        assert findings.state(check) == "ok"
    assert findings.state("channel guix") == findings.state("substitutes") == "ok"


def test_each_line_is_a_finding(new_project: NewProject) -> None:
    project = new_project()
    with project.assert_unchanged():
        result = project.inv("doctor")
    lines = result.stdout.splitlines()
    assert len(lines) > 8
    assert {line[:7] for line in lines} <= {"ok     ", "note   ", "failed "}
    assert project.docker.host in result.stdout


# --- The sandbox


def test_base_image_is_probed_before_the_base_stage_exists(new_project: NewProject) -> None:
    assert run_doctor(new_project()).state("sandbox") == "ok"


def test_nochroot_needs_no_privileges(new_project: NewProject) -> None:
    findings = run_doctor(new_project(GUIX_SANDBOX="nochroot"))
    assert findings.line("sandbox") == "ok: nochroot: Guix builds in a work container; "


def run_probe(
    project: Project, directory: Path, options: Sequence[str], preparation: str = "true"
) -> Result:
    """Run the probe with the entry point, as doctor does, in a container with these options."""
    name, work = project.container_name(), directory / "var/guix/guix-tasks"
    work.mkdir(parents=True)
    for file in ("probe.sh", "probe.scm", "resources/entry-point.sh"):
        shutil.copy(ROOT / "guix_tasks" / "stages" / file, work)
        (work / file.rpartition("/")[2]).chmod(0o755)
    command = f"{preparation} && exec /var/guix/guix-tasks/probe.sh"
    project.docker.ok(
        "create", f"--name={name}", "--network=none", *options,
        "--entrypoint=/var/guix/guix-tasks/entry-point.sh", BASE_TAG, "sh", "-c", command,
    )  # fmt: skip
    project.docker.ok("cp", str(directory / "var"), f"{name}:/")
    return project.docker("start", "--attach", name)


def test_container_that_may_not_clone_is_reported_in_one_line(
    new_project: NewProject, tmp_path: Path
) -> None:
    result = run_probe(new_project(), tmp_path, ())
    assert result.returncode == 1
    lines = (result.stdout + result.stderr).splitlines()
    assert [line for line in lines if "error:" in line] == [CLONE]


def test_probe_builds_a_derivation(new_project: NewProject, tmp_path: Path) -> None:
    is_missing = 'test -z "$(ls -d /gnu/store/*-guix-tasks-probe 2>/dev/null)"'
    result = run_probe(new_project(), tmp_path, ["--privileged"], is_missing)
    assert result.returncode == 0
    assert "build-succeeded /gnu/store/" in result.stderr
    assert "substitute" not in result.stdout + result.stderr


def test_probe_needs_no_ldd(new_project: NewProject, tmp_path: Path) -> None:
    result = run_probe(new_project(), tmp_path, ["--privileged"], "rm $(command -v ldd)")
    assert result.returncode == 0, result.stderr


def test_base_stage_without_guix_is_a_failure(new_project: NewProject) -> None:
    project = new_project(GUIX_SUBSTITUTE_KEYS="")
    project.write_dockerfile(f"{START}RUN rm /usr/bin/guix*\n")
    project.ok("base")
    line = run_doctor(project).line("sandbox")
    assert line.startswith("failed: ")
    assert "this image has no guix-daemon" in line
    # As a base image it is no failure, because the Dockerfile can install Guix.
    other = new_project(GUIX_SUBSTITUTE_KEYS="", BASE_IMAGE=project.tag("base"))
    findings = run_doctor(other)
    assert findings.line("sandbox").startswith("note: ")
    assert findings.failed == set()


def test_invalid_key_is_a_failure(new_project: NewProject) -> None:
    project = new_project(GUIX_SUBSTITUTE_KEYS="junk.pub")
    (project.directory / "junk.pub").write_text("junk\n")
    findings = run_doctor(project)
    assert findings.failed == {"sandbox"}
    assert findings.line("sandbox").endswith(
        "cannot authorise the substitute key 0-junk.pub; correct GUIX_SUBSTITUTE_KEYS"
    )


def test_untrusted_key_is_a_failure(new_project: NewProject) -> None:
    findings = run_doctor(new_project("base", GUIX_SUBSTITUTE_KEYS=""))
    assert findings.failed == {"substitutes"}
    assert "but the image does not trust its key; set GUIX_SUBSTITUTE_KEYS" in findings.line(
        "substitutes"
    )


def test_unavailable_base_image_is_a_failure(new_project: NewProject) -> None:
    project = new_project()
    project.set(BASE_IMAGE=f"{project.repository}:nope")
    findings = run_doctor(project)
    assert findings.failed == {"base image"}
    assert (
        f"{project.repository}:nope is neither on the engine nor in its registry"
        in findings.line("base image")
    )
    assert findings.state("sandbox") == "note"


# --- The registry


def registry_finding(project: Project, **env: str) -> str:
    findings = run_doctor(project, **env)
    assert findings.failed <= {"registry"}
    return findings.line("registry")


def test_stopped_registry_is_a_failure(new_project: NewProject) -> None:
    # The name contains an error code of registries, which must not be taken for an answer.
    address = f"localhost:{free_port()}"
    line = registry_finding(new_project(repository=f"{address}/unknown/manifest-unknown"))
    assert line.startswith(f"failed: cannot look up {address}/unknown/manifest-unknown:t: ")
    assert "connection refused" in line
    assert "inv registry.up" in line


def test_registry_at_an_unknown_host_is_a_failure(new_project: NewProject) -> None:
    line = registry_finding(new_project(repository="unknown.invalid/x"))
    assert line.startswith("failed: ")
    # Without a network, the host cannot be looked up.
    assert "there is no such registry: fix the reference" in line or "unreachable" in line


@pytest.mark.parametrize(
    "account",
    [{}, {**ACCOUNT, "DOCKER_PASSWORD": "wrong-one"}],
    ids=["no-account", "wrong-password"],
)
def test_refused_account_is_a_failure(
    new_project: NewProject, private_registry: str, account: dict[str, str]
) -> None:
    findings = run_doctor(new_project(repository=f"{private_registry}/x"), **account)
    assert findings.failed == {"registry"}
    assert "set DOCKER_USERNAME and DOCKER_PASSWORD" in findings.line("registry")
    assert "wrong-one" not in findings.result.stdout + findings.result.stderr


def test_accepted_account_is_reported(new_project: NewProject, private_registry: str) -> None:
    line = registry_finding(new_project(repository=f"{private_registry}/x"), **ACCOUNT)
    assert line == f"ok: {private_registry} answers to DOCKER_USERNAME; "


def configure_missing_helper(project: Project) -> dict[str, str]:
    """Configure a missing credential helper and return the environment that selects it."""
    directory = project.directory / "docker"
    directory.mkdir()
    (directory / "config.json").write_text('{"credsStore": "nowhere"}')
    return {"DOCKER_CONFIG": str(directory)}


def test_missing_credential_helper_is_reported(
    new_project: NewProject, private_registry: str
) -> None:
    project = new_project(repository=f"{private_registry}/x")
    line = registry_finding(project, **configure_missing_helper(project))
    assert line.startswith("failed: ")
    assert "docker-credential-nowhere is not installed" in line
    assert "does not answer" not in line


def test_account_of_the_settings_needs_no_credential_helper(
    new_project: NewProject, private_registry: str
) -> None:
    project = new_project(repository=f"{private_registry}/x")
    assert registry_finding(project, **configure_missing_helper(project), **ACCOUNT).startswith(
        "ok: "
    )
    wrong = {**ACCOUNT, "DOCKER_PASSWORD": "wrong-one"}
    configuration = {"DOCKER_CONFIG": str(project.directory / "docker")}
    assert "unauthorized" in registry_finding(project, **configuration, **wrong).lower()


def error_body(code: str, message: str) -> str:
    return json.dumps({"errors": [{"code": code, "message": message}]})


@pytest.fixture
def serve() -> Iterator[Callable[[int, str], str]]:
    """Start registries that give one answer to all requests except ``/v2/``."""
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
        (404, error_body("MANIFEST_UNKNOWN", "manifest unknown"), "ok"),
        (404, error_body("NAME_UNKNOWN", "repository name not known to registry"), "ok"),
        (404, error_body("NOT_FOUND", "artifact x:t not found"), "ok"),
        (404, error_body("NOT_FOUND", "project x not found"), "failed"),
        (404, "<html>404 Not Found</html>", "failed"),
        (403, error_body("DENIED", "not yours"), "failed"),
        (429, error_body("TOOMANYREQUESTS", "later"), "failed"),
        (500, error_body("UNKNOWN", "unknown error"), "failed"),
        (503, "down for maintenance", "failed"),
        (200, "<html>Log in", "failed"),
    ],
)
def test_only_a_missing_image_is_no_failure(
    new_project: NewProject, serve: Callable[[int, str], str], status: int, body: str, state: str
) -> None:
    project = new_project(repository=f"{serve(status, body)}/x")
    assert registry_finding(project).startswith(f"{state}: ")
