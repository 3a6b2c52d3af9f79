"""Brings pages of the checkout that lie outside docs/ into the site, and turns links between all of them.

Every page stays where a reader of the checkout looks for it, with links that work there.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {
    "export/README.md": "export/onnx.md",
    "export/kurtail_gguf/README.md": "export/gguf.md",
    "export/kurtail_vllm/README.md": "export/vllm.md",
    "benchmarks/README.md": "project/benchmarks.md",
    "configs/README.md": "project/recipes.md",
    "configs/ablation/README.md": "project/ablations.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
    "CODE_OF_CONDUCT.md": "project/conduct.md",
    "CHANGELOG.md": "project/changelog.md",
}
"""Pages of the checkout, and where the site has them."""
SHOWN = {"configs/base.yaml": "reference/recipe.md", "README.md": "index.md"}
"""Files that a page of the site stands for."""
INSIDE = {page: source for source, page in OUTSIDE.items()}
LINK = re.compile(r"(\[[^\]]*\])\(([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links as they are in the checkout into those of the site; other files of the checkout become plain text."""
    here = page.file.src_uri
    source = INSIDE.get(here, f"docs/{here}")

    def turned(link: re.Match[str]) -> str:
        text, target = link.groups()
        path, _, anchor = target.partition("#")
        if not path or re.match(r"https?:|mailto:", target):
            return link[0]
        wanted = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        there = (OUTSIDE | SHOWN).get(wanted, wanted.removeprefix("docs/") if wanted.startswith("docs/") else None)
        if there is None:
            return text[1:-1]
        return f"{text}({_relative(there, here)}{'#' if anchor else ''}{anchor})"

    return LINK.sub(turned, markdown)


def _relative(there: str, here: str) -> str:
    return posixpath.relpath(there, posixpath.dirname(here) or ".")
