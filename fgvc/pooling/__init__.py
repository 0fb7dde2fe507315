"""Pooling layers: local features (B, C, H, W) -> one descriptor per image (B, out_features)."""

from fgvc.pooling.layers import CovariancePooling, GlobalAveragePooling, Pooling, pooling_spectrum
from fgvc.pooling.registry import create_pooling, is_second_order, list_poolings, pooling_label

__all__ = [
    "CovariancePooling",
    "GlobalAveragePooling",
    "Pooling",
    "create_pooling",
    "is_second_order",
    "list_poolings",
    "pooling_label",
    "pooling_spectrum",
]
