"""Local features to measure on: drawn to resemble those of a CNN, or real ones from a file. B images, C channels."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fgvc.errors import ConfigError

Shape = tuple[int, int, int, int]
FILE_BATCHES = (10, 32)

SMOOTH_FIELD = (
    "ReLU of a smooth random field: white noise under a 1-2-1 filter along both axes, channels mixed by a Gaussian "
    "C x C matrix whose k-th column has the scale 1 / sqrt(k), variance 1 before the ReLU"
)


def smooth_features(shape: Shape, seed: int) -> Tensor:
    """The field that `SMOOTH_FIELD` describes, (B, C, H, W) float32.

    Neighbouring locations and the channels are correlated and half of the numbers are zero, as behind the last ReLU of
    a CNN: the eigenvalues of the covariance fall over orders of magnitude, as real ones do. An eigendecomposition of
    white noise would take another time.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, channels, height, width = shape
    noise = torch.randn(batch * channels, 1, height, width, generator=generator)
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]])
    field = F.conv2d(noise, kernel[None, None], padding=1).view(shape)
    scale = torch.arange(1, channels + 1).rsqrt()
    mixing = torch.randn(channels, channels, generator=generator) * scale
    field = torch.einsum("ck,bkhw->bchw", mixing, field)
    return torch.relu(field / field.square().mean().sqrt())


def load_features(path: Path) -> dict[Shape, Tensor]:
    """The first 10 and, where there are as many, the first 32 images of a .npy file (N, C, H, W), as float32.

    Raises:
        ConfigError: no such file, not such an array, fewer than 10 images, or NaN or infinity among the numbers read.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"{path}: cannot be read as a .npy file ({error})") from error
    if not isinstance(array, np.ndarray) or array.ndim != 4 or array.dtype.kind != "f" or 0 in array.shape:
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "an archive"
        raise ConfigError(f"{path}: expected one floating-point array (N, C, H, W), found {found}")
    if len(array) < FILE_BATCHES[0]:
        raise ConfigError(f"{path}: {len(array)} images, at least {FILE_BATCHES[0]} are needed")
    features = torch.from_numpy(array[: FILE_BATCHES[-1]].astype(np.float32))
    if not features.isfinite().all():
        raise ConfigError(f"{path}: NaN or infinity among the first {len(features)} images (as float32)")
    _, channels, height, width = features.shape
    return {(n, channels, height, width): features[:n] for n in FILE_BATCHES if n <= len(features)}
