"""Development tasks of a checkout of guix-tasks; not in the wheel."""

from pathlib import Path

CHECKOUT = Path(__file__).parents[1]
