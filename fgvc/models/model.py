"""A classifier: backbone, channel reduction, pooling, classifier."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fgvc.errors import ConfigError
from fgvc.models.backbone import Backbone, create_backbone
from fgvc.pooling import create_pooling, is_second_order


class PoolingHead(nn.Module):
    """Feature maps (B, in_channels, H, W) -> logits (B, num_classes).

    A second-order method is preceded by a 1x1 convolution to `reduction` channels with batch normalisation and ReLU, as
    in the papers; GAP, the first-order baseline, is not.

    Args:
        in_channels: channels of the feature map.
        method: one of `fgvc.pooling.list_poolings()`.
        num_classes: width of the logits.
        reduction: channels after the 1x1 convolution, None leaves it out.
        hidden: widths of fully connected layers with ReLU in front of the classifier's last one; none, the papers'
            choice for ResNets, makes the classifier linear. Their AlexNet has two of 4096.
        gradient: rule of the spectral layer, None means as published.
        eigh_device: where eigendecompositions run, see `fgvc.pooling.create_pooling`.
        spectral_dtype: precision of the covariance and all that is made of it, "float64" or "float32".
        options: of the pooling.

    Raises:
        ConfigError: unknown method, gradient or option; a width below 1.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        method: str,
        num_classes: int,
        reduction: int | None = 256,
        hidden: Sequence[int] = (),
        gradient: str | None = None,
        eigh_device: str = "auto",
        spectral_dtype: str = "float64",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ConfigError(f"num_classes must be at least 1, got {num_classes}")
        if any(width < 1 for width in hidden):
            raise ConfigError(f"method.hidden must hold widths of at least 1, got {list(hidden)}")
        if reduction is not None and reduction < 1:
            raise ConfigError(f"method.reduction must be at least 1 or null, got {reduction}")
        self.reduction: nn.Module = nn.Identity()
        channels = in_channels
        if reduction is not None and is_second_order(method):
            channels = reduction
            self.reduction = nn.Sequential(
                nn.Conv2d(in_channels, channels, kernel_size=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
            )
        self.pooling = create_pooling(
            method,
            channels=channels,
            gradient=gradient,
            eigh_device=eigh_device,
            dtype=spectral_dtype,
            **(options or {}),
        )
        self._hidden = tuple(hidden)
        self.classifier: nn.Module = self._new_classifier(num_classes)
        self.reset()

    def _new_classifier(self, num_classes: int) -> nn.Module:
        widths = (self.pooling.out_features, *self._hidden, num_classes)
        layers: list[nn.Module] = []
        for width, next_width in itertools.pairwise(widths):
            layers += [nn.Linear(width, next_width), nn.ReLU()]
        return nn.Sequential(*layers[:-1]) if self._hidden else layers[0]

    def reset(self, num_classes: int | None = None) -> None:
        """Initialise the parameters anew, for another number of classes if one is given."""
        if num_classes is not None:
            self.classifier = self._new_classifier(num_classes)
        for module in (*self.classifier.modules(), *self.reduction.modules()):
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear | nn.BatchNorm2d):
                module.reset_parameters()

    def pooling_input(self, features: Tensor) -> Tensor:
        """What the pooling reads: (B, in_channels, H, W) -> (B, pooling.channels, H, W)."""
        reduced: Tensor = self.reduction(features)
        return reduced

    def descriptor(self, features: Tensor) -> Tensor:
        """What the classifier reads: (B, in_channels, H, W) -> (B, pooling.out_features)."""
        pooled: Tensor = self.pooling(self.pooling_input(features))
        return pooled

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.descriptor(features))
        return logits


class FineGrainedModel(nn.Module):
    """Images (B, 3, H, W) -> logits (B, num_classes): a backbone's feature map through a pooling head."""

    def __init__(self, backbone: Backbone, head: PoolingHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def pooling_input(self, images: Tensor) -> Tensor:
        """What the pooling reads: (B, 3, H, W) -> (B, pooling.channels, h, w)."""
        return self.head.pooling_input(self.backbone(images))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.backbone(images))
        return logits


def create_model(
    name: str,
    *,
    method: str,
    num_classes: int,
    reduction: int | None = 256,
    hidden: Sequence[int] = (),
    gradient: str | None = None,
    eigh_device: str = "auto",
    spectral_dtype: str = "float64",
    pretrained: bool = False,
    weights: str | Path | None = None,
    last_stride: int | None = None,
    image_size: int | None = None,
    **options: Any,
) -> FineGrainedModel:
    """Build a model from any timm backbone and any pooling method.

    Args:
        name: timm name of the backbone.
        method: one of `fgvc.pooling.list_poolings()`.
        num_classes: width of the logits.
        reduction: channels in front of a second-order pooling, None for the backbone's own.
        hidden: widths of fully connected layers in front of the classifier's last one.
        gradient: rule of the spectral layer, None means as published.
        eigh_device: where eigendecompositions run, see `fgvc.pooling.create_pooling`.
        spectral_dtype: precision of the covariance and all that is made of it, "float64" or "float32".
        pretrained: load timm's weights from its hub.
        weights: load these into the backbone instead (.safetensors, .pth, package:NAME).
        last_stride: 1 removes the stride of a ResNet's last stage.
        image_size: pixels, for backbones that are built for one size (ViT, Swin); None means their own.
        options: of the pooling, e.g. `iterations=5` for isqrt_cov.

    Raises:
        ConfigError: unknown backbone, method or option, or a setting the backbone cannot take.
        WeightsError: weights that cannot be had, read or matched.
    """
    backbone = create_backbone(
        name, pretrained=pretrained, weights=weights, last_stride=last_stride, image_size=image_size
    )
    head = PoolingHead(
        backbone.out_channels,
        method=method,
        num_classes=num_classes,
        reduction=reduction,
        hidden=hidden,
        gradient=gradient,
        eigh_device=eigh_device,
        spectral_dtype=spectral_dtype,
        options=options,
    )
    return FineGrainedModel(backbone, head)
