"""Saved runs as tables and figures. Reads what runs wrote; computes nothing on images or models."""

from fgvc.csv_files import to_csv
from fgvc.reporting.class_report import ClassReport, confusions_markdown, write_class_report
from fgvc.reporting.confusion_plot import confusion_figure, plot_confusion
from fgvc.reporting.loewner_plot import gradients_markdown, loewner_figure, write_loewner_figure
from fgvc.reporting.published import load_published
from fgvc.reporting.render import markdown_table, to_html, to_latex, to_markdown
from fgvc.reporting.smoothness_plot import plot_smoothness, smoothness_figure, smoothness_markdown, write_smoothness
from fgvc.reporting.spectra_plot import plot_eigenvalues, spectra_figure, spectra_markdown
from fgvc.reporting.style import METHOD_STYLES, MethodStyle, figure_style, method_order, method_style, save_figure
from fgvc.reporting.tables import accuracy_table

__all__ = [
    "METHOD_STYLES",
    "ClassReport",
    "MethodStyle",
    "accuracy_table",
    "confusion_figure",
    "confusions_markdown",
    "figure_style",
    "gradients_markdown",
    "load_published",
    "loewner_figure",
    "markdown_table",
    "method_order",
    "method_style",
    "plot_confusion",
    "plot_eigenvalues",
    "plot_smoothness",
    "save_figure",
    "smoothness_figure",
    "smoothness_markdown",
    "spectra_figure",
    "spectra_markdown",
    "to_csv",
    "to_html",
    "to_latex",
    "to_markdown",
    "write_class_report",
    "write_loewner_figure",
    "write_smoothness",
]
