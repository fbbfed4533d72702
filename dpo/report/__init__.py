"""Pages about runs: charts, figures and config in one HTML file without scripts or network.

``write_report`` writes the page of one run, ``write_comparison`` that of several. What they read is
said in ``dpo.report.record``, how to read them in dpo/REPORT.md. To add a chart, add a line to
``dpo.report.charts.CHARTS``.
"""

from dpo.report.one_run import write_report
from dpo.report.page import interval
from dpo.report.record import REPORT
from dpo.report.several_runs import write_comparison

__all__ = ["REPORT", "interval", "write_comparison", "write_report"]
