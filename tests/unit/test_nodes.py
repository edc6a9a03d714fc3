"""``BUILDX_NODES``: syntax of nodes, and nodes of each driver."""

from __future__ import annotations

from pathlib import Path

import pytest

from guix_tasks.oci.platform import Platform
from guix_tasks.settings.nodes import node, problems
from guix_tasks.settings.values import Driver, Node

BASE = Path("/project")
AMD64, ARM64 = Platform.parse("linux/amd64"), Platform.parse("linux/arm64")


def find_problems(driver: Driver, *texts: str) -> list[str]:
    """Return the problems of nodes in the syntax of the setting."""
    return list(problems(driver, tuple(node(text, BASE) for text in texts)))


# --- Syntax ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ssh://me@host", Node("ssh://me@host")),
        ("my-context", Node("my-context")),
        ("unix:///run/x.sock", Node("unix:///run/x.sock")),
        ("tcp://[::1]:2376", Node("tcp://[::1]:2376")),
        ("team+1.x_y", Node("team+1.x_y")),
        (
            "tcp://a:1,platform=linux/aarch64,platform=linux/amd64",
            Node("tcp://a:1", (ARM64, AMD64)),
        ),
        ("a,memory=4g,platform=linux/amd64", Node("a", (AMD64,), (("memory", "4g"),))),
        ("a,env.A=b=c", Node("a", options=(("env.A", "b=c"),))),
        ('a,"env.A=1,2",memory=4g', Node("a", options=(("env.A", "1,2"), ("memory", "4g")))),
        ('a,"env.A=say ""x"""', Node("a", options=(("env.A", 'say "x"'),))),
        ("a,env.A=ünï ${x}", Node("a", options=(("env.A", "ünï ${x}"),))),
        ("namespace=ci,replicas=2", Node(options=(("namespace", "ci"), ("replicas", "2")))),
        ("platform=linux/arm64,env.A=tcp://a:1", Node("", (ARM64,), (("env.A", "tcp://a:1"),))),
    ],
)
def test_node_has_endpoint_platforms_and_options(text: str, expected: Node) -> None:
    assert node(text, BASE) == expected


def test_certificates_are_relative_to_the_settings_file() -> None:
    parsed = node("tcp://a:1,cacert=tls/ca.pem,key=/k.pem,servername=tls/x", BASE)
    assert dict(parsed.options) == {
        "cacert": "/project/tls/ca.pem",
        "key": "/k.pem",
        "servername": "tls/x",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not an endpoint"),
        (",platform=linux/amd64", "'' is not an endpoint"),
        ("platform=linux/amd64 x", "Guix does not support the platform 'linux/amd64 x'"),
        ("--append", "'--append' is not an endpoint"),
        ("a b", "'a b' is not an endpoint"),
        ("a$(id)", "is not an endpoint"),
        ("höst", "is not an endpoint"),
        ("a,", "'' is not an option; write NAME=VALUE"),
        ("a,memory", "'memory' is not an option"),
        ("a,memory=", "'memory=' is not an option"),
        ("a,memory=1g,memory=2g", "'memory' is set twice"),
        ("a,platform=linux/s390x", "Guix does not support the platform 'linux/s390x'"),
        ('a,"env.A=1,2', "a quote does not enclose a whole option"),
        ('a,"env.A"=1', "a quote does not enclose a whole option"),
        ("a,env.A=" + "x" * 200_000, "a quote does not enclose"),
        ("\na", "contains a control character"),
        ("a,env.A=1\n2", "contains a control character"),
        ("a,env.A=\x1b[31m", "contains a control character"),
        ("a,env.A=1\u20282", "contains a control character"),
    ],
)
def test_invalid_node_is_reported_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        node(text, BASE)
    (problem,) = caught.value.args
    assert message in problem
    assert ";" in problem
    assert problem.isprintable()
    assert len(problem) < 200


# --- Drivers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("driver", "texts"),
    [
        (Driver.DOCKER, []),
        (Driver.CONTAINER, []),
        (Driver.CONTAINER, ["ssh://host", "a,memory=4g", "memory=4g"]),
        (Driver.REMOTE, ["tcp://host:1234", "ssh://me@host,an-option-of-tomorrow=1"]),
        (Driver.KUBERNETES, []),
        (Driver.KUBERNETES, ["namespace=ci,replicas=4", "platform=linux/arm64"]),
    ],
)
def test_options_are_passed_to_buildx(driver: Driver, texts: list[str]) -> None:
    assert find_problems(driver, *texts) == []


def test_driver_docker_has_no_nodes() -> None:
    (problem,) = find_problems(Driver.DOCKER, "tcp://a:1")
    assert "has no nodes; unset BUILDX_NODES" in problem


@pytest.mark.parametrize("texts", [[], ["tcp://a:1", "cacert=/ca.pem"]])
def test_driver_remote_requires_endpoints(texts: list[str]) -> None:
    (problem,) = find_problems(Driver.REMOTE, *texts)
    assert problem.startswith("the driver remote requires a node; write the endpoint")
