"""What is shown: console, live display, CI logs, formats, redaction."""
