"""Pooling layers: local features (B, C, H, W) -> one descriptor per image (B, out_features); whitening layers."""

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
from fgvc.pooling.dropcov import DropCovPooling
from fgvc.pooling.projected import CrossCovariancePooling, HierarchicalBilinearPooling
from fgvc.pooling.registry import (
    Pooling,
    create_pooling,
    is_reduced,
    list_poolings,
    pooling_label,
    pooling_source,
    published_gradient,
    register_pooling,
)
from fgvc.pooling.whitening import ZCAWhitening2d, whiten_and_color

__all__ = [
    "BilinearPooling",
    "CholeskyPooling",
    "CompactBilinearPooling",
    "CovariancePooling",
    "CrossCovariancePooling",
    "DropCovPooling",
    "GlobalAveragePooling",
    "HierarchicalBilinearPooling",
    "MatrixPooling",
    "NewtonSchulzPooling",
    "Pooling",
    "SparseInversePooling",
    "SpectralPooling",
    "ZCAWhitening2d",
    "create_pooling",
    "is_reduced",
    "list_poolings",
    "pooling_label",
    "pooling_source",
    "pooling_spectrum",
    "published_gradient",
    "register_pooling",
    "register_spectral_pooling",
    "whiten_and_color",
]

for _module in pkgutil.iter_modules(__path__):  # a method in a file of its own needs no import here
    importlib.import_module(f"{__name__}.{_module.name}")
