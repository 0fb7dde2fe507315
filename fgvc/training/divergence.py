"""A run that diverges without a NaN: a training loss that has grown and stays grown."""

import math
from collections import deque
from statistics import median
from typing import Any

from fgvc.errors import ConfigError

FACTOR = 5.0
WINDOW = 50


class LossWatch:
    """Watches the loss of each step and names a divergence.

    The loss of a step is taken as the median of the last `window` losses, of fewer at first. A divergence is a median
    above both `factor` times the lowest median so far and 0.9 log(num_classes), about what guessing costs, for `window`
    steps in a row. So neither a few bad batches (a median does not see fewer than half a window of them) nor the steep
    steps of a warm-up or of a restart of the learning rate (which recover, or stay below guessing) are one, nor is a
    run that never learns. A network that collapses to guessing after it has learned is one.

    The defaults lie between what has been seen to recover and what has not, on heads on frozen features of 80 classes.
    Those that come to learn in the end, with AdamW or with SGD without clipping at up to 1000 times the recipe's
    learning rate, have medians of up to 3.8 times the lowest while above guessing, and single losses of up to 471.
    Those that do not, with SGD without clipping at 10000 times it, reach 1e10 times the lowest within 70 steps, and
    meet neither NaN nor infinity in 292.

    Args:
        factor: more than 1.
        window: steps.
        num_classes: of the logits.

    Raises:
        ConfigError: a factor or a window that makes no sense.
    """

    def __init__(self, *, num_classes: int, factor: float = FACTOR, window: int = WINDOW) -> None:
        if not factor > 1:
            raise ConfigError(f"trainer.divergence_factor must be above 1, got {factor}")
        if window < 1:
            raise ConfigError(f"trainer.divergence_window must be at least 1, got {window}")
        self.factor, self.window = factor, window
        # collapsed networks hover about log(num_classes), or below it where the classes are of unequal size
        self._guessing = 0.9 * math.log(num_classes)
        self._recent: deque[float] = deque(maxlen=window)
        self._lowest = math.inf
        self._above = 0

    def update(self, loss: float) -> str | None:
        """Take the loss of a step; what is wrong with the run, or None. It is said once a window at most.

        Raises:
            ValueError: the loss is NaN or infinite, which is another matter.
        """
        if not math.isfinite(loss):
            raise ValueError(f"the loss of a step must be finite, got {loss}")
        self._recent.append(loss)
        if len(self._recent) < self.window / 5:  # a median of fewer is no measure of where the run began
            return None
        smoothed = median(self._recent)
        self._lowest = min(self._lowest, smoothed)
        grown = smoothed > max(self.factor * self._lowest, self._guessing)
        self._above = self._above + 1 if grown else 0
        if self._above < self.window:
            return None
        self._above = 0
        return (
            f"the training loss diverges: for {self.window} steps its median over {self.window} steps has been above "
            f"{self.factor:g} times the lowest so far, {self._lowest:.4g}, and above guessing, {self._guessing:.4g}; "
            f"it is {smoothed:.4g} now"
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, from which another watch with the same arguments goes on in the same way."""
        return {"recent": list(self._recent), "lowest": self._lowest, "above": self._above}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Of a longer window the last losses are taken."""
        self._recent = deque(state["recent"], maxlen=self.window)
        self._lowest, self._above = float(state["lowest"]), int(state["above"])
