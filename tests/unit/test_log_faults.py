"""Network faults in the log of a BuildKit build whose steps are stages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from fake_engine import new_site

from guix_tasks.errors import StageError
from guix_tasks.stages.log_faults import StepFaults
from guix_tasks.ui.log import LogReader

if TYPE_CHECKING:
    from pathlib import Path

    from guix_tasks.settings import Settings

NO_SERVER = b"guix substitute: warning: a.test: host not found: Name or service not known"
EOF = b"guix pull: error: Git error: unexpected EOF"
SHAPES = [
    b"#12 0.345 %s\n",
    b"#12 [linux/arm64 pull 1/1] 10.34 %s\n",
    b"\x1b[34m => => # %s\x1b[0m\r\n",
    b"12.34 %s\n",
    b"%s\r",
]
"""Formats of a line of a step in the log of buildx."""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return new_site(tmp_path, None, GUIX_SUBSTITUTE_URLS="https://a.test").settings()


def check_log(settings: Settings, *log: bytes) -> StepFaults:
    reader, faults = LogReader(), StepFaults(settings)
    for data in log:
        faults.check(reader.read(data))
    return faults


@pytest.mark.parametrize("shape", SHAPES)
def test_network_fault_is_detected_in_every_log_format(settings: Settings, shape: bytes) -> None:
    assert check_log(settings, *(bytes([byte]) for byte in shape % EOF)).network_failed


@pytest.mark.parametrize("shape", SHAPES)
def test_silent_servers_are_detected_in_every_log_format(settings: Settings, shape: bytes) -> None:
    with pytest.raises(StageError, match=r"no substitute server answers \(a.test\)") as caught:
        check_log(settings, shape % NO_SERVER)
    assert caught.value.is_transient


def test_failed_build_is_not_a_network_fault(settings: Settings) -> None:
    log = b"#1 1.0 guix build: error: build of `/gnu/store/x.drv' failed\n#1 1.1 " + EOF
    assert not check_log(settings, log, b"\n").network_failed


@pytest.mark.parametrize("shape", SHAPES)
def test_image_that_trusts_no_key_is_detected(
    settings: Settings, tmp_path: Path, shape: bytes
) -> None:
    line = shape % (
        b"guix substitute: warning: ACL for archive imports seems to be uninitialized, substitutes"
        b" may be unavailable"
    )
    with pytest.raises(StageError, match="trusts no key of a substitute server"):
        check_log(settings, line)
    check_log(new_site(tmp_path / "fallback", None, GUIX_FALLBACK="yes").settings(), line)
