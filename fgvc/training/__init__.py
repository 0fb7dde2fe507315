"""Training: from a configuration to a run folder."""

from fgvc.training.dry_run import dry_run
from fgvc.training.launch import hydra_main
from fgvc.training.run import train_run

__all__ = ["dry_run", "hydra_main", "train_run"]
