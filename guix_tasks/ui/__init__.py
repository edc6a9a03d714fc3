"""Output: console, live display, CI logs, formats, redaction of secrets."""
