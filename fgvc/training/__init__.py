"""Training: typed configuration, one explicit loop, run folders."""

from fgvc.training.config import RunConfig
from fgvc.training.dry_run import dry_run
from fgvc.training.launch import hydra_main
from fgvc.training.rerun import rerun
from fgvc.training.run import train_run
from fgvc.training.run_evaluation import RunEvaluation, evaluate_run
from fgvc.training.run_folder import RunFolder

__all__ = ["RunConfig", "RunEvaluation", "RunFolder", "dry_run", "evaluate_run", "hydra_main", "rerun", "train_run"]
