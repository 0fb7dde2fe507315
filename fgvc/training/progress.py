"""What a run has done so far."""

import math
from dataclasses import dataclass, field
from typing import Any

from fgvc.training.evaluation import Accuracy
from fgvc.training.step import StepResult


@dataclass
class PartOfEpoch:
    """What has been done of an epoch that is being trained.

    Attributes:
        steps: optimiser steps taken.
        loss, correct, seen: summed over their images.
        rate: learning rate of the last one.
        skipped: steps left out by the guard.
        scaled_down: steps left out by the loss scaler.
        seconds: that they took.
    """

    steps: int = 0
    loss: float = 0.0
    correct: int = 0
    seen: int = 0
    rate: float = 0.0
    skipped: int = 0
    scaled_down: int = 0
    seconds: float = 0.0

    def count(self, result: StepResult, size: int) -> None:
        """Add a step of `size` images, or one that failed."""
        self.steps += 1
        self.scaled_down += result.scaled_down
        if result.failure is None:
            self.loss += result.loss * size
            self.correct += result.correct
            self.seen += size

    def measures(self) -> dict[str, Any]:
        """What metrics.csv says of it. Of mixed inputs the top-1 counts the class of the unmixed one."""
        loss = self.loss / self.seen if self.seen else math.nan
        top1 = 100 * self.correct / self.seen if self.seen else math.nan
        return {"lr": self.rate, "train_loss": loss, "train_top1": top1}


@dataclass
class Progress:
    """What a run has done so far; all of it is saved with the state.

    Attributes:
        epoch: finished epochs.
        step: optimiser steps, those left out included.
        part: of the epoch after those; None between two epochs.
        skipped: steps that the guard left out.
        watch: state of the watch on the loss.
        best: accuracies on the test split at the selected epoch, with `epoch`, `selected_on` and `selected_by` (the
            top-1 that decided).
        history: rows of metrics.csv.
        seconds: spent in all, over all sessions of the run: on "features", in "train", in "eval", and the "total".
    """

    epoch: int = 0
    step: int = 0
    part: PartOfEpoch | None = None
    skipped: int = 0
    watch: dict[str, Any] | None = None
    best: dict[str, Any] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("features", "train", "eval", "total"), 0.0)
    )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Progress":
        """From what `dataclasses.asdict` made of one."""
        part = values["part"]
        return cls(**{**values, "part": None if part is None else PartOfEpoch(**part)})

    def select(self, epoch: int, decisive: Accuracy, test: Accuracy, selected_on: str, *, since: int = 0) -> bool:
        """Make `epoch` the best one if its top-1 is the highest; returns whether it is.

        Args:
            epoch: counted from 1.
            decisive: accuracies on the split that decides.
            test: on the test split, to be reported.
            selected_on: name of the split that decides.
            since: an epoch before this one does not count any more.
        """
        if self.best is not None and self.best["epoch"] >= since and decisive.top1 <= self.best["selected_by"]:
            return False
        books = {"epoch": epoch, "selected_on": selected_on, "selected_by": decisive.top1}
        self.best = test.as_dict() | books
        return True
