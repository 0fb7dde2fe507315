"""Parts of the spectrum: what a head makes of them, and the study of runs that keep them."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from command_line import Train, refused, succeeded
from run_folders import find_runs, write_config, write_run
from scipy import stats

from fgvc.errors import RunError
from fgvc.models import PoolingHead
from fgvc.spectral import SCALED_SQRT, SQRT, Band, spectral_descriptor
from fgvc.studies.truncation.bands import ALL, band_predictions, evaluate_bands, restrict_spectrum, standard_bands
from fgvc.studies.truncation.measure import Study, band_table, effects, load_study, read_grid
from fgvc.studies.truncation.show import bands_figure, effects_figure, effects_markdown


def a_head(method: str, **options: object) -> PoolingHead:
    torch.manual_seed(0)
    return PoolingHead(6, method=method, num_classes=3, reduction=None, options=options).eval()


def maps(count: int = 5, channels: int = 6, size: int = 4) -> torch.Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("keep", [2, (1, 3), (3, None)])
@pytest.mark.parametrize(("method", "f"), [("mpn_cov", SQRT), ("seb", SCALED_SQRT)])
def test_a_restricted_head_maps_the_truncated_covariance(method: str, f: object, keep: object) -> None:
    head, x = a_head(method), maps()
    with restrict_spectrum(head, keep):  # type: ignore[arg-type]
        restricted = head.pooling(x)
    expected = spectral_descriptor(x, f, keep=keep)  # type: ignore[arg-type]
    torch.testing.assert_close(restricted, expected)
    assert (restricted - head.pooling(x)).abs().max() > 0.1


def test_newton_schulz_with_all_eigenvalues_is_the_iteration_itself() -> None:
    head, x = a_head("isqrt_cov", iterations=3), maps()
    whole = head.pooling(x)
    with restrict_spectrum(head, ALL):
        torch.testing.assert_close(head.pooling(x), whole)
    with restrict_spectrum(head, 1):
        assert (head.pooling(x) - whole).abs().max() > 0.1


def test_heads_without_a_whole_spectrum_are_refused() -> None:
    for head, message in ((a_head("gap"), "normalises no covariance"), (a_head("svd_topn", keep=3), r"\(0, 3\)")):
        with pytest.raises(RunError, match=message), restrict_spectrum(head, 2):
            pass


def test_predictions_by_band() -> None:
    head, x = a_head("mpn_cov"), maps(20)
    x = x * torch.linspace(-2, 2, 20 * 6).reshape(20, 6, 1, 1).exp().flip(1)  # channels of other variance in each image
    bands = [ALL, Band(0, 1), Band(1, None)]
    predicted = band_predictions(head, x, bands)
    assert torch.equal(predicted[0], head(x).argmax(dim=1))
    assert predicted.shape == (3, 20) and not torch.equal(predicted[0], predicted[2])


def test_standard_bands_cover_both_ends_and_the_middle() -> None:
    bands = standard_bands(20)
    assert bands[0] == ALL and len(bands) == len(set(bands))
    assert {(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (19, None), (4, None), (8, 16)} <= set(bands)
    assert standard_bands(1) == [ALL]


def grid_runs(folder: Path) -> list[Path]:
    """Three seeds each of the whole root, of all but its 4 largest eigenvalues, and of its 8 largest, leaking."""
    kinds = {
        "whole": ([90.0, 91.0, 92.0], {"name": "mpn_cov", "gradient": "exact", "options": {}}),
        "small": ([80.0, 82.0, 83.0], {"name": "svd_topn", "gradient": "exact", "options": {"keep": [4, None]}}),
        "leak": ([2.0, 1.0, 3.0], {"name": "svd_topn", "gradient": None, "options": {"keep": 8}}),
    }
    paths = []
    for name, (tops, method) in kinds.items():
        changes = {"gradient": method["gradient"], "label": f"L-{name}"}
        for seed, top1 in enumerate(tops):
            path = write_run(folder / name / f"seed{seed}", method["name"], top1=top1, seed=seed, **changes)
            write_config(path, method=method)
            paths.append(path)
    return paths


def test_effects_are_paired_by_seed(tmp_path: Path) -> None:
    grid_runs(tmp_path)
    grid, _ = read_grid(find_runs([tmp_path]))
    table = effects(grid, "L-whole").set_index("label")
    differences = np.array([-10.0, -9.0, -9.0])
    assert table.loc["L-small", "difference"] == pytest.approx(differences.mean())
    expected = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert (table.loc["L-small", "low"], table.loc["L-small", "high"]) == pytest.approx((expected.low, expected.high))
    assert table.loc["L-whole", "difference"] == 0
    with pytest.raises(RunError, match="choose one of L-"):
        effects(grid, "SEB")


def test_seeds_without_a_partner_are_not_compared(tmp_path: Path) -> None:
    paths = grid_runs(tmp_path)
    for path in paths[1:3]:  # the reference keeps its first seed only
        (path / "summary.json").unlink()
    table = effects(read_grid(find_runs([tmp_path]))[0], "L-whole").set_index("label")
    assert table.loc["L-small", ["pairs", "difference"]].tolist() == [1, -10.0]
    assert np.isnan(table.loc["L-small", "low"])
    assert " -10.00 |" in effects_markdown(table.reset_index(), "L-whole")


def test_bands_of_a_grid(tmp_path: Path) -> None:
    grid_runs(tmp_path)
    grid, _ = read_grid(find_runs([tmp_path]))
    tested = pd.DataFrame(
        {"label": "L-whole", "seed": [0, 0], "start": [0, 2], "stop": [pd.NA, 4], "rank": 48, "top1": [90.0, 5.0]}
    ).astype({"stop": "Int64"})
    table = band_table(Study(grid, tested, tested[:0]), "L-whole")
    found = {(row["curve"], row["kind"], row["start"]): row["mean"] for row in table.to_dict("records")}
    expected = {("test", "all", 0): 90.0, ("test", "window", 2): 5.0, ("exact", "all", 0): 91.0}
    expected |= {("exact", "smallest", 4): pytest.approx(245 / 3), ("published", "all", 0): 91.0}
    assert found == expected | {("published", "largest", 0): 2.0}
    figure = bands_figure(table, guessing=1.25)
    largest, smallest, window = figure.axes
    assert [len(axes.containers) for axes in (largest, smallest, window)] == [3, 3, 1]
    compared = effects(grid, "L-whole")
    assert len(effects_figure(compared, grid, "L-whole").axes[0].containers) == 2


def test_another_head_that_sees_all_eigenvalues_is_no_repetition(tmp_path: Path) -> None:
    grid_runs(tmp_path)
    path = write_run(tmp_path / "other", "mpn_cov", top1=10.0, seed=7, label="L-other")
    write_config(path, method={"name": "mpn_cov", "options": {"alpha": 0.1}})
    grid, _ = read_grid(find_runs([tmp_path]))
    tested = pd.DataFrame(
        {"label": ["L-whole", "L-other"], "start": 0, "stop": [2, 2], "top1": [80.0, 4.0], "rank": 48}
    )
    table = band_table(Study(grid, tested.astype({"stop": "Int64"}), tested[:0]), "L-whole").set_index(
        ["curve", "kind"]
    )
    assert table.loc[("exact", "all"), ["n", "mean"]].tolist() == [3, 91.0]
    assert table.loc[("test", "largest"), ["n", "mean"]].tolist() == [1, 80.0]


def test_parts_without_an_end_have_an_axis(tmp_path: Path) -> None:
    for path in grid_runs(tmp_path)[6:]:  # the leaking ones, which have an end
        (path / "summary.json").unlink()
    grid, notes = read_grid(find_runs([tmp_path]))
    assert len(notes) == 6 and "without rank and factor: " in notes[0] and "spectrum.npz" in notes[0]
    empty = grid[:0].assign(rank=0)
    assert set(band_table(Study(grid, empty, empty), "L-whole")["rank"]) == {4}


@pytest.mark.parametrize("options", [[1], {"keep": ["a", "b"]}, {"keep": [None, 3]}, {"keep": True}])
def test_damaged_options_are_named(tmp_path: Path, options: object) -> None:
    path = write_run(tmp_path / "run", "mpn_cov")
    write_config(path, method={"name": "mpn_cov", "options": options})
    with pytest.raises(RunError, match=r"config\.yaml: "):
        read_grid(find_runs([tmp_path]))


def test_one_seed_twice_is_refused(tmp_path: Path) -> None:
    grid_runs(tmp_path)
    grid, _ = read_grid(find_runs([tmp_path]))
    with pytest.raises(RunError, match="two runs of L-whole with seed 0"):
        effects(pd.concat([grid, grid[grid["label"] == "L-whole"]]), "L-whole")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


def test_the_study_from_the_command_line(trained: Path, train_here: Train, here: Train) -> None:
    frozen = ["backbone.frozen=true", "name=s", "trainer.epochs=1"]
    for overrides in (
        ["method=mpn_cov", "method.gradient=exact"],
        ["method=svd_topn", "method.gradient=exact", "+method.options.keep=[1,null]"],
        ["method=gap"],
    ):
        assert train_here(trained, *frozen, *overrides).returncode == 0
    runs = trained / "results" / "s" / "test_resnet"
    assert sorted(path.name for path in runs.iterdir()) == ["gap", "mpn_cov-exact", "svd_topn-exact-keep_1_None"]
    done = succeeded(here("study_truncation.py", "results/s", "--output", "out", cwd=trained))
    assert "SVD-TopN (exact) [keep=1:]" in done.stdout
    assert "note: not cut at test time: " in done.stderr and "gap/seed0: its head normalises no cov" in done.stderr
    study = load_study(trained / "out")
    whole = study.tested[(study.tested["start"] == 0) & study.tested["stop"].isna()]
    grid = study.grid.set_index("label")
    assert whole["top1"].tolist() == pytest.approx([grid.loc["MPN-COV (exact)", "top1"]])
    assert (grid.loc["SVD-TopN (exact) [keep=1:]", "start"], grid.loc["GAP", "start"]) == (1, 0)
    assert study.classes["class"].nunique() == 3
    for name in ("bands", "effects"):
        assert (trained / "out" / f"{name}.pdf").stat().st_size > 1000
    assert here("study_truncation.py", "results/s", "--strict", "--output", "out", cwd=trained).returncode == 1
    refused(here("study_truncation.py", "results/s", "--reference", "X", "--no-cut", cwd=trained), "'X'", "GAP")


def test_a_band_of_a_run(trained: Path) -> None:
    moved = {"root": str(trained / "datasets" / "synthetic"), "cache": str(trained / "results" / "cache")}
    path = trained / "results" / "s" / "test_resnet" / "mpn_cov-exact" / "seed0"
    table = evaluate_bands(path, [Band(0, 2)], **moved)
    assert table[["start", "stop"]].drop_duplicates().to_numpy().tolist() == [[0, 2]]
    assert table["images"].tolist() == [3, 3, 3]
    with pytest.raises(RunError, match="normalises no covariance"):
        evaluate_bands(path.parents[1] / "gap" / "seed0", **moved)
