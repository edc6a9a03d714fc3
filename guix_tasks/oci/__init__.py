"""Image references, platforms, labels and archives; pure."""
