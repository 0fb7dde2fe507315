"""Retrieval: worked examples, and random descriptors against scikit-learn."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from fgvc.errors import ConfigError
from fgvc.inference import evaluate
from fgvc.inference.evaluate import measure_retrieval


def at_angles(*degrees: float) -> Tensor:
    """Descriptors (N, 2) at these angles, with norms that must not matter."""
    angles = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([angles.cos(), angles.sin()], dim=1) * torch.arange(1, len(degrees) + 1)[:, None]


def test_two_pairs_that_find_each_other_are_perfect() -> None:
    found = measure_retrieval(at_angles(0, 10, 90, 100), torch.tensor([0, 0, 1, 1]))
    assert (found.queries, found.map_at_r) == (4, 100) and set(found.recall.values()) == {100}


def test_measures_by_hand() -> None:
    """Classes a a b a at 0, 30, 40 and 100 degrees; the b is alone, so it is no query, but stands in the way.

    a at 0 finds a (30), b (40), a (100):   rank 1 right; R = 2, precisions 1 and 0:    average 1/2.
    a at 30 finds b (40), a (0), a (100):   rank 1 wrong; R = 2, precisions 0 and 1/2:  average 1/4.
    a at 100 finds b (40), a (30), a (0):   the same.
    """
    found = measure_retrieval(at_angles(0, 30, 40, 100), torch.tensor([0, 0, 1, 0]), recall_at=(1, 2, 4, 8))
    assert found.queries == 3
    assert found.recall == pytest.approx({1: 100 / 3, 2: 100, 4: 100, 8: 100})
    assert found.map_at_r == pytest.approx(100 * (1 / 2 + 1 / 4 + 1 / 4) / 3)
    assert found.as_dict() == {
        "queries": 3,
        "recall_at_1": 33.3333,
        "recall_at_2": 100,
        "recall_at_4": 100,
        "recall_at_8": 100,
        "map_at_r": 33.3333,
    }


@pytest.mark.parametrize("chunk", [1, 700, 1 << 24])
def test_random_descriptors_against_scikit_learn(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "_CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(12, (150,), generator=generator)
    targets[0] = 12  # alone in its class
    descriptors = torch.randn(150, 7, generator=generator) + targets[:, None] / 4 * torch.randn(7, generator=generator)
    found = measure_retrieval(descriptors, targets)
    near = NearestNeighbors(n_neighbors=150, metric="cosine", algorithm="brute").fit(descriptors.double().numpy())
    order = near.kneighbors(return_distance=False, n_neighbors=149)  # without the image itself
    right = targets.numpy()[order] == targets.numpy()[:, None]
    queries = right.any(axis=1)
    assert found.queries == queries.sum() == 149
    for k, share in found.recall.items():
        assert share == pytest.approx(100 * right[queries, :k].any(axis=1).mean())
    averages = []
    for row in right[queries]:
        ideal = row.sum()
        first = row[:ideal]
        # scikit-learn divides by the number of right ones among the first R, the measure by R
        score = average_precision_score(first, -np.arange(ideal)) * first.sum() / ideal if first.any() else 0
        averages.append(score)
    assert found.map_at_r == pytest.approx(100 * np.mean(averages), abs=1e-4)


def test_without_two_images_of_a_class_there_is_nothing_to_find() -> None:
    with pytest.raises(ConfigError, match="none of 3 images has another one of its class"):
        measure_retrieval(torch.eye(3), torch.arange(3))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_descriptors_that_are_not_finite_are_refused(value: float) -> None:
    descriptors = torch.eye(4)
    descriptors[2, 1] = value
    with pytest.raises(ValueError, match="1 descriptors are NaN or infinite"):
        measure_retrieval(descriptors, torch.tensor([0, 0, 1, 1]))
