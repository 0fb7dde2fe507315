"""Smoothness along the gradient: values by hand on simple losses, undisturbed trainings, the command line."""

import copy
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from command_line import Train, refused, succeeded, trainable
from make_docs import beta_markdown
from run_folders import change_summary
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fgvc.errors import ConfigError, RunError
from fgvc.inference.restore import restore_run
from fgvc.models import PoolingHead
from fgvc.presentation.style import METHOD_STYLES
from fgvc.runs import RunConfig
from fgvc.runs.config import MethodConfig, OptimizerConfig
from fgvc.studies.smoothness.measure import (
    SMOOTHNESS_COLUMNS,
    load_smoothness,
    smoothness_along_gradient,
    smoothness_curve,
    summarise_smoothness,
)
from fgvc.studies.smoothness.show import smoothness_figure, smoothness_markdown, write_smoothness
from fgvc.studies.smoothness.study import smoothness_of_run, smoothness_study
from fgvc.training import train_run

SIZES = (0.1, 0.5, 2.0)


class Function(nn.Module):
    """A loss of one vector of weights."""

    def __init__(self, x: Tensor, f: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.x = nn.Parameter(x)
        self.f = f

    def forward(self, inputs: Tensor) -> Tensor:
        return self.f(self.x, inputs)


def same(value: Tensor) -> Tensor:
    return value


def test_quadratic_loss_has_the_curvature_along_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    root, x = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((4, 4), (4,)))
    a = root @ root.T
    found = smoothness_along_gradient(Function(x, lambda x, a: x @ a @ x / 2), a, same, SIZES)
    g = a @ x
    assert found.loss == pytest.approx(float(x @ a @ x / 2))
    assert found.gradient_norm == pytest.approx(float(g.norm()))
    assert found.beta == pytest.approx(float((a @ g).norm() / g.norm()))
    assert found.step_sizes == SIZES
    # against the gradient: the linear term lowers the loss
    assert found.losses == pytest.approx([found.loss - s * float(g @ g) + s**2 / 2 * float(g @ a @ g) for s in SIZES])
    assert found.gradient_changes == pytest.approx([s * float((a @ g).norm()) for s in SIZES])


def test_linear_loss_is_perfectly_smooth() -> None:
    slope = torch.tensor([3.0, 4.0])
    found = smoothness_along_gradient(Function(torch.ones(2), torch.dot), slope, same, SIZES)
    assert found.beta == 0 and found.gradient_changes == (0, 0, 0)
    assert found.losses == pytest.approx([7 - 25 * s for s in SIZES], rel=1e-5)
    # a longer gradient than 1 is clipped as the optimiser would: s of 0.1 becomes 0.1 / 5
    clipped = smoothness_along_gradient(Function(torch.ones(2), torch.dot), slope, same, SIZES, clip_norm=1.0)
    assert clipped.step_sizes == pytest.approx([s / 5 for s in SIZES]) and clipped.gradient_norm == 5
    assert clipped.losses == pytest.approx([7 - 5 * s for s in SIZES], rel=1e-5)


def test_what_has_no_number() -> None:
    flat = smoothness_along_gradient(Function(torch.zeros(2), lambda x, _: (x**2).sum()), torch.ones(1), same, SIZES)
    assert math.isnan(flat.beta) and flat.gradient_changes == (0, 0, 0)
    # sqrt ends at zero: x - s g = 1 - s / 2
    cliff = smoothness_along_gradient(Function(torch.ones(1), lambda x, _: x.sqrt().sum()), torch.ones(1), same, (1, 3))
    assert cliff.losses == (pytest.approx(math.sqrt(0.5)), math.inf) and cliff.beta == math.inf and cliff.finite
    with pytest.raises(ConfigError, match="features"):
        smoothness_along_gradient(
            nn.ModuleDict({"classifier": nn.Linear(1, 1)}), torch.ones(1), same, (1.0,), weights="features"
        )


def test_dropout_draws_the_same_in_every_place() -> None:
    module = nn.Sequential(nn.Linear(50, 1, bias=False), nn.Dropout(0.5))  # linear in its weights
    found = smoothness_along_gradient(module, torch.randn(4, 50), lambda out: out.sum(), SIZES)
    assert found.gradient_changes == (0, 0, 0)


def test_module_is_left_as_found() -> None:
    module = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.ReLU(), nn.Linear(5, 2)).train()
    module(torch.randn(4, 3)).sum().backward()
    before = copy.deepcopy(module)
    gradients = [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]
    generator = torch.get_rng_state()
    inputs = torch.randn(4, 3, generator=torch.Generator())
    smoothness_along_gradient(module, inputs, lambda out: out.square().sum(), SIZES)
    assert torch.get_rng_state().equal(generator)
    for (name, value), old in zip(module.state_dict().items(), before.state_dict().values(), strict=True):
        assert value.equal(old), name
    for parameter, old in zip(module.parameters(), gradients, strict=True):
        assert parameter.grad is not None and parameter.grad.equal(old)
    assert module.training and module[1].training


def test_features_alone_are_moved() -> None:
    head = PoolingHead(6, method="seb", num_classes=3, reduction=4).double().train()
    x, targets = torch.randn(5, 6, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    found = smoothness_along_gradient(head, x, lambda y: cross_entropy(y, targets), (0.3,), weights="features")
    moved = copy.deepcopy(head)
    cross_entropy(moved(x), targets).backward()
    gradient = [parameter.grad.clone() for parameter in moved.reduction.parameters() if parameter.grad is not None]
    assert found.gradient_norm == pytest.approx(math.hypot(*(float(g.norm()) for g in gradient)))
    with torch.no_grad():
        for parameter, g in zip(moved.reduction.parameters(), gradient, strict=True):
            parameter -= 0.3 * g
    assert found.losses == pytest.approx([cross_entropy(moved(x), targets).item()])


# --- trainings ---


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run whose backbone is trained, with mixed inputs."""
    config = trainable(tmp_path_factory.mktemp("runs"), method=MethodConfig(name="mpn_cov", reduction=8))
    config.optimizer.lr, config.trainer.epochs, config.trainer.mixup = 0.05, 2, 0.5
    return config


@pytest.fixture(scope="module")
def finished(config: RunConfig) -> Path:
    return train_run(config)


def test_measured_training_is_the_same_to_the_last_bit(config: RunConfig, finished: Path, tmp_path: Path) -> None:
    seen = []

    def measure(step: int, module: nn.Module, inputs: Tensor, loss: Callable[[Tensor], Tensor]) -> None:
        seen.append((step, smoothness_along_gradient(module, inputs, loss, [0.1]).loss))

    measured = train_run(replace(config, run_dir=str(tmp_path / "run")), before_step=measure)
    weights, expected = (load_file(run / "checkpoints" / "last.safetensors") for run in (measured, finished))
    assert all(weights[name].equal(expected[name]) for name in expected)
    assert [step for step, _ in seen] == [1, 2, 3, 4, 5, 6]
    losses = pd.read_csv(finished / "metrics.csv")["train_loss"]
    np.testing.assert_allclose([np.mean([loss for _, loss in seen[at : at + 3]]) for at in (0, 3)], losses, rtol=1e-5)


def test_curve_measures_every_nth_step(config: RunConfig) -> None:
    curve = smoothness_curve(config, every=3, step_factors=(1, 2))
    assert curve["step"].tolist() == [1, 4] and not curve["diverged"].any()
    assert set(curve["label"]) == {"MPN-COV"} and set(curve["point"]) == {"training"} and set(curve["seed"]) == {0}
    np.testing.assert_allclose(curve["step_size_max"], 2 * curve["step_size_min"])
    assert (curve["step_size_min"] <= 0.05).all()
    assert (curve["beta"] > 0).all() and (curve["gradient_change_max"] >= curve["gradient_change_min"]).all()


def test_divergence_is_recorded(config: RunConfig) -> None:
    unclipped = replace(config.trainer, clip_norm=None)
    curve = smoothness_curve(replace(config, optimizer=OptimizerConfig(lr=1e30), trainer=unclipped), every=1)
    assert curve["diverged"].tolist()[-1] and not curve["diverged"].tolist()[0]
    assert curve["beta"].iloc[0] == math.inf and math.isnan(curve["beta"].iloc[-1])


def test_study_trains_each_method_and_seed(config: RunConfig, finished: Path) -> None:
    before = {file: file.read_bytes() for file in finished.rglob("*") if file.is_file()}
    table, notes = smoothness_study(finished, ["mpn_cov-exact", "isqrt_cov"], [0, 1], epochs=1, every=2)
    assert notes == [] and table["step"].tolist() == [1, 3] * 4
    assert table["label"].tolist() == ["MPN-COV (exact)"] * 4 + ["iSQRT-COV"] * 4
    assert table["seed"].tolist() == [0, 0, 1, 1] * 2 and set(table["gradient"]) == {"exact", ""}
    assert {file: file.read_bytes() for file in finished.rglob("*") if file.is_file()} == before
    # the run's own forward pass on the run's own first batch, and another one
    own = smoothness_curve(config, every=6)["loss"].iloc[0]
    assert table["loss"].iloc[0] == pytest.approx(own) and table["loss"].iloc[2] != pytest.approx(own)


def test_saved_weights_are_measured_on_training_images(finished: Path) -> None:
    own = smoothness_of_run(finished, batches=9)
    assert len(own) == 3 and set(own["label"]) == {"MPN-COV"} and set(own["point"]) == {"last"}
    others = smoothness_of_run(finished, ["mpn_cov", "svd_newton", "isqrt_cov"], batches=2)
    columns = ["step", "loss", "gradient_norm", "beta"]
    pd.testing.assert_frame_equal(others[:2][columns], own[:2][columns])
    # another gradient of the same loss, and another loss
    assert others["loss"].tolist()[2:4] == others["loss"].tolist()[:2] != others["loss"].tolist()[4:]
    assert others["gradient_norm"].tolist()[2:4] != others["gradient_norm"].tolist()[:2]


def test_training_images_of_a_frozen_run_are_those_it_saw(config: RunConfig, tmp_path: Path) -> None:
    trainer = replace(config.trainer, epochs=1, val_fraction=0.5)
    frozen = replace(
        config, run_dir=str(tmp_path / "run"), backbone=replace(config.backbone, frozen=True), trainer=trainer
    )
    run = train_run(frozen)
    restored = restore_run(run, torch.device("cpu"), split="train")
    assert (len(restored.images), restored.inputs().shape[:2]) == (6, (2, 6))  # two views: mirrored or not
    assert len(restore_run(run, torch.device("cpu")).images) == 9
    assert len(smoothness_of_run(run, batches=9)) == 2


# --- tables and figures ---


def fabricated(label: str, seed: int, betas: list[float], **changes: object) -> pd.DataFrame:
    """Measures of one training; what is not beta follows from its place."""
    step = np.arange(1, 10 * len(betas), 10)
    row = {
        "setting": "cub80, sgd",
        "point": "training",
        "weights": "all",
        "method": "m",
        "gradient": "",
        "label": label,
    }
    row |= {"seed": seed, "step": step, "diverged": False, "loss": 1.0, "gradient_norm": 2.0}
    row |= {"step_size_min": 0.1, "step_size_max": 0.4, "loss_min": 0.5, "loss_max": [0.5 + beta for beta in betas]}
    row |= {"gradient_change_min": 0.0, "gradient_change_max": betas, "beta": betas}
    return pd.DataFrame(row | changes)


def diverged(label: str, seed: int, step: int) -> pd.DataFrame:
    measures = fabricated(label, seed, [0.0]).columns[9:]
    return fabricated(label, seed, [0.0]).assign(step=step, diverged=True, **dict.fromkeys(measures, np.nan))


@pytest.fixture
def table() -> pd.DataFrame:
    parts = [
        fabricated("SEB", 0, [1, 2, 3]),
        fabricated("SEB", 1, [4, 5, math.inf]),
        fabricated("iSQRT-COV", 0, [1, 1, 1]),
    ]
    return pd.concat([*parts, diverged("SEB", 1, 26), diverged("SVD-Taylor", 0, 1)], ignore_index=True)


def test_summary_pools_steps_and_seeds(table: pd.DataFrame) -> None:
    summary = summarise_smoothness(table).set_index("label")
    assert summary.index.tolist() == ["SEB", "iSQRT-COV"]  # nothing was measured of the third
    seb = summary.loc["SEB"]
    assert (seb["seeds"], seb["points"], seb["diverged"]) == (2, 6, 1)
    assert [seb[f"beta{end}"] for end in ("_lower", "", "_upper", "_seed_min", "_seed_max")] == [2, 3, 5, 2, 5]
    assert (seb["relative_change"], seb["loss_range"]) == (1.5, 3)
    text = smoothness_markdown(table)
    assert "2 (1 diverged)" in text and "3 [2, 5] {2 – 5}" in text and text.index("iSQRT") < text.index("SEB")
    nowhere = fabricated("SEB", 0, [math.inf], loss_min=math.inf, loss_max=math.inf)
    assert summarise_smoothness(nowhere)["loss_range"].tolist() == [math.inf]
    with pytest.raises(RunError, match=r"SVD-Taylor, seed 0: diverged at step 1"):
        summarise_smoothness(table[table["label"] == "SVD-Taylor"])


def test_beta_is_compared_step_by_step() -> None:
    table = pd.DataFrame({name: [0.0] * 6 for name in SMOOTHNESS_COLUMNS}).assign(
        setting="s", point="training", weights="all", gradient="", diverged=False, loss_max=1.0, gradient_norm=1.0
    )
    table["label"], table["step"], table["seed"] = ["A"] * 3 + ["B"] * 3, [1, 2, 3] * 2, 0
    table["beta"] = [1.0, 2.0, 4.0, 3.0, 4.0, 20.0]
    assert "| 3 [2, 5] |" in beta_markdown(table, "A").replace("  ", "")


def test_figure_has_a_curve_a_method_and_marks_where_it_ends(table: pd.DataFrame) -> None:
    figure = smoothness_figure(table)
    figure.draw_without_rendering()
    beta = figure.axes[2]
    curves = {line.get_label(): line for line in beta.lines if not str(line.get_label()).startswith("_")}
    assert list(curves) == ["iSQRT-COV", "SVD-Taylor", "SEB"]
    assert curves["SEB"].get_color() == METHOD_STYLES["SEB"].color
    np.testing.assert_array_equal(curves["SEB"].get_ydata(), [2.5, 3.5, np.nan])  # a gap under the triangle
    marks = {
        (line.get_color(), line.get_marker(), line.get_xdata()[0]) for line in beta.lines if len(line.get_xdata()) == 1
    }
    seb, taylor = (METHOD_STYLES[label].color for label in ("SEB", "SVD-Taylor"))
    assert marks == {(seb, "x", 26), (seb, "^", 21), (taylor, "x", 1)}
    assert beta.get_yscale() == "log"


def test_saved_measures_give_the_same_again(table: pd.DataFrame, tmp_path: Path) -> None:
    written = write_smoothness(table, tmp_path / "a")
    assert [file.name for file in written] == [f"smoothness.{kind}" for kind in ("csv", "md", "png", "pdf")]
    read = load_smoothness(written[0])
    pd.testing.assert_frame_equal(read, table, check_dtype=False)
    for old, new in zip(written, write_smoothness(read, tmp_path / "b"), strict=True):
        assert old.read_bytes() == new.read_bytes(), old.name


def test_damaged_or_mixed_measures_are_refused(table: pd.DataFrame, tmp_path: Path) -> None:
    file = tmp_path / "smoothness.csv"
    for damaged, message in (
        (table.drop(columns="beta"), "no column beta"),
        (table.astype({"beta": object}).assign(beta="high"), "column beta holds 'high'"),
        (table.assign(diverged="maybe"), "column diverged holds 'maybe'"),
        (table[:0], "no row"),
    ):
        damaged.to_csv(file, index=False)
        with pytest.raises(RunError, match=message):
            load_smoothness(file)
    mixed = pd.concat([table, table.assign(setting="cub80, adamw")])
    with pytest.raises(RunError, match="different setting do not compare: cub80, sgd; cub80, adamw"):
        smoothness_figure(mixed)
    with pytest.raises(RunError, match="different weights"):
        summarise_smoothness(pd.concat([table, table.assign(weights="features")]))


# --- the command line ---


def test_script_trains_measures_and_draws(finished: Path, tmp_path: Path, here: Train) -> None:
    limits = ["--seeds", "0,1", "--steps", "2", "--every", "2", "--step-factors", "1,3"]
    done = here("study_smoothness.py", finished, "--methods", "mpn_cov,svd_taylor", *limits, cwd=tmp_path)
    assert done.returncode == 0 and "note:" not in done.stderr, done.stderr
    assert "| MPN-COV " in done.stdout and "| SVD-Taylor " in done.stdout and "sgd lr 0.05, clipped at 5" in done.stdout
    table = load_smoothness(tmp_path / "figures" / "smoothness.csv")
    assert len(table) == 4 and table["step"].eq(1).all()
    np.testing.assert_allclose(table["step_size_max"], 3 * table["step_size_min"], rtol=1e-4)
    assert (tmp_path / "figures" / "smoothness.pdf").read_bytes().startswith(b"%PDF")


def test_script_measures_saved_weights_of_a_folder(finished: Path, tmp_path: Path, here: Train) -> None:
    shutil.copytree(finished, tmp_path / "runs" / "mpn_cov")
    options = ["--checkpoint", "best", "--batches", "1", "--weights", "features", "--strict"]
    done = succeeded(here("study_smoothness.py", "runs", *options, cwd=tmp_path))
    assert "the best weights" in done.stdout and "in front of the classifier" in done.stdout
    # next to it one that was stopped, and one whose weights are gone
    for name, changes in {"stopped": {"status": "stopped", "seed": 1}, "lost": {"seed": 2}}.items():
        change_summary(shutil.copytree(finished, tmp_path / "runs" / name), **changes)
    (tmp_path / "runs" / "lost" / "checkpoints" / "best.safetensors").unlink()
    done = here("study_smoothness.py", "runs", *options, cwd=tmp_path)
    assert done.returncode == 1 and "| MPN-COV " in done.stdout
    assert "note: left out runs/stopped: status stopped" in done.stderr
    assert "note: left out runs/lost: " in done.stderr and "best.safetensors is missing" in done.stderr
    shutil.rmtree(tmp_path / "runs" / "mpn_cov")
    refused(here("study_smoothness.py", "runs", *options, cwd=tmp_path), "no run could be measured", "runs/lost")


def test_mistakes_exit_with_2(config: RunConfig, finished: Path, tmp_path: Path, here: Train) -> None:
    gap = replace(config, run_dir=str(tmp_path / "gap"), method=MethodConfig(name="gap", reduction=8))
    train_run(replace(gap, trainer=replace(config.trainer, epochs=1)))
    change_summary(shutil.copytree(finished, tmp_path / "stopped"), status="stopped")
    for arguments, parts in {
        ("nowhere",): ["nowhere", "config.yaml"],
        ("stopped",): ["stopped", "not finished"],
        ("nowhere", "--checkpoint", "last"): ["nowhere", "no such folder"],
        ("gap", "--checkpoint", "last"): ["gap", "GAP maps no covariance"],
        (finished, "--methods", "mpn_cov,svd_py"): ["svd_py", "svd_pade"],
        (finished, "--methods", "gap"): ["gap", "no covariance"],
        (finished, "--methods", "svd_topn"): ["svd_topn", "keep=N"],
        (finished, "--methods", "mpn_cov-magic"): ["magic"],
        (finished, "--seeds", "-1", "--methods", "mpn_cov"): ["seeds", "-1"],
        (finished, "--every", "0", "--methods", "mpn_cov"): ["every", "0"],
        (finished, "--epochs", "0", "--methods", "mpn_cov"): ["epochs", "0"],
        (finished, "--steps", "0", "--methods", "mpn_cov"): ["max_steps", "0"],
        (finished, "--steps", "1", "--epochs", "1", "--methods", "mpn_cov"): ["not both"],
        (finished, "--step-factors", "0", "--methods", "mpn_cov"): ["step factors", "0"],
        (finished, "--checkpoint", "last", "--batches", "0"): ["batches", "0"],
    }.items():
        refused(here("study_smoothness.py", *arguments, cwd=tmp_path), *parts)
