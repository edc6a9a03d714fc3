"""Builds by BuildKit: the buildx command line, its builders, what a build is made from."""
