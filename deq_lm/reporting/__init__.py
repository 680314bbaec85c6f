"""Reports: measurements of one or several suites as a page to read."""

from deq_lm.reporting.headline import headline_rows
from deq_lm.reporting.measurements import Measurements, read_measurements
from deq_lm.reporting.published import Published, read_published
from deq_lm.reporting.report import write_markdown, write_report

__all__ = [
    "Measurements",
    "Published",
    "headline_rows",
    "read_measurements",
    "read_published",
    "write_markdown",
    "write_report",
]
