"""The tasks of this project: ``inv --list`` shows them."""

from guix_tasks.tasks import ns

__all__ = ["ns"]
