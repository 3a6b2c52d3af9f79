"""The page `report.html`: one file, which needs no network, for everything that was measured of one or more models."""

from kurtail_pl.stages.reporting.page.contents import page_of
from kurtail_pl.stages.reporting.page.model import Model, read_model
from kurtail_pl.stages.reporting.page.render import PAGE, write_page
from kurtail_pl.stages.reporting.page.section import Table

__all__ = ["PAGE", "Model", "Table", "page_of", "read_model", "write_page"]
