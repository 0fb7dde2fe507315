"""The whole model: backbone, channel reduction, pooling, classifier."""

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file
from torch import Tensor, nn

from fgvc.errors import ConfigError, RunError, WeightsError
from fgvc.io import atomic_path
from fgvc.models.backbone import Backbone, create_backbone
from fgvc.models.files import listed, not_floating, read_finite
from fgvc.models.hub import (
    CONFIG,
    WEIGHTS,
    Architecture,
    ModelConfig,
    find_file,
    read_model_config,
    write_model_config,
)
from fgvc.pooling import create_pooling, is_reduced
from fgvc.runs.config import MethodConfig, TransformConfig


class PoolingHead(nn.Module):
    """Feature maps (B, in_channels, H, W) -> logits (B, num_classes).

    As in the papers, a 1x1 convolution to `reduction` channels with batch normalisation and ReLU comes before a
    second-order method, but not before GAP and methods with projections of their own (`fgvc.pooling.is_reduced`).

    Attributes:
        token_classifier: Linear classifier of class tokens; None without `class_token`.

    Args:
        in_channels: Number of channels of the feature map.
        method: Name of the pooling, one of `fgvc.pooling.list_poolings()`.
        num_classes: Width of the logits.
        reduction: Number of channels after the 1x1 convolution; None leaves it out.
        hidden: Widths of fully connected layers with ReLU before the classifier's last layer. Without them the
            classifier is linear, as in the papers' ResNets; their AlexNet has two of 4096.
        gradient: Gradient rule of the pooling; None means as published.
        eigh_device: Device of the eigendecompositions, see `fgvc.pooling.create_pooling`.
        solver: Way to compute the pooling, see there.
        spectral_dtype: Precision of the covariance and everything computed from it, "float64" or "float32".
        options: Options of the pooling.
        map_channels: Number of channels of each layer's map, where there are several (`Backbone.map_channels`).
        class_token: Whether the logits of a linear classifier of the backbone's class token are added [So-ViT; Xie,
            Zeng, Wang, Zhou, Li, 2021]. `forward` then needs class tokens (B, width of the last layer).

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
        solver: str = "eigh",
        spectral_dtype: str = "float64",
        options: Mapping[str, Any] | None = None,
        map_channels: Sequence[int] = (),
        class_token: bool = False,
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
        if reduction is not None and is_reduced(method):
            channels = reduction
            self.reduction = nn.Sequential(
                nn.Conv2d(in_channels, channels, kernel_size=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
            )
        self.pooling = create_pooling(
            method,
            channels=channels,
            map_channels=map_channels,
            gradient=gradient,
            eigh_device=eigh_device,
            solver=solver,
            dtype=spectral_dtype,
            **(options or {}),
        )
        self._hidden = tuple(hidden)
        self._token_channels = [in_channels, *map_channels][-1] if class_token else None  # that of the last layer
        self.classifier: nn.Module
        self.token_classifier: nn.Module | None = None
        self.reset(num_classes)

    def reset(self, num_classes: int | None = None) -> None:
        """Initialise all parameters; with `num_classes`, first build the classifier for that number of classes."""
        if num_classes is not None:
            widths = (self.pooling.out_features, *self._hidden, num_classes)
            layers: list[nn.Module] = []
            for width, next_width in itertools.pairwise(widths):
                layers += [nn.Linear(width, next_width), nn.ReLU()]
            self.classifier = nn.Sequential(*layers[:-1]) if self._hidden else layers[0]
            if self._token_channels is not None:
                self.token_classifier = nn.Linear(self._token_channels, num_classes)
        token = [] if self.token_classifier is None else [self.token_classifier]
        for part in (self.classifier, self.reduction, self.pooling, *token):
            for module in part.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                elif reset := getattr(module, "reset_parameters", None):
                    reset()

    def pooling_input(self, features: Tensor) -> Tensor:
        """Return the input of the pooling: (B, in_channels, H, W) -> (B, pooling.channels, H, W)."""
        reduced: Tensor = self.reduction(features)
        return reduced

    def descriptor(self, features: Tensor) -> Tensor:
        """Return the input of the classifier: (B, in_channels, H, W) -> (B, pooling.out_features)."""
        pooled: Tensor = self.pooling(self.pooling_input(features))
        return pooled

    def classify(self, descriptor: Tensor, token: Tensor | None = None) -> Tensor:
        """Return the logits of descriptors (B, out_features) and, if the head reads them, class tokens.

        Raises:
            RunError: the head reads class tokens, and there are none: only a map was computed.
        """
        logits: Tensor = self.classifier(descriptor)
        if self.token_classifier is None:
            return logits
        if token is None:
            raise RunError("the head reads the class token too (method.class_token=true), which no feature map holds")
        fused: Tensor = logits + self.token_classifier(token)
        return fused

    def forward(self, features: Tensor, token: Tensor | None = None) -> Tensor:
        return self.classify(self.descriptor(features), token)


class FineGrainedModel(nn.Module):
    """A backbone and a pooling head: images (B, 3, H, W) -> logits (B, num_classes).

    Attributes:
        config: What builds the model again, with classes and transform, for `save_pretrained`; None unless
            `create_model` or `from_pretrained` made the model.

    Raises:
        ConfigError: the head reads a class token, and the backbone has none.
    """

    config: ModelConfig | None = None

    def __init__(self, backbone: Backbone, head: PoolingHead) -> None:
        super().__init__()
        if head.token_classifier is not None and not backbone.has_class_token:
            raise ConfigError(
                f"method.class_token=true needs a backbone with a class token, i.e. a transformer, and {backbone.name} "
                "has none; set it to false, or choose e.g. backbone.name=vit_small_patch16_224"
            )
        self.backbone = backbone
        self.head = head

    def pooling_input(self, images: Tensor) -> Tensor:
        """Return the input of the pooling: (B, 3, H, W) -> (B, pooling.channels, h, w)."""
        return self.head.pooling_input(self.backbone(images))

    def descriptor(self, images: Tensor) -> Tensor:
        """Return the input of the classifier: (B, 3, H, W) -> (B, pooling.out_features)."""
        return self.head.descriptor(self.backbone(images))

    def forward(self, images: Tensor) -> Tensor:
        reads_token = self.head.token_classifier is not None
        logits: Tensor = self.head(
            *(self.backbone.with_class_token(images) if reads_token else (self.backbone(images),))
        )
        return logits

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, as the Hugging Face hub has them, into a folder.

        Raises:
            ConfigError: the model has no `config` or another number of classes, or the folder holds one of the files.
        """
        if self.config is None:
            raise ConfigError(
                "only a model of create_model or from_pretrained can be saved so; of a run: fgvc export RUN --to hub"
            )
        outputs = list(self.head.classifier.parameters())[-1].shape[0]
        if len(self.config.classes) != outputs:
            raise ConfigError(f"config.classes has {len(self.config.classes)} names for {outputs} classes; set them")
        config_file, weights_file = Path(folder) / CONFIG, Path(folder) / WEIGHTS
        if found := [str(file) for file in (config_file, weights_file) if os.path.lexists(file)]:
            raise ConfigError(f"{found[0]} exists and is not replaced; give another folder, or delete it")
        write_model_config(config_file, self.config)
        try:
            with atomic_path(weights_file) as temporary:
                tensors = {name: tensor.contiguous().cpu() for name, tensor in self.state_dict().items()}
                save_file(tensors, temporary, metadata={"format": "pt"})
        except BaseException:
            config_file.unlink()  # both files, or none
            raise

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "FineGrainedModel":
        """Load a model that `save_pretrained` or `fgvc export --to hub` has written, in evaluation mode on the CPU.

        Only config.json and model.safetensors are read. Both may come from a stranger: no code of theirs is executed.

        Args:
            source: a folder; or OWNER/NAME or hf://OWNER/NAME on the hub, with @REVISION for a branch, a tag or a
                commit.

        Raises:
            WeightsError: a file is missing, cannot be fetched, is damaged or does not fit the other; config.json has an
                unknown key or an impossible value; the weights hold NaN or infinity.
        """
        if not str(source).startswith("hf://") and not Path(source).is_dir():
            source = f"hf://{source}"
        config_file = find_file(source, CONFIG)
        config = read_model_config(config_file)
        file = find_file(source, WEIGHTS, like=config_file)
        try:
            state = read_finite(file)
        except WeightsError as error:
            raise WeightsError(f"{error}; fetch it again") from error
        shapes = {tuple(tensor.shape) for tensor in state.values()}
        try:
            backbone = create_backbone(**asdict(config.backbone), image_size=config.transform.size)
            for shape in head_shapes(config.method, backbone.map_channels, len(config.classes)):
                if shape not in shapes:  # before it takes memory
                    raise WeightsError(
                        f"{file} has no layer of shape {shape}, which {config_file} asks for with "
                        f"{len(config.classes)} classes and method {config.method.name}; fetch both again"
                    )
            model = cls(backbone, create_head(backbone, config.method, len(config.classes)))
            if wrong := not_floating(state, model.state_dict()):
                raise WeightsError(f"{file} is damaged: no floating numbers{listed(wrong)}; fetch it again")
            model.load_state_dict(state)
        except ConfigError as error:
            raise WeightsError(f"{config_file} does not describe a model of this version of fgvc: {error}") from error
        except WeightsError:
            raise
        except Exception as error:  # of timm and torch for values that nobody gives, or other weights
            reason = " ".join(str(error).split())
            raise WeightsError(f"{file} does not fit {config_file}: {reason}; fetch both again") from error
        model.config = config
        return model.eval()

    def push_to_hub(self, name: str, *, private: bool | None = None) -> str:
        """Upload what `save_pretrained` writes to the repository OWNER/NAME on the hub; it is made if it is missing.

        Args:
            name: OWNER/NAME; the account is that of `hf auth login`.
            private: whether a new repository is private; None takes the account's default.

        Returns:
            The address of the commit.

        Raises:
            ConfigError: the model has no `config`.
            Exception: as `huggingface_hub.HfApi` raises it.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            hub = HfApi()
            hub.create_repo(name, private=private, exist_ok=True)
            return str(hub.upload_folder(repo_id=name, folder_path=folder))


def create_model(
    name: str,
    *,
    method: str,
    num_classes: int,
    reduction: int | None = 256,
    hidden: Sequence[int] = (),
    gradient: str | None = None,
    eigh_device: str = "auto",
    solver: str = "eigh",
    spectral_dtype: str = "float64",
    class_token: bool = False,
    pretrained: bool = False,
    weights: str | Path | None = None,
    last_stride: int | None = None,
    maps: int = 1,
    image_size: int | None = None,
    backbone_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> FineGrainedModel:
    """Build a model from any timm backbone and any pooling method.

    Args:
        name: Name of the backbone in timm.
        method, num_classes, hidden, gradient, eigh_device, solver, spectral_dtype, class_token: As in `PoolingHead`.
        reduction: Number of channels in front of the pooling, see `PoolingHead`; None keeps the backbone's.
        pretrained, weights, last_stride, maps, image_size: As in `create_backbone`.
        backbone_options: Its `options`.
        options: Options of the pooling, e.g. `iterations=5` for isqrt_cov.

    Raises:
        ConfigError: unknown backbone, method or option, or a setting that does not fit the backbone.
        WeightsError: weights that cannot be downloaded, found, read or matched.
    """
    architecture = Architecture(name, last_stride, maps, dict(backbone_options or {}))
    backbone = create_backbone(**asdict(architecture), pretrained=pretrained, weights=weights, image_size=image_size)
    method_config = MethodConfig(
        name=method,
        gradient=gradient,
        reduction=reduction,
        hidden=list(hidden),
        eigh_device=eigh_device,
        solver=solver,
        spectral_dtype=spectral_dtype,
        options=options,
        class_token=class_token,
    )
    model = FineGrainedModel(backbone, create_head(backbone, method_config, num_classes))
    transform = TransformConfig(size=backbone.data_config["input_size"][-1])
    model.config = ModelConfig(architecture, method_config, transform, [str(number) for number in range(num_classes)])
    return model


def create_head(backbone: Backbone, method: MethodConfig, num_classes: int) -> PoolingHead:
    """Build a head for the maps of `backbone`. Raises ConfigError as `PoolingHead`."""
    return PoolingHead(
        backbone.out_channels,
        method=method.name,
        num_classes=num_classes,
        reduction=method.reduction,
        hidden=method.hidden,
        gradient=method.gradient,
        eigh_device=method.eigh_device,
        solver=method.solver,
        spectral_dtype=method.spectral_dtype,
        options=method.options,
        map_channels=backbone.map_channels,
        class_token=method.class_token,
    )


def head_shapes(method: MethodConfig, map_channels: Sequence[int], num_classes: int) -> Iterator[tuple[int, ...]]:
    """Shapes of the weights that a head has, without making them. Raises ConfigError as `create_pooling`."""
    channels = in_channels = sum(map_channels)
    if is_reduced(method.name) and method.reduction is not None:
        channels = method.reduction
        yield (channels, in_channels, 1, 1)
    with torch.device("meta"):
        pooling = create_pooling(method.name, channels=channels, map_channels=map_channels, **method.options)
    yield from (tuple(parameter.shape) for parameter in pooling.parameters())
    for width, next_width in itertools.pairwise((pooling.out_features, *method.hidden, num_classes)):
        yield (next_width, width)
