"""What a run has done so far."""

from dataclasses import dataclass, field
from typing import Any

from fgvc.training.evaluation import Accuracy


@dataclass
class Progress:
    """What a run has done so far; all of it is saved with the state.

    Attributes:
        epoch: finished epochs.
        step: optimiser steps.
        best: accuracies on the test split at the selected epoch, with `epoch`, `selected_on` and `selected_by` (the
            top-1 that decided).
        history: rows of metrics.csv.
        seconds: spent in all, over all sessions of the run: on "features", in "train", in "eval", and the "total".
    """

    epoch: int = 0
    step: int = 0
    best: dict[str, Any] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("features", "train", "eval", "total"), 0.0)
    )

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
