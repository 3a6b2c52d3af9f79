"""A page of HTML as a browser reads it, by Python's own parser."""

from html.parser import HTMLParser
from pathlib import Path

VOID = ("meta", "br", "img", "link", "input")


class PageReader(HTMLParser):
    """Elements, attributes, tables and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        """Element, name and value."""
        self.tables: dict[str, list[list[list[str]]]] = {}
        """By the section's title: tables, their lines, with the names of the columns first."""
        self.titles: list[str] = []
        """What stands under the pointer, in the drawings."""
        self.sections: list[str] = []
        self.text = ""
        self.raw = ""
        """Styles and scripts."""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.setdefault(self.sections[-1], []).append([])
        elif tag == "tr":
            self.tables[self.sections[-1]][-1].append([])
        elif tag in ("td", "th"):
            self.tables[self.sections[-1]][-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("style", "script"):
            self.raw += data
            return
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.tables[self.sections[-1]][-1][-1][-1] += data
        elif self.open and self.open[-1] == "h2":
            self.sections.append(data)
        elif self.open and self.open[-1] == "title" and "svg" in self.open:
            self.titles.append(data)


def read_page(folder: Path) -> PageReader:
    return PageReader((folder / "report.html").read_text(encoding="utf-8"))
