"""How far each published gradient is from the exact one on given features: size, direction, place in the spectrum.

Shapes: B images, C = d channels, M = H * W locations; x (B, C, H, W) is what a covariance pooling reads, `grad`
(B, d (d + 1) / 2) is dLoss/dDescriptor.

With G the symmetric matrix of `grad`, P = U^T G U and inner_ij = L_ij P_ij (fgvc.spectral.rules), the features get
dLoss/dX = (2 / M) U inner U^T Xc. The rows of U^T Xc are orthogonal with squared lengths M l, so that

    ||dLoss/dX||^2 = (4 / M) sum_ij inner_ij^2 l_j,

and the squared error of a gradient is a sum over pairs of eigenvalues, (4 / M) (inner - inner*)_ij^2 (l_i + l_j) of
each two, (4 / M) (inner - inner*)_ii^2 l_i of each one. Two null eigenvalues, l_i = l_j = 0, never reach the features.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fgvc.errors import DatasetError
from fgvc.spectral import EIGENVALUE_FLOOR, EigendecompositionError, covariance, spectral_descriptor
from fgvc.spectral.descriptor import symmetric_gradient
from fgvc.spectral.eigen import symmetric_eigh
from fgvc.spectral.maps import Eigenvalues as Spectrum
from fgvc.spectral.spectral_map import SpectralLayer
from fgvc.studies.gradients.loewner import (
    AUDITED,
    BANDS,
    AuditedGradient,
    audited_gradient,
    error_shares,
    loewner_matrix,
    reaching,
    released_power_iteration,
    through_covariance,
)

ROUNDING = 1e-9  # a relative error below this is rounding; where it sits has no meaning


def audit_gradients(
    x: Tensor,
    methods: Sequence[str] | None = None,
    grad: Tensor | None = None,
    *,
    keep: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare gradients of the loss sum(descriptor * grad) with the exact gradients of their maps, in float64.

    Args:
        x: (B, C, H, W), any floating dtype.
        methods: names as in `AUDITED`; None means those.
        grad: (B, C (C + 1) / 2), the same for every method; None draws standard normal numbers.
        keep: eigenvalues that svd_topn keeps; None means C - 50, as published.
        seed: of the drawn `grad`.

    Returns:
        One row a method and image; numbers are NaN where the exact gradient is zero:

        method, label: name as in `AUDITED`, and in tables.
        kept, channels: number of eigenvalues that the map sees, and of all.
        image: index in the batch.
        rank: number of eigenvalues l > d eps l_max; the others are null.
        exact_norm: norm of the exact gradient g* of the features.
        norm_ratio, relative_error, cosine: ratio ||g|| / ||g*||, ||g - g*|| / ||g*||, and the cosine of g and g*.
        largest: largest |L_ij| over the spectrum as the decomposition of the d x d covariance finds it, slopes L_ii and
            null eigenvalues (rounding noise) included; NaN for the released SVD-PI, which is no Loewner matrix.
        largest_high, largest_low: its two eigenvalues, null ones as 0.
        reaching, reaching_high, reaching_low: the same three without pairs of null eigenvalues.
        diagonal, both_large, mixed, both_small, null: shares of the squared error, see `BANDS`; they sum to 1. NaN
            where the relative error is below `ROUNDING`.

    Raises:
        ConfigError: as `audited_gradient`.
        DatasetError: a covariance cannot be decomposed, or the exact gradient of every image is zero.
    """
    count, channels = x.shape[:2]
    if grad is None:
        width = channels * (channels + 1) // 2
        grad = torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    audited = [audited_gradient(method, channels, keep) for method in methods or AUDITED]
    rows: list[dict[str, Any]] = []
    for image in range(count):
        part = slice(image, image + 1)
        try:
            rows += _audit_image(image, x[part].detach().cpu().double(), grad[part].detach().cpu().double(), audited)
        except EigendecompositionError as error:
            raise DatasetError(f"the features of image {image} have no finite covariance: {error}") from error
    table: pd.DataFrame = pd.DataFrame(rows)
    if not (table["exact_norm"] > 0).any():
        raise DatasetError(
            f"the exact gradient of all {count} images is zero: their features are constant, or of a covariance below "
            f"{EIGENVALUE_FLOOR:.1e}; give features as a network makes them"
        )
    return table


def summarise_gradients(table: pd.DataFrame) -> pd.DataFrame:
    """One row a method: medians and quartiles over images, largest |L_ij| of any image, mean shares of the error.

    The table is that of `audit_gradients`. Medians and quartiles are order statistics, each the value of some image;
    mean shares sum to 1 as each image's do.

    Returns:
        Columns method, label, kept, channels, images (those with an exact gradient); norm_ratio, relative_error and
        cosine, each followed by *_lower and *_upper; largest and reaching, each followed by *_high and *_low; `BANDS`.
    """
    return pd.DataFrame([_summary(part) for _, part in table.groupby("method", sort=False)])


def _summary(part: pd.DataFrame) -> dict[str, object]:
    used = part[part["exact_norm"] > 0]
    row: dict[str, object] = {name: part[name].iloc[0] for name in ("method", "label", "kept", "channels")}
    row["images"] = len(used)
    for name in ("norm_ratio", "relative_error", "cosine"):
        lower, median, upper = np.quantile(used[name], [0.25, 0.5, 0.75], method="inverted_cdf")
        row |= {name: median, f"{name}_lower": lower, f"{name}_upper": upper}
    for name in ("largest", "reaching"):
        at = part.iloc[int(part[name].fillna(-1).to_numpy().argmax())]
        row |= {column: at[column] for column in (name, f"{name}_high", f"{name}_low")}
    return row | {band: used[band].mean() for band in BANDS}


class _Image(NamedTuple):
    """One image: x (1, d, H, W), grad (1, d (d + 1) / 2), l (1, d), U (1, d, d) and P (d, d), float64.

    `found` is l as the decomposition finds it, `seen` as `spectral_descriptor` does: with fewer locations than channels
    it takes null eigenvalues for 0.
    """

    x: Tensor
    grad: Tensor
    found: Tensor
    seen: Tensor
    vectors: Tensor
    projected: Tensor


class _Gradient(NamedTuple):
    """dLoss/dx (1, d, H, W), and what stands between U and U^T in dLoss/dS, (d, d)."""

    features: Tensor
    inner: Tensor


def _audit_image(index: int, x: Tensor, grad: Tensor, audited: Sequence[AuditedGradient]) -> list[dict[str, Any]]:
    """The rows of one image, x (1, d, H, W) and grad (1, d (d + 1) / 2) float64."""
    found, vectors = symmetric_eigh(covariance(x))
    projected = (vectors.mT @ symmetric_gradient(grad, x.shape[1]) @ vectors)[0]
    seen = reaching(found)[None] if x[0, 0].numel() < x.shape[1] else found
    image = _Image(x, grad, found, seen, vectors, projected)
    references = {(a.exact.f, a.exact.keep): _gradient(image, a.exact) for a in audited}
    return [_row(index, image, a, references[a.exact.f, a.exact.keep]) for a in audited]


def _gradient(image: _Image, layer: SpectralLayer) -> _Gradient:
    x = image.x.clone().requires_grad_()
    descriptor = spectral_descriptor(x, layer.f, layer.rule, keep=layer.keep)
    (features,) = torch.autograd.grad(descriptor, x, image.grad)
    loewner = layer.rule(layer.f, Spectrum(image.seen, layer.keep))
    inner = loewner.off_diagonal[0] * image.projected
    inner.diagonal().copy_(loewner.pullback(image.projected.diagonal()[None])[0])
    return _Gradient(features, inner)


def _released(image: _Image) -> _Gradient:
    matrix_gradient = released_power_iteration(image.x, image.grad)
    inner = (image.vectors.mT @ (matrix_gradient + matrix_gradient.mT) @ image.vectors)[0] / 2
    return _Gradient(through_covariance(matrix_gradient, image.x), inner)


def _row(index: int, image: _Image, audited: AuditedGradient, exact: _Gradient) -> dict[str, Any]:
    got = _released(image) if audited.released else _gradient(image, audited.layer)
    g, reference = got.features.flatten(), exact.features.flatten()
    norm, exact_norm = float(g.norm()), float(reference.norm())
    relative_error = float((g - reference).norm()) / exact_norm if exact_norm else math.nan
    weights = reaching(image.found)
    shares = error_shares(got.inner - exact.inner, weights)
    if not relative_error > ROUNDING:
        shares = dict.fromkeys(BANDS, math.nan)
    channels = len(weights)
    first, end = (0, channels) if audited.layer.keep is None else audited.layer.keep.limits(channels)
    return {
        "method": audited.method,
        "label": audited.label,
        "kept": end - first,
        "channels": channels,
        "image": index,
        "rank": int((weights > 0).sum()),
        "exact_norm": exact_norm,
        "norm_ratio": norm / exact_norm if exact_norm else math.nan,
        "relative_error": relative_error,
        "cosine": float(g @ reference) / (norm * exact_norm) if norm * exact_norm else math.nan,
        **_largest(image.found, weights, audited),
        **shares,
    }


def _largest(found: Tensor, weights: Tensor, audited: AuditedGradient) -> dict[str, float]:
    columns = [f"{scope}{part}" for scope in ("largest", "reaching") for part in ("", "_high", "_low")]
    if audited.released:
        return dict.fromkeys(columns, math.nan)
    matrix = loewner_matrix(found, audited.layer).abs()
    reached = (weights[:, None] > 0) | (weights > 0)
    values: list[float] = []
    for entries in (matrix, torch.where(reached, matrix, 0)):
        low, high = sorted(divmod(int(entries.argmax()), len(weights)))
        values += [float(entries[low, high]), float(weights[high]), float(weights[low])]
    return dict(zip(columns, values, strict=True))
