"""Variables of other tools and the umask do not change the images of stages."""

from __future__ import annotations

import re
import shutil
from typing import TYPE_CHECKING

import pytest
from harness import ROOT, read_contents

from guix_tasks.oci.labels import CREATED
from guix_tasks.stages.images import FILES_LABEL, IMAGE_LABEL, LAYERS_LABEL

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import NewProject
    from harness import BuiltProject, Project

pytestmark = pytest.mark.engine

HOSTILE = {
    # Docker's command line, buildx and Compose
    "BUILDKIT_COLORS": "run=red",
    "BUILDKIT_HOST": "tcp://127.0.0.1:9",
    "BUILDKIT_PROGRESS": "rawjson",
    "BUILDX_BUILDER": "nobody",
    "BUILDX_EXPERIMENTAL": "1",
    "BUILDX_GIT_LABELS": "full",
    "BUILDX_METADATA_PROVENANCE": "max",
    "BUILDX_NO_DEFAULT_ATTESTATIONS": "0",
    "BUILDX_NO_DEFAULT_LOAD": "1",
    "COMPOSE_FILE": "/missing.yml",
    "COMPOSE_PROJECT_NAME": "other",
    "DOCKER_API_VERSION": "1.12",
    "DOCKER_BUILDKIT": "0",
    "DOCKER_CONTENT_TRUST": "1",
    "DOCKER_CUSTOM_HEADERS": "X-A=b",
    "DOCKER_DEFAULT_PLATFORM": "linux/arm64",
    "DOCKER_HIDE_LEGACY_COMMANDS": "1",
    "SOURCE_DATE_EPOCH": "1",
    # networks
    "ALL_PROXY": "http://127.0.0.1:9",
    "CURL_CA_BUNDLE": "/missing.pem",
    "HTTP_PROXY": "http://127.0.0.1:9",
    "REQUESTS_CA_BUNDLE": "/missing.pem",
    "SSL_CERT_FILE": "/missing.pem",
    "http_proxy": "http://127.0.0.1:9",
    "https_proxy": "http://127.0.0.1:9",
    # Git and Guix
    "GIT_CEILING_DIRECTORIES": "/",
    "GIT_CONFIG_COUNT": "1",
    "GIT_CONFIG_KEY_0": "remote.origin.url",
    "GIT_CONFIG_VALUE_0": "https://other.test/repository",
    "GIT_DIR": "/missing.git",
    "GIT_INDEX_FILE": "/missing.index",
    "GIT_WORK_TREE": "/missing",
    "GUIX_BUILD_OPTIONS": "--no-substitutes",
    "GUIX_DAEMON_SOCKET": "/missing.socket",
    "GUIX_LOCPATH": "/missing",
    "GUIX_PACKAGE_PATH": "/missing",
    "GUIX_PROFILE": "/missing",
    # locale, time and display
    "COLUMNS": "1",
    "FORCE_COLOR": "1",
    "LANG": "tr_TR",
    "LANGUAGE": "tr",
    "LC_ALL": "C",
    "NO_COLOR": "1",
    "TERM": "missing",
    "TZ": "Asia/Kathmandu",
    # Python and the programs of a Unix machine
    "GZIP": "-1",
    "POSIXLY_CORRECT": "1",
    "PYTHONCOERCECLOCALE": "0",
    "PYTHONHASHSEED": "1",
    "PYTHONIOENCODING": "ascii",
    "PYTHONOPTIMIZE": "2",
    "PYTHONUTF8": "0",
    "SSH_ASKPASS": "/missing",
    "TAR_OPTIONS": "--exclude=*",
    "XZ_OPT": "-0",
}
"""Values that change the results of tools that read them, or make them fail."""


def set_umask(project: Project, umask: str) -> None:
    project.program = ["sh", "-c", f'umask {umask}; exec "$@"', "sh", *project.program]


def configuration(project: Project, image: str) -> dict[str, object]:
    """Return the configuration without the labels that differ between projects and times."""
    config = project.docker.config(image)
    for label in (CREATED, FILES_LABEL, IMAGE_LABEL, LAYERS_LABEL):
        del config["Labels"][label]
    return config


@pytest.mark.both_stores
def test_variables_of_other_tools_do_not_change_the_result(
    new_project: NewProject, built_project: BuiltProject, tmp_path: Path
) -> None:
    project = new_project()
    set_umask(project, "077")
    temporary = tmp_path / "of, all"
    temporary.mkdir()
    environment = {**HOSTILE, "TMPDIR": str(temporary)}
    result = project.inv("base", "pull", "install", "push", env=environment, timeout=480)
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(rf"{re.escape(project.image)}@sha256:[0-9a-f]{{64}}\n", result.stdout)
    assert "note: environment: DOCKER_DEFAULT_PLATFORM is ignored" in result.stderr
    for stage in ("base", "pull", "install"):
        expected = configuration(built_project.project, built_project.project.tag(stage))
        assert configuration(project, project.tag(stage)) == expected
    docker = project.docker
    assert read_contents(docker, project.image) == read_contents(
        docker, built_project.project.image
    )
    # The stages are up to date without the variables.
    output = project.ok("base", "pull", "install").stderr
    assert re.findall(r"^(\w+): up to date$", output, re.MULTILINE) == ["base", "pull", "install"]


def test_entry_point_of_a_private_checkout_is_readable_by_every_user(
    new_project: NewProject, tmp_path: Path
) -> None:
    """The checkout has the modes of ``umask 077; git clone``."""
    context, resources = tmp_path / "context", "guix_tasks/stages/resources"
    shutil.copytree(ROOT / resources, context / resources)
    shutil.copy(ROOT / "Dockerfile", context)
    for path in [context, *context.rglob("*")]:
        path.chmod(path.stat().st_mode & 0o700)
    project = new_project(BUILD_CONTEXT=str(context), DOCKERFILE=str(context / "Dockerfile"))
    project.ok("base")
    command = ("-c", "stat -c %a /entry-point.sh && cat /entry-point.sh >/dev/null")
    options = ("--user=12345", "--entrypoint=sh")
    result = project.docker.run(project.tag("base"), *command, options=options)
    assert (result.stdout, result.stderr) == ("755\n", "")
