"""Hooks of MkDocs: add the examples, which are next to ``docs/``, to the site."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
EXAMPLES = [*ROOT.glob("examples/*/README.md"), *ROOT.glob("examples/ci/*.yml")]
"""Files of the repository that pages link to."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the examples at the paths that they have in the repository."""
    for path in EXAMPLES:
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Replace links from ``docs/`` to the examples, which have one directory less to go up."""
    up = "../" * page.file.src_uri.count("/")
    return markdown.replace(f"](../{up}examples/", f"]({up}examples/")
