"""The command line of `fgvc train`: help, settings that can be found, what a run says, and how a sweep fails."""

import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from command_line import ROOT, SMALL, Train, a_config, run, succeeded
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from fgvc.runs.config import TrainerConfig, flatten
from fgvc.runs.known_settings import find_settings, first_values, known_settings, nearest_keys
from fgvc.training.batches import duration
from fgvc.training.launch import register_choices

pytestmark = pytest.mark.usefixtures("uncalibrated")

KEYS = flatten(dataclasses.asdict(a_config()))


def test_every_setting_has_a_description_and_its_default() -> None:
    assert {key for key in known_settings() if not key.endswith("options")} == {
        key for key in KEYS if not key.endswith("options")
    }
    assert all(len(setting.description) > 3 for setting in known_settings().values())
    defaults = {key: setting.default for key, setting in known_settings().items()}
    assert (defaults["trainer.batch_size"], defaults["trainer.max_steps"], defaults["dataset.root"]) == (
        "10",
        "null",
        None,
    )
    assert (defaults["trainer.deterministic"], defaults["trainer.mixup"]) == ("false", "0.0")


def test_help_and_settings_list_all_of_them(here: Train, tmp_path: Path) -> None:
    shown = succeeded(here("train.py", "--help", cwd=tmp_path)).stdout
    listed = succeeded(here("settings.py", cwd=tmp_path)).stdout
    for setting in known_settings().values():
        assert f"{setting.key}=" in shown and setting.text({}).partition("\n")[2] in listed
    for told in (shown, listed):
        assert re.search(r"optimizer\.lr=0\.003  \(first run: 0\.001\)\n", told)
    assert shown.startswith("usage: fgvc train dataset.root=FOLDER")
    for name in ("experiment= ", "cub80_frozen", "method= gap,", "--dry-run", "optimizer.lr=3e-4 name="):
        assert name in shown
    usage = here("train.py", cwd=tmp_path)
    assert (usage.returncode, usage.stdout) == (2, "") and usage.stderr.startswith("usage: fgvc train dataset.root=")
    assert not list(tmp_path.iterdir())


def test_values_of_a_first_run_are_those_that_are_composed() -> None:
    register_choices()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        composed = flatten(OmegaConf.to_container(compose("train", ["experiment=first"])))
    first = first_values(ROOT / "configs")
    assert len(first) > 10 and first == {key: composed[key] for key in first}


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("learning rate", "optimizer.lr"),
        ("epochs", "trainer.epochs"),
        ("--batch-size", "trainer.batch_size"),
        ("trianer.workers", "trainer.workers"),
    ],
)
def test_a_word_finds_a_setting(word: str, key: str, here: Train, tmp_path: Path) -> None:
    assert key in [setting.key for setting in find_settings(word)]
    assert f"{key}=" in succeeded(here("settings.py", f"{word.lstrip('-')}", cwd=tmp_path)).stdout
    assert here("settings.py", "xylophone", cwd=tmp_path).returncode == 2


def test_the_nearest_keys_are_those_of_the_same_name() -> None:
    assert nearest_keys("dtype") == ["cache.dtype"]
    assert nearest_keys("--lr") == ["optimizer.lr"]
    assert nearest_keys("experimant", ["experiment", "dataset"])[0] == "experiment"


def test_a_run_says_what_it_does(here: Train, tmp_path: Path) -> None:
    done = succeeded(here("train.py", *SMALL, "method=mpn_cov", cwd=tmp_path))
    assert "synthetic: 12 training, 9 test, 3 classes; 64 px" in done.stderr
    assert "test_resnet (trained), MPN-COV, reduction 8, " in done.stderr
    assert "6 of 4 images in 2 epochs, sgd, learning rate 0.003, step, seed 0" in done.stderr
    assert "results/synthetic/test_resnet/mpn_cov/seed0" in done.stderr
    assert "fgvc predict results/synthetic/test_resnet/mpn_cov/seed0 IMAGE_OR_FOLDER" in done.stdout
    quiet = succeeded(run("train.py", *SMALL, "--quiet", "name=quiet", "trainer.epochs=0", cwd=tmp_path))
    assert quiet.stdout == "run folder: results/quiet/test_resnet/seb/seed0\n"
    assert "epoch" not in quiet.stderr and "images" not in quiet.stderr


def test_few_images_get_more_epochs(here: Train, tmp_path: Path) -> None:
    """12 images in steps of 4: 3 steps an epoch."""
    assert [TrainerConfig(epochs=2, min_steps=least).planned_epochs(3) for least in (None, 6, 7, 8)] == [2, 2, 3, 3]
    assert TrainerConfig(epochs=0, min_steps=9).planned_epochs(3) == 0
    succeeded(here("train.py", *SMALL, "method=gap", "trainer.min_steps=7", "run_dir=run", cwd=tmp_path))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["final"]["epoch"] == 3
    again = succeeded(here("train.py", *SMALL, "method=gap", "trainer.min_steps=7", "run_dir=run", cwd=tmp_path))
    assert "finished already" in again.stderr


def test_a_sweep_says_once_what_failed_and_what_to_change(here: Train, tmp_path: Path) -> None:
    """One `run_dir` would be that of all runs; Hydra adds no line of its own."""
    sweep = ["-m", *SMALL, "method=gap", "seed=0,1"]
    succeeded(here("train.py", *sweep, "trainer.epochs=0", cwd=tmp_path))
    done = here("train.py", *sweep, cwd=tmp_path)
    assert done.returncode == 2 and "Error executing job" not in done.stderr
    assert "give another name= (it is synthetic)" in done.stderr and "run_dir=" not in done.stderr
    assert done.stderr.count("failed: ") == 2


def test_one_mistake_is_one_line(tmp_path: Path) -> None:
    done = run("train.py", *SMALL, "method=gap", "backbone.name=nothing", "run_dir=run", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == done.stderr.count("error: ") == 1, done.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_the_tab_key_completes(tmp_path: Path) -> None:
    script = succeeded(run("completion.py", cwd=tmp_path)).stdout
    ask = """
t() { COMP_LINE="fgvc $1"; COMP_POINT=${#COMP_LINE}; COMP_WORDS=($COMP_LINE); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_fgvc; echo "${COMPREPLY[*]}"; }
t trai; t "train trainer.ep"; t "train method=mpn"; t "train method=gap,isq"; t "train experiment=demo"
"""
    done = subprocess.run(["bash", "-c", script + ask], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["train", "trainer.epochs=", "mpn_cov", "gap,isqrt_cov", "demo"]


def test_durations_are_in_words() -> None:
    assert [duration(seconds) for seconds in (3.2, 59.6, 600, 3661)] == ["3 s", "1 min", "10 min", "1 h 1 min"]
