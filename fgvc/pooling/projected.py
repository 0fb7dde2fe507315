"""Poolings with projections of their own in place of the head's reduction: HBP and MGCrP.

Shapes: B images, C channels, M = H * W locations. Both compute in float32 (float64 for float64 input), products with
autocast off.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fgvc.pooling.averages import signed_root
from fgvc.pooling.registry import Pooling, register_pooling, whole_number
from fgvc.spectral.covariance import centred
from fgvc.spectral.precision import result_dtype, without_autocast


@register_pooling("hbp", "HBP", source="Yu, Zhao, Zheng, Zhang, You, ECCV 2018", reduced=False)
class HierarchicalBilinearPooling(Pooling):
    """Products of several layers: (B, C, H, W) -> (B, pairs x width), each pair with l2 norm 1.

    The input holds the maps of several layers, one after another along its channels (`backbone.maps`). Each map has a
    projection to `width` channels; each pair of projected maps is multiplied entry by entry, averaged over the
    locations, and goes through the signed square root and l2 normalisation. Of one map alone, two projections are
    multiplied: the paper's factorized bilinear pooling.

    Args:
        channels: C, all maps together.
        map_channels: Channels of each map, in their order; the sum is C. Empty means one map.
        width: Number of channels of each projection. The paper has 8192.

    Raises:
        ConfigError: the maps have another number of channels together, or an argument is no whole number above 0.
    """

    def __init__(self, channels: int, map_channels: Sequence[int] = (), width: int = 8192) -> None:
        maps = list(map_channels) or [channels]
        if sum(maps) != channels:
            raise ValueError(f"map_channels {maps} sum up to {sum(maps)}, but the input has {channels} channels")
        self._maps = maps if len(maps) > 1 else 2 * maps
        self._pairs = list(itertools.combinations(range(len(self._maps)), 2))
        super().__init__(channels, len(self._pairs) * whole_number("width", width, at_least=1))
        self._shared = len(maps) == 1
        self.projections = nn.ModuleList(nn.Conv1d(size, width, kernel_size=1) for size in self._maps)

    def pool(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            features = x.flatten(2).to(result_dtype(x))
            maps = [features, features] if self._shared else torch.split(features, self._maps, dim=1)
            projected = [_project(part, layer) for part, layer in zip(maps, self.projections, strict=True)]
            products = ((projected[i] * projected[j]).mean(dim=-1) for i, j in self._pairs)
            return torch.cat([signed_root(product) for product in products], dim=1)


@register_pooling("mgcrp", "MGCrP", source="Xie, Zeng, Wang, Zhou, Li, 2021", reduced=False)
class CrossCovariancePooling(Pooling):
    """Cross-covariances of several heads, singular values to a power: (B, C, H, W) -> (B, heads x width^2).

    Each head has two projections of the features; A is the width x width covariance between them. The largest singular
    value s of A and its vectors u, v come from power iteration from a learned start. s u v^T becomes s^alpha u v^T, and
    the rest of A is divided by s^(1 - alpha) + 1e-5. The gradient goes through the iterations. As released, and with
    `method.class_token` the head of So-ViT; the initial weights are those of torch's layers.

    Args:
        channels: C.
        heads: Number of heads.
        width: Number of channels of each projection.
        iterations: Number of power iterations, at most 1000.
        alpha: Power of the largest singular value, above 0 and at most 1.

    Raises:
        ConfigError: an argument is no whole number above 0, or alpha is out of range.
    """

    def __init__(self, channels: int, heads: int = 6, width: int = 24, iterations: int = 1, alpha: float = 0.5) -> None:
        self.heads = whole_number("heads", heads, at_least=1)
        self.width = whole_number("width", width, at_least=1)
        super().__init__(channels, heads * width * width)
        self.iterations = whole_number("iterations", iterations, at_least=1, below=1001)
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha must be above 0 and at most 1, got {alpha}")
        self.alpha = alpha
        self.projection = nn.Conv1d(channels, 2 * heads * width, kernel_size=1, bias=False)
        self.start = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the start of the power iteration; the projection is a layer of its own."""
        nn.init.normal_(self.start)

    def pool(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            features = x.flatten(2).to(result_dtype(x))
            projected = centred(_project(features, self.projection), features.dtype)
            sides = projected.reshape(-1, 2, self.heads, self.width, features.shape[-1])
            left, right = sides.unbind(1)  # (B, heads, width, M) each
            return self._normalised(left @ right.mT / features.shape[-1]).flatten(1)

    def _normalised(self, cross: Tensor) -> Tensor:
        """(B, heads, width, width) -> the same shape"""
        v = self.start.to(cross).expand(*cross.shape[:2], -1).unsqueeze(-1)
        for _ in range(self.iterations):
            u = F.normalize(cross @ v, dim=-2)
            v = F.normalize(cross.mT @ u, dim=-2)
        value, direction = u.mT @ cross @ v, u @ v.mT
        value = value.clamp(min=torch.finfo(value.dtype).tiny)  # the root has no derivative at 0
        return value**self.alpha * direction + (cross - value * direction) / (value ** (1 - self.alpha) + 1e-5)


def _project(features: Tensor, layer: nn.Module) -> Tensor:
    """A layer's 1x1 convolution in the precision of the features: (B, C, M) -> (B, width, M)."""
    assert isinstance(layer, nn.Conv1d)
    bias = None if layer.bias is None else layer.bias.to(features)
    return F.conv1d(features, layer.weight.to(features), bias)
