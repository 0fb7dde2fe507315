"""The folder of a run: who may write to it, and what each of its files is."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor

from fgvc.csv_text import to_csv
from fgvc.errors import RunError
from fgvc.files import atomic_path, locked, write_json_atomic, write_text_atomic
from fgvc.nested import flatten
from fgvc.reading import read_json_object, read_plain_yaml
from fgvc.training.config import RunConfig
from fgvc.training.states import StateStore

_log = logging.getLogger(__name__)

# these say how a run is carried out, not what it computes: they may differ when it is continued
_CARRIED_OUT_BY = (
    *("run_dir", "resume", "method.eigh_device", "cache.dir", "cache.max_gb"),
    *("trainer.workers", "trainer.tracker", "trainer.probe_images"),
    *("trainer.save_minutes", "trainer.save_steps", "trainer.on_non_finite", "trainer.max_skips"),
    *("trainer.on_divergence", "trainer.divergence_factor", "trainer.divergence_window"),
)


class RunFolder:
    """Paths of a run's files and the reading and writing of them; every file is written whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.summary_file = path / "summary.json"
        self.metrics_file = path / "metrics.csv"
        self.predictions_file = path / "predictions.csv"
        self.spectrum_file = path / "spectrum.npz"
        self.spectrum_history_file = path / "spectrum_history.npz"
        self.lock_file = path / ".lock"
        self.states = StateStore(path / "checkpoints")

    def weights_file(self, which: str) -> Path:
        """File of the "best" or "last" weights."""
        return self.path / "checkpoints" / f"{which}.safetensors"

    def claimable(self, config: RunConfig) -> bool:
        """Whether an unfinished run of this configuration is there to be continued; changes nothing.

        Raises:
            RunError: the folder holds a run and `resume` is "never", or one of another configuration.
        """
        if not self.config_file.is_file():
            return False
        if config.resume == "never":
            raise RunError(
                f"{self.path} holds a run already and resume=never; delete the folder, give another run_dir=, "
                "or continue it with resume=auto"
            )
        self._require_same(config)
        if not self.states.exists() and (old := self.path / "checkpoints" / "state.pt").is_file():
            raise RunError(f"{old} is the state of an earlier version, which cannot be continued; delete {self.path}")
        return self.states.exists()

    def require_state(self, config: RunConfig) -> None:
        """Raise RunError unless a state of the same configuration is here to continue from (`resume=PATH`)."""
        self._require_same(config)
        if not self.states.exists():
            raise RunError(f"{self.states.folder} holds no state: the run in {self.path} has saved none yet")

    def _require_same(self, config: RunConfig) -> None:
        differences = _differences(self.read_config(), config)
        if differences:
            raise RunError(
                f"{self.path} holds a run of another configuration: {'; '.join(differences)}; "
                "give another run_dir= or delete the folder"
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only one who writes here while the block runs. Raises RunError where another process is."""
        created = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with locked(self.lock_file) as free:
                if not free:
                    raise RunError(f"{self.path}: another process is training in this folder; wait, or give run_dir=")
                self._remove_leftovers()
                yield
        finally:
            if created and not any(self.path.iterdir()):
                self.path.rmdir()

    def _remove_leftovers(self) -> None:
        """Delete the temporary files of a process that was killed while it wrote."""
        for folder in (self.path, self.states.folder, self.path / "replay"):
            for file in folder.glob(".*.tmp*"):
                file.unlink(missing_ok=True)

    def begin(self, config: RunConfig, summary: dict[str, Any]) -> None:
        """Write the configuration and a first summary: from here on the folder belongs to this run.

        The summary stays if the process is killed.
        """
        write_text_atomic(self.config_file, OmegaConf.to_yaml(OmegaConf.structured(config)))
        self.write_summary(summary)

    def read_config(self) -> RunConfig:
        """The run's configuration.

        Raises:
            RunError: config.yaml is missing, is not YAML, or has keys this version does not know.
        """
        if not self.config_file.is_file():
            raise RunError(f"{self.path} is not a run folder: it has no config.yaml; name the folder of one run")
        try:
            loaded = OmegaConf.create(read_plain_yaml(self.config_file))
            merged = OmegaConf.merge(OmegaConf.structured(RunConfig), loaded)
            config = OmegaConf.to_object(merged)
        except Exception as error:  # omegaconf and yaml raise many kinds; all mean that this file is not usable
            raise RunError(f"{self.config_file} is not a readable configuration: {error}") from error
        assert isinstance(config, RunConfig)
        return config

    def is_finished(self) -> bool:
        """Whether summary.json says that the run is finished; a damaged one, of which there is a warning, does not."""
        try:
            return self.summary_file.is_file() and self.read_summary().get("status") == "finished"
        except RunError as error:
            _log.warning("%s; the run counts as unfinished", error)
            return False

    def read_summary(self) -> dict[str, Any]:
        """The run's summary. Raises RunError where it is missing or not JSON."""
        try:
            return read_json_object(self.summary_file)
        except (OSError, ValueError) as error:
            raise RunError(f"{self.summary_file} is missing or damaged: {error}") from error

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_json_atomic(self.summary_file, summary)

    def write_table(self, file: Path, table: pd.DataFrame) -> None:
        write_text_atomic(file, to_csv(table, None))

    def write_weights(self, which: str, weights: dict[str, Tensor]) -> None:
        with atomic_path(self.weights_file(which)) as temporary:
            save_file({name: tensor.contiguous().cpu() for name, tensor in weights.items()}, temporary)

    def read_weights(self, which: str) -> dict[str, Tensor]:
        """The "best" or "last" weights. Raises RunError where the file is missing or damaged."""
        file = self.weights_file(which)
        if not file.is_file():
            when = "when the run ends" if which == "last" else "after its first epoch"
            raise RunError(f"{file} is missing: the {which} weights are written {when}")
        try:
            return load_file(file)
        except Exception as error:  # safetensors and the file system raise many types
            raise RunError(f"{file} is damaged: {error}; train the run again") from error


def computed_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that decide what a run computes, flat: without those that only say how it is carried out."""
    container = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(container, dict)
    flat = flatten({str(key): value for key, value in container.items()})
    return {key: value for key, value in flat.items() if key not in _CARRIED_OUT_BY}


def _differences(old: RunConfig, new: RunConfig) -> list[str]:
    """What two configurations would compute differently, as "key: old -> new"."""
    before, after = computed_settings(old), computed_settings(new)
    return [
        f"{key} was {before.get(key)}, now {after.get(key)}"
        for key in {**before, **after}
        if before.get(key) != after.get(key)
    ]
