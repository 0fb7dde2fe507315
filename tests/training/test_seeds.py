"""One seed fixes everything: the same run in processes and folders of their own is the same to the last bit."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from command_line import ROOT, succeeded, trainable
from safetensors.torch import load_file

from fgvc.runs.compare import compare_runs
from fgvc.runs.config import MethodConfig
from fgvc.training import train_run

PROCESSES = (("frozen0", "frozen1", "trained0", "trained1"), ("trained0", "frozen0"))


def train_each(names: Sequence[str]) -> None:
    """Runs with everything that draws: weights, order, held-out images, augmentation (also in a worker), mixtures."""
    for name in names:
        run = trainable(Path(), run_dir=name, seed=int(name[-1]), method=MethodConfig(name="seb", reduction=8))
        run.dataset.options["train_per_class"] = 6
        run.trainer.epochs, run.trainer.mixup, run.trainer.val_fraction = 2, 0.4, 0.25
        if name.startswith("frozen"):
            run.backbone.frozen = True
        else:
            run.dataset.transform.crop, run.dataset.transform.randaugment = "random_resized", "rand-m9-mstd0.5-inc1"
            run.trainer.cutmix, run.trainer.workers, run.trainer.ema_decay = 1.0, 1, 0.9
        train_run(run)


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of this process and of a new one, which hash differently and train the runs in another order."""
    folders = [tmp_path_factory.mktemp(f"process{number}") for number in range(2)]
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folders[0])
        torch.set_num_threads(1)
        train_each(PROCESSES[0])
    torch.set_num_threads(threads)
    other_hash = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    env = {**os.environ, "PYTHONHASHSEED": other_hash, "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers"), str(Path(__file__).parent)])
    command = [sys.executable, "-c", "import sys, test_seeds; test_seeds.train_each(sys.argv[1:])", *PROCESSES[1]]
    succeeded(subprocess.run(command, cwd=folders[1], capture_output=True, text=True, env=env, timeout=300))
    return folders


@pytest.mark.parametrize("name", PROCESSES[1])
def test_one_seed_gives_the_same_bits(twice: list[Path], name: str) -> None:
    first, second = (folder / name for folder in twice)
    for which in ("last", "best"):
        weights = [(run / "checkpoints" / f"{which}.safetensors").read_bytes() for run in (first, second)]
        assert weights[0] == weights[1], which
    assert (first / "predictions.csv").read_bytes() == (second / "predictions.csv").read_bytes()
    metrics = [pd.read_csv(run / "metrics.csv", dtype=str).drop(columns="seconds") for run in (first, second)]
    pd.testing.assert_frame_equal(*metrics)
    for file in ("spectrum.npz", "spectrum_history.npz"):
        a, b = (np.load(run / file) for run in (first, second))
        assert a.files == b.files and all(a[key].tobytes() == b[key].tobytes() for key in a.files)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (first, second)]
    for key in ("final", "best", "weights_digest", "dataset_fingerprint", "config_hash"):
        assert summaries[0][key] == summaries[1][key], key
    comparison = compare_runs(first, second)
    assert comparison.verdict == "bit-identical" and not comparison.environment and not comparison.settings


@pytest.mark.parametrize("kind", ["frozen", "trained"])
def test_zero_is_a_seed_like_any_other(twice: list[Path], kind: str) -> None:
    zero, one = (twice[0] / f"{kind}{seed}" for seed in (0, 1))
    weights = [load_file(run / "checkpoints" / "last.safetensors") for run in (zero, one)]
    matrices = [name for name, tensor in weights[0].items() if tensor.dim() > 1]
    assert matrices and not any(weights[0][name].equal(weights[1][name]) for name in matrices)
    comparison = compare_runs(zero, one)
    assert not comparison.identical
    assert [change.name for change in comparison.settings] == ["seed"]
    # another seed holds out other images and draws another backbone
    differing = {change.name for change in comparison.environment}
    assert differing == {"weights_digest", "dataset_fingerprint.train_list", "dataset_fingerprint.validation_list"}
