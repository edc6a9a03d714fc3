"""Stages: what each is, as data; in which order; and how one is run and committed."""
