"""A factor on the descriptor is a change of the classifier's rate: the algebra, and the study of runs."""

import copy
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from command_line import Train, succeeded
from run_folders import find_runs, write_config, write_run, write_spectrum
from torch import Tensor, nn

from fgvc.errors import RunError
from fgvc.pooling import create_pooling
from fgvc.runs.statistics import two_level_interval
from fgvc.studies.rates.measure import best_values, comparable, curves, read_rates, shifts
from fgvc.studies.rates.show import best_markdown

PLAIN = "MPN-COV (exact)"


class Net(nn.Module):
    """A reduction, the square root times a factor, and a classifier."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(8, 4, 1, bias=False, dtype=torch.float64)
        self.pooling = create_pooling("mpn_cov", channels=4, gradient="exact", scale=scale)
        self.classifier = nn.Linear(10, 5, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.pooling(self.reduction(x)))
        return logits


def trained_logits(net: Net, optimizer: str, rate: float, factor: float, decay: float) -> Tensor:
    """Logits after 60 steps; the classifier's matrix has `rate` times `factor` and `decay`, others have `rate`."""
    torch.manual_seed(1)
    images = torch.randn(12, 8, 5, 5, dtype=torch.float64)
    targets = torch.arange(12) % 5
    others = [*net.reduction.parameters(), net.classifier.bias]
    groups = [
        {"params": [net.classifier.weight], "lr": rate * factor, "weight_decay": decay},
        {"params": others, "lr": rate, "weight_decay": 0.0},
    ]
    kind = {
        "sgd": lambda: torch.optim.SGD(groups, momentum=0.9),
        "adamw": lambda: torch.optim.AdamW(groups, eps=1e-30),
    }
    steps = kind[optimizer]()
    for _ in range(60):
        steps.zero_grad()
        nn.functional.cross_entropy(net(images), targets).backward()
        steps.step()
    return net(images).detach()


@pytest.mark.parametrize(("optimizer", "power"), [("sgd", 2), ("adamw", 1)])
def test_a_factor_on_the_descriptor_is_a_rate(optimizer: str, power: int) -> None:
    """Exact with initial weights times c, and their decay divided by c to the same power; not without the rate."""
    c = 2.65
    torch.manual_seed(0)
    scaled, plain = Net(c), Net(1.0)
    plain.load_state_dict(copy.deepcopy(scaled.state_dict()))
    with torch.no_grad():
        plain.classifier.weight *= c
    unmoved = copy.deepcopy(plain)
    logits = trained_logits(scaled, optimizer, 0.01, 1, 0.03)
    same = trained_logits(plain, optimizer, 0.01, c**power, 0.03 / c**power)
    assert (same - logits).abs().max() < 1e-9 * logits.abs().max()
    assert (trained_logits(unmoved, optimizer, 0.01, 1, 0.03) - logits).abs().max() > 0.01 * logits.abs().max()


C = 2.0
RATES = (0.01, 0.04, 0.16, 0.64, 2.56)


def made_run(
    path: Path,
    method: str,
    rate: float,
    seed: int,
    right: int,
    scale: float | None = None,
    reduction: int = 64,
    **config: object,
) -> None:
    """A run of 100 test images with the first `right` predicted right; the validation accuracy is a point above."""
    gradient = None if method == "seb" else "exact"
    changes = {} if scale is None else {"label": f"{PLAIN} [scale={scale:g}]"}
    write_run(path, method, seed=seed, gradient=gradient, top1=float(right), **changes)
    options = {} if scale is None else {"scale": scale}
    optimizer = {"name": "sgd", "lr": 0.01, "classifier_factor": rate / 0.01}
    settings = {"name": method, "options": options, "reduction": reduction}
    write_config(path, optimizer=optimizer, method=settings, **config)
    lines = [f"{i:03d}.jpg,0,{int(i >= right)},0.5" for i in reversed(range(100))]  # not in the order of paths
    (path / "predictions.csv").write_text("\n".join(["path,target,predicted,confidence", *lines, ""]))
    metrics = f"epoch,train_loss,test_top1,val_top1\n1,1,1,1\n2,0.5,{right},{right + 1}\n"
    (path / "metrics.csv").write_text(metrics)
    if method == "seb":
        write_spectrum(path)


def made_grid(folder: Path) -> pd.DataFrame:
    """The root times c is the plain root moved by c^2 = one step of the grid; SEB is four points worse everywhere."""
    plain = dict(zip(RATES, (40, 60, 80, 90, 84), strict=True))
    scaled = dict(zip(RATES, (60, 80, 90, 84, 50), strict=True))
    for seed in (0, 1, 2):
        for rate in RATES:
            place = f"{rate}/{seed}"
            made_run(folder / "plain" / place, "mpn_cov", rate, seed, plain[rate])
            made_run(folder / "scaled" / place, "mpn_cov", rate, seed, scaled[rate], C)
            made_run(folder / "seb" / place, "seb", rate, seed, plain[rate] - 4)
    table, notes = read_rates(find_runs([folder]))
    assert notes == []
    return table


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rates")
    made_grid(folder)
    return folder


def test_the_table_of_runs(grid: Path) -> None:
    table, _ = read_rates(find_runs([grid]))
    means = curves(table).set_index(["label", "rate"])
    assert means.loc[(PLAIN, 0.64), ["n", "mean", "std", "validation", "factor"]].tolist() == [3, 90, 0, 91, 1]
    assert means.loc[(f"{PLAIN} × c", 0.01), "factor"] == C
    assert means.loc[("SEB", 0.01), "factor"] == pytest.approx(3.07, abs=0.01)  # of the made spectra
    row = table[(table["label"] == PLAIN) & (table["rate"] == 0.64)].iloc[0]
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(row["right"]), np.uint8))[: row["images"]]
    assert bits.tolist() == [1] * 90 + [0] * 10


def test_a_moved_curve_is_found(grid: Path) -> None:
    table, _ = read_rates(find_runs([grid]))
    found = shifts(table, PLAIN).set_index("label").loc[f"{PLAIN} × c"]
    assert found["before"] == pytest.approx((20 + 20 + 10 + 6 + 34) / 5)
    assert found["after"] == pytest.approx(0) and found["rates"] == 4
    assert found["expected_move"] == 4 and found["best_move"] == pytest.approx(4, rel=0.03)


def test_verdicts_on_the_best_values(grid: Path) -> None:
    table, _ = read_rates(find_runs([grid]))
    best = best_values(table, PLAIN, 0.5).set_index("label")
    assert best["rate"].to_dict() == {PLAIN: 0.64, f"{PLAIN} × c": 0.16, "SEB": 0.64}
    assert best["verdict"].fillna("").to_dict() == {PLAIN: "", f"{PLAIN} × c": "equal", "SEB": "different"}
    assert best.loc["SEB", "difference"] == pytest.approx(-4)
    # four of 100 images: the interval of a mean of 96 zeros and 4 times -100 is about -4 +- 1.645 * 1.96
    assert best.loc["SEB", "low"] == pytest.approx(-7, abs=1) and best.loc["SEB", "high"] == pytest.approx(-1, abs=1)
    assert best_values(table, PLAIN, 3).set_index("label").loc["SEB", "verdict"] == "undecided"


def test_an_interval_knows_both_seeds_and_images() -> None:
    seeds = np.repeat([[-1.0], [0.0], [1.0]], 50, axis=1)  # of the means of three draws, 4 in 27 are at most -2 / 3
    assert two_level_interval(seeds, level=0.9) == pytest.approx((-2 / 3, 2 / 3))
    images = np.tile(np.repeat([0.0, 1.0], 50), (3, 1))  # a binomial share of 100 images
    assert two_level_interval(images, level=0.9) == pytest.approx((0.5 - 0.082, 0.5 + 0.082), abs=0.02)


def test_what_cannot_be_compared_is_named(grid: Path, tmp_path: Path) -> None:
    table, _ = read_rates(find_runs([grid]))
    others = table.assign(listed=table["listed"].where(table["label"] != "SEB", "other"))
    with pytest.raises(RunError, match="differ in test images"):
        best_values(others, PLAIN, 0.5)
    made_run(tmp_path / "a", "mpn_cov", 0.01, 0, 40)
    made_run(tmp_path / "b", "mpn_cov", 0.01, 0, 50)
    with pytest.raises(RunError, match=r"two runs of MPN-COV \(exact\) at rate 0\.01 and seed 0: .*a and .*b"):
        read_rates(find_runs([tmp_path]))
    made_run(tmp_path / "c" / "d", "mpn_cov", 0.04, 0, 50, trainer={"batch_size": 7})
    with pytest.raises(RunError, match=r"differ in trainer\.batch_size"):
        read_rates(find_runs([tmp_path / "a", tmp_path / "c"]))
    made_run(tmp_path / "e", "mpn_cov", 0.04, 0, 50, reduction=7)
    with pytest.raises(RunError, match=r"differ in method\.reduction"):
        read_rates(find_runs([tmp_path / "a", tmp_path / "e"]))


def test_a_bad_run_is_left_out_and_a_head_with_few_rates_has_no_distance(grid: Path, tmp_path: Path) -> None:
    made_run(tmp_path / "few" / "0", "svd_pade", 0.01, 0, 40)
    made_run(tmp_path / "few" / "1", "svd_pade", 0.04, 0, 40)
    (tmp_path / "few" / "1" / "metrics.csv").unlink()
    table, (note,) = read_rates(find_runs([grid, tmp_path]))
    assert "left out" in note and "metrics.csv" in note
    good = (tmp_path / "few" / "0" / "config.yaml").read_text()
    shutil.copy(tmp_path / "few" / "0" / "metrics.csv", tmp_path / "few" / "1")
    for old, new in (
        ('"lr": ', '"lr": "x", "_": '),
        ('"lr": ', '"lr": .nan, "_": '),
        ('"options": {}', '"options": {"scale": "big"}'),
        ('"sgd"', '["a"]'),
    ):
        (tmp_path / "few" / "1" / "config.yaml").write_text(good.replace(old, new))
        assert old in good and "left out" in read_rates(find_runs([grid, tmp_path]))[1][0]
    found = shifts(table, PLAIN).set_index("label").loc["SVD-Padé (exact)"]
    assert found[["before", "after", "best_move"]].isna().all()


def test_what_has_no_reference_is_named(grid: Path) -> None:
    table, _ = read_rates(find_runs([grid]))
    with pytest.raises(RunError, match=r"val_fraction=0\.2"):
        best_values(table.assign(validation=float("nan")), PLAIN, 0.5)
    with pytest.raises(RunError, match="no runs of GAP on cub80 with sgd, only of MPN-COV"):
        comparable(table, "GAP")
    more = pd.concat([table, table[table["label"] == "SEB"].assign(optimizer="adamw")])
    kept, (note,) = comparable(more, PLAIN)
    assert len(kept) == len(table) and "on cub80 with adamw, only of SEB" in note


def test_seeds_that_one_label_lacks_are_not_compared(grid: Path) -> None:
    table, _ = read_rates(find_runs([grid]))
    seb = table["label"] == "SEB"
    found = best_values(table[~seb | (table["seed"] > 0)], PLAIN, 0.5).set_index("label")
    assert found["pairs"].fillna(0).to_dict() == {PLAIN: 0, f"{PLAIN} × c": 3, "SEB": 2}
    assert found.loc["SEB", "difference"] == pytest.approx(-4)
    apart = table.assign(seed=table["seed"] + 7 * seb)
    assert best_values(apart, PLAIN, 0.5).set_index("label").loc["SEB", "verdict"] == "no seed in common"
    assert " no seed in common |" in best_markdown(apart, PLAIN, 0.5)


def test_the_move_is_relative_to_the_reference(grid: Path) -> None:
    """Of a reference with a factor of its own, too: here the root times c."""
    table, _ = read_rates(find_runs([grid]))
    found = shifts(table, f"{PLAIN} × c").set_index("label").loc[PLAIN]
    assert found["expected_move"] == 1 / 4 and found["best_move"] == pytest.approx(1 / 4, rel=0.03)
    assert found["after"] == pytest.approx(0)


def test_runs_that_are_no_curve_are_refused(grid: Path, tmp_path: Path) -> None:
    made_run(tmp_path / "c5", "mpn_cov", 0.08, 0, 40, scale=5)
    with pytest.raises(RunError, match=r"× c on cub80 with sgd has 2 and 5 as scale"):
        comparable(read_rates(find_runs([grid, tmp_path / "c5"]))[0], PLAIN)
    made_run(tmp_path / "lr", "mpn_cov", 0.08, 0, 40)
    optimizer = {"name": "sgd", "lr": 0.02, "classifier_factor": 4}
    write_config(tmp_path / "lr", optimizer=optimizer, method={"name": "mpn_cov", "reduction": 64})
    with pytest.raises(RunError, match=r"several values of optimizer\.lr and of optimizer\.classifier_factor"):
        comparable(read_rates(find_runs([grid, tmp_path / "lr"]))[0], PLAIN)


def test_the_study_from_the_command_line(grid: Path, here: Train) -> None:
    done = succeeded(here("study_rates.py", grid, "--output", grid / "out", cwd=grid))
    assert "| SEB, cub80, SGD " in done.stdout and "| undecided |" not in done.stdout
    assert {file.name for file in (grid / "out").glob("[!.]*")} == {"rates.csv", "rates_sgd.png", "rates_sgd.pdf"}
    write_config(grid / "plain" / "0.01" / "0", method={"name": "mpn_cov"})
    done = succeeded(here("study_rates.py", grid, "--output", grid / "out", "--reference", "SEB", cwd=grid))
    assert "optimizer.lr, optimizer.classifier_factor or method.options.scale is no number" in done.stderr
