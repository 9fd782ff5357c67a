"""Reports: charts, tables and feature cards on one page that works without a network."""

from e2e_sae_plugin.report.cards import CardGroup as CardGroup
from e2e_sae_plugin.report.chart import Chart as Chart
from e2e_sae_plugin.report.chart import Series as Series
from e2e_sae_plugin.report.matplotlib_charts import save_figure as save_figure
from e2e_sae_plugin.report.page import Report as Report
from e2e_sae_plugin.report.page import Section as Section
from e2e_sae_plugin.report.page import SummaryLine as SummaryLine
from e2e_sae_plugin.report.page import write_report as write_report
from e2e_sae_plugin.report.plotly_charts import plotly_figure as plotly_figure
from e2e_sae_plugin.report.table import Table as Table
