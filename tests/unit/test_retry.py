"""Retries after transient failures."""

from __future__ import annotations

import io

import pytest

from guix_tasks.engine import retry
from guix_tasks.errors import RegistryError
from guix_tasks.ui.console import Console


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    seconds: list[float] = []
    monkeypatch.setattr("time.sleep", seconds.append)
    return seconds


def fault(text: str = "no", *, transient: bool = True) -> RegistryError:
    error = RegistryError(text)
    error.is_transient = transient
    return error


class Server:
    """A server that raises each fault once and then answers."""

    def __init__(self, *faults: Exception) -> None:
        self.faults = list(faults)
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self.faults:
            raise self.faults.pop(0)
        return "answer"


def test_success_is_not_retried(waits: list[float]) -> None:
    server = Server()
    assert retry.retry_call(Console(), "it", server) == "answer"
    assert (server.calls, waits) == (1, [])


def test_transient_failure_is_retried_with_growing_delays(waits: list[float]) -> None:
    output = io.StringIO()
    server = Server(fault("one"), fault("two"), fault("three"))
    assert retry.retry_call(Console(err=output), "the push", server) == "answer"
    assert len(waits) == 3
    for wait, maximum in zip(waits, (2, 4, 8), strict=True):
        assert maximum / 2 <= wait <= maximum
    lines = output.getvalue().splitlines()
    assert lines[0].startswith("warning: one; the push is retried in ")
    assert len(lines) == 3


def test_permanent_failure_is_raised_after_the_last_try(waits: list[float]) -> None:
    server = Server(*(fault(str(number)) for number in range(9)))
    with pytest.raises(RegistryError, match="3"):
        retry.retry_call(Console(err=io.StringIO()), "it", server)
    assert server.calls == retry.TRIES


def test_other_failure_is_raised_immediately(waits: list[float]) -> None:
    server = Server(fault(transient=False))
    with pytest.raises(RegistryError):
        retry.retry_call(Console(), "it", server)
    assert (server.calls, waits) == (1, [])


def test_delay_is_at_most_a_minute(waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.uniform", lambda _lower, upper: upper)
    server = Server(*(fault() for _ in range(10)))
    retry.retry_call(Console(err=io.StringIO()), "it", server, tries=11)
    assert waits[-1] == max(waits) == retry.LONGEST


@pytest.mark.parametrize(
    "text",
    [
        "toomanyrequests: You have reached your pull rate limit",
        "received unexpected HTTP status: 503 Service Unavailable",
        "unexpected status from PUT request to http://x/manifests/t: 429 Too Many Requests",
        'Put "http://x": read tcp 127.0.0.1:1->127.0.0.1:2: read: connection reset by peer',
        'Get "https://x/v2/": net/http: TLS handshake timeout',
        'Get "https://x/v2/": dial tcp 1.2.3.4:443: i/o timeout',
        'Patch "http://x/blobs/uploads/1": EOF',
        "write tcp: broken pipe",
        "500 Internal Server Error",
        "filesystem layer verification failed for digest sha256:12",
        "image config verification failed for digest sha256:12",
        "502 Bad Gateway",
        # The containerd image store, with and without the status of the registry's answer.
        "unknown: unexpected status from PUT request to http://x/manifests/t: 504 Gateway Timeout",
        "error from registry: You have reached your unauthenticated pull rate limit. https://x/y",
        "error from registry: retry-after: 1.06ms, allowed: 44000/minute",
        "error from registry: Rate exceeded",
        "error from registry: toomanyrequests toomanyrequests",
        "error from registry: unknown error - driver.Error",
        "error from registry: unknown unknown",
        "error from registry: unavailable unavailable",
        "error from registry: provided digest did not match uploaded content",
        "digest invalid: provided digest did not match uploaded content",
        'failed commit on ref "config-sha256:1": commit failed: unexpected commit digest sha256:2',
        'failed commit on ref "layer-sha256:1": unexpected commit size 3, expected 4',
        "failed to copy: short read: expected 9 bytes but got 4: unexpected EOF",
    ],
)
def test_transient_failure_is_recognised(text: str) -> None:
    assert retry.is_transient(text)


@pytest.mark.parametrize(
    "text",
    [
        "denied: requested access to the resource is denied",
        "unauthorized: authentication required",
        "dial tcp 127.0.0.1:1: connect: connection refused",
        "dial tcp: lookup registry.invalid: no such host",
        "manifest unknown",
        "tls: first record does not look like a TLS handshake",
        "tls: failed to verify certificate: x509: certificate signed by unknown authority",
        "403 Forbidden",
        "blob sha256:5000429500 is unknown to the registry",
        "no space left on device",
        # The containerd image store.
        'failed to resolve reference "x/a:t": x/a:t: not found',
        "unknown: unexpected status from PUT request to http://x/v2/a/manifests/503: 403 Forbidden",
        'failed to do request: Head "https://x/v2/429/manifests/500": connection refused',
        "error from registry: requested access to the resource is denied",
        "error from registry: unknown repository a",
        "error from registry: blob unknown to registry",
        "disk quota exceeded",
    ],
)
def test_other_failure_is_not_transient(text: str) -> None:
    assert not retry.is_transient(text)
