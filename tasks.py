"""Tasks of this checkout; ``inv --list`` lists them."""

from dev.tasks import demo, test
from guix_tasks.tasks import ns

ns.add_task(demo)
ns.add_task(test)

__all__ = ["ns"]
