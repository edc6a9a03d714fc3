"""What only a checkout of guix-tasks needs; not in the wheel."""
