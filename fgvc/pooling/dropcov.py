"""DropCov: the covariance itself, of features whose channels are dropped in training, in place of a normalisation."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fgvc.pooling.registry import Pooling, register_pooling
from fgvc.spectral.covariance import centred, upper_triangle
from fgvc.spectral.precision import result_dtype, without_autocast


@register_pooling("dropcov", "DropCov", source="Wang, Gao, Zhang, Xie, Li, Hu, NeurIPS 2022")
class DropCovPooling(Pooling):
    """Covariance without a matrix function, upper triangle: (B, C, H, W) -> (B, C (C + 1) / 2).

    In training alone, an adaptive channel dropout comes first. A convolution with three taps over the means of the
    channels and a softmax give weights w, and x becomes x + w x. Of each image, channels are dropped with probability
    p = 1 - 10 / log2(C) cos(w, S 1), limited to 0 and 1, where S 1 are the row sums of the covariance and the cosine is
    the mean over the batch; the others are divided by 1 - p. As released, p carries no gradient, and evaluation reads x
    without weights. Below 1,024 channels a cosine of log2(C) / 10 is enough for p = 0. Computes in float32 (float64 for
    float64 input).

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels * (channels + 1) // 2)
        self.attention = nn.Conv1d(1, 1, kernel_size=3, padding=1, bias=False)

    def pool(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            features = x.flatten(2).to(result_dtype(x))
            return upper_triangle(_covariance(self._drop(features) if self.training else features))

    def _drop(self, features: Tensor) -> Tensor:
        means = features.mean(dim=-1)
        weights = F.conv1d(means[:, None], self.attention.weight.to(means), padding=1)[:, 0].softmax(dim=1)  # (B, C)
        features = features + weights[..., None] * features
        with torch.no_grad():
            cosine = F.cosine_similarity(weights, _covariance(features).sum(dim=-1)).mean()
            rate = (1 - 10 / math.log2(max(self.channels, 2)) * cosine).clamp(0, 1)
            kept = torch.rand_like(weights) >= rate  # a tensor: the rate stays on the device
            scale = kept / (1 - rate).clamp(min=1e-6)
        return features * scale[..., None]


def _covariance(features: Tensor) -> Tensor:
    """(B, C, M) -> (B, C, C), in the precision of the features."""
    flat = centred(features, features.dtype)
    return flat @ flat.mT / flat.shape[-1]
