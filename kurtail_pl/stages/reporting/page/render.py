"""The page as HTML: every text in it is escaped, and it loads nothing from anywhere."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from kurtail_pl.stages.reporting.page.section import Page
from kurtail_pl.storage.files import write_text

PAGE = "report.html"


def write_page(folder: Path, page: Page) -> None:
    """Write `report.html`."""
    # Halves of characters, which JSON can hold and UTF-8 cannot, become question marks.
    text = _template().render(page=page).encode(errors="replace").decode()
    write_text(folder / PAGE, text)


@cache
def _template() -> Template:
    loader = PackageLoader(__package__, "")
    environment = Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    return environment.get_template("page.html")
