"""Folding batch normalisation into the convolutions before it: the same features, computed faster."""

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

M = TypeVar("M", bound=nn.Module)

_TOLERANCE = 1e-4  # relative difference on a random image; float32 rounding in a deep network stays well below


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
