"""Work with one trained run: evaluate, predict, calibrate, export, repeat."""

from fgvc.inference.evaluate import RunEvaluation, evaluate_run
from fgvc.inference.rerun import rerun

__all__ = ["RunEvaluation", "evaluate_run", "rerun"]
