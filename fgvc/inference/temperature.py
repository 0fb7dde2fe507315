"""Calibration measures of probabilities, and temperature scaling, which improves them with one number T.

Probabilities are softmax(logits / T). T > 0 does not change the order of the classes, so no accuracy changes.
[Guo, Pleiss, Sun, Weinberger, On Calibration of Modern Neural Networks, ICML 2017]

Shapes: N images, K classes.
"""

from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
import torch
from scipy.optimize import brentq
from torch import Tensor

BINS = 15
"""Number of bins of equal width, as in Guo et al."""
FOLDS = 5
TEMPERATURES = (0.05, 20.0)
"""Search range of T; if the optimum is outside, the images determine no temperature."""


@dataclass(frozen=True)
class ProbabilityMeasures:
    """How well probabilities agree with the true classes.

    Attributes:
        calibration_error: Expected calibration error of the predicted class in per cent, over `BINS` bins.
        loss: Mean cross-entropy (negative log-likelihood of the true class), in nats.
        brier: Mean over images of the squared distance between probabilities and truth, 0 to 2.
    """

    calibration_error: float
    loss: float
    brier: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """Return the temperature with the least cross-entropy, computed in float64.

    The cross-entropy is convex in 1/T, so the zero of its derivative is the minimum. If it still falls at an end of
    `TEMPERATURES`, that end is returned, see `is_determined`. There is no minimum if every image is right (each lower
    temperature is better) or if the logits carry no information (each higher one is better).

    Args:
        logits: (N, K) for images that the model was not trained on.
        targets: (N,) class indices.

    Raises:
        ValueError: no image, or logits that are not finite.
    """
    if len(targets) == 0 or not torch.isfinite(logits).all():
        raise ValueError("a temperature needs finite logits of at least one image")
    true = logits.gather(1, targets[:, None])[:, 0].double()  # (N, K) -> (N,)

    def slope(log_temperature: float) -> float:
        """Return the derivative of the cross-entropy by 1/T: the mean over images of E[z] - z_true; it falls with T."""
        parts = (part.double() for part in torch.split(logits, _rows(logits)))
        expected = [((z / np.exp(log_temperature)).softmax(dim=1) * z).sum(dim=1) for z in parts]
        return float((torch.cat(expected) - true).mean())

    low, high = np.log(TEMPERATURES)
    if slope(low) <= 0:
        return TEMPERATURES[0]
    if slope(high) >= 0:
        return TEMPERATURES[1]
    return float(np.exp(brentq(slope, low, high, xtol=1e-10)))


def is_determined(temperature: float) -> bool:
    """Return whether the best temperature lies within `TEMPERATURES`."""
    return TEMPERATURES[0] < temperature < TEMPERATURES[1]


def cross_fitted(logits: Tensor, targets: Tensor, folds: int = FOLDS, seed: int = 0) -> Tensor:
    """Return for each image a temperature that was fitted without it: (N, K), (N,) -> (N,) float64.

    The images are split at random into `folds` parts (N parts if N is smaller). Each part gets the temperature fitted
    on the other parts. Measures at these temperatures estimate those on new images of the same kind.

    Raises:
        ValueError: fewer than two images, or as in `fit_temperature`.
    """
    if len(targets) < 2:
        raise ValueError("cross-fitting needs two images")
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    temperatures = torch.empty(len(targets), dtype=torch.float64)
    for part in order.tensor_split(min(folds, len(targets))):
        others = torch.ones(len(targets), dtype=torch.bool)
        others[part] = False
        temperatures[part] = fit_temperature(logits[others], targets[others])
    return temperatures


def probabilities(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Return softmax(logits / T) in float64: (N, K) -> (N, K); `temperature` is one number or one per image (N,)."""
    t = torch.as_tensor(temperature, dtype=torch.float64, device=logits.device)
    return (logits.double() / t[..., None]).softmax(dim=-1)


def measure_probabilities(
    logits: Tensor, targets: Tensor, temperature: float | Tensor = 1.0
) -> tuple[ProbabilityMeasures, pd.DataFrame]:
    """Return the measures of `probabilities` and their `reliability_curve`.

    Args:
        logits: (N, K).
        targets: (N,) class indices.
        temperature: one number, or one per image (N,).
    """
    temperatures = torch.as_tensor(temperature, dtype=torch.float64).expand(len(targets))
    columns = []
    parts = (torch.split(tensor, _rows(logits)) for tensor in (logits, targets, temperatures))
    for part, classes, t in zip(*parts, strict=True):
        probability = probabilities(part, t)
        confidence, predicted = probability.max(dim=1)
        true = probability.gather(1, classes[:, None])[:, 0]
        columns.append(torch.stack([confidence, predicted == classes, true, probability.square().sum(dim=1)]))
    confidence, right, true, squares = torch.cat(columns, dim=1)
    # sum over classes of (p - e_true)^2, without the one-hot matrix
    brier = (squares - 2 * true + 1).mean()
    curve = reliability_curve(confidence, right)
    tiny = torch.finfo(true.dtype).tiny
    loss = float(-true.clamp_min(tiny).log().mean())
    return ProbabilityMeasures(calibration_error(curve), loss, float(brier)), curve


def _rows(logits: Tensor) -> int:
    """Return the number of images at a time that keeps the float64 arrays of (N, K) logits at some MB."""
    return max(2**20 // logits.shape[1], 1)


def reliability_curve(confidence: Tensor, right: Tensor, bins: int = BINS) -> pd.DataFrame:
    """Return accuracy against confidence, one row per bin that holds images.

    Bins have equal width and include their upper end, as in Guo et al.

    Args:
        confidence: (N,) probability of the predicted class.
        right: (N,) whether the prediction is right.
        bins: number of bins.

    Returns:
        Columns lower, upper (the bin's ends), images, confidence (mean), accuracy (share); all from 0 to 1.
    """
    edges = np.linspace(0, 1, bins + 1)
    values = confidence.double().cpu().numpy()
    place = np.clip(np.searchsorted(edges, values, side="left") - 1, 0, bins - 1)
    images = np.bincount(place, minlength=bins)
    count = np.maximum(images, 1)
    curve = pd.DataFrame(
        {
            "lower": edges[:-1],
            "upper": edges[1:],
            "images": images,
            "confidence": np.bincount(place, values, minlength=bins) / count,
            "accuracy": np.bincount(place, right.double().cpu().numpy(), minlength=bins) / count,
        }
    )
    return curve[images > 0].reset_index(drop=True)


def calibration_error(curve: pd.DataFrame) -> float:
    """Return the expected calibration error in per cent: mean |accuracy - confidence|, weighted by images."""
    distance = (curve["accuracy"] - curve["confidence"]).abs()
    return 100 * float((distance * curve["images"]).sum() / curve["images"].sum())
