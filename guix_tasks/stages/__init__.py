"""The built-in stages: each module says what one is, in data."""
