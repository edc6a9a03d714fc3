"""``python -m guix_tasks.settings`` prints ``.env.example``."""

import sys

from guix_tasks.settings import example_text

sys.stdout.write(example_text())
