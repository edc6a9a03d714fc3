"""Local substitutes: the server of a stage image, and `inv weather`."""

from __future__ import annotations

import json
import re
import secrets
import shutil
import socket
import threading
import urllib.request
from http.server import ThreadingHTTPServer
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from harness import ROOT, HttpHandler, expect_error, free_port, read_contents
from planted_secrets import PLANTED_SECRETS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import NewProject
    from harness import BuiltProject, Docker, Project, ProjectFactory

pytestmark = pytest.mark.engine

EMPTY_SERVER = "file:///offline/empty"
"""A substitute server without substitutes."""

GREET = re.compile(r"building /gnu/store/\w+-greet-1.0.drv")
ANY_BUILD = re.compile(r"building /gnu/store/.*")


@pytest.fixture
def server_project(new_project: NewProject) -> Project:
    """Create a project that serves its store on the loopback interface."""
    project = new_project("base", "pull", "install", **server_settings())
    project.ok("substitutes.up")
    return project


def server_settings() -> dict[str, str]:
    return {"NETWORK": "host", "SUBSTITUTES_LISTEN": f"127.0.0.1:{free_port()}"}


def url(project: Project) -> str:
    return f"http://{project.settings['SUBSTITUTES_LISTEN']}"


def server_name(project: Project) -> str:
    """Return the name of the server container."""
    (name,) = project.containers()
    assert name.startswith("guix-tasks-substitutes-")
    return name


def inspect_server(project: Project) -> dict[str, Any]:
    details: list[dict[str, Any]] = json.loads(project.docker.ok("inspect", server_name(project)))
    return details[0]


def read_requests(project: Project) -> str:
    log = project.docker("logs", server_name(project))
    return log.stdout + log.stderr


def downloaded_items(project: Project) -> list[str]:
    """Return the store items that were downloaded from the project's server."""
    return re.findall(r"GET /nar/(?:gzip|zstd)/\w+-(\S+)", read_requests(project))


def read_acl(docker: Docker, image: str) -> str:
    result = docker.run(image, "cat", "/etc/guix/acl", options=("--entrypoint=",))
    assert result.returncode == 0, result.stderr
    return result.stdout


def read_signing_key(project: Project, base_image: str) -> str:
    """Return the secret number of the key pair, and search later results for it."""
    (volume,) = [name for name in project.volumes() if name.endswith("-signing-key")]
    result = project.docker.run(
        base_image,
        "cat",
        "/key/signing-key.sec",
        options=("--entrypoint=", "--user=0", f"--volume={volume}:/key:ro"),
    )
    (number,) = re.findall(r"\(d #([0-9A-F]+)#\)", result.stdout)
    PLANTED_SECRETS.add(number)
    return str(number)


def test_another_machine_downloads_what_it_would_build(
    server_project: Project, new_project: NewProject, base_image: str
) -> None:
    read_signing_key(server_project, base_image)
    assert server_project.ok("substitutes.up").stdout == ""
    port = server_project.settings["SUBSTITUTES_LISTEN"].rpartition(":")[2]
    result = server_project.ok("substitutes.up", f"--listen=0.0.0.0:{port}")
    (host,) = re.findall(r"replace (\S+) with a name", result.stderr)
    settings = dict(line.split("=", 1) for line in result.stdout.splitlines())
    other = new_project("base", NETWORK="host")
    (key,) = (server_project.directory / "out").glob("*.pub")
    shutil.copy(key, other.directory)
    other.set(**{name: value.replace(host, "127.0.0.1") for name, value in settings.items()})
    assert url(server_project) in other.settings["GUIX_SUBSTITUTE_URLS"]
    log = other.ok("install", "--upstream").stderr
    assert "greet-1.0" in log
    assert not ANY_BUILD.search(log)
    assert {"greet-1.0", "hello-2.12.2"} <= set(downloaded_items(server_project))
    assert read_contents(other.docker, other.image) == read_contents(
        server_project.docker, server_project.image
    )


def test_substitutes_of_an_untrusted_server_are_not_used(
    server_project: Project, new_project: NewProject
) -> None:
    servers = f"{url(server_project)} file:///offline/substitutes"
    other = new_project("base", "pull", NETWORK="host", GUIX_SUBSTITUTE_URLS=servers)
    log = other.ok("install").stderr
    assert GREET.search(log)
    assert "greet-1.0" not in downloaded_items(server_project)
    assert ".narinfo" in read_requests(server_project)


def test_change_of_the_base_rebuilds_no_packages(
    server_project: Project, built_project: BuiltProject, base_image: str
) -> None:
    docker, container = server_project.docker, inspect_server(server_project)["Id"]
    assert all(ANY_BUILD.search(built_project.calls[stage].stderr) for stage in ("pull", "install"))
    number = read_signing_key(server_project, base_image)
    dockerfile = server_project.directory / "Dockerfile"
    dockerfile.write_text((ROOT / "Dockerfile").read_text() + "\nRUN touch /changed\n")
    # All substitutes come from the project's server.
    server_project.set(DOCKERFILE=str(dockerfile), GUIX_SUBSTITUTE_URLS=EMPTY_SERVER)
    log = server_project.ok("install", "--upstream").stderr
    assert f"install: substitutes come from {url(server_project)} first" in log
    assert not ANY_BUILD.search(log)
    assert {"greet-1.0", "hello-2.12.2"} <= set(downloaded_items(server_project))
    assert inspect_server(server_project)["Id"] == container
    assert (
        docker.run(server_project.image, "ls", "/changed", options=("--entrypoint=",)).returncode
        == 0
    )
    # The image is the same as without the server.
    model = built_project.project.image
    assert read_contents(docker, server_project.image) == read_contents(docker, model)
    assert read_acl(docker, server_project.image) == read_acl(docker, model)
    config, expected = docker.config(server_project.image), docker.config(model)
    assert {**config, "Labels": ""} == {**expected, "Labels": ""}
    keys = docker.run(
        server_project.image, "sh", "-c", "find / -xdev -name 'signing-key*'; "
        f"grep -rl {number} /etc /var /root /tmp || true", options=("--entrypoint=",),
    )  # fmt: skip
    assert keys.stdout == ""
    # Stages stay up to date without the server.
    server_project.ok("substitutes.down")
    assert server_project.ok("install").stderr.endswith("install: up to date\n")


def test_substitutes_up_serves_the_newest_image(server_project: Project) -> None:
    first = inspect_server(server_project)
    server_project.ok("install", "--package=hello")
    messages = server_project.ok("weather", "--package=greet").stderr
    assert "of an older image; `inv substitutes.up` serves the newest" in messages
    assert "serving the stage install\n" in server_project.ok("substitutes.up").stderr
    assert inspect_server(server_project)["Image"] == server_project.id("install") != first["Image"]
    assert (
        server_project.docker("image", "inspect", first["Image"]).returncode == 0
    )  # other projects use it


def test_server_keeps_its_key_until_clean(server_project: Project, base_image: str) -> None:
    number, first = (
        read_signing_key(server_project, base_image),
        inspect_server(server_project)["Id"],
    )
    (key,) = (server_project.directory / "out").glob("substitutes-*.pub")
    public = key.read_text()
    server_project.ok("substitutes.up")
    assert inspect_server(server_project)["Id"] == first
    server_project.ok("clean", "--work")
    assert inspect_server(server_project)["Id"] == first
    server_project.ok("substitutes.down")
    assert server_project.containers() == []
    assert "no server of this project is running" in server_project.ok("substitutes.down").stderr
    server_project.ok("substitutes.up")
    assert key.read_text() == public
    assert read_signing_key(server_project, base_image) == number
    server_project.ok("clean")
    assert server_project.containers() == server_project.volumes() == []


def test_server_has_no_privileges(server_project: Project) -> None:
    details = inspect_server(server_project)
    host = details["HostConfig"]
    assert (host["Privileged"], host["CapDrop"], host["CapAdd"]) == (False, ["ALL"], None)
    assert host["SecurityOpt"] == ["no-new-privileges"]
    assert details["Config"]["User"] == "guix-daemon"
    assert details["Config"]["Env"] == server_project.docker.config(server_project.image)["Env"]
    users = server_project.docker.ok(
        "top", server_name(server_project), "-o", "pid,uid"
    ).splitlines()[1:]
    assert users
    assert "0" not in [line.split()[1] for line in users]


def run_weather(project: Project, *options: str, status: int = 0) -> list[dict[str, Any]]:
    result = project.inv("weather", "--json", *options)
    assert result.returncode == status, result.stderr
    reports: list[dict[str, Any]] = json.loads(result.stdout)
    return reports


@pytest.fixture
def built_commit() -> Iterator[SimpleNamespace]:
    """Run a server with the API of Cuirass; ``commit`` is the newest commit that it has built."""
    server = SimpleNamespace(commit="f" * 40, url="")

    class Handler(HttpHandler):
        def do_GET(self) -> None:  # noqa: N802 -- the base class's name
            answers = {
                "/api/latestbuilds": [{
                    "id": 1, "derivation": "x.drv", "evaluation": 7, "system": "x86_64-linux",
                    "buildstatus": 0, "timestamp": 1, "starttime": 1, "stoptime": 1,
                    "buildproducts": [],
                }],
                "/api/evaluation": {
                    "id": 7, "specification": "guix", "status": 0, "timestamp": 1,
                    "checkouttime": 1, "evaltime": 1,
                    "checkouts": [{"commit": server.commit, "channel": "guix"}],
                },
            }  # fmt: skip
            answer = answers.get(self.path.partition("?")[0])
            self.send_response(404 if answer is None else 200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        server.url = f"http://127.0.0.1:{http_server.server_port}"
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        yield server
        http_server.shutdown()


def test_update_uses_the_newest_commit_of_guix_that_a_server_has_built(
    new_project: NewProject, factory: ProjectFactory, built_commit: SimpleNamespace
) -> None:
    newest = factory.channel_commit("guix")
    (built, _) = re.findall(
        r'introduction\s+"(\w+)"', (factory.offline / "channels.scm").read_text()
    )
    servers = f"file:///offline/substitutes {built_commit.url}"
    project = new_project("base", NETWORK="host", GUIX_SUBSTITUTE_URLS=servers)

    def locked_commit() -> str:
        lock = (project.directory / "channels.lock.scm").read_text()
        (commit,) = re.findall(r'name .guix.*?commit\s+"(\w+)".*name', lock, re.DOTALL)
        return str(commit)

    log = project.ok("pull").stderr
    assert "guix: taking the newest commit, because no substitute server names one" in log
    assert locked_commit() == newest
    built_commit.commit = built
    log = project.ok("pull", "--update").stderr
    assert f"guix: staying at commit {newest}, because {built_commit.url} has built" in log
    assert locked_commit() == newest
    (project.directory / "channels.lock.scm").unlink()
    project.ok("clean")
    log = project.ok("pull", "--upstream").stderr
    assert f"guix: commit {built} is the newest that {built_commit.url} has built" in log
    assert locked_commit() == built
    assert "guix: " not in project.ok("pull", "--newest").stderr
    assert locked_commit() == newest


def test_weather_reports_the_substitutes_of_a_new_server(new_project: NewProject) -> None:
    project = new_project("base", "pull", "install", **server_settings())
    with project.assert_unchanged():
        result = project.inv("weather")
        assert "missing: greet@1.0" in result.stdout
        assert "1 of 2 available" in result.stdout
        assert "substitutes are missing for" in expect_error(result, 1)
        (report,) = run_weather(project, "--package=greet", status=1)
        assert report["wanted"] == {"greet@1.0": "missing"}
    project.ok("substitutes.up")
    assert "2 of 2 available" in project.ok("weather").stdout
    (report,) = run_weather(project, "--package=greet")
    assert report["wanted"] == {"greet@1.0": "substitutable"}
    assert (report["items"], report["missing"]) == (1, [])
    assert report["store_bytes"] > 0


def test_weather_checks_the_manifest_for_each_system(new_project: NewProject) -> None:
    project = new_project("base", "pull", PLATFORMS="linux/amd64 linux/arm64", GUIX_PACKAGES="")
    (project.directory / "manifest.scm").write_text('(specifications->manifest (list "hello"))\n')
    project.set(GUIX_MANIFEST="manifest.scm")
    with project.assert_unchanged():
        reports = run_weather(project, status=1)
    architecture = project.docker.ok("version", "--format={{.Server.Arch}}")
    native = {"amd64": "x86_64-linux", "arm64": "aarch64-linux"}[architecture]
    assert {report["system"]: report["wanted"] for report in reports} == {
        system: {"hello@2.12.2": "substitutable" if system == native else "missing"}
        for system in ("x86_64-linux", "aarch64-linux")
    }


def test_install_stops_if_required_substitutes_are_missing(new_project: NewProject) -> None:
    settings = {**server_settings(), "GUIX_REQUIRE_SUBSTITUTES": "yes"}
    project = new_project("base", "pull", "install", **settings)
    with project.assert_unchanged():
        result = project.inv("install", "--force")
        error = expect_error(result, 1)
    assert "no substitute for greet@1.0, and GUIX_REQUIRE_SUBSTITUTES is set" in error
    assert not ANY_BUILD.search(result.stderr)
    # The server has the items of the existing image.
    project.ok("substitutes.up")
    assert not ANY_BUILD.search(project.ok("install", "--force").stderr)


def test_weather_fails_only_if_no_server_answers(new_project: NewProject) -> None:
    unused = f"http://127.0.0.1:{free_port()}"
    project = new_project("base", "pull", NETWORK="host", GUIX_SUBSTITUTE_URLS=unused)
    assert "no substitute server answers (127.0.0.1)" in expect_error(project.inv("weather"), 4)
    project.set(GUIX_SUBSTITUTE_URLS=f"{unused} file:///offline/substitutes")
    (report,) = run_weather(project, "--package=hello")
    assert report["wanted"] == {"hello@2.12.2": "substitutable"}


@pytest.fixture
def bridge(docker: Docker) -> Iterator[str]:
    """Create a network of containers, like the default network of most engines."""
    name = f"guix-tasks-test-{secrets.token_hex(4)}"
    result = docker("network", "create", name)
    if result.returncode:
        pytest.skip(f"this engine cannot create a network: {result.stderr}")
    yield name
    docker("network", "rm", name)


def test_server_is_reachable_on_a_network_of_containers(
    new_project: NewProject, bridge: str
) -> None:
    project = new_project("base", "pull", "install", **{**server_settings(), "NETWORK": bridge})
    try:
        project.ok("substitutes.up")
        (report,) = run_weather(project, "--package=greet")
        assert report["wanted"] == {"greet@1.0": "substitutable"}
        with urllib.request.urlopen(  # noqa: S310 -- a local server
            f"{url(project)}/nix-cache-info", timeout=30
        ) as answer:
            assert b"StoreDir: /gnu/store" in answer.read()
        # Stages on the host's network use the published port.
        project.set(NETWORK="host")
        run_weather(project, "--package=greet")
        project.set(NETWORK="none")
        run_weather(project, "--package=greet", status=1)
    finally:
        project.ok("substitutes.down")


def test_port_in_use_is_one_error(new_project: NewProject) -> None:
    project = new_project("base", NETWORK="host")
    with socket.socket() as used, project.assert_unchanged():
        used.bind(("127.0.0.1", 0))
        used.listen()
        listen = f"127.0.0.1:{used.getsockname()[1]}"
        error = expect_error(project.inv("substitutes.up", f"--listen={listen}"), 3)
    assert "Address already in use" in error
    assert "SUBSTITUTES_LISTEN" in error
