"""What a project's ``tasks.py`` imports: the tasks, and what adds stages and tests to them."""

from __future__ import annotations

from guix_tasks.cli.custom import add_stage, add_test
from guix_tasks.cli.tasks import ns

__all__ = ["add_stage", "add_test", "ns"]
