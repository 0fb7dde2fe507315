"""The class report: its files, its summary, and a figure that stays readable from 2 to hundreds of classes."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from fgvc.errors import RunError
from fgvc.io import read_csv
from fgvc.presentation.style import figure_style, new_figure
from fgvc.studies.confusion.measure import confusion_matrix, top_confusions
from fgvc.studies.confusion.show import confusion_figure, confusions_markdown, plot_confusion, write_class_report


def names(count: int) -> list[str]:
    return [f"{index:03d}.A_bird_of_long_name_{index}" for index in range(count)]


def predictions(count: int, images: int = 6, share_wrong: float = 0.3) -> pd.DataFrame:
    """Classes in pairs far apart, 0 with count / 2 and so on, confused with each other."""
    rng = np.random.default_rng(0)
    target = np.repeat(np.arange(count), images)
    twin = (target + count // 2) % count
    return pd.DataFrame({"target": target, "predicted": np.where(rng.random(len(target)) < share_wrong, twin, target)})


def figure(count: int, **options: float):  # type: ignore[no-untyped-def]
    table = predictions(count, **options)  # type: ignore[arg-type]
    return confusion_figure(confusion_matrix(table, names(count)), top_confusions(table, names(count)), "title")


def test_cells_are_shares_with_the_diagonal_apart() -> None:
    matrix = pd.DataFrame([[3, 1], [0, 0]], index=["a", "b"], columns=["a", "b"])
    with figure_style():
        axes = new_figure(3.3, 3).subplots()
        wrong, right = plot_confusion(axes, matrix, [1, 0])
    assert wrong.get_array().filled(-1).tolist() == [[-1, -1], [25, -1]]  # type: ignore[union-attr]
    assert right.get_array().filled(-1).tolist() == [[0, -1], [-1, 75]]  # type: ignore[union-attr]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b  1", "a  2"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2"]
    assert sorted(text.get_text() for text in axes.texts) == ["0", "1", "3"]


def test_a_single_mistake_shows_beside_a_large_one() -> None:
    matrix = pd.DataFrame(np.diag([100] * 3), index=names(3), columns=names(3))
    matrix.iloc[0, 1], matrix.iloc[1, 0] = 1, 100
    with figure_style():
        wrong, _ = plot_confusion(new_figure(3.3, 3).subplots(), matrix, [0, 1, 2])
    small, large = (
        np.asarray(wrong.to_rgba(value))[:3] for value in (wrong.get_array()[0, 1], wrong.get_array()[1, 0])
    )  # type: ignore[index]
    assert small.min() < 0.6 and np.abs(small - large).max() > 0.3  # neither white nor alike


@pytest.mark.parametrize("count", [2, 12, 40, 60])
def test_names_stand_where_they_fit_and_overlap_nowhere(count: int) -> None:
    drawn = figure(count)
    drawn.draw_without_rendering()
    axes = drawn.axes[0]
    labels = axes.get_yticklabels()
    assert len(labels) == (count if count <= 40 else 0)
    boxes = [label.get_window_extent() for label in labels]
    for upper, lower in pairwise(boxes):
        assert upper.y0 + 0.1 * upper.height > lower.y1 - 0.1 * lower.height  # a letter's box has some spacing
    page = drawn.bbox
    assert all(box.x0 >= page.x0 - 1 for box in boxes)
    for text in drawn.findobj(lambda artist: hasattr(artist, "get_text") and bool(artist.get_text())):
        box = text.get_window_extent()  # type: ignore[attr-defined]
        assert box.x0 > page.x0 - 2 and box.x1 < page.x1 + 2, text


def test_confused_classes_are_neighbours_and_numbered_as_in_the_list() -> None:
    drawn = figure(60)
    matrix, listing = drawn.axes[0], drawn.axes[1]
    rows, columns = np.nonzero(~np.ma.getmaskarray(matrix.images[0].get_array()))
    assert (np.abs(rows - columns) == 1).all()
    numbers = [text for text in matrix.texts if text.get_text().isdigit()]
    assert sorted(int(text.get_text()) for text in numbers) == list(range(1, 11))
    for text in numbers:
        j, i = text.xy  # type: ignore[attr-defined]
        assert not np.ma.getmaskarray(matrix.images[0].get_array())[i, j]
    first = top_confusions(predictions(60), names(60)).iloc[0]
    assert first["true"] in listing.texts[0].get_text().splitlines()[2]


def test_hundreds_of_classes_and_none_confused(tmp_path: Path) -> None:
    figure(300, images=2).savefig(tmp_path / "large.png", dpi=50)
    drawn = figure(20, share_wrong=0)
    drawn.savefig(tmp_path / "perfect.png", dpi=50)
    assert "no image is taken" in drawn.axes[1].texts[0].get_text()


def test_dollar_signs_in_names_are_no_formula(tmp_path: Path) -> None:
    classes = ["$a_{$", "$b^{$", *names(14)]
    table = predictions(16)
    drawn = confusion_figure(confusion_matrix(table, classes), top_confusions(table, classes), "title")
    drawn.savefig(tmp_path / "figure.png", dpi=50)
    assert "$a_{$" in "".join(label.get_text() for label in drawn.axes[0].get_yticklabels())


def test_report_writes_files_and_a_summary(tmp_path: Path) -> None:
    table = pd.DataFrame({"target": [0, 0, 0, 1, 1, 2], "predicted": [0, 1, 1, 1, 1, 2]})
    classes = ["crow, hooded", "dove", "egret"]
    report = write_class_report(table, classes, "run\nlast", tmp_path, "last-mirror")
    assert [file.name for file in report.files] == [
        "per_class-last-mirror.csv",
        "confusion-last-mirror.csv",
        "confusions-last-mirror.md",
        "confusion-last-mirror.png",
        "confusion-last-mirror.pdf",
    ]
    assert sorted(tmp_path.iterdir()) == sorted(report.files)
    per_class = read_csv(report.files[0], ("class", "recall", "precision", "f1", "confused_with"))
    assert per_class["class"].tolist() == classes and per_class["confused_count"].tolist() == [2, 0, 0]
    matrix = read_csv(report.files[1], ("true", *classes))
    assert matrix[classes].to_numpy().tolist() == [[1, 2, 0], [0, 2, 0], [0, 0, 1]]
    assert report.files[2].read_text(encoding="utf-8") == f"# run last\n\n{report.text}\n"
    assert "| crow, hooded → dove" in report.text and "1 of 3" in report.text and "33.3 [6.1, 79.2]" in report.text
    assert imread(report.files[3]).shape[1] == round(3.3 * 300)
    pdf = report.files[4].read_bytes()
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf


def test_nothing_confused_says_so() -> None:
    table = pd.DataFrame({"target": [0, 1], "predicted": [0, 1]})
    assert confusions_markdown(top_confusions(table, ["a", "b"])) == "No image is taken for another class."


def test_nothing_is_written_of_bad_predictions(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="predicted holds 7"):
        write_class_report(pd.DataFrame({"target": [0], "predicted": [7]}), ["a", "b"], "t", tmp_path, "last")
    assert not list(tmp_path.iterdir())
