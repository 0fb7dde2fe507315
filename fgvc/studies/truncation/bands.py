"""A trained head on a part of the spectrum: its accuracy where only a band of the eigenvalues is kept.

A band is a pair (start, stop) of eigenvalues in descending order, as a slice (`fgvc.spectral.Band`). The others are set
to `EIGENVALUE_FLOOR`, so that a head reads F(S_band), not F(S). Scalars that a map takes from the whole spectrum (the
factor of SEB, the trace of iSQRT-COV) are those of S_band.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from fgvc.errors import ConfigError, RunError
from fgvc.inference.restore import restore_run
from fgvc.models import FineGrainedModel, PoolingHead
from fgvc.pooling import CovariancePooling, NewtonSchulzPooling, Pooling, SpectralPooling
from fgvc.runs.spectra import median_rank
from fgvc.runs.summary import read_run
from fgvc.spectral import Band, Keep
from fgvc.spectral.maps import NewtonSchulzRoot

ALL = Band(0, None)
"""The whole spectrum."""


@contextmanager
def restrict_spectrum(
    model: FineGrainedModel | PoolingHead, keep: Keep | None, *, gradient: str | None = None
) -> Iterator[None]:
    """Within the block a head sees only these eigenvalues; then it gets its pooling back.

    Args:
        model: a head, or a model with one, whose pooling normalises a covariance of all eigenvalues.
        keep: N for the N largest, or a band. None for what the head sees; this works with any head.
        gradient: rule of the spectral layer within the block, in `fgvc.spectral.GRADIENTS`; None: the head's own.

    Raises:
        RunError: the head reads no eigenvalues, or only a band of them already.
        ValueError: `keep` is not a band, or the rule is unknown.
    """
    head = model.head if isinstance(model, FineGrainedModel) else model
    whole = head.pooling
    head.pooling = _restricted(whole, keep, gradient)
    try:
        yield
    finally:
        head.pooling = whole


def _restricted(pooling: Pooling, keep: Keep | None, gradient: str | None) -> Pooling:
    if keep is None and not (isinstance(pooling, SpectralPooling) and gradient is not None):
        return pooling
    if isinstance(pooling, SpectralPooling):
        layer = pooling.layer
        if keep is not None and layer.keep is not None:
            raise RunError(f"the head sees only the eigenvalues {tuple(layer.keep)} already; give one that sees all")
        return SpectralPooling(
            pooling.channels,
            layer.f,
            layer.rule if gradient is None else gradient,
            keep=layer.keep if keep is None else keep,
            eigh_device=layer.eigh_device,
            dtype=layer.dtype,
        )
    if isinstance(pooling, NewtonSchulzPooling):
        # the iteration is a map of the eigenvalues: this one has the same result and gives access to them
        return SpectralPooling(
            pooling.channels, NewtonSchulzRoot(pooling.iterations), gradient or "exact", keep=keep, dtype=pooling.dtype
        )
    raise RunError(f"{type(pooling).__name__} normalises no covariance; give a head that does, e.g. of mpn_cov")


def parse_band(text: str, rank: int) -> Band:
    """The band that a user writes: "all", "top16", "bottom16", "8:24", "8:" or ":24".

    Args:
        text: one of these forms; indices count from 0, the largest eigenvalue.
        rank: number of numerically non-zero eigenvalues. "bottom16" are the 16 smallest of these, as in
            `standard_bands`: null eigenvalues, which every map leaves at the floor, hold nothing.

    Raises:
        ConfigError: another form, or more eigenvalues than there are.
    """
    ends, window = re.fullmatch(r"(top|bottom)(\d+)", text), re.fullmatch(r"(\d*):(\d*)", text)
    if text == "all":
        return ALL
    if ends:
        size = int(ends[2])
        if not 1 <= size <= rank:
            raise ConfigError(f"band {text!r} asks for {size} of {rank} numerically non-zero eigenvalues")
        return Band(0, size) if ends[1] == "top" else Band(rank - size, None)
    if window:
        start, stop = int(window[1] or 0), int(window[2]) if window[2] else None
        if start >= (rank if stop is None else min(stop, rank)):
            raise ConfigError(f"band {text!r} is empty: there are {rank} numerically non-zero eigenvalues, from 0")
        return Band(start, stop)
    raise ConfigError(f"unknown band {text!r}; write all, top16, bottom16 or 8:24 (from the largest, counted from 0)")


def standard_bands(rank: int) -> list[Band]:
    """The k largest and the k smallest of `rank` eigenvalues, k = 1, 2, 4, 8, 16, 24, ..., and windows of eight.

    The whole spectrum comes first, and no band twice. A band at the end includes the null eigenvalues, which every map
    leaves at the floor.
    """
    sizes = [k for k in (1, 2, 4, *range(8, rank, 8)) if k < rank]
    largest = [Band(0, k) for k in sizes]
    smallest = [Band(rank - k, None) for k in sizes]
    windows = [Band(start, start + 8) for start in range(0, rank - 8, 8)]
    return list(dict.fromkeys([ALL, *largest, *smallest, *windows]))


def band_logits(head: PoolingHead, features: Tensor, keep: Keep | None) -> Tensor:
    """Logits of a head that sees only these eigenvalues, from what its pooling reads: (B, C, H, W) -> (B, classes).

    The gradient is exact, whatever rule the head was trained with; some rules know no bands.
    """
    with restrict_spectrum(head, keep, gradient="exact"):
        return head.classify(head.pooling(features))


@torch.inference_mode()
def band_predictions(head: PoolingHead, features: Tensor, bands: Sequence[Band]) -> Tensor:
    """Classes that a head predicts with each band, from what its pooling reads: (B, C, H, W) -> (len(bands), B)."""
    return torch.stack([band_logits(head, features, keep).argmax(dim=1) for keep in bands])


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
        bands: the bands; None for `standard_bands` of the median numerical rank.
        checkpoint: "last" or "best".
        root, cache: as in `restore_run`.

    Returns:
        A row for each band and class, in that order: start, stop (missing for the end), rank (median of the images),
        class, images, right.

    Raises:
        RunError: as `restrict_spectrum` and `restore_run`.
        DatasetError, WeightsError: as in training.
    """
    restored = restore_run(path, checkpoint=checkpoint, root=root, cache=cache)
    if not isinstance(restored.head.pooling, CovariancePooling):
        raise RunError(f"{path}: its head normalises no covariance; give a run of a method that does, e.g. mpn_cov")
    rank = median_rank(read_run(path).spectrum().before)
    bands = standard_bands(rank) if bands is None else list(bands)
    batches = [(band_predictions(restored.head, x, bands).cpu(), y) for x, y in restored.pooling_inputs()]
    predicted, targets = (torch.cat(part, dim=-1) for part in zip(*batches, strict=True))
    rows = [
        {"start": start, "stop": stop, "rank": rank, "class": name, "images": int(of_class.sum()), "right": right}
        for (start, stop), classes in zip(bands, predicted, strict=True)
        for index, name in enumerate(restored.images.classes)
        for of_class in [targets == index]
        for right in [int((classes[of_class] == index).sum())]
    ]
    return pd.DataFrame(rows).astype({"stop": "Int64"})
