"""BuildKit builds: the buildx command line, its builders, the inputs of a build, and bake."""
