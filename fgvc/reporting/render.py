"""The accuracy table as Markdown, LaTeX (booktabs) and CSV."""

from collections.abc import Iterable, Sequence

import pandas as pd

from fgvc.reporting.blocks import Block, table_blocks

_LATEX = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "[": "{[}",  # at the start of a row it would be read as the optional argument of \\
    "]": "{]}",
    "±": r"$\pm$",
    "\n": " ",
}


def to_markdown(table: pd.DataFrame) -> str:
    """One Markdown table a setting, preceded by an overview where there are several; sources as numbered notes."""
    parts = ["# Accuracy"]
    for block in table_blocks(table):
        notes = "\n".join(f"- {_flat(note)}" for note in block.notes)
        parts.append(f"## {_flat(block.title)}\n\n{markdown_table(block.header, block.rows)}\n\n{notes}")
    return "\n\n".join(parts) + "\n"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with aligned columns, the first to the left, the others to the right."""
    cells = [[_flat(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(row: Sequence[str]) -> str:
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        return f"| {' | '.join([row[0].ljust(widths[0]), *rest])} |"

    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])


def to_latex(table: pd.DataFrame) -> str:
    """One LaTeX table a setting for \\input; needs the package booktabs."""
    return "% needs \\usepackage{booktabs}\n" + "\n".join(_latex_block(block) for block in table_blocks(table))


def to_csv(table: pd.DataFrame) -> str:
    """The tidy frame as CSV. Text that a spreadsheet would take for a formula gets a leading apostrophe."""
    safe = table.copy()
    for column in safe.columns:
        if not pd.api.types.is_numeric_dtype(safe[column]):
            safe[column] = safe[column].map(_defuse)
    text: str = safe.to_csv(index=False, float_format="%.4f")
    return text


def _defuse(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def _latex_block(block: Block) -> str:
    rows = "\n".join(" & ".join(map(_escape, row)) + r" \\" for row in block.rows)
    notes = "\n\n".join(map(_escape, block.notes))
    environment = "table*" if len(block.header) > 5 else "table"  # the starred one spans both columns
    return f"""\
\\begin{{{environment}}}[t]
\\centering
\\small
\\caption{{{_escape(block.title)}. Top-1 accuracy in \\%.}}
\\begin{{tabular}}{{l{"r" * (len(block.header) - 1)}}}
\\toprule
{" & ".join(map(_escape, block.header))} \\\\
\\midrule
{rows}
\\bottomrule
\\end{{tabular}}

\\footnotesize
{notes}
\\end{{{environment}}}
"""


def _escape(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def _flat(text: str) -> str:
    return " ".join(text.split())
