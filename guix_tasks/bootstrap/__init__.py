"""What a bare machine lacks: an engine, a registry, a base image, something to install."""
