"""Low-rank adapters in the attention of a transformer [LoRA; Hu et al., ICLR 2022], by the library peft.

An adapted layer computes (W + B A) x with the frozen W (out, in), and trains A (rank, in) and B (out, rank), which
begins at 0.
"""

import torch
from torch import Tensor, nn

from fgvc.errors import ConfigError
from fgvc.models.backbone import Backbone


def add_adapters(backbone: Backbone, rank: int) -> None:
    """Add adapters to the linear layers of a backbone's attention; freeze all else in it.

    Raises:
        ConfigError: timm's attention of this backbone has no linear layers, it has no attention, or it has batch
            normalisation.
    """
    from peft import LoraConfig, inject_adapter_in_model  # of the extra fgvc[lora]

    modules = backbone.model.named_modules()
    names = [name for name, layer in modules if isinstance(layer, nn.Linear) and "attn" in name.split(".")]
    if not names:
        raise ConfigError(
            f"backbone.lora={rank} adapts the linear layers of attention, and {backbone.name} has none; set it to "
            "null, or choose a transformer, e.g. backbone.name=vit_small_patch16_224"
        )
    if any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in backbone.model.modules()):
        raise ConfigError(
            f"backbone.lora={rank} trains adapters alone, and the statistics of {backbone.name}'s batch normalisation "
            "would change with the images; set it to null, or choose a transformer without, e.g. vit_small_patch16_224"
        )
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), backbone.model)


@torch.no_grad()
def merged_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a module by name, not copied; an adapted layer has those of a plain one, W + B A."""
    weights = dict(module.state_dict())
    for name, layer in module.named_modules():
        if hasattr(layer, "get_delta_weight"):  # peft's
            own = {key: weights.pop(key) for key in list(weights) if key.startswith(f"{name}.")}
            plain = {key.replace(".base_layer.", "."): own[key] for key in own if ".base_layer." in key}
            weights |= plain | {f"{name}.weight": plain[f"{name}.weight"] + layer.get_delta_weight("default")}
    return weights
