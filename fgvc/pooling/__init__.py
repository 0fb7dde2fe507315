"""Pooling layers: local features (B, C, H, W) -> one descriptor per image (B, out_features)."""

import importlib
import pkgutil

from fgvc.pooling.averages import BilinearPooling, CompactBilinearPooling, GlobalAveragePooling
from fgvc.pooling.covariance import (
    CholeskyPooling,
    CovariancePooling,
    MatrixPooling,
    NewtonSchulzPooling,
    SparseInversePooling,
    SpectralPooling,
    pooling_spectrum,
    register_spectral_pooling,
)
from fgvc.pooling.registry import (
    Pooling,
    create_pooling,
    is_second_order,
    list_poolings,
    pooling_label,
    pooling_source,
    published_gradient,
    register_pooling,
)

__all__ = [
    "BilinearPooling",
    "CholeskyPooling",
    "CompactBilinearPooling",
    "CovariancePooling",
    "GlobalAveragePooling",
    "MatrixPooling",
    "NewtonSchulzPooling",
    "Pooling",
    "SparseInversePooling",
    "SpectralPooling",
    "create_pooling",
    "is_second_order",
    "list_poolings",
    "pooling_label",
    "pooling_source",
    "pooling_spectrum",
    "published_gradient",
    "register_pooling",
    "register_spectral_pooling",
]

for _module in pkgutil.iter_modules(__path__):  # a method in a file of its own needs no import here
    importlib.import_module(f"{__name__}.{_module.name}")
