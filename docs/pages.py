"""Hook of MkDocs (mkdocs.yml): the site has the repository's layout, so that the documents' links work in both."""

import logging
import re
from collections import Counter
from pathlib import Path

from markdown_it import MarkdownIt
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
FILES = (
    "*.md",
    "docs/*.md",
    "benchmarks/README.md",
    "benchmarks/results/*.png",
    "examples/*.py",
    "notebooks/*.ipynb",
    "docs/pages.css",
)
API = "docs/api.md"
BLOCKS = re.compile("<(blockquote|h[1-6]|li|ol|pre|table|ul)[ >]")

log = logging.getLogger("mkdocs.hooks.pages")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Return the theme's files, the documents and what they link to by their paths here, and the page of the API."""
    theme = [file for file in files if file.src_dir != config.docs_dir]
    paths = [path for pattern in FILES for path in sorted(ROOT.glob(pattern))]
    found = [File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)) for path in paths]
    return Files([*theme, *found, File.generated(config, API, content="# Python API\n\n::: fastresnet\n")])


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> None:
    """Warn of a page with other blocks than in CommonMark, which the repository's viewers read."""
    if page.file.src_uri == API:
        return
    here = Counter(BLOCKS.findall(html))
    there = Counter(BLOCKS.findall(MarkdownIt("commonmark").enable("table").render(page.markdown or "")))
    tags = sorted(tag for tag in here | there if here[tag] != there[tag])
    if wrong := ", ".join(f"<{tag}> {here[tag]} times, not {there[tag]}" for tag in tags):
        remedy = "Put an empty line before a list, and indent what is in its items by 4 spaces."
        log.warning("%s: the site has %s. %s", page.file.src_uri, wrong, remedy)
