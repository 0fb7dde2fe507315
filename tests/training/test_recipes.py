"""What a recipe adds to the loop: mixed inputs, averaged weights, the hybrid protocol, runs of no epoch."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from command_line import ROOT, Train, refused, run, succeeded, train
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fgvc.inference.restore import read_weights
from fgvc.models import PoolingHead
from fgvc.runs.config import HybridConfig, MethodConfig, RunConfig, ScheduleConfig, TrainerConfig
from fgvc.runs.folder import RunFolder
from fgvc.runs.summary import Accuracy
from fgvc.training.hybrid import Stages
from fgvc.training.learner import Learner, Objective
from fgvc.training.states import Progress, StateStore
from fgvc.training.step import Stepper

pytestmark = pytest.mark.usefixtures("uncalibrated")


def test_loss_of_plain_inputs_is_the_smoothed_cross_entropy() -> None:
    logits, targets = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 0.0]]), torch.tensor([0, 2])
    objective = Objective(3, label_smoothing=0.3)
    inputs = torch.rand(2, 1, 2, 2)
    same, wanted = objective.mix(inputs, targets)
    assert same is inputs and wanted is targets
    shares = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8]])
    expected = -(shares * logits.log_softmax(1)).sum(1).mean()
    assert objective.mean(logits, wanted).item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_mixup_mixes_inputs_and_targets_in_the_same_shares(smoothing: float) -> None:
    objective = Objective(4, mixup=1.0, label_smoothing=smoothing)
    np.random.seed(0)
    inputs = torch.eye(4).view(4, 4, 1, 1).clone()  # input i holds nothing but its class
    mixed, shares = objective.mix(inputs, torch.arange(4))
    lam = mixed[0, 0].item()
    assert 0.02 < lam < 0.98
    torch.testing.assert_close(mixed.flatten(1), lam * torch.eye(4) + (1 - lam) * torch.eye(4).flip(0))
    torch.testing.assert_close(shares, (1 - smoothing) * mixed.flatten(1) + smoothing / 4)
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    expected = -(shares * logits.log_softmax(1)).sum(1).mean()
    assert objective.mean(logits, shares).item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_is_no_longer_than_the_clipped_gradient(accumulation: int) -> None:
    torch.manual_seed(0)
    inputs, targets = torch.rand(4, 6, 3, 3), torch.tensor([0, 1, 2, 0])

    def length(clip_norm: float | None) -> float:
        torch.manual_seed(1)
        module = PoolingHead(6, method="gap", num_classes=3, reduction=None)
        before = [parameter.detach().clone() for parameter in module.parameters()]
        learner = Learner(module, torch.optim.SGD(module.parameters(), lr=1.0), Objective(3), Accelerator(cpu=True))
        stepper = Stepper(learner, accumulation=accumulation, clip_norm=clip_norm)
        parts = zip(inputs.chunk(accumulation), targets.chunk(accumulation), strict=True)
        assert stepper.optimizer_step(parts, 4, 1, list).failure is None
        steps = [parameter.detach() - old for parameter, old in zip(module.parameters(), before, strict=True)]
        return float(torch.cat([step.flatten() for step in steps]).norm())

    whole = length(None)
    assert length(2 * whole) == pytest.approx(whole) and length(whole / 4) == pytest.approx(whole / 4, rel=1e-4)


class Reads(TorchDispatchMode):
    """Counts the reads of numbers from the device; on a GPU each waits until all work before it is done."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))

    def counted(self, plain: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        def read(tensor: Tensor) -> Any:
            self.count += 1
            return plain(tensor)

        return read


@pytest.mark.parametrize(("accumulation", "clip_norm"), [(1, None), (3, 0.1)])
def test_a_step_reads_numbers_once(accumulation: int, clip_norm: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    module = PoolingHead(6, method="isqrt_cov", num_classes=3, reduction=4)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    learner = Learner(module, optimizer, Objective(3, mixup=1), Accelerator(cpu=True), ema_decay=0.9)
    stepper = Stepper(learner, accumulation=accumulation, clip_norm=clip_norm)
    parts = [(torch.rand(2, 6, 3, 3), torch.tensor([0, 2]))] * accumulation
    with Reads() as reads, monkeypatch.context() as counted:
        for name in ("tolist", "cpu", "numpy"):  # on the CPU these dispatch no operation
            counted.setattr(Tensor, name, reads.counted(getattr(Tensor, name)))
        assert stepper.optimizer_step(parts, 2 * accumulation, 1, lambda: [True, False]).flags == (1, 0)
    assert reads.count == 1


def test_cutmix_pastes_a_part_and_counts_its_area() -> None:
    objective = Objective(2, cutmix=1.0)
    areas = []
    for seed in range(8):
        np.random.seed(seed)
        inputs = torch.stack([torch.zeros(1, 10, 10), torch.ones(1, 10, 10)])
        mixed, shares = objective.mix(inputs, torch.tensor([0, 1]))
        assert set(mixed.unique().tolist()) == {0.0, 1.0}
        assert shares[0, 1].item() == pytest.approx(mixed[0].mean().item(), abs=1e-6)
        areas.append(shares[0, 1].item())
    assert sum(0 < area < 1 for area in areas) >= 4


def test_a_batch_of_odd_size_stays_unmixed() -> None:
    objective = Objective(4, mixup=1.0, label_smoothing=0.2)
    inputs = torch.rand(3, 1, 2, 2)
    mixed, shares = objective.mix(inputs.clone(), torch.tensor([1, 0, 3]))
    assert torch.equal(mixed, inputs)
    torch.testing.assert_close(shares, 0.8 * torch.eye(4)[[1, 0, 3]] + 0.05)


def a_head(method: str) -> PoolingHead:
    return PoolingHead(6, method=method, num_classes=3, reduction=None)


def test_stages_are_a_function_of_the_epoch() -> None:
    hybrid, schedule = HybridConfig(method="isqrt_cov", options={"iterations": 7}), ScheduleConfig(milestones=[2, 4])
    method, trainer = MethodConfig(name="mpn_cov"), TrainerConfig(epochs=6)
    config = RunConfig(method=method, hybrid=hybrid, schedule=schedule, trainer=trainer)
    head = a_head("mpn_cov")
    last = head.pooling
    assert config.switch_epoch == 4
    stages = Stages(head, config.method, config.hybrid, config.switch_epoch)
    for epoch in (5, 4, 6, 1):
        stages.enter(head, epoch)
        assert stages.method(epoch) == ("isqrt_cov" if epoch <= 4 else "mpn_cov")
        assert (head.pooling is last) == (epoch > 4)
    assert getattr(head.pooling, "iterations", None) == 7


def test_selection_starts_anew_after_the_switch() -> None:
    progress = Progress()
    for epoch, top1, chosen in ((1, 50.0, True), (2, 60.0, True), (3, 60.0, False), (4, 40.0, True), (5, 39.0, False)):
        accuracy = Accuracy(top1, top1, top1)
        assert progress.select(epoch, accuracy, accuracy, "test", since=4 if epoch > 3 else 0) == chosen


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cwd = tmp_path_factory.mktemp("trained")
    succeeded(train(cwd, "run_dir=trained"))
    return cwd


@pytest.fixture
def trained(trained_once: Path, tmp_path: Path) -> Path:
    """Working folder of a run in `trained`."""
    return shutil.copytree(trained_once, tmp_path, dirs_exist_ok=True)


def test_hybrid_run_says_what_each_epoch_was_trained_with(tmp_path: Path, train_here: Train, here: Train) -> None:
    settings = ["trainer.epochs=3", "method=svd_pade", "hybrid.method=isqrt_cov", "schedule.milestones=[1, 2]"]
    done = train_here(tmp_path, *settings)
    assert done.returncode == 0 and "from isqrt_cov to svd_pade at epoch 3" in done.stderr, done.stderr
    folder = tmp_path / "results" / "synthetic" / "test_resnet" / "svd_pade-hybrid" / "seed0"
    assert pd.read_csv(folder / "metrics.csv")["method"].tolist() == ["isqrt_cov", "isqrt_cov", "svd_pade"]
    summary = summary_of(folder)
    assert summary["label"] == "SVD-Padé (hybrid)"
    assert summary["hybrid"] == {"method": "isqrt_cov", "switch_epoch": 2}
    assert summary["best"]["epoch"] == 3
    # what was evaluated last is the method of the last stage: saved weights give the same result
    evaluated = here("evaluate.py", str(folder), cwd=tmp_path)
    assert f"{summary['final']['top1']:.2f}" in evaluated.stdout, evaluated.stderr


def test_hybrid_trains_like_its_stages(tmp_path: Path, train_here: Train) -> None:
    """Its first stage is a run of that method, averaged weights and their evaluation included; its second is not."""
    for name, settings in {
        "hybrid": ["method=mpn_cov", "hybrid.method=isqrt_cov", "hybrid.switch_epoch=1"],
        "plain": ["method=isqrt_cov"],
    }.items():
        assert train_here(tmp_path, f"run_dir={name}", "trainer.ema_decay=0.5", *settings).returncode == 0
    tables = {name: pd.read_csv(tmp_path / name / "metrics.csv") for name in ("hybrid", "plain")}
    for column in ("train_loss", "test_loss"):
        losses = {name: table[column].tolist() for name, table in tables.items()}
        assert losses["hybrid"][0] == losses["plain"][0]
        assert losses["hybrid"][1] != losses["plain"][1]


def test_steps_that_end_before_the_switch_are_refused(tmp_path: Path, train_here: Train) -> None:
    settings = ["method=mpn_cov", "hybrid.method=isqrt_cov", "hybrid.switch_epoch=1"]
    done = train_here(tmp_path, *settings, "trainer.max_steps=3", "run_dir=run")
    refused(done, "trainer.max_steps=3", "after 3 steps")
    assert not (tmp_path / "run").exists()
    assert train_here(tmp_path, *settings, "trainer.max_steps=4", "run_dir=run").returncode == 0


def test_the_average_of_the_weights_is_evaluated_and_saved(
    trained: Path, tmp_path: Path, train_here: Train, here: Train
) -> None:
    succeeded(train_here(tmp_path, "run_dir=run", "trainer.ema_decay=0.5"))
    folder = RunFolder(tmp_path / "run")
    state, last = StateStore(folder.checkpoints).read(), read_weights(folder, "last")
    name = "head.classifier.weight"
    assert torch.equal(last[name], state["average"][name])
    assert not torch.allclose(last[name], state["model"][name])
    plain = read_weights(RunFolder(trained / "trained"), "last")
    assert torch.equal(plain[name], state["model"][name])  # averaging does not change what is trained
    evaluated = here("evaluate.py", "run", cwd=tmp_path)
    assert f"{summary_of(folder.path)['final']['top1']:.2f}" in evaluated.stdout
    # the eigenvalues are those of the averaged weights too
    weights = "initial_weights=run/checkpoints/last.safetensors"
    assert train_here(tmp_path, "run_dir=again", "trainer.epochs=0", weights).returncode == 0
    spectra = [np.load(tmp_path / name / "spectrum.npz")["before"] for name in ("run", "again")]
    np.testing.assert_allclose(*spectra, rtol=1e-5, atol=1e-9)


def test_no_epoch_evaluates_the_initial_weights(trained: Path, tmp_path: Path, train_here: Train) -> None:
    weights = "initial_weights=trained/checkpoints/last.safetensors"
    done = train_here(tmp_path, "run_dir=imported", "trainer.epochs=0", weights)
    assert done.returncode == 0 and "with its classifier" in done.stderr, done.stderr
    source, imported = summary_of(trained / "trained"), summary_of(tmp_path / "imported")
    assert imported["status"] == "finished" and imported["epochs"] == imported["final"]["epoch"] == 0
    for key in ("top1", "top5", "mean_class"):
        assert imported["final"][key] == source["final"][key] == imported["best"][key]
    assert imported["best"]["selected_on"] == "test" and f"{source['final']['top1']:.2f} %" in done.stderr
    ours, theirs = (pd.read_csv(tmp_path / name / "predictions.csv") for name in ("imported", "trained"))
    assert ours["confidence"].tolist() == pytest.approx(theirs["confidence"].tolist(), abs=1e-6)
    assert train_here(tmp_path, "run_dir=held", "trainer.epochs=0", "trainer.val_fraction=0.25").returncode == 0
    assert summary_of(tmp_path / "held")["best"]["selected_on"] == "validation"


def test_initial_weights_of_other_classes_leave_the_classifier_new(trained: Path, train_here: Train) -> None:
    weights = "initial_weights=trained/checkpoints/last.safetensors"
    more = ["dataset.root=more", "dataset.options.classes=4", "run_dir=four", "trainer.epochs=1", weights]
    done = train_here(trained, *more)
    assert done.returncode == 0 and "classifier ignored" in done.stderr, done.stderr
    refused(train_here(trained, "run_dir=other", "method.reduction=6", weights), "another shape")
    assert not (trained / "other").exists()


def test_a_frozen_head_starts_from_initial_weights(trained: Path, train_here: Train, here: Train) -> None:
    """The backbone comes from the file, in training as in a later evaluation; another seed would draw another one."""
    file = trained / "trained" / "checkpoints" / "last.safetensors"
    weights = f"initial_weights={file.relative_to(trained)}"
    succeeded(train_here(trained, "run_dir=head", "seed=5", "backbone.frozen=true", "trainer.epochs=1", weights))
    evaluated = here("evaluate.py", "head", cwd=trained)
    assert f"{summary_of(trained / 'head')['final']['top1']:.2f}" in evaluated.stdout, evaluated.stderr
    save_file({name: 1.5 * tensor for name, tensor in load_file(file).items()}, file)
    refused(here("evaluate.py", "head", "--output", "new", cwd=trained), f"{weights} are not the weights")


PUBLISHED = sorted(path.stem for path in (ROOT / "configs" / "experiment").iterdir())
SMALLER = ["backbone.name=test_resnet", "backbone.weights=null", "method.reduction=8"]
SMALLER += ["dataset.transform.size=64", "dataset.root=nowhere", "initial_weights=null"]


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name[0] != "_" and not name.endswith("_seb")])
def test_dry_run_of_every_experiment(tmp_path: Path, here: Train, name: str) -> None:
    hidden = ["method.hidden=[8, 8]"] if "alexnet" in name else []
    done = succeeded(here("train.py", f"experiment={name}", *SMALLER, *hidden, "--dry-run", cwd=tmp_path))
    for words in ("dry run: ", "2 steps", " random images of 64 px; losses "):
        assert words in done.stdout
    assert "nan" not in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in PUBLISHED if name.endswith(("resnet50", "alexnet", "bn", "_frozen"))]
)
def test_dry_run_at_full_size(tmp_path: Path, name: str) -> None:
    """With the experiment's own backbone, from random weights, and its own image size, as a user starts it."""
    done = succeeded(run("train.py", f"experiment={name}", "dataset.root=nowhere", "--dry-run", cwd=tmp_path))
    assert "2 steps" in done.stdout and "nan" not in done.stdout
    assert list(tmp_path.iterdir()) == []
