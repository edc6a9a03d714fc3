"""Image references, platforms, labels, archives and ignore files of image builds."""
