"""What a trained head makes of a part of the spectrum: its accuracy with only a band of the eigenvalues kept.

A band is a pair (start, stop) of eigenvalues in descending order, as a slice (`fgvc.spectral.Band`); the others are set
to `EIGENVALUE_FLOOR`, so that a head reads F(S_band) in place of F(S). Scalars that a map takes from the whole spectrum
(the factor of SEB, the trace of iSQRT-COV) are those of S_band.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fgvc.analysis.runs import read_run
from fgvc.errors import RunError
from fgvc.models import PoolingHead
from fgvc.pooling import CovariancePooling, NewtonSchulzPooling, Pooling, SpectralPooling
from fgvc.spectral import Band, Keep
from fgvc.spectral.maps import NewtonSchulzRoot
from fgvc.spectrum_measures import median_rank
from fgvc.training.restore import Restored, restore_run

ALL = Band(0, None)
"""The whole spectrum."""


@contextmanager
def restrict_spectrum(head: PoolingHead, keep: Keep) -> Iterator[None]:
    """Within the context `head` sees only these eigenvalues; afterwards it is as it was.

    Args:
        head: with a pooling that normalises a covariance, of all eigenvalues.
        keep: N for the N largest, or a band.

    Raises:
        RunError: the head reads no eigenvalues, or only a band of them already.
        ValueError: `keep` is no band.
    """
    whole = head.pooling
    head.pooling = _restricted(whole, keep)
    try:
        yield
    finally:
        head.pooling = whole


def _restricted(pooling: Pooling, keep: Keep) -> Pooling:
    if isinstance(pooling, SpectralPooling):
        layer = pooling.layer
        if layer.keep is not None:
            raise RunError(f"the head sees only the eigenvalues {tuple(layer.keep)} already; give one that sees all")
        return SpectralPooling(
            pooling.channels, layer.f, layer.rule, keep=keep, eigh_device=layer.eigh_device, dtype=layer.dtype
        )
    if isinstance(pooling, NewtonSchulzPooling):
        # the iteration is a map of the eigenvalues: the same result, with a handle on them
        return SpectralPooling(
            pooling.channels, NewtonSchulzRoot(pooling.iterations), "exact", keep=keep, dtype=pooling.dtype
        )
    raise RunError(f"{type(pooling).__name__} normalises no covariance; give a head that does, e.g. of mpn_cov")


def standard_bands(rank: int, width: int = 8) -> list[Band]:
    """The k largest and the k smallest of `rank` eigenvalues, k = 1, 2, 4, 8, 16, 24, ..., and windows of `width`.

    The whole spectrum comes first. A band at the end goes on to the null eigenvalues, which every map leaves at the
    floor. Each band once.
    """
    sizes = [k for k in (1, 2, 4, *range(8, rank, 8)) if k < rank]
    largest = [Band(0, k) for k in sizes]
    smallest = [Band(rank - k, None) for k in sizes]
    windows = [Band(start, start + width) for start in range(0, rank - width, width)]
    return list(dict.fromkeys([ALL, *largest, *smallest, *windows]))


@torch.inference_mode()
def band_predictions(head: PoolingHead, features: Tensor, bands: Sequence[Band]) -> Tensor:
    """Classes that a head predicts with each band, for what its pooling reads (B, C, H, W) -> (len(bands), B)."""
    predicted = []
    for keep in bands:
        with restrict_spectrum(head, keep):
            predicted.append(head.classifier(head.pooling(features)).argmax(dim=1))
    return torch.stack(predicted)


def evaluate_bands(
    path: Path,
    bands: Sequence[Band] | None = None,
    *,
    checkpoint: str = "last",
    root: str | None = None,
    cache: str | None = None,
) -> pd.DataFrame:
    """Evaluate a run on its test split once for each band.

    Args:
        path: a finished run whose head normalises a covariance and sees all of its eigenvalues.
        bands: None means `standard_bands` of the median numerical rank.
        checkpoint: "last" or "best".
        root, cache: folders of the dataset and of cached features, where they have moved since training.

    Returns:
        One row a band and class, in that order: start, stop (missing for the end), rank (median of the images),
        class, images, right.

    Raises:
        RunError: as `restrict_spectrum` and `restore_run`.
        DatasetError, WeightsError: as in training.
    """
    restored = restore_run(path, checkpoint=checkpoint, root=root, cache=cache)
    restored.trained.eval()
    if not isinstance(restored.head.pooling, CovariancePooling):
        raise RunError(f"{path}: its head normalises no covariance; give a run of a method that does, e.g. mpn_cov")
    rank = median_rank(read_run(path).spectrum().before)
    bands = standard_bands(rank) if bands is None else list(bands)
    predicted, targets = _predict(restored, bands)
    rows = [
        {"start": start, "stop": stop, "rank": rank, "class": name, "images": int(of_class.sum()), "right": right}
        for (start, stop), classes in zip(bands, predicted, strict=True)
        for index, name in enumerate(restored.images.classes)
        for of_class in [targets == index]
        for right in [int((classes[of_class] == index).sum())]
    ]
    table: pd.DataFrame = pd.DataFrame(rows).astype({"stop": "Int64"})
    return table


def _predict(restored: Restored, bands: Sequence[Band]) -> tuple[Tensor, Tensor]:
    """Predicted classes (len(bands), N) and targets (N,) of the test split."""
    predicted, targets = [], []
    for inputs, classes in DataLoader(restored.inputs(), batch_size=restored.config.trainer.eval_batch_size):
        predicted.append(band_predictions(restored.head, restored.pooling_input(inputs), bands).cpu())
        targets.append(classes)
    return torch.cat(predicted, dim=1), torch.cat(targets)
