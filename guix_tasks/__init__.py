"""Docker images with GNU Guix in them, as Invoke tasks."""
