"""The descriptor study: similar classes, neighbours, the map, on known descriptors and on a trained run."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from command_line import SMALL, Train, refused, succeeded
from PIL import Image
from sklearn.model_selection import LeaveOneOut, cross_val_score
from sklearn.neighbors import KNeighborsClassifier

from fgvc.inference.restore import restore_run
from fgvc.spectral import symmetric_from_triangle
from fgvc.studies.descriptors import measure
from fgvc.studies.descriptors.show import confusable_classes, embedding_figure


def three_classes(per_class: int = 20) -> measure.Descriptors:
    """Classes a and b overlap, c is far from both; b is taken for a in a quarter of its images."""
    rng = np.random.default_rng(0)
    centres = np.array([[0.0, 0.0], [1.0, 0.0], [30.0, 0.0]])
    targets = np.repeat([0, 1, 2], per_class)
    predicted = targets.copy()
    predicted[per_class : per_class + per_class // 4] = 0
    vectors = (centres[targets] + rng.normal(size=(3 * per_class, 2))).astype(np.float32)
    paths = [f"{i}.jpg" for i in range(3 * per_class)]
    return measure.Descriptors("MPN-COV", 0, ["a", "b", "c"], paths, targets, predicted, vectors)


def test_the_closest_pair_comes_first_with_its_confusions() -> None:
    pairs = measure.class_pairs(three_classes())
    assert pairs.loc[0, ["first", "second"]].tolist() == ["a", "b"]
    assert pairs.loc[0, ["first_as_second", "second_as_first", "images"]].tolist() == [0, 5, 40]
    assert pairs["accuracy"].tolist() == [87.5, 87.5, 100]  # of a and b, b and c, a and c
    assert pairs.loc[0, "confused"] == 12.5 and pairs.loc[0, "distance"] == pytest.approx(1, abs=0.8)
    assert pairs.loc[1:, "confused"].tolist() == [0, 0] and (pairs.loc[1:, "distance"] > 25).all()
    assert confusable_classes(pairs, count=2) == ["a", "b"]


def test_a_class_without_images_makes_no_pair() -> None:
    found = three_classes()
    classes, targets, predicted = ["empty", *found.classes], found.targets + 1, found.predicted + 1
    more = replace(found, classes=classes, targets=targets, predicted=predicted)
    pd.testing.assert_frame_equal(measure.class_pairs(more), measure.class_pairs(found))


def test_correlation_of_closeness_and_confusion() -> None:
    rng = np.random.default_rng(1)
    i, j = np.triu_indices(12, 1)
    distance = rng.uniform(1, 2, size=len(i))
    pairs = pd.DataFrame({"first": i, "second": j, "distance": distance, "confused": 1 / distance})
    found = measure.similarity_and_confusion(pairs, resamples=100)
    assert found == pytest.approx({"value": 1, "low": 1, "high": 1})
    unrelated = measure.similarity_and_confusion(pairs.assign(confused=rng.permutation(distance)), resamples=300)
    assert unrelated["low"] < 0 < unrelated["high"]
    assert np.isnan(measure.similarity_and_confusion(pairs.assign(confused=0.0), resamples=10)["value"])


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_neighbours_are_those_of_a_leave_one_out_classifier(metric: str) -> None:
    found = three_classes()
    table = measure.neighbour_table(found).set_index(["metric", "k"])
    for k in (1, 5):  # c is so far that of five neighbours two classes are never level
        classifier = KNeighborsClassifier(k, metric=metric, algorithm="brute")
        expected = 100 * cross_val_score(classifier, found.vectors, found.targets, cv=LeaveOneOut()).mean()
        assert table.loc[(metric, k), "top1"] == pytest.approx(expected)
    assert table.loc[(metric, 1), "same"] == table.loc[(metric, 1), "top1"]
    assert table.loc[("euclidean", 5), "top1"] < 100


def test_queries_are_the_images_among_strangers() -> None:
    found = three_classes()
    table = measure.queries(found, images=2, k=3)
    assert table["rank"].tolist() == [1, 2, 3, 1, 2, 3]
    assert set(table["query_class"]) <= {"a", "b"} and "c" not in set(table["neighbour_class"])
    assert not (table["query"] == table["neighbour"]).any()


def test_the_map_repeats_itself_and_parts_what_is_apart() -> None:
    table = measure.embed(three_classes(), seed=3)
    pd.testing.assert_frame_equal(table, measure.embed(three_classes(), seed=3))
    apart = table[table["class"] == "c"][["x", "y"]].to_numpy()
    others = table[table["class"] != "c"][["x", "y"]].to_numpy()
    nearest = np.linalg.norm(apart[:, None] - others, axis=2).min()
    assert nearest > np.linalg.norm(apart[:, None] - apart, axis=2).max() / 2


def test_the_study_from_the_command_line(tmp_path: Path, train_here: Train, here: Train) -> None:
    for method in ("mpn_cov", "gap"):
        overrides = [f"method={method}", "backbone.frozen=true", "name=d", "trainer.epochs=1"]
        assert train_here(tmp_path, *overrides).returncode == 0
    done = succeeded(here("study_descriptors.py", "results/d", "--map", "MPN-COV", "--output", "out", cwd=tmp_path))
    assert "| MPN-COV |" in done.stdout and "Closest pairs of classes of MPN-COV" in done.stdout
    names = ("pairs", "correlations", "neighbours", "queries", "embedding")
    tables = {name: pd.read_csv(tmp_path / "out" / f"{name}.csv") for name in names}
    assert all(set(measure.COLUMNS[name]) <= set(table) for name, table in tables.items())
    assert len(embedding_figure(tables["embedding"], tables["pairs"]).axes) == 1
    assert len(tables["pairs"]) == 6 and len(tables["neighbours"]) == 8 and len(tables["embedding"]) == 9
    assert (tmp_path / "out" / "embedding.pdf").stat().st_size > 1000
    refused(here("study_descriptors.py", "results/d", "--map", "SEB", cwd=tmp_path), "'SEB'", "GAP", "MPN-COV")

    one = ["dataset=folder", "dataset.root=one", "method=gap", "trainer.epochs=0", "run_dir=one_class"]
    for split, name in (("train", "wren"), ("train", "owl"), ("test", "owl")):
        (tmp_path / "one" / split / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64)).save(tmp_path / "one" / split / name / "1.png")
    small = [word for word in SMALL if not word.lstrip("+").startswith(("dataset=", "dataset.options"))]
    succeeded(here("train.py", *small, *one, cwd=tmp_path))
    refused(here("study_descriptors.py", "one_class", cwd=tmp_path), "its test images are of one class")

    weights = tmp_path / "results" / "d" / "test_resnet" / "gap" / "seed0" / "checkpoints"
    weights.rename(weights.with_name("elsewhere"))
    arguments = ("study_descriptors.py", "results/d", "--output", "part")
    done = here(*arguments, cwd=tmp_path)
    assert done.returncode == 0 and "note: left out results/d/test_resnet/gap/seed0: " in done.stderr
    assert set(pd.read_csv(tmp_path / "part" / "neighbours.csv")["label"]) == {"MPN-COV"}
    assert here(*arguments, "--strict", cwd=tmp_path).returncode == 1
    refused(here(*arguments, "--map", "GAP", cwd=tmp_path), "no run of GAP could be studied", "gap/seed0")

    run = tmp_path / "results" / "d" / "test_resnet" / "mpn_cov" / "seed0"
    moved = {"root": str(tmp_path / "datasets" / "synthetic"), "cache": str(tmp_path / "results" / "cache")}
    found = measure.read_descriptors(run, **moved)
    assert (found.predicted == pd.read_csv(run / "predictions.csv")["predicted"]).all()
    # a distance of descriptors is the Frobenius distance of the matrices
    restored = restore_run(run, torch.device("cpu"), **moved)
    restored.trained.eval()
    maps = restored.pooling_input(torch.stack([restored.inputs()[i][0] for i in (0, 5)]))
    with torch.inference_mode():
        first, second = symmetric_from_triangle(restored.head.pooling(maps), 8)
    expected = float(torch.linalg.matrix_norm(first - second))
    assert np.linalg.norm(found.vectors[0] - found.vectors[5]) == pytest.approx(expected, rel=1e-4)
