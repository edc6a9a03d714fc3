"""What each task does, a module for each, named after the task."""
