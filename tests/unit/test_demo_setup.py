"""Port and last lines of the demo."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest
from fake_engine import BufferConsole, Site, console_text

from dev import demo
from guix_tasks.bootstrap.engine import PrivateEngine
from guix_tasks.bootstrap.registry import LocalRegistry

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("private", [True, False])
def test_next_steps_explain_how_to_reach_the_private_engine(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, private: bool
) -> None:
    engine = PrivateEngine(tmp_path / "engine")
    monkeypatch.setattr(demo, "private_engine", lambda: engine)
    project = site.project()
    if private:
        monkeypatch.setattr(engine, "url", project.engine.info().url)
    demo.print_next_steps(project)
    assert (engine.shell_hint() in console_text(project)) is private


def test_demo_uses_a_free_port_if_its_port_is_in_use(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []
    monkeypatch.setattr(demo, "make_base", lambda *_: None)
    monkeypatch.setattr(demo, "make_material", lambda *_: None)
    monkeypatch.setattr(LocalRegistry, "up", lambda self, _: started.append(self.port))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        used_port = other.getsockname()[1]
        registry_for = lambda _engine, port=used_port: LocalRegistry(tmp_path, port)  # noqa: E731
        monkeypatch.setattr(demo, "registry_for", registry_for)
        port = demo.prepare(site.engine, BufferConsole(), tmp_path)
    assert [port] == started != [used_port]
    site.env["IMAGE"] = f"localhost:{port}/guix-tasks-demo"
    project = site.project()
    demo.print_next_steps(project)
    assert f"IMAGE=localhost:{port}/guix-tasks-demo:latest ./inv base" in console_text(project)
    assert f"`./inv registry.down --port {port}`" in console_text(project)
