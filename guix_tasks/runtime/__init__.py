"""Runtime images: the packages and what they need, without Guix and without a base image."""
