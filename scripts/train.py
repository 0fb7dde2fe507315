"""Train one run, or a sweep of runs with -m.

python scripts/train.py experiment=cub80_frozen dataset.root=PATH method=seb seed=0
python scripts/train.py -m experiment=demo method=gap,isqrt_cov,mpn_cov,seb
"""

from pathlib import Path

from fgvc.cli import exit_on_user_error
from fgvc.training import hydra_main, train_run


def main() -> None:
    configs = Path(__file__).resolve().parents[1] / "configs"
    hydra_main(configs, lambda config: print(f"run folder: {train_run(config)}"))


if __name__ == "__main__":
    exit_on_user_error(main)
