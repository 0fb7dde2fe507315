"""What is written down of a run: rows of metrics.csv, spectra of the probe, the best weights, seconds."""

import time
from dataclasses import asdict
from typing import Any

import pandas as pd
from torch import Tensor

from fgvc.training.config import RunConfig
from fgvc.training.evaluation import Evaluation
from fgvc.training.probe import SpectrumHistory
from fgvc.training.progress import PartOfEpoch, Progress
from fgvc.training.run_folder import RunFolder


class Books:
    """Keeps the books of a run in its folder.

    Args:
        config: the run.
        folder: where they are written.
        writes: whether this process is the one that writes.
        started: `time.perf_counter` at the beginning of the run; its total counts from there.
    """

    def __init__(self, config: RunConfig, folder: RunFolder, *, writes: bool, started: float) -> None:
        self.progress = Progress()
        self.spectra = SpectrumHistory()
        self.best_weights: dict[str, Tensor] | None = None
        self._config = config
        self._folder = folder
        self._writes = writes
        self._counted = started

    def count_time(self, phase: str | None = None) -> float:
        """Add the time since the last call to the run's total, and to a phase; returns it in seconds."""
        now = time.perf_counter()
        spent, self._counted = now - self._counted, now
        self.progress.seconds["total"] += spent
        if phase is not None:
            self.progress.seconds[phase] += spent
        return spent

    def row(self, epoch: int, part: PartOfEpoch, validation: Evaluation | None, test: Evaluation) -> dict[str, Any]:
        """A row of metrics.csv."""
        row = {"epoch": epoch, **part.measures()}
        if self._config.trainer.precision == "fp16":
            row["loss_scale_skips"] = part.scaled_down
        if self._config.trainer.on_non_finite == "skip":
            row["skipped_steps"] = part.skipped
        for name, evaluation in (("val", validation), ("test", test)):
            if evaluation is not None:
                row |= {f"{name}_loss": evaluation.loss}
                row |= {f"{name}_{key}": value for key, value in evaluation.accuracy.as_dict().items()}
        return row

    def finish_epoch(self, row: dict[str, Any]) -> None:
        """Count an epoch, and write it down with the next `write`."""
        self.progress.epoch = row["epoch"]
        self.progress.part = None
        self.progress.history.append(row)

    def keep_best(self, weights: dict[str, Tensor]) -> None:
        """Keep a copy of the weights of the epoch that was selected, with the state and in a file of their own."""
        if self._writes:
            self.best_weights = {name: tensor.cpu().clone() for name, tensor in weights.items()}
            self._folder.write_weights("best", self.best_weights)

    def write(self) -> None:
        """Write metrics.csv, and the spectra where there are new ones."""
        if self.progress.history:
            self._folder.write_table(self._folder.metrics_file, pd.DataFrame(self.progress.history))
        # within an epoch there is nothing new to them but before the first has ended
        if self.spectra.epochs and (self.progress.part is None or self.progress.epoch == 0):
            self.spectra.write(self._folder.spectrum_history_file)

    def state_dict(self) -> dict[str, Any]:
        """What a state holds of them; not copied."""
        return {"best": self.best_weights, "progress": asdict(self.progress)}

    def load_state_dict(self, state: dict[str, Any], source: RunFolder) -> None:
        """Go on from a state that was saved in `source`. Raises RunError where its spectra are damaged."""
        self.progress = Progress.from_dict(state["progress"])
        self.spectra = SpectrumHistory.read(source.spectrum_history_file, self.progress.epoch)
        self.best_weights = state["best"]
        if not self._writes:
            return
        self.write()  # the files may be of later epochs than the state, or gone
        if self.best_weights is not None:
            self._folder.write_weights("best", self.best_weights)
