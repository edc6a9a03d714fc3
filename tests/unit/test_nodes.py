"""``BUILDX_NODES``: how a node is written, and what each driver takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from guix_tasks.oci.platform import Platform
from guix_tasks.settings import Driver, Node
from guix_tasks.settings.nodes import node, problems

BASE = Path("/project")
AMD64, ARM64 = Platform.parse("linux/amd64"), Platform.parse("linux/arm64")


def found(driver: Driver, *texts: str, base: Path = BASE) -> list[str]:
    """What is wrong with nodes, each written as in the setting."""
    return list(problems(driver, tuple(node(text, base) for text in texts)))


# --- How it is written ----------------------------------------------------------------------


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
    ],
)
def test_a_node_is_an_endpoint_with_platforms_and_options(text: str, expected: Node) -> None:
    assert node(text, BASE) == expected


def test_certificates_are_relative_to_where_they_are_written() -> None:
    read = node("tcp://a:1,cacert=tls/ca.pem,key=/k.pem,servername=tls/x", BASE)
    assert dict(read.options) == {
        "cacert": "/project/tls/ca.pem",
        "key": "/k.pem",
        "servername": "tls/x",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not an endpoint"),
        (",platform=linux/amd64", "'' is not an endpoint"),
        ("platform=linux/amd64 x", "is not an endpoint"),
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


# --- What each driver takes -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("driver", "texts"),
    [
        (Driver.DOCKER, []),
        (Driver.CONTAINER, []),
        (Driver.CONTAINER, ["ssh://host", "tcp://host:2376", "unix:///x", "context"]),
        (Driver.CONTAINER, ["a,memory=4g,network=host,env.A=1,cpu-quota=5,default-load=true"]),
        (Driver.REMOTE, ["tcp://host:1234", "unix:///x", "docker-container://b", "kube-pod://b"]),
        (Driver.REMOTE, ["ssh://me@host", "tcp://[::1]:1234,default-load=true"]),
        (Driver.KUBERNETES, []),
        (Driver.KUBERNETES, ["kubernetes://a,replicas=4,limits.cpu=1,env.A=1", "kubernetes://b"]),
    ],
)
def test_good_nodes_of_each_driver(driver: Driver, texts: list[str]) -> None:
    assert found(driver, *texts) == []


@pytest.mark.parametrize(
    ("driver", "text", "message"),
    [
        (Driver.DOCKER, "tcp://a:1", "has no nodes; unset BUILDX_NODES"),
        (Driver.CONTAINER, "kube-pod://a", "is not an endpoint of the driver docker-container"),
        (Driver.CONTAINER, "ssh://", "'ssh://' has no address; write ssh://HOST"),
        (Driver.CONTAINER, "unix://", "'unix://' has no address"),
        (Driver.CONTAINER, "tcp://host", "has no host or no port; write ssh://HOST"),
        (Driver.CONTAINER, "tcp://:2376", "has no host or no port"),
        (Driver.CONTAINER, "tcp://host:99999", "has no host or no port"),
        (Driver.CONTAINER, "tcp://[::1:1", "has no host or no port"),
        (Driver.CONTAINER, "ssh:///x", "has no host or no port"),
        (Driver.CONTAINER, "a,memroy=4g", "'memroy' is not an option of the driver"),
        (Driver.CONTAINER, "a,memroy=4g", "; did you mean memory?"),
        (Driver.CONTAINER, "a,platfrom=linux/arm64", "; did you mean platform?"),
        (Driver.CONTAINER, "a,wat=1", "its options are allow-untrusted-image, cgroup-parent"),
        (Driver.CONTAINER, "a,env.=1", "'env.' is not an option"),
        (Driver.CONTAINER, "a,replicas=2", "'replicas' is not an option"),
        (Driver.REMOTE, "context", "write tcp://HOST:PORT, unix:///SOCKET, ssh://HOST, docker-"),
        (Driver.REMOTE, "docker-container://", "has no address"),
        (Driver.REMOTE, "tcp://a:1,env.A=1", "'env.A' is not an option of the driver remote"),
        (Driver.REMOTE, "tcp://a:1,servername=b", "tcp://a:1: servername requires cacert"),
        (Driver.KUBERNETES, "context", "write kubernetes://NAME"),
        (Driver.KUBERNETES, "kubernetes://", "has no address"),
        (Driver.KUBERNETES, "tcp://a:1", "is not an endpoint of the driver kubernetes"),
        (Driver.KUBERNETES, "kubernetes://a,replicas=0", "replicas='0' is not a whole number"),
        (Driver.KUBERNETES, "kubernetes://a,replicas=x", "replicas='x' is not a whole number"),
    ],
)  # fmt: skip
def test_a_bad_node_of_each_driver(driver: Driver, text: str, message: str) -> None:
    (problem,) = found(driver, text)
    assert message in problem
    assert ";" in problem
    assert problem.isprintable()


def test_the_driver_remote_is_nothing_without_a_node() -> None:
    (problem,) = found(Driver.REMOTE)
    assert problem.startswith("the driver remote requires a node; ")


@pytest.mark.parametrize("driver", [Driver.CONTAINER, Driver.REMOTE, Driver.KUBERNETES])
def test_one_machine_is_no_two_nodes(driver: Driver) -> None:
    """A second ``create --append`` would only change the first."""
    endpoint = "kubernetes://a" if driver is Driver.KUBERNETES else "unix:///a"
    told = found(driver, endpoint, f"{endpoint},platform=linux/arm64")
    assert set(told) == {f"'{endpoint}' is set twice; keep one"}


def test_certificates_require_each_other_and_must_exist(tmp_path: Path) -> None:
    for name in ("ca", "cert", "key"):
        (tmp_path / name).touch()

    def told(text: str) -> list[str]:
        return found(Driver.REMOTE, f"tcp://a:1,{text}", base=tmp_path)

    assert told("cacert=ca") == told("cacert=ca,cert=cert,key=key,servername=b") == []
    assert told("cert=cert,key=key") == [
        "tcp://a:1: cert requires cacert; set the authority's file"
    ]
    assert told("cacert=ca,key=key") == [
        "tcp://a:1: cert and key require each other; set both files"
    ]
    long = "x" * 5000
    for missing in ("none", "../" + tmp_path.name, long):
        (problem,) = told(f"cacert={missing}")
        assert problem.startswith("tcp://a:1: cacert: '")
        assert len(problem) < 200


def test_every_problem_of_every_node_is_reported() -> None:
    told = found(Driver.CONTAINER, "tcp://a,x=1,y=2", "kube-pod://b")
    assert len(told) == 4
