"""Text for calibration and evaluation, and its windows of tokens."""

from kurtail_pl.stages.text.hub import Split
from kurtail_pl.stages.text.sources import COMBINED, EMBEDDED, FOLDER, read_text, title_of
from kurtail_pl.stages.text.windows import TextSpec, Windows, cut_windows, said

__all__ = [
    "COMBINED",
    "EMBEDDED",
    "FOLDER",
    "Split",
    "TextSpec",
    "Windows",
    "cut_windows",
    "read_text",
    "said",
    "title_of",
]
