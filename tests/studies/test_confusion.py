"""Confusions and classes from predictions, against scikit-learn and by hand; their figure and files; McNemar's test."""

import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from run_folders import write_run
from sklearn import metrics

from fgvc.errors import RunError
from fgvc.io import read_csv
from fgvc.presentation.style import class_name, figure_style, new_figure
from fgvc.runs import read_predictions, read_run
from fgvc.runs.statistics import mcnemar
from fgvc.studies.confusion.measure import confusion_matrix, confusion_order, per_class, top_confusions
from fgvc.studies.confusion.show import confusion_figure, confusions_markdown, plot_confusion, write_class_report

CLASSES = ["auk", "bunting", "crow", "dove", "egret"]


def frame(target: list[int], predicted: list[int]) -> pd.DataFrame:
    paths = [f"images/{number}.jpg" for number in range(len(target))]
    return pd.DataFrame({"path": paths, "target": target, "predicted": predicted, "confidence": 0.5})


@pytest.fixture
def predictions() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    target = rng.integers(0, 5, 300)
    wrong = rng.random(300) < 0.4
    return frame(target.tolist(), np.where(wrong, rng.integers(0, 5, 300), target).tolist())


def test_matrix_and_classes_equal_those_of_scikit_learn(predictions: pd.DataFrame) -> None:
    target, predicted = predictions["target"], predictions["predicted"]
    matrix, table = confusion_matrix(predictions, CLASSES), per_class(predictions, CLASSES)
    np.testing.assert_array_equal(matrix, metrics.confusion_matrix(target, predicted))
    precision, recall, f1, images = metrics.precision_recall_fscore_support(target, predicted)
    for name, expected in (("precision", precision), ("recall", recall), ("f1", f1)):
        np.testing.assert_allclose(table[name], 100 * expected)
    np.testing.assert_array_equal(table["images"], images)
    assert table["correct"].sum() == (target == predicted).sum() and table["class"].tolist() == CLASSES
    assert matrix.loc["auk", "egret"] == ((target == 0) & (predicted == 4)).sum()


def test_many_classes_have_counts_and_no_matrix(tmp_path: Path) -> None:
    classes = [f"class {index}" for index in range(5_000)]
    tracemalloc.start()
    text, files = write_class_report(frame([9, 9, 9, 42], [9, 7, 7, 42]), classes, "title", tmp_path, "last")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100e6  # the matrix would take 200 MB
    assert {file.suffix for file in files} == {".csv", ".md"} and "class 9 → class 7" in text
    counts = pd.read_csv(tmp_path / "confusion-last.csv").values.tolist()
    assert counts == [["class 9", "class 7", 2], ["class 9", "class 9", 1], ["class 42", "class 42", 1]]


def test_wilson_interval_by_hand() -> None:
    # 18 of 30, z = 1.959964: (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
    p, n, z = 0.6, 30, 1.959964
    centre, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    row = per_class(frame([0] * 30, [0] * 18 + [1] * 12), ["a", "b"]).iloc[0]
    assert row["recall_lower"] == pytest.approx(100 * (centre - half) / (1 + z**2 / n), abs=1e-3)
    assert row["recall_upper"] == pytest.approx(100 * (centre + half) / (1 + z**2 / n), abs=1e-3)


def test_shares_of_nothing_are_nan() -> None:
    table = per_class(frame([0, 0, 1], [0, 0, 0]), ["a", "b", "c"])
    assert table["recall"].tolist()[:2] == [100, 0] and np.isnan(table["recall"][2])
    assert table["precision"][0] == pytest.approx(200 / 3) and table["precision"][1:].isna().all()
    assert table["f1"].tolist()[:2] == [80, 0] and np.isnan(table["f1"][2])
    assert table["confused_with"].fillna("-").tolist() == ["-", "a", "-"]
    assert table["confused_count"].tolist() == [0, 1, 0]
    assert table.loc[2, ["recall_lower", "recall_upper"]].isna().all()


def test_a_class_without_images_has_no_shares_even_where_it_is_predicted(tmp_path: Path) -> None:
    predictions = frame([0, 0, 1, 1], [0, 2, 1, 1])
    table = per_class(predictions, ["a", "b", "c"])
    assert table[["recall", "precision", "f1"]].mean().tolist() == pytest.approx([75, 100, (200 / 3 + 100) / 2])
    text, _ = write_class_report(predictions, ["a", "b", "c"], "title", tmp_path, "last")
    assert "1 of 3 classes have no test image" in text


def test_top_confusions_are_ranked_by_count_then_share() -> None:
    target = [0, 0, 0, 0, 1, 1, 1, 2, 2, 3]
    predicted = [0, 1, 1, 2, 2, 2, 1, 0, 0, 3]
    table = top_confusions(frame(target, predicted), CLASSES)
    assert table[["true", "predicted", "count"]].values.tolist() == [
        ["crow", "auk", 2],
        ["bunting", "crow", 2],
        ["auk", "bunting", 2],
        ["auk", "crow", 1],
    ]
    assert table[["target", "answer"]].values.tolist() == [[2, 0], [1, 2], [0, 1], [0, 2]]
    assert table["share"].tolist() == pytest.approx([100, 200 / 3, 50, 25])
    assert top_confusions(frame(target, predicted), CLASSES, 2)["count"].tolist() == [2, 2]
    assert top_confusions(frame([0, 1], [0, 1]), CLASSES).empty


def test_confused_classes_become_neighbours() -> None:
    matrix = 20 * np.eye(8, dtype=int)
    for i, j in ((0, 5), (5, 2), (1, 6)):
        matrix[i, j] = 4
    place = np.argsort(confusion_order(matrix))
    assert sorted(place) == list(range(8))
    assert sorted(place[[0, 2, 5]])[2] - min(place[[0, 2, 5]]) == 2 and abs(place[0] - place[5]) == 1
    assert abs(place[1] - place[6]) == 1
    assert place[[3, 4, 7]].tolist() == [5, 6, 7]  # those never confused, as they were
    assert confusion_order(np.eye(3, dtype=int)).tolist() == [0, 1, 2]
    assert sorted(confusion_order(np.ones((2, 2), dtype=int))) == [0, 1]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (frame([], []), "no rows"),
        (frame([0, 1], [0, 5]), "predicted holds 5.*0 to 4"),
        (frame([0, -1], [0, 1]), "target holds -1"),
        (frame([0, 1], [0, 1]).astype({"target": float}), "target holds 0.0"),
        (frame([0, 1], [0, 1]).drop(columns="predicted"), "no column predicted"),
    ],
)
def test_bad_predictions_are_refused(bad: pd.DataFrame, message: str) -> None:
    for measure in (confusion_matrix, per_class, top_confusions):
        with pytest.raises(RunError, match=message):
            measure(bad, CLASSES)


def test_predictions_of_every_version_are_read(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    file = path / "predictions.csv"
    file.write_text("path,target,predicted,confidence\na.jpg,0,1,0.5\n")
    assert read_run(path).predictions()["predicted"].tolist() == [1]
    file.write_text("path,target,predicted,target_class,predicted_class,confidence,rank\na.jpg,0,1,auk,crow,0.5,2\n")
    assert read_predictions(file)["target_class"].tolist() == ["auk"]
    with pytest.raises(RunError, match=r"none\.csv"):
        read_predictions(tmp_path / "none.csv")
    file.write_text("path,target,confidence\na.jpg,0,0.5\n")
    with pytest.raises(RunError, match="no column predicted"):
        read_predictions(file)


def test_mcnemar_counts_and_exact_p_value() -> None:
    # both right 3, only first 6, only second 1, neither 2
    first = frame([0] * 12, [0] * 9 + [1] * 3)
    second = frame([0] * 12, [0] * 3 + [1] * 6 + [0] + [1] * 2).sample(frac=1, random_state=0)
    result = mcnemar(first, second)
    assert (result.both, result.only_first, result.only_second, result.neither, result.images) == (3, 6, 1, 2, 12)
    assert result.p_value == pytest.approx(2 * (1 + 7) / 2**7)  # P(X <= 1) twice, X binomial(7, 1/2)
    assert mcnemar(second, first).p_value == result.p_value
    assert mcnemar(first, first).p_value == 1


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (frame([0, 1, 1], [0, 1, 1]), "2 and 3 images have 2 in common"),
        (frame([0, 0], [0, 1]), r"differ in the target of images/1\.jpg"),
        (frame([], []), "no rows"),
        (frame([0, 1], [0, 1]).assign(path="a"), "a path twice"),
        (frame([0, 1], [0, 1]).drop(columns="target"), "no column target"),
    ],
)
def test_mcnemar_refuses_what_is_not_paired(other: pd.DataFrame, message: str) -> None:
    with pytest.raises(RunError, match=message):
        mcnemar(frame([0, 1], [0, 1]), other)


def names(count: int) -> list[str]:
    return [f"{index:03d}.A_bird_of_long_name_{index}" for index in range(count)]


def twins(count: int, share_wrong: float = 0.3, classes: Sequence[str] = ()) -> Figure:
    """Classes in pairs far apart, 0 with count / 2 and so on, confused with each other."""
    rng = np.random.default_rng(0)
    target = np.repeat(np.arange(count), 6)
    twin = (target + count // 2) % count
    table = frame(target.tolist(), np.where(rng.random(len(target)) < share_wrong, twin, target).tolist())
    classes = classes or names(count)
    return confusion_figure(confusion_matrix(table, classes), top_confusions(table, classes), "title")


@pytest.mark.parametrize(
    ("count", "share_wrong", "first"), [(2, 0.3, "$a^{$"), (20, 0.0, "$a^{$"), (40, 0.3, "$b^{$"), (300, 0.3, "c")]
)
def test_names_of_any_kind_stand_where_they_fit(count: int, share_wrong: float, first: str, tmp_path: Path) -> None:
    drawn = twins(count, share_wrong, [first, *names(count - 1)])
    drawn.savefig(tmp_path / "figure.png", dpi=50)  # a dollar sign begins no formula
    labels = [label.get_text() for label in drawn.axes[0].get_yticklabels()]
    assert len(labels) == (count if count <= 40 else 0) and (first in "".join(labels)) == (count <= 40)
    if not share_wrong:
        assert "no image is taken" in drawn.axes[1].texts[0].get_text()


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


def test_confused_classes_are_neighbours_and_numbered_as_in_the_list() -> None:
    drawn = twins(60)
    matrix, listing = drawn.axes[0], drawn.axes[1]
    rows, columns = np.nonzero(~np.ma.getmaskarray(matrix.images[0].get_array()))
    assert (np.abs(rows - columns) == 1).all()
    numbers = [text for text in matrix.texts if text.get_text().isdigit()]
    assert sorted(int(text.get_text()) for text in numbers) == list(range(1, 11))
    for text in numbers:
        j, i = text.xy  # type: ignore[attr-defined]
        assert not np.ma.getmaskarray(matrix.images[0].get_array())[i, j]
    assert matrix.get_yticklabels() == [] and "A bird of long name 0" in listing.texts[0].get_text().splitlines()[2]


def test_report_writes_files_and_a_summary(tmp_path: Path) -> None:
    table, classes = frame([0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 2]), ["crow, hooded", "dove", "egret"]
    with pytest.raises(RunError, match="target holds 2"):
        write_class_report(table, classes[:2], "t", tmp_path, "last")
    assert not list(tmp_path.iterdir())
    text, files = write_class_report(table, classes, "run\nlast", tmp_path, "last-mirror")
    assert [file.name for file in files] == [
        "per_class-last-mirror.csv",
        "confusion-last-mirror.csv",
        "confusions-last-mirror.md",
        "confusion-last-mirror.png",
        "confusion-last-mirror.pdf",
    ]
    assert sorted(tmp_path.glob("[!.]*")) == sorted(files)
    saved = read_csv(files[0], ("class", "recall", "precision", "f1", "confused_with"))
    assert saved["class"].tolist() == classes and saved["confused_count"].tolist() == [2, 0, 0]
    matrix = read_csv(files[1], ("true", *classes))
    assert matrix[classes].to_numpy().tolist() == [[1, 2, 0], [0, 2, 0], [0, 0, 1]]
    assert files[2].read_text(encoding="utf-8") == f"# run last\n\n{text}\n"
    assert "| crow, hooded → dove" in text and "1 of 3" in text and "33.3 [6.1, 79.2]" in text
    assert imread(files[3]).shape[1] == round(3.3 * 300)
    right = table.assign(predicted=table["target"])
    assert confusions_markdown(top_confusions(right, classes)) == "No image is taken for another class."


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("001.Black_footed_Albatross", "Black footed Albatross"),
        ("n02085620-Chihuahua", "Chihuahua"),
        ("00012_Animalia", "Animalia"),
        ("Acura TL Type-S 2008", "Acura TL Type-S 2008"),
        ("2012_BMW", "2012 BMW"),  # a year says something
        ("007.", "007."),
        ("__", "__"),
        ("two\nlines", "two\\nlines"),
    ],
)
def test_readers_see_a_class_without_underscores_and_sorting_numbers(raw: str, shown: str) -> None:
    assert class_name(raw) == shown
