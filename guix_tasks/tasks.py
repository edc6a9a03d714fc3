"""Public imports of a project's ``tasks.py``: the tasks, ``add_stage`` and ``add_test``."""

from __future__ import annotations

from guix_tasks.cli.custom import add_stage, add_test
from guix_tasks.cli.tasks import ns

__all__ = ["add_stage", "add_test", "ns"]
