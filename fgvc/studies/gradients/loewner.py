"""Gradients of covariance poolings by name, and their Loewner matrices on given features.

Shapes: d channels, M = H * W locations, eigenvalues ascending as in fgvc.spectral; x (1, d, H, W) float64 is one image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fgvc.errors import ConfigError, DatasetError, RunError
from fgvc.io import read_csv
from fgvc.pooling import SpectralPooling, create_pooling, pooling_label
from fgvc.runs.spectra import nonzero_condition_number, numerical_rank
from fgvc.spectral import EIGENVALUE_FLOOR, GRADIENTS, EigendecompositionError, covariance
from fgvc.spectral.covariance import centred
from fgvc.spectral.descriptor import null_as_zero, symmetric_gradient
from fgvc.spectral.eigen import symmetric_eigh
from fgvc.spectral.maps import Eigenvalues as Spectrum
from fgvc.spectral.spectral_map import SpectralLayer

RELEASED_PI = "svd_pi-released"
"""The name of `released_power_iteration`, the one gradient here that is no rule of fgvc.spectral."""

AUDITED: tuple[str, ...] = (
    *("mpn_cov-exact", "mpn_cov", "svd_trunc", "svd_taylor", "svd_pade", "svd_pi", RELEASED_PI, "svd_newton"),
    *("mpa_lya", "mtp_lya", "seb-exact", "seb", "svd_topn-exact", "svd_topn"),
)
"""What is audited by default: METHOD as in `list_poolings()`, with its published gradient, or METHOD-GRADIENT, as run
folders are called."""

DRAWN: tuple[str, ...] = tuple(method for method in AUDITED if method not in (RELEASED_PI, "seb-exact"))
"""What is drawn by default: SEB's exact matrix is that of the square root times one number, but for the slopes."""

BANDS: tuple[str, ...] = ("diagonal", "both_large", "mixed", "both_small", "null")
"""Where an error sits: at the slope of one eigenvalue; between two of the larger half of the non-zero eigenvalues, one
of each half, two of the smaller half; between one that is not null and one that is."""


class AuditedGradient(NamedTuple):
    """A spectral layer by name; where `released`, `released_power_iteration` is meant in place of its rule."""

    method: str
    label: str
    layer: SpectralLayer

    @property
    def released(self) -> bool:
        return self.method == RELEASED_PI

    @property
    def exact(self) -> SpectralLayer:
        """The same forward map with its exact derivative."""
        return self.layer._replace(rule=GRADIENTS["exact"])


def audited_gradient(method: str, channels: int, keep: int | None = None) -> AuditedGradient:
    """Look up a gradient by its name, see `AUDITED`; `keep` is for svd_topn, None drops the 50 smallest eigenvalues.

    Raises ConfigError: unknown method or gradient, a method without an eigendecomposition, `keep` below 1, or None with
    50 channels or fewer.
    """
    name, _, gradient = method.partition("-")
    if method == RELEASED_PI:
        gradient = ""
    options: dict[str, Any] = {"keep": keep} if name == "svd_topn" and keep is not None else {}
    pooling = create_pooling(name, channels=channels, gradient=gradient or None, **options)
    if not isinstance(pooling, SpectralPooling):
        raise ConfigError(f"method {method!r} maps no eigenvalues; choose of {', '.join(AUDITED)}")
    label = "SVD-PI as released" if method == RELEASED_PI else pooling_label(name, gradient or None)
    return AuditedGradient(method, label, pooling.layer)


def loewner_matrix(eigenvalues: Tensor, layer: SpectralLayer) -> Tensor:
    """L with the slopes df_i/dl_i on its diagonal, of the decomposition's eigenvalues: (1, d) -> (d, d)."""
    loewner = layer.rule(layer.f, Spectrum(eigenvalues, layer.keep))
    matrix = loewner.off_diagonal[0].clone()
    # row i of the pullback of the unit vectors is the gradient of f_i
    slopes = loewner.pullback(torch.eye(eigenvalues.shape[1], dtype=eigenvalues.dtype))
    matrix.diagonal().copy_(slopes.diagonal())
    return matrix


def reaching(eigenvalues: Tensor) -> Tensor:
    """Eigenvalues as the features feel them, (1, d) -> (d,): 0 for null ones, l <= d eps l_max, as in the thin path."""
    return null_as_zero(eigenvalues, eigenvalues.shape[1])[0]


def released_power_iteration(x: Tensor, grad: Tensor) -> Tensor:
    """dLoss/dS (1, d, d), not symmetric, as the released SVD-PI computes it: nothing but rounding.

    Power iteration (Wang et al., NeurIPS 2019, arXiv 1906.09023) gives each eigenvector v of eigenvalue l the gradient
    sum_k (S / l)^k (I - v v^T) / l dLoss/dv v^T. The released layer of Song, Sebe and Wang (ICCV 2021, SVD_PI.py) does
    this for all eigenvectors at once: v becomes U, so that the projector is I - U U^T = 0, and l becomes ||S U||_F. The
    gradient of the eigenvalues is left out. It sums 1 + 20 terms.

    Args:
        x: (1, d, H, W) float64.
        grad: dLoss/dDescriptor of the square root, (1, d (d + 1) / 2) float64.
    """
    s = covariance(x)
    eigenvalues, u = symmetric_eigh(s)
    root = eigenvalues.clamp(min=EIGENVALUE_FLOOR).sqrt()
    to_vectors = 2 * symmetric_gradient(grad, x.shape[1]) @ (u * root[:, None, :])  # dLoss/dU
    scale = torch.linalg.matrix_norm(s @ u).clamp(min=1e-10)[:, None, None]
    term = (torch.eye(x.shape[1], dtype=x.dtype) - u @ u.mT) / scale
    total = term
    for _ in range(20):
        term = s @ term / scale
        total = total + term
    matrix_gradient: Tensor = total @ to_vectors @ u.mT
    return matrix_gradient


def through_covariance(matrix_gradient: Tensor, x: Tensor) -> Tensor:
    """dLoss/dx = (D + D^T) Xc / M, of the shape of x, for D = dLoss/dS (1, d, d)."""
    features = centred(x, torch.float64)
    gradient = (matrix_gradient + matrix_gradient.mT) @ features / features.shape[-1]
    return gradient.view(x.shape)


def error_shares(error: Tensor, weights: Tensor) -> dict[str, float]:
    """Shares of `BANDS` in the squared error of the features' gradient.

    Args:
        error: inner - inner*, (d, d).
        weights: eigenvalues, ascending, null ones as 0, (d,).

    Returns:
        Share by band; they sum to 1, or are NaN where nothing reaches the features.
    """
    energy = error**2 * weights  # entry (i, j) has l_j, entry (j, i) has l_i
    rank = int((weights > 0).sum())
    # 0: null, 1: smaller half, 2: larger half, to which the middle of an odd number belongs
    half = torch.zeros(len(weights), dtype=torch.long)
    half[len(half) - rank :] = 1
    half[len(half) - (rank + 1) // 2 :] = 2
    higher, lower = torch.maximum(half[:, None], half), torch.minimum(half[:, None], half)
    own = torch.eye(len(half), dtype=torch.bool)
    masks = {
        "diagonal": own,
        "both_large": ~own & (lower == 2),
        "mixed": ~own & (higher == 2) & (lower == 1),
        "both_small": ~own & (higher == 1) & (lower == 1),
        "null": ~own & (lower == 0),
    }
    total = energy.sum()
    return {band: float(energy[mask].sum() / total) for band, mask in masks.items()}


@dataclass(frozen=True)
class LoewnerMatrix:
    """L of one gradient and of the exact one of the same map, both (d, d) float64, eigenvalues descending."""

    label: str
    matrix: np.ndarray
    exact: np.ndarray


@dataclass(frozen=True)
class LoewnerPicture:
    """The Loewner matrices of several gradients on one image.

    Attributes:
        image: Index of the image in the batch.
        eigenvalues: Eigenvalues of the decomposition, (d,) float64, descending.
        rank: Number of eigenvalues that are not null.
        condition: Largest over smallest eigenvalue that is not null.
        matrices: Matrices, one for each gradient.
        keep: Number of eigenvalues that SVD-TopN keeps; None for all but 50.
    """

    image: int
    eigenvalues: np.ndarray
    rank: int
    condition: float
    matrices: list[LoewnerMatrix]
    keep: int | None = None

    def table(self) -> pd.DataFrame:
        """What `load_picture` needs: image, keep (missing for None) and eigenvalue, a row an eigenvalue, descending."""
        table: pd.DataFrame = pd.DataFrame({"image": self.image, "keep": self.keep, "eigenvalue": self.eigenvalues})
        return table.astype({"keep": "Int64"})


def loewner_picture(x: Tensor, methods: Sequence[str] = DRAWN, *, keep: int | None = None) -> LoewnerPicture:
    """Loewner matrices on the image of the batch whose covariance has the median condition number.

    Args:
        x: (B, C, H, W), any floating dtype.
        methods, keep: as in `audit_gradients`, but for `RELEASED_PI`, which has no Loewner matrix.

    Raises:
        ConfigError: as `audited_gradient`.
        DatasetError: every image is constant, or a covariance cannot be decomposed.
    """
    for method in methods:  # refused before the work
        audited_gradient(method, x.shape[1], keep)
    try:
        found = torch.cat([symmetric_eigh(covariance(image[None].detach().cpu()))[0] for image in x])  # (B, d)
    except EigendecompositionError as error:
        raise DatasetError(f"the features have no finite covariance: {error}") from error
    conditions = nonzero_condition_number(found.flip(-1).numpy())
    if np.isnan(conditions).all():
        raise DatasetError("the features of every image are the same at every location")
    image = int(np.nanargmin(np.abs(conditions - np.nanquantile(conditions, 0.5, method="inverted_cdf"))))
    return picture_of_spectrum(found[image], methods, keep=keep, image=image)


def picture_of_spectrum(
    eigenvalues: Tensor, methods: Sequence[str] = DRAWN, *, keep: int | None = None, image: int = 0
) -> LoewnerPicture:
    """Loewner matrices on one spectrum, (d,) float64, ascending as `symmetric_eigh` found it; `image` is its number.

    Raises ConfigError as `audited_gradient`.
    """
    audited = [audited_gradient(method, len(eigenvalues), keep) for method in methods]
    descending = eigenvalues.flip(0).numpy()[None]

    def flipped(layer: SpectralLayer) -> np.ndarray:
        return loewner_matrix(eigenvalues[None], layer).flip(0, 1).numpy()

    return LoewnerPicture(
        image,
        descending[0],
        int(numerical_rank(descending)[0]),
        float(nonzero_condition_number(descending)[0]),
        [LoewnerMatrix(method.label, flipped(method.layer), flipped(method.exact)) for method in audited],
        keep,
    )


def load_picture(path: Path) -> LoewnerPicture:
    """The picture of `DRAWN` whose table was saved as CSV. Raises RunError if the file is missing or damaged."""
    table = read_csv(path, ("image", "keep", "eigenvalue"))
    if table.empty or table["eigenvalue"].dtype.kind != "f":
        raise RunError(f"{path}: no eigenvalues in it; restore the file")
    keep = None if table["keep"].isna().any() else int(table["keep"].iloc[0])
    eigenvalues = torch.tensor(table["eigenvalue"].to_numpy()[::-1].copy(), dtype=torch.float64)
    return picture_of_spectrum(eigenvalues, keep=keep, image=int(table["image"].iloc[0]))
