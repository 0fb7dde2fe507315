"""Train one run, or a sweep of runs with -m.

fgvc train experiment=cub80_frozen dataset.root=PATH method=seb seed=0
fgvc train -m experiment=demo method=gap,isqrt_cov,mpn_cov,seb
fgvc train experiment=cars_resnet50 method=svd_pade --dry-run    # two steps on random images, nothing saved
"""

import sys

from fgvc.cli import exit_on_user_error
from fgvc.inference.calibrate import calibrate_finished
from fgvc.resources import resource_folder
from fgvc.runs import RunConfig
from fgvc.training import dry_run, hydra_main, train_run


def main() -> None:
    dry = "--dry-run" in sys.argv

    def task(config: RunConfig) -> None:
        if dry:
            print(dry_run(config))
            return
        folder = train_run(config)
        calibrate_finished(folder, config.cache.dir)
        print(f"run folder: {folder}")

    hydra_main(resource_folder("configs"), task, flags=["--dry-run"])


if __name__ == "__main__":
    exit_on_user_error(main)
