"""One self-contained HTML page from results files: tables, figures, and what is behind them."""

from cats.report.material import Material
from cats.report.page import write_page

__all__ = ["Material", "write_page"]
