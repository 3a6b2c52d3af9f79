"""What a page is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup


@dataclass(frozen=True)
class Table:
    """Names of columns, and lines with as many cells; the page sorts them by any column.

    Args:
        columns: names.
        rows: cells, as they are shown.
        note: below the table.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    @property
    def numeric(self) -> list[bool]:
        """For each column whether it holds numbers, which stand at its right edge."""
        return [
            any(cell[:1].isdigit() for cell in cells) and not any(cell[:1].isalpha() for cell in cells)
            for cells in ([row[place] for row in self.rows] for place in range(len(self.columns)))
        ]


@dataclass(frozen=True)
class Picture:
    """A drawing with its title.

    Args:
        svg: the drawing.
        title: in words.
        legend: names of its colours, in their order.
        wide: as wide as the page.
    """

    svg: Markup
    title: str
    legend: Sequence[str] = ()
    wide: bool = False


@dataclass(frozen=True)
class Listing:
    """Text as it stands in a file.

    Args:
        title: what it is.
        text: the file's.
        closed: shown when it is asked for.
    """

    title: str
    text: str
    closed: bool = False


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading.

    Args:
        title: of the heading.
        about: what is shown, in words.
        pictures: side by side where there is room.
        tables: one below the other.
        listings: texts.
    """

    title: str
    about: str = ""
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    listings: Sequence[Listing] = ()

    @property
    def anchor(self) -> str:
        """Its place on the page, for links."""
        return self.title.lower().replace(" ", "-")


@dataclass(frozen=True)
class Page:
    """A page.

    Args:
        title: of the page.
        facts: the few numbers that matter most, by their names.
        sections: in their order.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section]
