"""From the command line to runs: Hydra composes the configuration; a mistake in it becomes one readable message."""

import dataclasses
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from fgvc.errors import ConfigError, UserError
from fgvc.pooling import list_poolings
from fgvc.runs.config import RunConfig, to_run_config

_log = logging.getLogger(__name__)

PATHS = (
    "dataset.root",
    "dataset.options.path",
    "backbone.weights",
    "initial_weights",
    "run_dir",
    "resume",
    "cache.dir",
)
"""Settings that hold a path, or a name that is a word."""


def hydra_main(config_dir: Path, task: Callable[[RunConfig], None], *, flags: Sequence[str] = ()) -> None:
    """Compose `train.yaml` in `config_dir` with the overrides of the command line and run the task.

    With -m the task runs for each combination of the comma-separated values, one after the other. A failure does not
    stop the others; its error is raised at the end. `flags` are the script's own arguments, hidden from Hydra.

    Raises:
        ConfigError: an unknown key, group or value (the valid ones are listed), a wrong type, or a key left unset.
    """
    # with several processes, the other ones log warnings only
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    register_choices()
    own = ("--debug", *flags)  # for --debug see fgvc.cli
    sweep = bool({"-m", "--multirun"} & set(sys.argv))
    sys.argv = [quoted(argument, sweep=sweep) for argument in sys.argv if argument not in own]
    # otherwise Hydra prints the error itself and exits with 1; our message and exit status need the exception
    os.environ["HYDRA_FULL_ERROR"] = "1"

    def job(composed: DictConfig) -> None:
        try:
            task(to_run_config(composed))
        except UserError as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN:  # Hydra raises only the first error of a sweep, at its end
                _log.error("failed: %s: %s", " ".join(HydraConfig.get().overrides.task), error)
            raise

    try:
        hydra.main(version_base="1.3", config_path=str(config_dir.resolve()), config_name="train")(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error)) from error


def quoted(argument: str, *, sweep: bool) -> str:
    """The argument, where it is a path in the quotes of Hydra's grammar, which knows no = or ö; commas part a sweep."""
    found = re.fullmatch(rf"(\+{{0,2}}(?:{'|'.join(map(re.escape, PATHS))})=)(.*)", argument, re.DOTALL)
    if found is None:
        return argument
    paths = found[2].split(",") if sweep else [found[2]]
    return found[1] + ",".join(map(_quoted_path, paths))


def _quoted_path(path: str) -> str:
    plain = re.fullmatch(r"([a-z./][\w./:-]*)?", path, re.ASCII | re.I) and path not in ("true", "false", "nan", "inf")
    if plain or (path[:1] in "'\"" and path[-1:] == path[:1]):
        return path
    escaped = re.sub(r"(\\*)('|$)", lambda end: 2 * end[1] + ("\\'" if end[2] else ""), path)
    return f"'{escaped}'"


def register_choices() -> None:
    """Register with Hydra what is not in configs/: the schema, which refuses unknown keys, and `method=NAME`."""
    store = ConfigStore.instance()
    store.store(name="schema", node=RunConfig)
    for name in list_poolings():
        store.store(group="method", name=name, node={"name": name})


def _explain(error: Exception) -> str:
    """Return Hydra's message, with the valid keys if a key is unknown."""
    if isinstance(error, OverrideParseException):
        key, _, value = error.override.partition("=")
        return f"{error.override}: not in Hydra's grammar; put the value in quotes of its own: \"{key}='{value}'\""
    lines = [line for line in str(error).splitlines() if line.strip()]
    cause: Any = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if cause is not None and cause is not error:
        lines += [line for line in str(cause).splitlines() if line.strip() and line not in lines]
    owner = getattr(cause, "object_type", None)
    if isinstance(owner, type) and dataclasses.is_dataclass(owner) and getattr(cause, "key", None) is not None:
        names = [field.name for field in dataclasses.fields(owner)]
        if cause.key not in names:
            lines.append(f"valid keys there: {', '.join(names)}")
            # Hydra's advice to use +key does not help: the schema refuses unknown keys
            lines = [line for line in lines if "To append to your config" not in line]
    return "\n  ".join(lines)
