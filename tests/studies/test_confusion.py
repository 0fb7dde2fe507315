"""Confusions and classes from predictions, against scikit-learn and by hand; two classifiers compared."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from run_folders import write_run
from sklearn import metrics

from fgvc.errors import RunError
from fgvc.runs import read_predictions, read_run
from fgvc.runs.statistics import mcnemar
from fgvc.studies.confusion.measure import confusion_matrix, confusion_order, per_class, top_confusions

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


def test_results_do_not_depend_on_the_order_of_the_images(predictions: pd.DataFrame) -> None:
    shuffled = predictions.sample(frac=1, random_state=1)
    pd.testing.assert_frame_equal(per_class(shuffled, CLASSES), per_class(predictions, CLASSES))
    pd.testing.assert_frame_equal(top_confusions(shuffled, CLASSES), top_confusions(predictions, CLASSES))


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
