"""The progress of a run, its written records, and the saved states to resume it from."""

import contextlib
import hashlib
import io
import logging
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from fgvc.errors import RunError
from fgvc.foreign import load_pytorch, read_json_object
from fgvc.io import atomic_path, checksum_problem, to_csv, write_json_atomic, write_text_atomic
from fgvc.models.files import write_weights
from fgvc.runs.folder import RunFolder
from fgvc.runs.spectra import SpectrumHistory
from fgvc.runs.summary import Accuracy

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_log = logging.getLogger(__name__)

KEPT = 2
"""Number of saved states to keep: the newest, and the one before it in case the newest is damaged."""


@dataclass
class EpochProgress:
    """Progress within the current epoch.

    Attributes:
        steps: Number of optimiser steps, including skipped ones.
        loss: Sum of the losses of the images.
        correct: Number of images whose class had the largest logit.
        seen: Number of images counted in `loss` and `correct`.
        rate: Learning rate of the last step.
        skipped: Number of steps skipped because a number was not finite.
        scaled_down: Number of steps skipped by the loss scaler of fp16.
        seconds: Duration of the steps.
    """

    steps: int = 0
    loss: float = 0.0
    correct: int = 0
    seen: int = 0
    rate: float = 0.0
    skipped: int = 0
    scaled_down: int = 0
    seconds: float = 0.0

    def row(self, epoch: int) -> dict[str, Any]:
        """Return the training columns of metrics.csv. For mixed inputs, top-1 counts the class before mixing."""
        loss = self.loss / self.seen if self.seen else math.nan
        top1 = 100 * self.correct / self.seen if self.seen else math.nan
        return {"epoch": epoch, "lr": self.rate, "train_loss": loss, "train_top1": top1}


@dataclass
class Progress:
    """Progress of a run; all of it is saved with the state.

    Attributes:
        epoch: Number of finished epochs.
        step: Number of optimiser steps, including skipped ones.
        part: Progress of the current epoch; None between two epochs.
        skipped: Number of steps skipped because a number was not finite.
        watch: State of the `LossWatch`.
        best: Accuracies on the test split at the selected epoch, with `epoch`, `selected_on` and `selected_by` (the
            top-1 that decided).
        history: Rows of metrics.csv.
        seconds: Time spent over all sessions of the run: "features", "train", "eval" and "total".
    """

    epoch: int = 0
    step: int = 0
    part: EpochProgress | None = None
    skipped: int = 0
    watch: dict[str, Any] | None = None
    best: dict[str, Any] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("features", "train", "eval", "total"), 0.0)
    )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Progress":
        """Return the progress that `dataclasses.asdict` turned into `values`."""
        part = values["part"]
        return cls(**{**values, "part": None if part is None else EpochProgress(**part)})

    def select(self, epoch: int, decisive: Accuracy, test: Accuracy, selected_on: str, *, since: int = 0) -> bool:
        """Make `epoch` the best one if its top-1 is the highest; return whether it is.

        Args:
            epoch: epoch, counted from 1.
            decisive: accuracies on the split that decides.
            test: accuracies on the test split, for reports.
            selected_on: name of the split that decides.
            since: first epoch that counts; an earlier best epoch is replaced.
        """
        if self.best is not None and self.best["epoch"] >= since and decisive.top1 <= self.best["selected_by"]:
            return False
        self.best = {**asdict(test), "epoch": epoch, "selected_on": selected_on, "selected_by": decisive.top1}
        return True


class RunLog:
    """The progress of a run and its written records: metrics.csv, spectra by epoch, the best weights.

    Args:
        folder: folder of the run.
        writes: whether this process writes the files.
        started: `time.perf_counter` at the start of the run, where its total time begins.
    """

    def __init__(self, folder: RunFolder, *, writes: bool, started: float) -> None:
        self.progress = Progress()
        self.spectra = SpectrumHistory()
        self.best_weights: dict[str, Tensor] | None = None
        self._folder = folder
        self._writes = writes
        self._counted = started

    def count_time(self, phase: str | None = None) -> float:
        """Add the seconds since the last call to the run's total and to a phase; return them."""
        now = time.perf_counter()
        spent, self._counted = now - self._counted, now
        self.progress.seconds["total"] += spent
        if phase is not None:
            self.progress.seconds[phase] += spent
        return spent

    def finish_epoch(self, row: dict[str, Any]) -> None:
        """Count an epoch; the next `write` writes its row of metrics.csv."""
        self.progress.epoch = row["epoch"]
        self.progress.part = None
        self.progress.history.append(row)

    def keep_best(self, weights: dict[str, Tensor]) -> None:
        """Keep a copy of the weights of the selected epoch, in the state and in a separate file."""
        if self._writes:
            self.best_weights = {name: tensor.to("cpu", copy=True) for name, tensor in weights.items()}
            self._write_best()

    def _write_best(self) -> None:
        assert self.best_weights is not None and self.progress.best is not None
        write_weights(self._folder.weights_file("best"), self.best_weights, epoch=self.progress.best["epoch"])

    def write(self) -> None:
        """Write metrics.csv, and the spectra if there are new ones."""
        if self.progress.history:
            write_text_atomic(self._folder.metrics_file, to_csv(pd.DataFrame(self.progress.history), None))
        # within an epoch there are new spectra only during the first one
        if self.spectra.epochs and (self.progress.part is None or self.progress.epoch == 0):
            self.spectra.write(self._folder.spectrum_history_file)

    def state_dict(self) -> dict[str, Any]:
        """Return this part of a state, not copied."""
        return {"best": self.best_weights, "progress": asdict(self.progress)}

    def load_state_dict(self, state: dict[str, Any], source: RunFolder) -> None:
        """Continue from a state that was saved in `source`. Raises RunError if its spectra are damaged."""
        self.progress = Progress.from_dict(state["progress"])
        if source.spectrum_history_file.is_file():
            try:
                self.spectra = SpectrumHistory.read(source.spectrum_history_file, self.progress.epoch)
            except RunError as error:
                raise RunError(f"{error}, or delete this file to continue without its epochs") from error
        self.best_weights = state["best"]
        if not self._writes:
            return
        self.write()  # the files may be missing or newer than the state
        if self.best_weights is not None:
            self._write_best()


class StateStore:
    """The states of a run in a folder, as state-000001.pt, state-000002.pt, ...

    Each state has a card, state-000001.json, with its size and checksum. The card is written last, so a state without a
    card is incomplete and does not count.

    Args:
        folder: folder of the states; the first `write` creates it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._damaged: set[Path] = set()

    def exists(self) -> bool:
        """Return whether there is a state, damaged or not."""
        return bool(self._complete())

    def write(self, state: dict[str, Any], **about: Any) -> None:
        """Add a state of tensors, numbers, texts, lists and dicts, with `about` in its card; delete older states."""
        # keeping a damaged state would delete an undamaged one
        complete = [path for path in self._complete() if path not in self._damaged]
        number = 1 + max((_number(path) for path in self.folder.glob("state-*.pt")), default=0)
        path = self.folder / f"state-{number:06d}.pt"
        # opened here, since torch does not report a full disk for files that it opens itself
        with atomic_path(path) as temporary, _HashedFile(temporary) as file:
            torch.save(state, file)
        card = {**about, "bytes": path.stat().st_size, "sha256": file.sha256.hexdigest()}
        write_json_atomic(_card(path), card)
        self._keep([*complete[: KEPT - 1], path])

    def digests(self) -> dict[str, str]:
        """Return the digests that the newest readable card holds; empty if there is none."""
        for path in self._complete():
            with contextlib.suppress(OSError, ValueError):
                digests = read_json_object(_card(path)).get("digests")
                return digests if isinstance(digests, dict) else {}
        return {}

    def clear(self) -> None:
        """Delete all states; they belong to another run than the one that begins."""
        self._keep([])

    def keep_newest(self) -> None:
        """Delete all states except the newest."""
        self._keep(self._complete()[:1])

    def read(self) -> dict[str, Any]:
        """Return the newest undamaged state; no code in it is executed. Damaged states are logged and skipped.

        Raises:
            RunError: there is no state, or all are damaged.
        """
        damages: dict[Path, str] = {}
        # listed again each time, since a run that is still training may replace its states meanwhile
        while path := next((path for path in self._complete() if path not in damages), None):
            try:
                return _read(path)
            except (OSError, ValueError) as error:
                self._damaged.add(path)
                damages[path] = f"{path} is damaged ({error})"
                _log.warning("%s; trying the state before it", damages[path])
        if not damages:
            raise RunError(f"{self.folder} holds no state to continue from: the run has saved none yet")
        raise RunError(
            f"{'; '.join(damages.values())}; none is left to continue from: delete {self.folder.parent}, train again"
        )

    def _complete(self) -> list[Path]:
        """Return the states that have a card, newest first."""
        return sorted(
            (path for path in self.folder.glob("state-*.pt") if _card(path).is_file()), key=_number, reverse=True
        )

    def _keep(self, kept: list[Path]) -> None:
        for path in self.folder.glob("state-*.pt"):
            if path not in kept:
                _card(path).unlink(missing_ok=True)  # first, since a card without its state counts as damage
                path.unlink(missing_ok=True)
        for card in self.folder.glob("state-*.json"):
            if not card.with_suffix(".pt").exists():  # somebody deleted the state
                card.unlink(missing_ok=True)


class _HashedFile(io.BufferedWriter):
    """A file to write whose content is hashed meanwhile, in a thread."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "w"))
        self.sha256 = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1)

    def write(self, data: "ReadableBuffer", /) -> int:
        hashing = self._thread.submit(self.sha256.update, data)
        written = super().write(data)
        hashing.result()  # the data is torch's, and gone after the call
        return written

    def close(self) -> None:
        self._thread.shutdown()
        super().close()


def _card(path: Path) -> Path:
    return path.with_suffix(".json")


def _number(path: Path) -> int:
    digits = path.stem.partition("-")[2]
    return int(digits) if digits.isascii() and digits.isdigit() else 0


def _read(path: Path) -> dict[str, Any]:
    """Read a state. Raises OSError if it cannot be read, ValueError if it is not as written."""
    card = read_json_object(_card(path))
    size = path.stat().st_size
    if size != card.get("bytes"):
        raise ValueError(f"{size} bytes, but {card.get('bytes')} were written")
    problem = checksum_problem(path, {"sha256": str(card.get("sha256"))})
    if problem is not None:
        raise ValueError(problem)
    try:
        state = load_pytorch(path)
    except Exception as error:  # zip, pickle and key errors: a file that was replaced on purpose
        raise ValueError(str(error).splitlines()[0] if str(error) else type(error).__name__) from error
    if not isinstance(state, dict):
        raise ValueError("it does not hold a dictionary")
    return state
