"""A report: everything that was measured about some runs, as one HTML file that needs no server and no network.

`gather` reads the runs into tables. `charts` draws the tables. `page` makes an HTML page of both, and `write_report` writes
it to a file.
"""

from icl.report.gather import Material, gather
from icl.report.page import page, write_report

__all__ = ["Material", "gather", "page", "write_report"]
