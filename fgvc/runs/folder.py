"""The folder of a run: paths of its files, and reading and writing its configuration and summary.

It also knows two facts about every setting: whether it changes the result, and whether a resumed run may change it.
"""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf

from fgvc.errors import ConfigError, RunError
from fgvc.foreign import YAML_LOADER, read_json_object, read_plain_yaml
from fgvc.io import locked, remove_leftovers, write_json_atomic, write_text_atomic
from fgvc.runs.config import RunConfig, check_config, check_switch, flatten

_log = logging.getLogger(__name__)


class Role(NamedTuple):
    """The effect of a setting in which two runs differ.

    Attributes:
        changes_result: Whether the runs compute different results; a table must not average over them then.
        may_change: Whether a resumed run may take another value.
    """

    changes_result: bool
    may_change: bool


_ROLES = {
    **dict.fromkeys(
        (
            # a dataset may move; another one is found by its digests
            *("run_dir", "resume", "dataset.root", "method.eigh_device", "cache.dir", "cache.max_gb"),
            *("trainer.workers", "trainer.tracker", "trainer.device", "trainer.probe_images"),
            *("trainer.save_minutes", "trainer.save_steps"),
            *("trainer.on_divergence", "trainer.divergence_factor", "trainer.divergence_window"),
        ),
        Role(changes_result=False, may_change=True),
    ),
    "name": Role(changes_result=False, may_change=False),
    # a file may move; one with other content is found by its digests
    **dict.fromkeys(
        ("backbone.weights", "initial_weights", "dataset.options.file"), Role(changes_result=True, may_change=True)
    ),
    # with "skip" a finished run may have skipped steps
    **dict.fromkeys(("trainer.on_non_finite", "trainer.max_skips"), Role(changes_result=True, may_change=True)),
}


def role(key: str) -> Role:
    """Return the role of a setting; `key` is as on the command line, e.g. "trainer.batch_size"."""
    return _ROLES.get(key, Role(changes_result=True, may_change=False))


def fixed_settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings that a resumed run must keep, by key."""
    container = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(container, dict)
    flat = flatten({str(key): value for key, value in container.items()})
    flat["dataset.adapter"] = config.dataset.reader  # earlier versions left it out where it is the name
    # a file of weights may move, but not come or go: digests tell one file from another
    given = {f"{key} given": flat[key] is not None for key in ("backbone.weights", "initial_weights")}
    return {key: value for key, value in flat.items() if not role(key).may_change} | given


class RunFolder:
    """Paths of a run's files, its lock, its configuration and summary; every file is written completely or not at all.

    A folder with a link that leads out of it is refused by RunError, since someone else may have sent it.

    Other modules read the other files: `fgvc.runs.read_run` metrics.csv, predictions.csv and spectra,
    `fgvc.inference.restore` the weights, `fgvc.training.states` the states.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.summary_file = path / "summary.json"
        self.calibration_file = path / "calibration.json"
        self.split_file = path / "split.csv"
        self.metrics_file = path / "metrics.csv"
        self.predictions_file = path / "predictions.csv"
        self.spectrum_file = path / "spectrum.npz"
        self.spectrum_history_file = path / "spectrum_history.npz"
        self.lock_file = path / ".lock"
        self.checkpoints = path / "checkpoints"
        self.failed_steps = path / "failed_steps"
        _refuse_links_out(path)

    def files(self) -> list[Path]:
        """Return what is there of the files and folders that training writes."""
        return [path for path in vars(self).values() if path not in (self.path, self.lock_file) and path.exists()]

    def weights_file(self, which: str) -> Path:
        """Return the file of the "best" or "last" weights."""
        return self.checkpoints / f"{which}.safetensors"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder's lock during the block. Raises RunError if another process holds it."""
        created = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with locked(self.lock_file) as free:
                if free is False:
                    raise RunError(f"{self.path}: another process is training in this folder; wait, or give run_dir=")
                own = None if self.config_file.exists() else self.config_file  # other files are not ours then
                for folder in (self.path, self.checkpoints, self.failed_steps):
                    remove_leftovers(folder, own)
                yield
        finally:
            if created and not any(self.path.iterdir()):
                self.path.rmdir()

    def begin(self, config: RunConfig, summary: dict[str, Any]) -> None:
        """Write the configuration and a first summary, which stays if the process is killed."""
        write_text_atomic(self.config_file, OmegaConf.to_yaml(OmegaConf.structured(config)))
        self.write_summary(summary)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Replace summary.json."""
        write_json_atomic(self.summary_file, summary)

    def read_summary(self) -> dict[str, Any]:
        """Return summary.json untyped (`fgvc.runs.read_run` is typed). Raises RunError if it is missing or damaged."""
        try:
            return read_json_object(self.summary_file)
        except (OSError, ValueError) as error:
            raise RunError(
                f"{self.summary_file} is missing or damaged ({_one_line(error)}); restore the file or repeat the run"
            ) from error

    def has_mean_weights(self) -> bool:
        """Return whether summary.json says that `fgvc soup` wrote the folder."""
        try:
            return self.read_summary().get("status") == "averaged"
        except RunError:  # damaged: the run is done again
            return False

    def is_finished(self) -> bool:
        """Return whether summary.json says that the run is finished; if it is damaged, warn and return False."""
        try:
            return self.summary_file.exists() and self.read_summary().get("status") == "finished"
        except RunError as error:
            _log.warning("%s; the run counts as unfinished", error)
            return False

    def read_settings(self) -> dict[str, Any]:
        """Return config.yaml nested and untyped (see `read_config`). Raises RunError if it is missing or damaged."""
        if not self.config_file.exists():
            below = [str(file.parent) for file in sorted(self.path.rglob("summary.json"))[:3]]
            fix = f"name one of the runs in it, e.g. {', '.join(below)}" if below else "name the folder of one run"
            raise RunError(f"{self.path} is not a run folder: it has no config.yaml; {fix}")
        try:
            settings = yaml.load(read_plain_yaml(self.config_file), Loader=YAML_LOADER)
        except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: e.g. a date such as 31 February
            raise self._unreadable(_one_line(error)) from error
        if not isinstance(settings, dict):
            raise self._unreadable(f"it holds {type(settings).__name__}, not a mapping of settings")
        return settings

    def read_config(self, *, root: str | None = None, cache: str | None = None) -> RunConfig:
        """Return the run's configuration, with other folders of the dataset and of cached features where given.

        In a finished run, unknown settings are ignored with a log line.

        Raises RunError: config.yaml is missing or damaged, has a value of the wrong type or out of range, or, in an
        unfinished run, an unknown setting.
        """
        settings = self.read_settings()
        known, unknown = _split_known(settings, RunConfig)
        if unknown:
            names = ", ".join(unknown)
            if not self.is_finished():
                raise self._unreadable(f"this version has no setting {names}, and the run is not finished")
            _log.info("%s: ignored %s, unknown to this version", self.config_file, names)
        try:
            config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), known))
        except Exception as error:  # omegaconf raises many types; all mean that the file is not usable
            raise self._unreadable(str(error)) from error
        assert isinstance(config, RunConfig)
        try:
            # reading needs no package of the training
            backbone, trainer = replace(config.backbone, lora=None), replace(config.trainer, tracker=None)
            check_config(replace(config, backbone=backbone, trainer=trainer))
            if config.hybrid.method is not None:
                check_switch(config)
        except ConfigError as error:
            raise self._unreadable(str(error)) from error
        if config.trainer.workers is not None:  # it may be from a larger machine
            config.trainer.workers = min(config.trainer.workers, os.cpu_count() or 1)
        config.dataset.root = config.dataset.root if root is None else root
        config.cache.dir = config.cache.dir if cache is None else cache
        return config

    def _unreadable(self, reason: str) -> RunError:
        return RunError(
            f"{self.config_file} is not a readable configuration: {reason}; restore the file or repeat the run"
        )


def _refuse_links_out(path: Path) -> None:
    """Raise RunError if a link in the folder leads out of it: someone may have sent the folder.

    What is read through such a link ends up in a report; what is written, in any file of the user.
    """
    inside = path.resolve()
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            link = Path(folder, name)
            if link.is_symlink() and not Path(os.path.realpath(link)).is_relative_to(inside):
                raise RunError(f"{link}: a link out of the run folder, which is not followed; put what it names there")


def _split_known(settings: Mapping[str, Any], schema: Any, prefix: str = "") -> tuple[dict[str, Any], list[str]]:
    """Split nested settings into those that a configuration dataclass has, and the keys of the others."""
    fields = {field.name: field.type for field in dataclasses.fields(schema)}
    known: dict[str, Any] = {}
    unknown = []
    for key, value in settings.items():
        if key not in fields:
            unknown.append(f"{prefix}{key}")
        elif dataclasses.is_dataclass(fields[key]) and isinstance(value, Mapping):
            known[key], more = _split_known(value, fields[key], f"{prefix}{key}.")
            unknown += more
        else:
            known[key] = value
    return known, unknown


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
