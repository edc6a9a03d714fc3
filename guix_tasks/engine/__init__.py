"""Docker and Podman: the only package that imports the docker SDK."""
