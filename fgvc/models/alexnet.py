"""AlexNet, which the papers train from scratch on ImageNet; timm lacks it, so it is added to timm's registry.

`alexnet` is torchvision's (Krizhevsky, "One weird trick for parallelizing convolutional neural networks", 2014) and
takes its published weights. `alexnet_bn` has batch normalisation after each convolution, as in the released code of
Song, Sebe, Wang (ICCV 2021). As there, both end before the last max-pooling: 256 channels, 13 x 13 at 224 pixels.

Shapes: B images, H x W pixels, h x w the map's grid.
"""

from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from fgvc.models.files import State

# channels, kernel, stride and padding of each convolution, and whether a max-pooling follows
_LAYERS = (
    (64, 11, 4, 2, True),
    (192, 5, 1, 2, True),
    (384, 3, 1, 1, False),
    (256, 3, 1, 1, False),
    (256, 3, 1, 1, False),
)


class AlexNet(nn.Module):
    """The convolutions of AlexNet with timm's interface for feature extraction: (B, 3, H, W) -> (B, 256, h, w).

    Args:
        batch_norm: whether to add batch normalisation after each convolution.
        in_chans: number of channels of the images.
        num_classes: ignored, since there is no classifier.
    """

    def __init__(self, *, batch_norm: bool = False, in_chans: int = 3, num_classes: int = 0) -> None:
        super().__init__()
        del num_classes
        self.num_classes, self.num_features = 0, _LAYERS[-1][0]
        layers: list[nn.Module] = []
        for channels, kernel, stride, padding, pooled in _LAYERS:
            layers.append(nn.Conv2d(in_chans, channels, kernel, stride, padding))
            layers += [nn.BatchNorm2d(channels)] if batch_norm else []
            layers.append(nn.ReLU(inplace=True))
            layers += [nn.MaxPool2d(3, 2)] if pooled else []
            in_chans = channels
        self.features = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        maps: Tensor = self.features(x)
        return maps

    def forward_intermediates(self, x: Tensor, **_: Any) -> list[Tensor]:
        """Return the only feature map, for any requested layers."""
        return [self(x)]

    def prune_intermediate_layers(self, *_: Any, **__: Any) -> list[int]:
        """Do nothing, since no layer follows the map."""
        return [0]


def checkpoint_filter_fn(state: State, model: nn.Module) -> State:
    """Return torchvision's state dict without its classifier."""
    del model
    return {name: tensor for name, tensor in state.items() if name.startswith("features.")}


_CFG: dict[str, Any] = {
    "input_size": (3, 224, 224),
    "pool_size": None,
    "crop_pct": 0.875,
    "interpolation": "bilinear",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "features.0",
    "classifier": None,
    "num_classes": 0,
}
default_cfgs = generate_default_cfgs(
    {
        "alexnet.tv_in1k": {**_CFG, "url": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"},
        "alexnet_bn": _CFG,
    }
)


@register_model
def alexnet(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build torchvision's AlexNet up to its last convolution."""
    return _build("alexnet", pretrained, **kwargs)


@register_model
def alexnet_bn(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build `alexnet` with batch normalisation; there are no separately published weights."""
    return _build("alexnet_bn", pretrained, batch_norm=True, **kwargs)


def _build(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return build_model_with_cfg(AlexNet, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)
