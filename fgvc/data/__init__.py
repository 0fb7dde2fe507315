"""Datasets, transforms and cached feature maps."""

from fgvc.data.dataset import FeatureSet, ImageDataset, Samples, collate, fingerprint, split_validation
from fgvc.data.detect import find_layout
from fgvc.data.feature_cache import cached_features
from fgvc.data.folder import image_files
from fgvc.data.image_file import UnreadableImageError, copy_rgb, decode_rgb
from fgvc.data.prepare import prepare_dataset
from fgvc.data.registry import create_dataset, effective_options, list_datasets, read_splits, reads_validation
from fgvc.data.transforms import (
    VIEWS,
    TransformSpec,
    ViewTransform,
    boxes_in_view,
    normalization_from_timm,
    resized_spec,
)
from fgvc.data.verify import require_readable, verified_content

__all__ = [
    "VIEWS",
    "FeatureSet",
    "ImageDataset",
    "Samples",
    "TransformSpec",
    "UnreadableImageError",
    "ViewTransform",
    "boxes_in_view",
    "cached_features",
    "collate",
    "copy_rgb",
    "create_dataset",
    "decode_rgb",
    "effective_options",
    "find_layout",
    "fingerprint",
    "image_files",
    "list_datasets",
    "normalization_from_timm",
    "prepare_dataset",
    "read_splits",
    "reads_validation",
    "require_readable",
    "resized_spec",
    "split_validation",
    "verified_content",
]
