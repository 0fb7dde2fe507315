"""Backbones of the library transformers, with what `Backbone` needs of a timm model.

`transformers:FOLDER` names a folder in the layout of that library. A run keeps what it describes, see `without_folder`,
and needs no such folder later on.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL.Image import Resampling
from torch import Tensor, nn

from fgvc.errors import ConfigError, one_line
from fgvc.foreign import read_json_object
from fgvc.io import expanded
from fgvc.runs.config import BackboneConfig

PREFIX = "transformers:"
# labels, layers to return, and names of code and types, which are ours to choose; some name what lies on a hub
_IGNORED = {"id2label", "label2id", "out_features", "out_indices", "architectures", "auto_map", "transformers_version"}
_IGNORED |= {"torch_dtype", "dtype", "stage_names", "attn_implementation", "_attn_implementation"}


class _Maps(nn.Module):
    """A backbone of transformers behind the methods of a timm model."""

    def __init__(self, model: nn.Module, pretrained_cfg: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.pretrained_cfg = pretrained_cfg

    def prune_intermediate_layers(self, *_: int, **_timm: bool) -> None:
        """Nothing is left to remove: `build` asks for the last maps alone."""

    def forward_intermediates(self, images: Tensor, **_timm: Any) -> list[Tensor]:
        return list(self.model(images).feature_maps)


def checkpoint_filter_fn(state: Mapping[str, Tensor], model: _Maps) -> dict[str, Tensor]:
    """Give the tensors of a file the names that they have in `model`; `load_backbone_weights` calls it."""
    from transformers.utils import logging

    own: Any = model.model
    logging.set_verbosity_error()  # its report names what a head leaves over
    logging.disable_progress_bar()
    # the library renames tensors of files that it wrote itself, by rules that change with its versions
    loaded, info = type(own).from_pretrained(None, config=own.config, state_dict=dict(state), output_loading_info=True)
    filled = loaded.state_dict().keys() - info["missing_keys"]
    return {f"model.{key}": tensor for key, tensor in loaded.state_dict().items() if key in filled}


def without_folder(backbone: BackboneConfig) -> BackboneConfig:
    """Return the settings of a backbone; one that is named transformers:FOLDER, by what it is instead.

    Its name is then transformers:TYPE, its weights are those of the folder if `pretrained`, and its options describe
    the architecture: `config`, `mean`, `std` and `interpolation`. Options that were given replace the folder's.

    Raises:
        ConfigError: no such folder, its config.json or preprocessor_config.json is unreadable, or it has no weights.
    """
    if not backbone.name.startswith(PREFIX) or "config" in backbone.options:
        return backbone
    folder = expanded(backbone.name.removeprefix(PREFIX))
    try:
        config = {key: value for key, value in read_json_object(folder / "config.json").items() if key not in _IGNORED}
        kind = config.pop("model_type")
        given = folder / "preprocessor_config.json"
        looks = read_json_object(given) if given.exists() else {}
        options = {"config": config | backbone.options, "mean": looks.get("image_mean"), "std": looks.get("image_std")}
        options["interpolation"] = Resampling(looks.get("resample", Resampling.BICUBIC)).name.lower()
        for key, usual in (("do_normalize", True), ("do_rescale", True), ("rescale_factor", 1 / 255)):
            if looks.get(key, usual) != usual:
                raise ValueError(f"{given.name}: {key} is {looks[key]}, and only {usual} is known")
        for key in ("mean", "std"):
            if options[key] is not None and not _is_colour(options[key]):
                raise ValueError(f"{given.name}: image_{key} is {options[key]!r}, not three numbers")
        if "${" in json.dumps([kind, options]):
            raise ValueError("an interpolation, ${...}, which is refused")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"backbone.name={backbone.name}: {folder} is no folder of a model of transformers ({one_line(error)}); "
            "fetch one by hf download OWNER/NAME --local-dir FOLDER"
        ) from error
    weights = backbone.weights
    if backbone.pretrained and weights is None:
        weights = str(folder / "model.safetensors")
        if not Path(weights).is_file():
            raise ConfigError(f"backbone.name={backbone.name}: {weights} is missing, the only weights that are read")
    return replace(backbone, name=f"{PREFIX}{kind}", pretrained=False, weights=weights, options=options)


def _is_colour(value: object) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(number) in (int, float) for number in value)


def build(name: str, options: Mapping[str, Any], maps: int) -> nn.Module:
    """Build the architecture that `without_folder` describes, with random weights and the maps of its last layers.

    Raises:
        ConfigError: transformers is missing, or has no backbone of this type and these settings.
    """
    try:
        from transformers import AutoBackbone, AutoConfig  # of the extra fgvc[transformers]
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"backbone.name={name} needs the library transformers: pip install 'fgvc[transformers]'"
        ) from error
    kind = name.removeprefix(PREFIX)
    if kind == "timm_backbone":  # it would ask a hub
        raise ConfigError(f"backbone.name={name}: give timm's own name of the architecture")
    try:
        config = AutoConfig.for_model(kind, **{k: v for k, v in options["config"].items() if k not in _IGNORED})
        config.out_features = list(config.stage_names[-maps:])
        model = AutoBackbone.from_config(config)
        side = getattr(config, "image_size", None) or 224
        known = {key: options[key] for key in ("mean", "std", "interpolation") if options.get(key)}
    except Exception as error:  # the library raises many types for settings that do not fit
        raise ConfigError(
            f"backbone.name={name}: transformers cannot build this backbone: {one_line(error)}"
        ) from error
    return _Maps(model, {"input_size": (3, side, side), **known})
