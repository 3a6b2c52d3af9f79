"""Flesch reading ease of the README and the documents, by textstat: 100 is read by children, 0 by nobody.

Needs ``pip install textstat==0.7.4``; later versions download a dictionary. Code, tables and headings do not count.
"""

import re
from pathlib import Path

import textstat

ROOT = Path(__file__).resolve().parents[1]
CODE = re.compile(r"^```.*?^```$", re.M | re.S)


def prose(text: str) -> str:
    """Sentences of a page, the names in them without their marks."""
    lines = (line for line in CODE.sub("", text).splitlines() if not line.startswith(("|", "#", "!", "[", ":::", "<")))
    return re.sub(r"[`*]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", "\n".join(lines)))


if __name__ == "__main__":
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        print(f"{textstat.flesch_reading_ease(prose(page.read_text())):6.1f}  {page.relative_to(ROOT)}")
