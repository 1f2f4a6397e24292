"""The report of a finished evaluation: the table on a terminal, `report.md`, and one HTML page."""

from post_dist.report.page import finished_evaluation, write_report
from post_dist.report.tables import read_table

__all__ = ["finished_evaluation", "read_table", "write_report"]
