"""The paper's figures and Table 8, drawn from an activation store: one file a figure, and the stage that calls them."""

from kurtail_pl.stages.reporting.figures.stage import Pages, chosen_layers, figures, file_of

__all__ = ["Pages", "chosen_layers", "figures", "file_of"]
