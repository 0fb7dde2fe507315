"""What an evaluation says of the classes: tables and the figure of the confusion matrix, as files and as a summary."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from fgvc.analysis import confusion_matrix, per_class, top_confusions
from fgvc.csv_files import to_csv
from fgvc.io import write_text_atomic
from fgvc.reporting.confusion_plot import confusion_figure
from fgvc.reporting.render import markdown_table
from fgvc.reporting.style import save_figure


@dataclass(frozen=True)
class ClassReport:
    """A Markdown summary of the classes, and the files it came with."""

    text: str
    files: list[Path]


def write_class_report(
    predictions: pd.DataFrame, classes: Sequence[str], title: str, folder: Path, name: str
) -> ClassReport:
    """Write per_class-NAME.csv, confusion-NAME.csv, confusion-NAME.png and .pdf, and confusions-NAME.md to a folder.

    Args:
        predictions: one row an image, columns target and predicted.
        classes: names of the class indices.
        title: of the figure and the Markdown file; a line or two.
        folder: where the files go.
        name: what they are told apart by.

    Raises:
        RunError: predictions without rows, or of other classes.
    """
    matrix, table = confusion_matrix(predictions, classes), per_class(predictions, classes)
    confusions = top_confusions(predictions, classes)
    text = f"{_worst_classes(table)}\n\n{confusions_markdown(confusions)}"
    texts = {
        f"per_class-{name}.csv": to_csv(table, "%.4f"),
        f"confusion-{name}.csv": to_csv(matrix, index=True),
        f"confusions-{name}.md": f"# {' '.join(title.splitlines())}\n\n{text}\n",
    }
    for file, content in texts.items():
        write_text_atomic(folder / file, content)
    figures = save_figure(confusion_figure(matrix, confusions, title), folder / f"confusion-{name}")
    return ClassReport(text, [*(folder / file for file in texts), *figures])


def confusions_markdown(confusions: pd.DataFrame) -> str:
    """The frame of `fgvc.analysis.top_confusions` as a Markdown table."""
    if confusions.empty:
        return "No image is taken for another class."
    rows = [
        [f"{row['true']} → {row['predicted']}", str(row["count"]), f"{row['share']:.1f}"]
        for _, row in confusions.iterrows()
    ]
    return markdown_table(["Most frequent confusions: true → predicted", "images", "% of the true class"], rows)


def _worst_classes(table: pd.DataFrame, count: int = 5) -> str:
    """The classes of lowest recall as a Markdown table."""
    header = ["Lowest recall: class", "right", "recall % [95 % interval]", "precision %", "taken for"]
    rows = []
    for _, row in table[table["images"] > 0].nsmallest(count, "recall").iterrows():
        recall = f"{row['recall']:.1f} [{row['recall_lower']:.1f}, {row['recall_upper']:.1f}]"
        precision = "–" if pd.isna(row["precision"]) else f"{row['precision']:.1f}"
        taken = f"{row['confused_with']} ({row['confused_count']})" if row["confused_count"] else "–"
        rows.append([row["class"], f"{row['correct']} of {row['images']}", recall, precision, taken])
    return markdown_table(header, rows)
