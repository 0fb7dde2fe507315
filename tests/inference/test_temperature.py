"""Temperature scaling and the measures of calibration, against their definitions."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics.functional.classification import binary_calibration_error

from fgvc.inference import calibrate as scaling


def sample(images: int, classes: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits (N, K), and targets (N,) drawn from their softmax: calibrated at temperature 1."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(images, classes, generator=generator)
    return logits, torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
def test_the_temperature_undoes_a_factor(factor: float) -> None:
    logits, targets = sample(20_000)
    found = scaling.fit_temperature(factor * logits, targets)
    assert found == pytest.approx(factor, rel=0.02)
    assert found == pytest.approx(factor * scaling.fit_temperature(logits, targets), rel=1e-5)


def test_no_other_temperature_has_a_lower_cross_entropy() -> None:
    logits, targets = sample(300, seed=1)
    best = scaling.fit_temperature(logits, targets)
    losses = [float(cross_entropy(logits.double() / (best * (1 + step)), targets)) for step in (-1e-3, 0, 1e-3)]
    assert losses[1] == min(losses)


def test_images_that_determine_no_temperature_give_an_end() -> None:
    right = 3 * torch.eye(4)
    assert scaling.fit_temperature(right, torch.arange(4)) == scaling.TEMPERATURES[0]
    assert scaling.fit_temperature(right, (torch.arange(4) + 1) % 4) == scaling.TEMPERATURES[1]
    assert not any(map(scaling.is_determined, scaling.TEMPERATURES)) and scaling.is_determined(1.0)


@pytest.mark.parametrize("logits", [torch.empty(0, 3), torch.full((2, 3), torch.nan)])
def test_a_temperature_needs_finite_logits(logits: Tensor) -> None:
    with pytest.raises(ValueError, match="finite logits of at least one image"):
        scaling.fit_temperature(logits, torch.zeros(len(logits), dtype=torch.long))


def test_a_cross_fitted_temperature_does_not_know_its_image() -> None:
    logits, targets = sample(60, seed=2)
    before = scaling.cross_fitted(logits, targets)
    assert len(before.unique()) == 5
    changed = targets.clone()
    changed[7] = (changed[7] + 1) % 6
    after = scaling.cross_fitted(logits, changed)
    assert after[7] == before[7] and (after != before).sum() == 48  # the four other parts
    assert len(scaling.cross_fitted(logits[:3], targets[:3])) == 3
    with pytest.raises(ValueError, match="two images"):
        scaling.cross_fitted(logits[:1], targets[:1])


@pytest.mark.parametrize("temperature", [*scaling.TEMPERATURES, 0.7])
def test_a_temperature_changes_no_answer(temperature: float) -> None:
    logits = 5 * torch.randn(500, 20, generator=torch.Generator().manual_seed(3))
    logits[:, 1] = torch.nextafter(logits[:, 0], torch.tensor(torch.inf))  # neighbours in float32
    assert (scaling.probabilities(logits, temperature).argmax(dim=1) == logits.argmax(dim=1)).all()
    one_each = torch.full((500,), temperature)
    shared = scaling.probabilities(logits, temperature)
    torch.testing.assert_close(scaling.probabilities(logits, one_each), shared, rtol=1e-5, atol=1e-9)


def test_measures_by_their_definitions() -> None:
    logits, targets = sample(200, seed=4)
    probability = scaling.probabilities(1.7 * logits)
    measured, curve = scaling.measure_probabilities(logits, targets, 1 / 1.7)
    assert measured.loss == pytest.approx(float(cross_entropy(1.7 * logits.double(), targets)))
    assert measured.brier == pytest.approx(float((probability - one_hot(targets, 6)).square().sum(dim=1).mean()))
    confidence, predicted = probability.max(dim=1)
    expected = binary_calibration_error(confidence, (predicted == targets).long(), n_bins=15, norm="l1")
    assert measured.calibration_error == pytest.approx(100 * float(expected))
    assert curve["images"].sum() == 200
    assert np.isfinite(scaling.measure_probabilities(torch.tensor([[900.0, 0]]), torch.tensor([1]))[0].loss)


class Largest(TorchDispatchMode):
    """Size of the largest float64 tensor that is made."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float64:
            self.size = max(self.size, result.numel())
        return result


def test_many_classes_are_computed_in_parts() -> None:
    logits, targets = sample(12, classes=100_000, seed=5)
    with Largest() as largest:
        at_once = scaling.fit_temperature(logits, targets)
        measures, _ = scaling.measure_probabilities(logits, targets, torch.linspace(1, 2, 12))
    assert largest.size <= 2**20 < logits.numel()
    assert scaling.is_determined(at_once)
    assert measures.loss == pytest.approx(float(cross_entropy(logits / torch.linspace(1, 2, 12)[:, None], targets)))


def test_reliability_by_hand() -> None:
    confidence = torch.tensor([0.25, 0.25, 0.5, 0.51, 1.0, 1.0], dtype=torch.float64)
    curve = scaling.reliability_curve(confidence, torch.tensor([True, False, True, False, True, True]), bins=4)
    # a bin holds its upper end
    assert curve["upper"].tolist() == [0.25, 0.5, 0.75, 1.0] and curve["images"].tolist() == [2, 1, 1, 2]
    assert curve["confidence"].tolist() == [0.25, 0.5, 0.51, 1] and curve["accuracy"].tolist() == [0.5, 1, 0, 1]
    assert scaling.calibration_error(curve) == pytest.approx(100 * (2 * 0.25 + 0.5 + 0.51) / 6)
