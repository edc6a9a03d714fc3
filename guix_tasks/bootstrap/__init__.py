"""Local infrastructure for machines without Docker, a registry or a base image."""
