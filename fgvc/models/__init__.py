"""Models: a timm backbone, a channel reduction, a pooling and a classifier."""

from fgvc.models.backbone import Backbone, create_backbone, fold_batch_norm, weights_digest
from fgvc.models.checkpoints import CheckpointReport, load_checkpoint
from fgvc.models.model import FineGrainedModel, PoolingHead, create_model
from fgvc.models.weights import WeightsReport, load_backbone_weights

__all__ = [
    "Backbone",
    "CheckpointReport",
    "FineGrainedModel",
    "PoolingHead",
    "WeightsReport",
    "create_backbone",
    "create_model",
    "fold_batch_norm",
    "load_backbone_weights",
    "load_checkpoint",
    "weights_digest",
]
