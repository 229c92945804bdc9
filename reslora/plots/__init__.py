"""Plots: charts as SVG for the report and the page, and the figures of a run."""
