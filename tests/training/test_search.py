"""`fgvc train search=heads`: Optuna proposes settings, held-out images choose, an experiment file keeps the best."""

import re
from pathlib import Path

import pandas as pd
import pytest
import yaml
from command_line import SMALL, Train, refused, run, succeeded

from fgvc.errors import ConfigError
from fgvc.training.search import with_sweep

try:
    import hydra_plugins.hydra_optuna_sweeper  # noqa: F401
except ImportError:
    OPTUNA = False
else:
    OPTUNA = True
needs_optuna = pytest.mark.skipif(not OPTUNA, reason="needs the extra [search]")


@pytest.mark.extras
@needs_optuna
def test_held_out_images_choose_the_settings_that_an_experiment_keeps(tmp_path: Path) -> None:
    small = ["train.py", *(word for word in SMALL if word != "method=seb"), "method=gap,mpn_cov"]
    done = succeeded(run(*small, "search=heads", "hydra.sweeper.n_trials=3", "name=first", cwd=tmp_path))
    folder = tmp_path / "results" / "first" / "search"
    held_out = [pd.read_csv(folder / f"trial{n}" / "metrics.csv")["val_top1"].iloc[-1] for n in range(3)]
    best = int(pd.Series(held_out).idxmax())
    rows = re.findall(r"\| trial(\d) +\| +([\d.]+) \| +(gap|mpn_cov) \|", done.stdout)
    assert len(rows) == 3
    assert (int(rows[0][0]), float(rows[0][1])) == (best, pytest.approx(held_out[best], abs=0.01))
    found = yaml.safe_load((folder / "experiment" / "best.yaml").read_text())
    chosen = yaml.safe_load((folder / f"trial{best}" / "config.yaml").read_text())
    assert found["optimizer"] == chosen["optimizer"] and found["method"] == chosen["method"]
    assert found["trainer"]["val_fraction"] == 0 and not {"seed", "run_dir", "name"} & set(found)
    again = ["train.py", "--config-dir", folder, "experiment=best", "name=again", "seed=1", "run_dir=again"]
    succeeded(run(*again, cwd=tmp_path))
    summary = yaml.safe_load((tmp_path / "again" / "config.yaml").read_text())
    assert summary["optimizer"] == chosen["optimizer"] and summary["seed"] == 1


@pytest.mark.extras
@needs_optuna
def test_a_trial_that_diverges_counts_as_0_and_a_wrong_setting_ends_the_search(tmp_path: Path) -> None:
    command = ["train.py", *SMALL, "search=heads", "hydra.sweeper.n_trials=3", "name=first", "optimizer.name=sgd"]
    rates = "optimizer.lr=choice(1e9,1e-3)"
    done = succeeded(run(*command, rates, "hydra.sweeper.sampler.seed=2", "trainer.clip_norm=null", cwd=tmp_path))
    assert "this trial counts as 0 %" in done.stderr and "1e+09" not in done.stdout
    assert (tmp_path / "results" / "first" / "search" / "experiment" / "best.yaml").is_file()
    succeeded(run(*command, rates, "--dry-run", cwd=tmp_path))  # it keeps no run, and none has diverged
    none = ["optimizer.lr=choice(1e9)", "name=third", "trainer.clip_norm=null"]
    refused(run(*command, *none, cwd=tmp_path), "every trial has diverged")
    refused(run(*command, "schedule.name=choice(steps,stairs)", "name=second", cwd=tmp_path), "unknown schedule.name")
    assert not (tmp_path / "results" / "second").exists()


@pytest.mark.skipif(OPTUNA, reason="the extra [search] is here")
def test_without_the_library_the_extra_is_named(here: Train, tmp_path: Path) -> None:
    refused(here("train.py", *SMALL, "search=heads", cwd=tmp_path), "pip install 'fgvc[search]'")
    assert not list(tmp_path.iterdir())


def test_several_processes_have_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="a search runs in one process"):
        with_sweep(["search=heads"])


def test_an_experiment_of_ones_own_is_found(here: Train, tmp_path: Path) -> None:
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "experiment" / "mine.yaml").write_text("# @package _global_\nname: mine\nseed: 7\n")
    done = succeeded(here("train.py", "--config-dir", "own", "experiment=mine", "--cfg", "job", cwd=tmp_path))
    assert "name: mine\n" in done.stdout and "seed: 7\n" in done.stdout
    refused(here("train.py", "--config-dir=own", "experiment=min", cwd=tmp_path), "nearest: mine")
