"""An engine, a base image, a registry and the offline example for the tests that need them."""

from __future__ import annotations

import json
import os
import shutil
import sys
from typing import TYPE_CHECKING, Protocol

import engines
import pytest
from harness import (
    HTPASSWD,
    OFFLINE,
    ROOT,
    Docker,
    Made,
    Project,
    Workshop,
    builder_environment,
    free_port,
    log_in,
    new_python,
    pip,
)
from island import Island, load_image, raised, start_registry
from parallel import OTHER_STORE, is_worker
from planted import PLANTED

from dev.offline import make_material
from guix_tasks import files
from guix_tasks.bootstrap import service as service_module
from guix_tasks.bootstrap.base_image import BASE_TAG, PLAIN_TAG, make_base
from guix_tasks.bootstrap.engine import PrivateEngine, private_engine
from guix_tasks.bootstrap.registry import LocalRegistry, local_registry
from guix_tasks.bootstrap.service import Service
from guix_tasks.cli.session import helpers
from guix_tasks.engine.accounts import docker_config_directory
from guix_tasks.engine.discovery import find_engine
from guix_tasks.engine.docker import DockerEngine
from guix_tasks.errors import EngineError, NoEngineError
from guix_tasks.settings.values import ImageStore
from guix_tasks.ui.console import Console

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from soak import Soak

    from guix_tasks.engine.discovery import Address

STAGES = ("base", "pull", "install")

_NO_ENGINE = pytest.StashKey[str]()


_RAN_BEFORE = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RAN_BEFORE] = private_engine().running()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stop the private engine if the tests started it, after the last process that uses it."""
    if not is_worker(config) and not config.stash[_RAN_BEFORE] and private_engine().running():
        private_engine().down(Console())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs an engine, where there is none and none can be started.

    In CI that is a failure, of the fixture ``engine``.
    """
    # The longest first: at the end no process should have much left while the others have none.
    items.sort(key=_rank)
    wanted = [item for item in items if item.get_closest_marker("engine")]
    if not wanted or os.geteuid() == 0 or os.environ.get("CI") == "true":
        return
    try:
        find_engine(_docker_variables(), private_engine().socket)
    except NoEngineError as error:
        config.stash[_NO_ENGINE] = f"{len(wanted)} tests on a real engine are skipped: {error}"
        config.hook.pytest_deselected(items=wanted)
        items[:] = [item for item in items if item not in wanted]
    except EngineError:
        pass  # for the fixture to tell


LONGEST = (
    "test_warm_store", "test_kills", "test_incremental", "test_bad_input", "test_lifecycle",
    "test_pages", "test_distributable", "test_leaks", "test_ci_files", "test_podman",
    "test_substitutes", "test_other_programs", "test_rootless_docker", "test_userns_remap",
)  # fmt: skip
"""Modules that take more than two minutes, the longest first."""


def _rank(item: pytest.Item) -> int:
    """Return when a test starts: all of the other image store first, then the longest modules."""
    if OTHER_STORE in item.name:
        return -1
    return LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if reason := config.stash.get(_NO_ENGINE, ""):
        terminalreporter.write_line(reason)


@pytest.fixture(scope="session", autouse=True)
def summary(soak: Soak) -> Iterator[None]:
    """Report what was searched for secrets (``planted``), and on which engines tasks ran."""
    yield
    if PLANTED.outputs:
        soak.tell("no secret leaks", PLANTED.told)
    for engine, tasks in engines.lines():
        soak.tell(engine, tasks)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test on the machine's engine, or, if it is marked so, on one with the other store too.

    Tests of one store run together, because engines are started once.
    """
    if "store" in metafunc.fixturenames:
        both = metafunc.definition.get_closest_marker("both_stores")
        stores = [MACHINES, *([pytest.param(OTHER, id=OTHER)] if both else [])]
        metafunc.parametrize("store", stores, indirect=True, scope="session")


MACHINES = pytest.param("machine", id=pytest.HIDDEN_PARAM)
OTHER = OTHER_STORE


@pytest.fixture(scope="session")
def store(request: pytest.FixtureRequest) -> str:
    """Which engine a test runs on: that of the machine, or one with the other image store."""
    return str(request.param)


@pytest.fixture(scope="session")
def engine(store: str, request: pytest.FixtureRequest) -> DockerEngine:
    """The engine that a test runs on."""
    if store == OTHER:
        island: Island = request.getfixturevalue("other_store")
        return island.client()
    machines: DockerEngine = request.getfixturevalue("machine_engine")
    return machines


@pytest.fixture(scope="session")
def image_store(store: str, request: pytest.FixtureRequest) -> str:
    """The image store that a private engine of a test is to have; empty is Docker's default."""
    if store != OTHER:
        return ""
    machines: DockerEngine = request.getfixturevalue("machine_engine")
    uses_containerd = machines.info().uses_containerd
    return str((ImageStore.OVERLAY2 if uses_containerd else ImageStore.CONTAINERD).value)


@pytest.fixture(scope="session")
def other_store(
    machine_docker: Docker,
    machine_base: str,
    machine_registry: LocalRegistry,
    programs: Path,
    image_store: str,
) -> Iterator[Island]:
    """An engine with the image store that the machine's engine does not use."""
    with raised(programs, image_store) as island:
        island.ok("engine.up")
        start_registry(island, machine_registry.directory / "root")
        load_image(machine_base, machine_docker, island.docker)
        yield island


@pytest.fixture(scope="session")
def machine_engine() -> DockerEngine:
    """The engine of this machine; if there is none, a private one for the time of the tests."""
    try:
        found = DockerEngine(_address(), helpers(os.environ))
        found.info()
    except EngineError as error:
        pytest.fail(str(error), pytrace=False)
    _find_programs()
    return found


def made_once() -> AbstractContextManager[None]:
    """Keep other processes of the same run from making the same thing at the same time."""
    return service_module.locked(files.cache_home() / "tests" / "lock")


def _address() -> Address:
    private, own = private_engine(), _docker_variables()
    try:
        address = find_engine(own, private.socket)
    except NoEngineError:
        if os.geteuid() != 0:
            raise
    else:
        if address.url != private.url or private.running():
            return address
    private.up(Console())
    return find_engine(own, private.socket)


def _docker_variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("DOCKER_")}


def _find_programs() -> None:
    """Let the tests find the docker command line, with buildx, where only the private one is."""
    private = private_engine()
    if not shutil.which("docker"):
        programs = [each.parent for each in (private.docker_path(), private.buildx_path()) if each]
        os.environ["PATH"] = os.pathsep.join([os.environ["PATH"], *map(str, programs)])


@pytest.fixture(scope="session")
def engine_host(engine: DockerEngine) -> str:
    return engine.address.url


@pytest.fixture(scope="session")
def docker(engine_host: str, tmp_path_factory: pytest.TempPathFactory) -> Docker:
    return _docker(engine_host, tmp_path_factory)


@pytest.fixture(scope="session")
def machine_docker(
    machine_engine: DockerEngine, tmp_path_factory: pytest.TempPathFactory
) -> Docker:
    return _docker(machine_engine.address.url, tmp_path_factory)


def _docker(host: str, tmp_path_factory: pytest.TempPathFactory) -> Docker:
    config, own = tmp_path_factory.mktemp("docker"), docker_config_directory(os.environ)
    if (own / "cli-plugins").is_dir():
        (config / "cli-plugins").symlink_to(own / "cli-plugins")
    return Docker(host, config)


@pytest.fixture(scope="session")
def machine_base(machine_engine: DockerEngine) -> str:
    """An image that has Debian's Guix, on the engine of this machine."""
    with made_once():
        if machine_engine.image(BASE_TAG) is None:
            make_base(machine_engine, Console(), BASE_TAG)
    return BASE_TAG


@pytest.fixture(scope="session")
def base_image(machine_base: str, engine: DockerEngine) -> str:
    """The same image on the engine that a test runs on."""
    assert engine.image(machine_base)
    return machine_base


@pytest.fixture(scope="session")
def offline(machine_engine: DockerEngine, machine_base: str) -> Path:
    """The channels and substitutes of the offline example."""
    with made_once():
        make_material(machine_engine, Console(), machine_base, OFFLINE)
    return OFFLINE / "out"


@pytest.fixture(scope="session")
def registry(store: str, docker: Docker, request: pytest.FixtureRequest) -> LocalRegistry:
    """A registry that the engine of a test reaches, and that docker has logged in to."""
    if store == OTHER:
        found: LocalRegistry = request.getfixturevalue("other_store").registry
    else:
        found = request.getfixturevalue("machine_registry")
    log_in(docker, found)
    return found


@pytest.fixture(scope="session")
def machine_registry(
    tmp_path_factory: pytest.TempPathFactory, machine_docker: Docker
) -> Iterator[LocalRegistry]:
    """A registry of the tests' own; only the program is the one that may be here already.

    It is where ``inv`` finds it, with the account, and docker has logged in to it.
    """
    directory = tmp_path_factory.mktemp("data") / "guix-tasks" / "registry"
    directory.mkdir(parents=True)
    shared = local_registry()
    if shared.installed():
        (directory / "root").symlink_to(shared.directory / "root")
    own = LocalRegistry(directory, free_port())
    with made_once():
        own.up(Console())
    log_in(machine_docker, own)
    yield own
    own.down(Console())


@pytest.fixture(scope="session")
def programs() -> Path:
    """An engine's unpacked packages; of the one that is here, or a copy for the tests alone."""
    if private_engine().installed():
        return private_engine().directory / "root"
    kept = PrivateEngine(files.cache_home() / "tests" / "engine")
    with made_once():
        if not kept.installed():
            kept.directory.mkdir(parents=True, exist_ok=True)
            kept._unpack(Console())
    return kept.directory / "root"


@pytest.fixture
def island(programs: Path, image_store: str) -> Iterator[Island]:
    with raised(programs, image_store) as place:
        yield place


@pytest.fixture(scope="session")
def locked(registry: LocalRegistry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A registry that lets in only who has the password."""
    directory, port = tmp_path_factory.mktemp("locked"), free_port()
    (directory / "htpasswd").write_text(HTPASSWD)
    configuration = {
        "version": 0.1,
        "log": {"accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(directory / "data")}},
        "http": {"addr": f"127.0.0.1:{port}"},
        "auth": {"htpasswd": {"realm": "tests", "path": str(directory / "htpasswd")}},
    }
    (directory / "configuration").write_text(json.dumps(configuration))
    service = Service(
        registry.directory / "root/usr/bin/docker-registry", directory / "pid", directory / "log"
    )
    service.start(["serve", str(directory / "configuration")])
    assert service_module.wait_until(lambda: "listening on" in service.log.read_text(), 20)
    yield f"localhost:{port}"
    service.stop(20)


@pytest.fixture(scope="session")
def workshop(docker: Docker, registry: LocalRegistry, offline: Path) -> Workshop:
    data = registry.directory.parents[1]
    return Workshop(docker, f"localhost:{registry.port}", offline, data)


@pytest.fixture(scope="session")
def made(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    project = workshop.project(tmp_path_factory.mktemp("made") / "project")
    try:
        yield Made(project, {stage: project.ok(stage) for stage in STAGES})
    finally:
        project.remove()


class NewProject(Protocol):
    def __call__(self, *stages: str, repository: str = "", **settings: str) -> Project: ...


@pytest.fixture
def new_project(
    workshop: Workshop, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[NewProject]:
    """Makes projects that have some stages finished, and removes them after the test."""
    projects: list[Project] = []

    def make(*stages: str, repository: str = "", **settings: str) -> Project:
        directory = tmp_path / f"project{len(projects)}"
        projects.append(workshop.project(directory, repository, **settings))
        for stage in stages:
            projects[-1].take(stage, request.getfixturevalue("made").project)
        return projects[-1]

    yield make
    for project in projects:
        project.remove()


@pytest.fixture
def project(new_project: NewProject) -> Project:
    """A project that has all its stages finished."""
    return new_project(*STAGES)


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, and those of what it needs, as locked: all that pip needs."""
    directory = tmp_path_factory.mktemp("wheels")
    # Without the hashes: a wheel is not in the lock.
    locked = [line.split()[0] for line in (ROOT / "requirements.txt").open() if "==" in line]
    (directory / "locked").write_text("\n".join(locked))
    constraint = f"--constraint={directory / 'locked'}"
    pip(sys.executable, "wheel", f"--wheel-dir={directory}", constraint, str(ROOT))
    return directory


@pytest.fixture(scope="session")
def programs_of_wheel(wheels: Path) -> Path:
    """The programs of a virtual environment that has the wheel, and what that asks for."""
    programs = new_python(wheels / "venv")
    pip(str(programs / "python"), "install", "--no-index", f"--find-links={wheels}", "guix-tasks")
    return programs


@pytest.fixture(params=["buildx", "classic"])
def builder(
    request: pytest.FixtureRequest, registry: LocalRegistry, tmp_path: Path
) -> dict[str, str]:
    """The environment in which the one or the other builder is found."""
    environment = builder_environment(request.param)
    if request.param == "classic":
        # The registry alone: the private engine of the other image store has buildx.
        data = tmp_path / "data"
        (data / "guix-tasks").mkdir(parents=True)
        (data / "guix-tasks" / "registry").symlink_to(registry.directory)
        environment["XDG_DATA_HOME"] = str(data)
    return environment


@pytest.fixture(scope="session")
def plain_image(engine: DockerEngine) -> str:
    """A Debian that has no Guix; as the base image, it is made once."""
    with made_once():
        if engine.image(PLAIN_TAG) is None:
            make_base(engine, Console(), PLAIN_TAG, plain=True)
    return PLAIN_TAG
