"""Pooling layers: local features (B, C, H, W) -> one descriptor per image (B, out_features)."""

from fgvc.pooling.bilinear import BilinearPooling, CompactBilinearPooling
from fgvc.pooling.layers import (
    CovariancePooling,
    GlobalAveragePooling,
    NewtonSchulzPooling,
    Pooling,
    SpectralPooling,
    pooling_spectrum,
)
from fgvc.pooling.registry import create_pooling, is_second_order, list_poolings, pooling_label, published_gradient

__all__ = [
    "BilinearPooling",
    "CompactBilinearPooling",
    "CovariancePooling",
    "GlobalAveragePooling",
    "NewtonSchulzPooling",
    "Pooling",
    "SpectralPooling",
    "create_pooling",
    "is_second_order",
    "list_poolings",
    "pooling_label",
    "pooling_spectrum",
    "published_gradient",
]
