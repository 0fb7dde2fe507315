"""A model as the Hugging Face hub has it: config.json and model.safetensors, in a folder or in a repository.

Both may come from a stranger: nothing else of the folder or repository is read, and config.json can name no file and no
weights to fetch.
"""

import json
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from omegaconf import MISSING, OmegaConf

from fgvc.errors import ConfigError, WeightsError, one_line
from fgvc.foreign import read_json_object
from fgvc.io import write_json_atomic
from fgvc.models.backbone import is_hosted
from fgvc.runs.config import BackboneConfig, DatasetConfig, MethodConfig, RunConfig, TransformConfig, check_config

CONFIG, WEIGHTS = "config.json", "model.safetensors"

_ADDRESS = re.compile(r"hf://(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?", re.ASCII)


@dataclass
class Architecture:
    """The backbone without its weights; the attributes are those of `fgvc.runs.config.BackboneConfig`."""

    name: str = MISSING
    last_stride: int | None = None
    maps: int = 1
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class FittedTemperature:
    """The calibration of the probabilities.

    Attributes:
        temperature: Divisor of the logits.
        split: Images it was fitted on, "validation" or "test".
        images: Number of those images.
    """

    temperature: float = MISSING
    split: str = MISSING
    images: int = MISSING


@dataclass
class ModelConfig:
    """Content of config.json: what is needed besides the weights to classify images.

    Attributes:
        backbone: Backbone.
        method: Pooling head.
        transform: Transform of images; normalisation comes from the backbone's data config in timm.
        classes: Names of the classes, in the order of the logits.
        calibration: Calibration of the probabilities; None where there is none.
        cut_to_box: Whether the images of the training were cut to the object's box.
        banner_removed: Whether the banner of FGVC-Aircraft was cut off.
    """

    backbone: Architecture = field(default_factory=Architecture)
    method: MethodConfig = field(default_factory=MethodConfig)
    transform: TransformConfig = field(default_factory=TransformConfig)
    classes: list[str] = MISSING
    calibration: FittedTemperature | None = None
    cut_to_box: bool = False
    banner_removed: bool = False


def is_published(source: str | Path) -> bool:
    """Whether `source` is an address on the hub, hf://OWNER/NAME, or a folder as the hub has it, and not of a run."""
    folder = Path(source)
    return str(source).startswith("hf://") or ((folder / CONFIG).is_file() and not (folder / "config.yaml").exists())


def find_file(source: str | Path, name: str, like: Path | None = None) -> Path:
    """Return the file `name` of a folder or, fetched into the hub's cache, of a repository.

    Args:
        source: a folder, or hf://OWNER/NAME, or hf://OWNER/NAME@REVISION for a branch, a tag or a commit.
        name: name of the file.
        like: a file that was found before; the result is of the same commit.

    Raises:
        WeightsError: there is no such file, it cannot be fetched, or it is a link out of the folder.
    """
    missing = f"{source} has no {name}"
    if name == WEIGHTS:
        missing += ", the only file of weights that is read (not e.g. pytorch_model.bin, which can hold code)"
    missing += "; such a folder is written by: fgvc export RUN --to hub"
    if not str(source).startswith("hf://"):
        file = Path(source) / name
        if not file.is_file():
            raise WeightsError(missing)
        if not file.resolve().is_relative_to(Path(source).resolve()):
            raise WeightsError(f"{file}: a link out of the folder, which is not followed; put what it names there")
        return file
    address = _ADDRESS.fullmatch(str(source))
    if address is None:
        raise WeightsError(f"{source} is no address on the hub; write hf://OWNER/NAME or hf://OWNER/NAME@REVISION")
    revision = address["revision"] if like is None else like.parent.name  # the cache has a folder for each commit
    try:
        return Path(hf_hub_download(address["name"], name, revision=revision))
    except Exception as error:  # the client raises many types, also of its HTTP library and the system
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise WeightsError(missing) from error
        reason = one_line(" ".join(str(error).split())) or type(error).__name__
        raise WeightsError(
            f"{source}: {name} could not be fetched ({reason}); check the name and the network, and for a private "
            "repository log in: hf auth login"
        ) from error


def read_model_config(file: Path) -> ModelConfig:
    """Return the content of a config.json.

    Raises:
        WeightsError: it is unreadable, has an unknown key, lacks one, or has a value of the wrong type or out of range.
    """
    try:
        settings = read_json_object(file)
        if lacking := [known.name for known in fields(ModelConfig) if known.name not in settings]:
            raise ValueError(f"no {', '.join(lacking)}")
        classes = settings.pop("classes")  # names as they are, also one with ${
        if not (isinstance(classes, list) and all(isinstance(name, str) and name for name in classes)):
            raise ValueError("classes are no list of names")
        if len(set(classes)) < len(classes):
            raise ValueError("two classes have one name")
        if "${" in json.dumps(settings, ensure_ascii=False):  # OmegaConf would put variables of the system there
            raise ValueError("an interpolation, ${...}, which is refused")
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), settings, {"classes": []}))
        assert isinstance(config, ModelConfig)
        config.classes = classes
        _check(config)
    except Exception as error:  # omegaconf raises many types; all mean that the file is not usable
        reason = one_line(" ".join(str(error).split()))
        raise WeightsError(
            f"{file} does not describe a model of this version of fgvc: {reason}; export the run again"
        ) from error
    return config


def _check(config: ModelConfig) -> None:
    """Raise ConfigError as `check_config`, and for what a run's settings cannot ask for or do not have."""
    backbone = BackboneConfig(**asdict(config.backbone))
    data = DatasetConfig("hub", root="", transform=config.transform)
    check_config(RunConfig("hub", dataset=data, backbone=backbone, method=config.method))
    if is_hosted(config.backbone.name):
        raise ConfigError(f"backbone.name={config.backbone.name} is looked up on a hub or in a folder")
    calibration = config.calibration
    if calibration is not None:
        if not 0.01 <= calibration.temperature <= 100:  # far outside the range that is searched
            raise ConfigError(f"calibration.temperature must be from 0.01 to 100, got {calibration.temperature}")
        if calibration.split not in ("validation", "test") or calibration.images < 1:
            raise ConfigError(
                f"calibration is on {calibration.images} {calibration.split} images, must be on "
                "1 or more validation or test images"
            )


def write_model_config(file: Path, config: ModelConfig) -> None:
    """Write a config.json, completely or not at all. Raises ConfigError: a value has no place in JSON."""
    try:
        write_json_atomic(file, asdict(config))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{file} cannot hold the settings of this model: {error}; give plain values") from error
