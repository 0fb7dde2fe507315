"""How tables and figures look: the styles of methods, figures on paper, and tables in four formats."""

from fgvc.presentation.render import Block, Table, markdown_table, to_html, to_latex, to_markdown
from fgvc.presentation.style import METHOD_STYLES, MethodStyle, figure_style, method_order, method_style, save_figure

__all__ = [
    "METHOD_STYLES",
    "Block",
    "MethodStyle",
    "Table",
    "figure_style",
    "markdown_table",
    "method_order",
    "method_style",
    "save_figure",
    "to_html",
    "to_latex",
    "to_markdown",
]
