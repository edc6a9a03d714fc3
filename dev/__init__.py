"""Development tasks of a checkout of guix-tasks; not in the wheel."""
