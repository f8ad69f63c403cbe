"""Reports: tables as text, Markdown, CSV and JSON, and accuracy-against-cost plots."""

from falcon_jax.report.experiment import COLUMNS as COLUMNS
from falcon_jax.report.experiment import write_report as write_report
from falcon_jax.report.plots import plot_tradeoff as plot_tradeoff
from falcon_jax.report.search import plot_front as plot_front
from falcon_jax.report.search import plot_sensitivity as plot_sensitivity
from falcon_jax.report.search import write_shrunk as write_shrunk
from falcon_jax.report.table import Column as Column
from falcon_jax.report.table import describe_machine as describe_machine
from falcon_jax.report.table import format_millions as format_millions
from falcon_jax.report.table import format_milliseconds as format_milliseconds
from falcon_jax.report.table import format_percent as format_percent
from falcon_jax.report.table import format_ratio as format_ratio
from falcon_jax.report.table import format_table as format_table
from falcon_jax.report.table import markdown_table as markdown_table
from falcon_jax.report.table import write_csv as write_csv
from falcon_jax.report.table import write_json as write_json
