"""Substitutes near by: served from a stage image, and asked for before hours are spent."""

from __future__ import annotations

import json
import re
import secrets
import shlex
import shutil
import socket
import threading
import urllib.request
from http.server import ThreadingHTTPServer
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from harness import ROOT, HttpHandler, contents, free_port, one_error
from planted import PLANTED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import NewProject
    from harness import Docker, Made, Project, Workshop

pytestmark = pytest.mark.engine

NOBODY = "file:///offline/nobody"
"""A substitute server that has nothing."""

GREET = re.compile(r"building /gnu/store/\w+-greet-1.0.drv")
ANY_BUILD = re.compile(r"building /gnu/store/.*")


@pytest.fixture
def served(new_project: NewProject) -> Project:
    """A project that serves its store to whoever is on this machine."""
    project = new_project("base", "pull", "install", **on_a_port())
    project.ok("substitutes.up")
    return project


def on_a_port() -> dict[str, str]:
    return {"NETWORK": "host", "SUBSTITUTES_LISTEN": f"127.0.0.1:{free_port()}"}


def url(project: Project) -> str:
    return f"http://{project.settings['SUBSTITUTES_LISTEN']}"


def server(project: Project) -> str:
    """The name of the container that serves."""
    (name,) = project.containers()
    assert name.startswith("guix-tasks-substitutes-")
    return name


def inspected(project: Project) -> dict[str, Any]:
    found: list[dict[str, Any]] = json.loads(project.docker.ok("inspect", server(project)))
    return found[0]


def requests(project: Project) -> str:
    log = project.docker("logs", server(project))
    return log.stdout + log.stderr


def downloaded(project: Project) -> list[str]:
    """The store items that were fetched from a project's server."""
    return re.findall(r"GET /nar/(?:gzip|zstd)/\w+-(\S+)", requests(project))


def acl(docker: Docker, image: str) -> str:
    said = docker.run(image, "cat", "/etc/guix/acl", options=("--entrypoint=",))
    assert said.returncode == 0, said.stderr
    return said.stdout


def signing_key(project: Project, base_image: str) -> str:
    """The secret number of the key pair, which is looked for in all that comes out from now on."""
    (volume,) = [each for each in project.volumes() if each.endswith("-signing-key")]
    said = project.docker.run(
        base_image,
        "cat",
        "/key/signing-key.sec",
        options=("--entrypoint=", "--user=0", f"--volume={volume}:/key:ro"),
    )
    (number,) = re.findall(r"\(d #([0-9A-F]+)#\)", said.stdout)
    PLANTED.know(number)
    return str(number)


def test_another_machine_downloads_what_it_would_build(
    served: Project, new_project: NewProject, base_image: str
) -> None:
    signing_key(served, base_image)
    assert served.ok("substitutes.up").stdout == ""
    port = served.settings["SUBSTITUTES_LISTEN"].rpartition(":")[2]
    said = served.ok("substitutes.up", f"--listen=0.0.0.0:{port}")
    (host,) = re.findall(r"replace (\S+) with a name", said.stderr)
    lines = dict(line.split("=", 1) for line in said.stdout.splitlines())
    other = new_project("base", NETWORK="host")
    (ours,) = (served.directory / "out").glob("*.pub")
    shutil.copy(ours, other.directory)
    other.set(**{name: line.replace(host, "127.0.0.1") for name, line in lines.items()})
    assert url(served) in other.settings["GUIX_SUBSTITUTE_URLS"]
    log = other.ok("install", "--upstream").stderr
    assert "greet-1.0" in log
    assert not ANY_BUILD.search(log)
    assert {"greet-1.0", "hello-2.12.2"} <= set(downloaded(served))
    assert contents(other.docker, other.image) == contents(served.docker, served.image)


def test_without_its_key_nothing_of_it_is_taken(served: Project, new_project: NewProject) -> None:
    servers = f"{url(served)} file:///offline/substitutes"
    other = new_project("base", "pull", NETWORK="host", GUIX_SUBSTITUTE_URLS=servers)
    log = other.ok("install").stderr
    assert GREET.search(log)
    assert "greet-1.0" not in downloaded(served)
    assert ".narinfo" in requests(served)


def test_the_next_build_after_a_change_of_the_base_builds_nothing(
    served: Project, made: Made, base_image: str
) -> None:
    docker, before = served.docker, inspected(served)["Id"]
    assert all(ANY_BUILD.search(made.calls[stage].stderr) for stage in ("pull", "install"))
    number = signing_key(served, base_image)
    changed = served.directory / "Dockerfile"
    changed.write_text((ROOT / "Dockerfile").read_text() + "\nRUN touch /changed\n")
    # Nobody else has anything.
    served.set(DOCKERFILE=str(changed), GUIX_SUBSTITUTE_URLS=NOBODY)
    log = served.ok("install", "--upstream").stderr
    assert f"install: substitutes come from {url(served)} first" in log
    assert not ANY_BUILD.search(log)
    assert {"greet-1.0", "hello-2.12.2"} <= set(downloaded(served))
    assert inspected(served)["Id"] == before
    assert docker.run(served.image, "ls", "/changed", options=("--entrypoint=",)).returncode == 0
    # The image is what it would be had it never met the server.
    model = made.project.image
    assert contents(docker, served.image) == contents(docker, model)
    assert acl(docker, served.image) == acl(docker, model)
    ours, theirs = docker.config(served.image), docker.config(model)
    assert {**ours, "Labels": ""} == {**theirs, "Labels": ""}
    keys = docker.run(
        served.image, "sh", "-c", f"find / -xdev -name 'signing-key*'; grep -rl {number} /etc /var"
        " /root /tmp || true",
        options=("--entrypoint=",),
    )  # fmt: skip
    assert keys.stdout == ""
    # It does not matter to the stages that the server is there.
    served.ok("substitutes.down")
    assert served.ok("install").stderr.endswith("install: up to date\n")


def test_the_newest_is_served_once_asked_for(served: Project) -> None:
    first = inspected(served)
    served.ok("install", "--package=hello")
    said = served.ok("weather", "--package=greet").stderr
    assert "of an older image; `inv substitutes.up` serves the newest" in said
    assert "serving the stage install\n" in served.ok("substitutes.up").stderr
    assert inspected(served)["Image"] == served.id("install") != first["Image"]
    assert served.docker("image", "inspect", first["Image"]).returncode == 0  # the model's


def test_it_comes_up_once_and_goes_without_a_trace(served: Project, base_image: str) -> None:
    number, first = signing_key(served, base_image), inspected(served)["Id"]
    (key,) = (served.directory / "out").glob("substitutes-*.pub")
    public = key.read_text()
    served.ok("substitutes.up")
    assert inspected(served)["Id"] == first
    served.ok("clean", "--work")
    assert inspected(served)["Id"] == first
    served.ok("substitutes.down")
    assert served.containers() == []
    assert "no server of this project is running" in served.ok("substitutes.down").stderr
    served.ok("substitutes.up")
    assert key.read_text() == public
    assert signing_key(served, base_image) == number
    served.ok("clean")
    assert served.containers() == served.volumes() == []


def test_nothing_in_it_has_any_right(served: Project) -> None:
    found = inspected(served)
    host = found["HostConfig"]
    assert (host["Privileged"], host["CapDrop"], host["CapAdd"]) == (False, ["ALL"], None)
    assert host["SecurityOpt"] == ["no-new-privileges"]
    assert found["Config"]["User"] == "guix-daemon"
    assert found["Config"]["Env"] == served.docker.config(served.image)["Env"]
    users = served.docker.ok("top", server(served), "-o", "pid,uid").splitlines()[1:]
    assert users
    assert "0" not in [line.split()[1] for line in users]


def forecast(project: Project, *options: str, status: int = 0) -> list[dict[str, Any]]:
    result = project.inv("weather", "--json", *options)
    assert result.returncode == status, result.stderr
    found: list[dict[str, Any]] = json.loads(result.stdout)
    return found


@pytest.fixture
def built_commit() -> Iterator[SimpleNamespace]:
    """A server with the API of Cuirass; ``commit`` is the last that it has built."""
    server = SimpleNamespace(commit="f" * 40, url="")

    class Handler(HttpHandler):
        def do_GET(self) -> None:  # noqa: N802 -- the base class calls it
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

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        server.url = f"http://127.0.0.1:{listening.server_port}"
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield server
        listening.shutdown()


def test_an_update_takes_the_commit_of_guix_that_a_server_has_built(
    new_project: NewProject, workshop: Workshop, built_commit: SimpleNamespace
) -> None:
    newest = workshop.commit_of("guix")
    (built, _) = re.findall(
        r'introduction\s+"(\w+)"', (workshop.offline / "channels.scm").read_text()
    )
    servers = f"file:///offline/substitutes {built_commit.url}"
    project = new_project("base", NETWORK="host", GUIX_SUBSTITUTE_URLS=servers)

    def locked() -> str:
        lock = (project.directory / "channels.lock.scm").read_text()
        (commit,) = re.findall(r'name .guix.*?commit\s+"(\w+)".*name', lock, re.DOTALL)
        return str(commit)

    log = project.ok("pull").stderr
    assert "guix: taking the newest commit, because no substitute server names one" in log
    assert locked() == newest
    built_commit.commit = built
    log = project.ok("pull", "--update").stderr
    assert f"guix: staying at commit {newest}, because {built_commit.url} has built" in log
    assert locked() == newest
    (project.directory / "channels.lock.scm").unlink()
    project.ok("clean")
    log = project.ok("pull", "--upstream").stderr
    assert f"guix: commit {built} is the newest that {built_commit.url} has built" in log
    assert locked() == built
    assert "guix: " not in project.ok("pull", "--newest").stderr
    assert locked() == newest


def test_the_weather_turns_when_a_server_comes_up(new_project: NewProject) -> None:
    project = new_project("base", "pull", "install", **on_a_port())
    with project.unharmed():
        result = project.inv("weather")
        assert "missing: greet@1.0" in result.stdout
        assert "1 of 2 available" in result.stdout
        assert "substitutes are missing for" in one_error(result, 1)
        (found,) = forecast(project, "--package=greet", status=1)
        assert found["wanted"] == {"greet@1.0": "missing"}
    project.ok("substitutes.up")
    assert "2 of 2 available" in project.ok("weather").stdout
    (found,) = forecast(project, "--package=greet")
    assert found["wanted"] == {"greet@1.0": "substitutable"}
    assert (found["items"], found["missing"]) == (1, [])
    assert found["store_bytes"] > 0


def test_the_weather_is_asked_for_each_system_and_for_a_manifest(new_project: NewProject) -> None:
    project = new_project("base", "pull", PLATFORMS="linux/amd64 linux/arm64", GUIX_PACKAGES="")
    (project.directory / "manifest.scm").write_text('(specifications->manifest (list "hello"))\n')
    project.set(GUIX_MANIFEST="manifest.scm")
    with project.unharmed():
        found = forecast(project, status=1)
    own = project.docker.ok("version", "--format={{.Server.Arch}}")
    here = {"amd64": "x86_64-linux", "arm64": "aarch64-linux"}[own]
    assert {each["system"]: each["wanted"] for each in found} == {
        system: {"hello@2.12.2": "substitutable" if system == here else "missing"}
        for system in ("x86_64-linux", "aarch64-linux")
    }


def test_install_stops_where_substitutes_are_required(new_project: NewProject) -> None:
    required = {**on_a_port(), "GUIX_REQUIRE_SUBSTITUTES": "yes"}
    project = new_project("base", "pull", "install", **required)
    with project.unharmed():
        result = project.inv("install", "--force")
        said = one_error(result, 1)
    assert "no substitute for greet@1.0, and GUIX_REQUIRE_SUBSTITUTES is set" in said
    assert not ANY_BUILD.search(result.stderr)
    # What is served is what it was made from before.
    project.ok("substitutes.up")
    assert not ANY_BUILD.search(project.ok("install", "--force").stderr)


def test_servers_that_do_not_answer_have_said_nothing(new_project: NewProject) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    project = new_project("base", "pull", NETWORK="host", GUIX_SUBSTITUTE_URLS=nobody)
    assert "no substitute server answers (127.0.0.1)" in one_error(project.inv("weather"), 4)
    both = f"{nobody} file:///offline/substitutes"
    project.set(GUIX_SUBSTITUTE_URLS=both)
    (found,) = forecast(project, "--package=hello")
    assert found["wanted"] == {"hello@2.12.2": "substitutable"}


@pytest.fixture
def bridge(docker: Docker) -> Iterator[str]:
    """A network of containers, as most engines have one by default."""
    name = f"guix-tasks-test-{secrets.token_hex(4)}"
    made = docker("network", "create", name)
    if made.returncode:
        pytest.skip(f"this engine makes no network: {made.stderr}")
    yield name
    docker("network", "rm", name)


def test_containers_reach_it_on_a_network_of_their_own(
    new_project: NewProject, bridge: str
) -> None:
    project = new_project("base", "pull", "install", **{**on_a_port(), "NETWORK": bridge})
    try:
        project.ok("substitutes.up")
        (found,) = forecast(project, "--package=greet")
        assert found["wanted"] == {"greet@1.0": "substitutable"}
        with urllib.request.urlopen(  # noqa: S310 -- our own
            f"{url(project)}/nix-cache-info", timeout=30
        ) as answer:
            assert b"StoreDir: /gnu/store" in answer.read()
        # By its port, where stages are on the host's network now.
        project.set(NETWORK="host")
        forecast(project, "--package=greet")
        project.set(NETWORK="none")
        forecast(project, "--package=greet", status=1)
    finally:
        project.ok("substitutes.down")


def test_what_cannot_be_served_is_one_line(new_project: NewProject) -> None:
    project = new_project()
    assert one_error(project.inv("substitutes.up"), 2).startswith(
        "error: NETWORK=none: a substitute server would be unreachable"
    )
    project.set(NETWORK="host")
    assert "there is no stage to serve" in one_error(project.inv("substitutes.up"), 2)
    assert "is not an IPv4 address with a port" in one_error(
        project.inv("substitutes.up", "--listen=8181"), 2
    )
    project = new_project("base", NETWORK="host")
    with socket.socket() as taken, project.unharmed():
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        said = one_error(project.inv("substitutes.up", f"--listen={listen}"), 3)
    assert "Address already in use" in said
    assert "SUBSTITUTES_LISTEN" in said


def test_a_dry_run_starts_nothing(project: Project) -> None:
    project.set(NETWORK="host")
    with project.unharmed():
        said = project.ok("--dry", "substitutes.up").stderr
    assert "--user=guix-daemon" in said
    assert "--cap-drop=ALL" in said
    assert "serving" not in said
    assert shlex.split(said.partition("+ docker create")[2].splitlines()[0])
