"""Fixtures: engines, base image, registries, offline example and projects."""

from __future__ import annotations

import json
import os
import shutil
import sys
from typing import TYPE_CHECKING, Protocol

import pytest
import task_counts
from harness import (
    HTPASSWD,
    OFFLINE,
    ROOT,
    BuiltProject,
    Docker,
    Project,
    ProjectFactory,
    builder_environment,
    create_venv,
    free_port,
    log_in,
    pip,
)
from isolated_host import IsolatedHost, copy_image, create_isolated_host, start_registry
from parallel import OTHER_STORE, is_worker
from planted_secrets import PLANTED_SECRETS

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
_WAS_RUNNING = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_WAS_RUNNING] = private_engine().running()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stop the private engine if the tests started it; the main process ends last."""
    if not is_worker(config) and not config.stash[_WAS_RUNNING] and private_engine().running():
        private_engine().down(Console())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests that need an engine if none exists and none can be started.

    In CI these tests then fail in the fixture ``engine``.
    """
    # The longest tests start first, so that all processes end at about the same time.
    items.sort(key=_rank)
    engine_tests = [item for item in items if item.get_closest_marker("engine")]
    if not engine_tests or os.geteuid() == 0 or os.environ.get("CI") == "true":
        return
    try:
        find_engine(_docker_variables(), private_engine().socket)
    except NoEngineError as error:
        message = f"{len(engine_tests)} tests on a real engine are skipped: {error}"
        config.stash[_NO_ENGINE] = message
        config.hook.pytest_deselected(items=engine_tests)
        items[:] = [item for item in items if item not in engine_tests]
    except EngineError:
        pass  # the fixture reports it


LONGEST = (
    "test_warm_store", "test_kills", "test_incremental", "test_bad_input", "test_lifecycle",
    "test_pages", "test_distributable", "test_leaks", "test_ci_files", "test_podman",
    "test_substitutes", "test_other_programs", "test_rootless_docker", "test_userns_remap",
)  # fmt: skip
"""Modules that take more than two minutes, the longest first."""


def _rank(item: pytest.Item) -> int:
    """Return the sort key: tests on the other image store first, then the longest modules."""
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
    """Report the search for planted secrets, and the tasks that ran on each engine."""
    yield
    if PLANTED_SECRETS.outputs:
        soak.report("no secret leaks", PLANTED_SECRETS.summary)
    for engine, tasks in task_counts.summary():
        soak.report(engine, tasks)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests on the engine of the machine, and marked tests on the other image store.

    Tests of one store run together, because each engine is started once.
    """
    if "store" in metafunc.fixturenames:
        if metafunc.definition.get_closest_marker("other_store"):
            stores = [pytest.param(OTHER_STORE, id=OTHER_STORE)]
            metafunc.parametrize("store", stores, indirect=True, scope="session")
            return
        both = metafunc.definition.get_closest_marker("both_stores")
        marks = [pytest.mark.only_soak] if both and both.kwargs.get("only_soak") else []
        other = [pytest.param(OTHER_STORE, id=OTHER_STORE, marks=marks)] if both else []
        metafunc.parametrize("store", [MACHINE_STORE, *other], indirect=True, scope="session")


MACHINE_STORE = pytest.param("machine", id=pytest.HIDDEN_PARAM)


@pytest.fixture(scope="session")
def store(request: pytest.FixtureRequest) -> str:
    """Name the engine of a test: that of the machine, or one with the other image store."""
    return str(request.param)


@pytest.fixture(scope="session")
def engine(store: str, request: pytest.FixtureRequest) -> DockerEngine:
    """Return the engine of a test."""
    if store == OTHER_STORE:
        host: IsolatedHost = request.getfixturevalue("other_store")
        return host.client()
    machine_engine: DockerEngine = request.getfixturevalue("machine_engine")
    return machine_engine


@pytest.fixture(scope="session")
def image_store(store: str, request: pytest.FixtureRequest) -> str:
    """Name the image store of the private engines of a test (empty: Docker's default)."""
    if store != OTHER_STORE:
        return ""
    machine_engine: DockerEngine = request.getfixturevalue("machine_engine")
    uses_containerd = machine_engine.info().uses_containerd
    return str((ImageStore.OVERLAY2 if uses_containerd else ImageStore.CONTAINERD).value)


@pytest.fixture(scope="session")
def other_store(
    machine_docker: Docker,
    machine_base: str,
    machine_registry: LocalRegistry,
    programs: Path,
    image_store: str,
) -> Iterator[IsolatedHost]:
    """Run an engine with the image store that the engine of the machine does not use."""
    with create_isolated_host(programs, image_store) as host:
        host.ok("engine.up")
        start_registry(host, machine_registry.directory / "root")
        copy_image(machine_base, machine_docker, host.docker)
        yield host


@pytest.fixture(scope="session")
def machine_engine() -> DockerEngine:
    """Return the engine of this machine, or start the private engine if there is none."""
    try:
        engine = DockerEngine(_address(), helpers(os.environ))
        engine.info()
    except EngineError as error:
        pytest.fail(str(error), pytrace=False)
    _extend_path()
    return engine


def lock_shared_files() -> AbstractContextManager[None]:
    """Hold a lock, so that only one process of a test run creates shared files and images."""
    return service_module.locked(files.cache_home() / "tests" / "lock")


def _address() -> Address:
    private, variables = private_engine(), _docker_variables()
    try:
        address = find_engine(variables, private.socket)
    except NoEngineError:
        if os.geteuid() != 0:
            raise
    else:
        if address.url != private.url or private.running():
            return address
    private.up(Console())
    return find_engine(variables, private.socket)


def _docker_variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("DOCKER_")}


def _extend_path() -> None:
    """Add docker and buildx of the private engine to ``PATH`` if docker is not installed."""
    private = private_engine()
    if not shutil.which("docker"):
        programs = (private.docker_path(), private.buildx_path())
        directories = [str(program.parent) for program in programs if program]
        os.environ["PATH"] = os.pathsep.join([os.environ["PATH"], *directories])


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
    config = tmp_path_factory.mktemp("docker")
    plugins = docker_config_directory(os.environ) / "cli-plugins"
    if plugins.is_dir():
        (config / "cli-plugins").symlink_to(plugins)
    return Docker(host, config)


@pytest.fixture(scope="session")
def machine_base(machine_engine: DockerEngine) -> str:
    """Create an image with Debian's Guix on the engine of this machine."""
    with lock_shared_files():
        if machine_engine.image(BASE_TAG) is None:
            make_base(machine_engine, Console(), BASE_TAG)
    return BASE_TAG


@pytest.fixture(scope="session")
def base_image(machine_base: str, engine: DockerEngine) -> str:
    """Return the same image on the engine of a test."""
    assert engine.image(machine_base)
    return machine_base


@pytest.fixture(scope="session")
def offline(machine_engine: DockerEngine, machine_base: str) -> Path:
    """Create the channels and substitutes of the offline example."""
    with lock_shared_files():
        make_material(machine_engine, Console(), machine_base, OFFLINE)
    return OFFLINE / "out"


@pytest.fixture(scope="session")
def registry(store: str, docker: Docker, request: pytest.FixtureRequest) -> LocalRegistry:
    """Return a registry that the engine of a test can reach, and log in to it."""
    if store == OTHER_STORE:
        registry: LocalRegistry = request.getfixturevalue("other_store").registry
    else:
        registry = request.getfixturevalue("machine_registry")
    log_in(docker, registry)
    return registry


@pytest.fixture(scope="session")
def machine_registry(
    tmp_path_factory: pytest.TempPathFactory, machine_docker: Docker
) -> Iterator[LocalRegistry]:
    """Run a registry in a data directory in which ``inv`` finds it, and log in to it.

    Only its program can be that of the user's local registry.
    """
    directory = tmp_path_factory.mktemp("data") / "guix-tasks" / "registry"
    directory.mkdir(parents=True)
    shared = local_registry()
    if shared.installed():
        (directory / "root").symlink_to(shared.directory / "root")
    registry = LocalRegistry(directory, free_port())
    with lock_shared_files():
        registry.up(Console())
    log_in(machine_docker, registry)
    yield registry
    registry.down(Console())


@pytest.fixture(scope="session")
def programs() -> Path:
    """Return the unpacked packages of the private engine, or of a cached copy for tests."""
    if private_engine().installed():
        return private_engine().directory / "root"
    cached = PrivateEngine(files.cache_home() / "tests" / "engine")
    with lock_shared_files():
        if not cached.installed():
            cached.directory.mkdir(parents=True, exist_ok=True)
            cached._unpack(Console())
    return cached.directory / "root"


@pytest.fixture
def host(programs: Path, image_store: str) -> Iterator[IsolatedHost]:
    with create_isolated_host(programs, image_store) as host:
        yield host


@pytest.fixture(scope="session")
def private_registry(
    registry: LocalRegistry, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Run a registry that needs the account ``USER``, and yield its address."""
    directory, port = tmp_path_factory.mktemp("private-registry"), free_port()
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
def factory(docker: Docker, registry: LocalRegistry, offline: Path) -> ProjectFactory:
    data = registry.directory.parents[1]
    return ProjectFactory(docker, f"localhost:{registry.port}", offline, data)


@pytest.fixture(scope="session")
def built_project(
    factory: ProjectFactory, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[BuiltProject]:
    project = factory.create(tmp_path_factory.mktemp("built") / "project")
    try:
        yield BuiltProject(project, {stage: project.ok(stage) for stage in STAGES})
    finally:
        project.remove()


class NewProject(Protocol):
    def __call__(self, *stages: str, repository: str = "", **settings: str) -> Project: ...


@pytest.fixture
def new_project(
    factory: ProjectFactory, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[NewProject]:
    """Create projects with some finished stages, and remove them after the test."""
    projects: list[Project] = []

    def create(*stages: str, repository: str = "", **settings: str) -> Project:
        directory = tmp_path / f"project{len(projects)}"
        projects.append(factory.create(directory, repository, **settings))
        for stage in stages:
            projects[-1].copy_stage(stage, request.getfixturevalue("built_project").project)
        return projects[-1]

    yield create
    for project in projects:
        project.remove()


@pytest.fixture
def project(new_project: NewProject) -> Project:
    """Create a project with all stages finished."""
    return new_project(*STAGES)


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel of this checkout and those of its locked dependencies."""
    directory = tmp_path_factory.mktemp("wheels")
    # Without hashes, because the lock file has none of this wheel.
    versions = [line.split()[0] for line in (ROOT / "requirements.txt").open() if "==" in line]
    (directory / "versions").write_text("\n".join(versions))
    constraint = f"--constraint={directory / 'versions'}"
    pip(sys.executable, "wheel", f"--wheel-dir={directory}", constraint, str(ROOT))
    return directory


@pytest.fixture(scope="session")
def wheel_programs(wheels: Path) -> Path:
    """Install the wheel in a virtual environment, and return the directory of its programs."""
    programs = create_venv(wheels / "venv")
    pip(str(programs / "python"), "install", "--no-index", f"--find-links={wheels}", "guix-tasks")
    return programs


@pytest.fixture(params=["buildx", "classic"])
def builder(
    request: pytest.FixtureRequest, registry: LocalRegistry, tmp_path: Path
) -> dict[str, str]:
    """Return an environment in which `inv` uses buildx or the classic builder."""
    environment = builder_environment(request.param)
    if request.param == "classic":
        # Only the registry, because the private engine of the other image store has buildx.
        data = tmp_path / "data"
        (data / "guix-tasks").mkdir(parents=True)
        (data / "guix-tasks" / "registry").symlink_to(registry.directory)
        environment["XDG_DATA_HOME"] = str(data)
    return environment


@pytest.fixture(scope="session")
def plain_image(engine: DockerEngine) -> str:
    """Create an image of Debian without Guix."""
    with lock_shared_files():
        if engine.image(PLAIN_TAG) is None:
            make_base(engine, Console(), PLAIN_TAG, plain=True)
    return PLAIN_TAG
