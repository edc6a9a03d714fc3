"""Implementation of the tasks, one module per task."""
