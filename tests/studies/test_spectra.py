"""Spectra as they are shown: curves of methods, and by epoch, by class, across backbones, through layers."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from command_line import Train, refused, succeeded
from matplotlib.figure import Figure
from matplotlib.image import imread
from run_folders import find_runs, write_run, write_spectrum

from fgvc.errors import RunError
from fgvc.inference.pooling_inputs import look_again
from fgvc.presentation.render import block_markdown
from fgvc.presentation.style import METHOD_STYLES, figure_style, method_order, method_style, new_figure, save_figure
from fgvc.runs.spectra import smallest_share
from fgvc.studies.spectra import measure, show
from fgvc.studies.spectra.views import VIEWS, Options


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for method, channels in (("seb", 64), ("isqrt_cov", 64), ("gap", 320)):
        for seed in (0, 1):
            path = write_run(tmp_path / "runs" / method / f"seed{seed}", method, seed=seed)
            write_spectrum(path, channels=channels, images=12, seed=seed)
    return tmp_path / "runs"


def test_every_method_has_its_own_look_that_depends_on_its_label_alone() -> None:
    styles = {label: method_style(label) for label in [*METHOD_STYLES, "SVD-TopN (exact)", "SEB (exact)"]}
    assert len({style.color for style in styles.values()}) == len(styles)
    assert len({(style.dash, style.marker) for style in METHOD_STYLES.values()}) == len(METHOD_STYLES)
    assert styles["SVD-TopN (exact)"].marker == styles["SVD-TopN"].marker
    assert method_style("a new method") == method_style("a new method")


def test_order_of_labels() -> None:
    labels = ["Zeta", "SEB (exact)", "SEB", "Alpha", "GAP", "SVD-PI"]
    assert sorted(labels, key=method_order) == ["GAP", "SVD-PI", "SEB", "SEB (exact)", "Alpha", "Zeta"]


def test_curve_is_the_median_over_images_of_all_seeds() -> None:
    before = np.array([[9.0, 1.0], [7.0, 2.0], [5.0, 3.0]])
    with figure_style():
        axes = new_figure(3.3, 2.5).subplots()
        show.plot_eigenvalues(
            axes, measure.curve_table([measure.MethodSpectrum("SEB", (0, 1), before, before**0.5)]), "before"
        )
    (line,) = axes.lines
    np.testing.assert_array_equal(line.get_xdata(), [1, 2])
    np.testing.assert_array_equal(line.get_ydata(), [7, 2])
    assert axes.get_yscale() == "log" and line.get_color() == METHOD_STYLES["SEB"].color


def test_axes_end_at_the_numerical_rank_not_at_rounding_noise(folder: Path) -> None:
    figure = show.spectra_figure(measure.curve_table(measure.pool_spectra(find_runs([folder]))), "title")
    for axes, methods in zip(figure.axes, (3, 2), strict=True):
        assert len(axes.lines) == methods
        bottom, top = axes.get_ylim()
        assert 1e-6 < bottom < top < 1e6
        assert 48 < axes.get_xlim()[1] < 60
        for line in axes.lines:
            values = np.asarray(line.get_ydata())
            assert (values[:48] > bottom).all() and (values[48:] < bottom).all()


def test_legend_and_table_are_in_the_order_of_methods_and_pool_the_seeds(folder: Path) -> None:
    spectra = measure.pool_spectra(find_runs([folder]))
    (legend,) = show.spectra_figure(measure.curve_table(spectra), "title").legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["GAP (d = 320)", "iSQRT-COV (d = 64)", "SEB (d = 64)"]
    lines = block_markdown(show.spectra_block(spectra)).splitlines()
    gap, isqrt, _ = ([part.strip() for part in line.split("|")[1:-1]] for line in lines[2:])
    assert gap[:5] == ["GAP", "2", "24", "320", "48"] and gap[8] == gap[10] == "–"
    assert isqrt[:5] == ["iSQRT-COV", "2", "24", "64", "48"]


@pytest.mark.parametrize("before", [np.zeros((2, 4)), np.ones((1, 1))], ids=["constant features", "one channel"])
def test_degenerate_spectra_are_drawn_alike_every_time_with_embedded_fonts(tmp_path: Path, before: np.ndarray) -> None:
    curves = measure.curve_table([measure.MethodSpectrum("GAP", (0,), before, None)])
    first, second = (save_figure(show.spectra_figure(curves, "title"), tmp_path / name) for name in ("a", "b"))
    assert [one.read_bytes() for one in first] == [other.read_bytes() for other in second]
    pdf = first[1].read_bytes()
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf


def test_script_notes_a_failed_run_and_refuses_what_it_cannot_draw(folder: Path, tmp_path: Path, here: Train) -> None:
    write_run(folder / "broken", seed=5, status="failed", reason=None, final=None, best=None)
    done = here("plot_spectra.py", folder, "--output", "figures", cwd=tmp_path)
    assert done.returncode == 0 and f"note: left out {folder / 'broken'}: status failed" in done.stderr
    assert re.search(r"\| GAP +\| +2 \| +24 \| +320 \|", done.stdout)
    assert imread(tmp_path / "figures" / "spectra.png").shape[1] == round(6.9 * 300)
    lost = write_run(tmp_path / "lost")
    refused(here("plot_spectra.py", "lost", cwd=tmp_path), str(Path("lost") / "spectrum.npz"))
    assert not (lost / "figures").exists()
    write_spectrum(write_run(folder / "cub", dataset="cub", seed=9))
    refused(here("plot_spectra.py", folder, cwd=tmp_path), "2 settings")


def write_arrays(path: Path, top: float, *, targets: bool = True, epochs: tuple[int, ...] = (0, 1, 2)) -> Path:
    """spectrum.npz and spectrum_history.npz of four images of rank 3, the largest eigenvalue `top`, growing."""
    rows = np.array([[top * (1 + i), 2.0, 1.0, 0.0] for i in range(4)])
    classes = {"targets": np.array([0, 0, 1, 1])} if targets else {}
    np.savez(path / "spectrum.npz", before=rows, after=rows**0.5, **classes)
    before = np.stack([rows * (1 + epoch) ** np.array([1.0, 0, 0, 0]) for epoch in epochs])
    np.savez(path / "spectrum_history.npz", epochs=np.array(epochs), before=before, after=before**0.5)
    return path


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for seed, top in enumerate((10.0, 20.0)):
        write_arrays(write_run(tmp_path / "r" / f"seed{seed}", "mpn_cov", seed=seed, classes=["ant", "bee"]), top)
    return tmp_path / "r"


def view(name: str, folder: Path, **options: int) -> tuple[pd.DataFrame, list[str], int]:
    shown = VIEWS[name](find_runs([folder]), Options(**options))  # type: ignore[arg-type]
    return shown.table, shown.notes, len(shown.figure.axes)


def test_share_of_the_smallest() -> None:
    eigenvalues = np.array([[6.0, 3.0, 1.0, 1e-20], [1.0, 0.0, 0.0, 0.0], [0.0] * 4])
    np.testing.assert_allclose(smallest_share(eigenvalues, 2), [0.4, 1.0, np.nan])
    floor = np.array([[6.0, 3.0, 1e-8, 1e-20]])
    np.testing.assert_allclose(smallest_share(floor, 1, np.array([2])), [1 / 3])


def test_measures_by_epoch_over_seeds(runs: Path) -> None:
    table, notes, panels = view("conditions", runs)
    # largest over the smallest non-zero: images 1 to 4 times 10 or 20, median image the second, times the epoch
    assert table["nonzero_condition_number_lowest"].tolist() == [20, 40, 60]
    assert table["nonzero_condition_number_highest"].tolist() == [40, 80, 120]
    assert table["nonzero_condition_number"].tolist() == [30, 60, 90]
    assert np.isinf(table["condition_number"]).all() and table["n"].tolist() == [2, 2, 2]
    assert notes == [] and panels == 3


def test_a_run_without_a_history_is_noted_and_the_rest_drawn(runs: Path) -> None:
    write_run(runs / "gap", "gap")
    table, notes, _ = view("conditions", runs)
    assert set(table["label"]) == {"MPN-COV"} and "no history of GAP" in notes[0]
    (runs / "seed1" / "spectrum_history.npz").write_bytes(b"PK")
    assert any("seed1" in note and "cannot be read" in note for note in view("conditions", runs)[1])
    (runs / "seed0" / "spectrum_history.npz").unlink()
    with pytest.raises(RunError) as nothing:
        view("conditions", runs)
    for part in (
        "seed0/spectrum_history.npz: no such file",
        "trainer.probe_images=0",
        "seed1/spectrum_history.npz: cannot",
    ):
        assert part in str(nothing.value)


def test_eigenvalues_by_epoch(runs: Path) -> None:
    table, _, panels = view("epochs", runs)
    first = table[(table["stage"] == "before") & (table["index"] == 1)].set_index("epoch")["median"]
    # order statistics of 10, 20, 30, 40 and 20, 40, 60, 80: the lower of the two in the middle is 30
    assert first.tolist() == [30, 60, 90] and panels == 2
    write_arrays(runs / "seed1", 20.0, epochs=(0, 1))
    with pytest.raises(RunError, match="differ in the epochs"):
        view("epochs", runs)


def test_a_history_that_begins_late_is_drawn_and_one_of_zero_matrices_noted(runs: Path) -> None:
    for seed in (0, 1):
        write_arrays(runs / f"seed{seed}", 10.0, epochs=(3, 4))
    zero = write_arrays(write_run(runs / "seb", "seb", classes=["ant", "bee"]), 10.0)
    np.savez(zero / "spectrum_history.npz", epochs=np.array([0, 1]), before=np.zeros((2, 4, 4)))
    shown = VIEWS["epochs"](find_runs([runs]), Options())
    assert [line.split("|")[3].strip() for line in shown.markdown.splitlines()[2:]] == ["3", "4", "3", "4"]
    assert len(shown.notes) == 1 and "left out SEB" in shown.notes[0] and "zero" in shown.notes[0]


@pytest.mark.parametrize("name", ["methods", "classes", "backbones"])
def test_a_method_without_its_spectrum_is_noted_and_the_rest_drawn(runs: Path, name: str) -> None:
    write_run(runs / "seb", "seb")
    _, notes, _ = view(name, runs)
    assert len(notes) == 1 and "left out SEB" in notes[0] and "spectrum.npz" in notes[0]


def test_spectra_by_class(runs: Path) -> None:
    table, _, panels = view("classes", runs)
    assert table["class"].tolist() == ["ant", "bee"] and table["images"].tolist() == [4, 4] and panels == 1
    # a larger first eigenvalue holds more of the trace: the second class is flatter nowhere
    assert table["effective_rank"].iloc[0] > table["effective_rank"].iloc[1]
    write_arrays(runs / "seed1", 20.0, targets=False)
    with pytest.raises(RunError, match="give --images N"):
        view("classes", runs)
    fewer = write_arrays(write_run(runs / "seb", "seb", classes=["ant"]), 20.0)
    with pytest.raises(RunError, match=r"class 1 in spectrum\.npz, of 1 class"):
        view("classes", fewer)


def test_backbones_are_compared_by_shares_of_the_trace(runs: Path) -> None:
    write_arrays(write_run(runs / "other", "mpn_cov", backbone="resnet50"), 10_000.0)
    (spectrum, *_) = measure.pool_spectra(find_runs([runs / "seed0"]))
    np.testing.assert_allclose(measure.as_shares(spectrum).before.sum(axis=1), 1)
    table, _, _ = view("backbones", runs)
    assert table["label"].unique().tolist() == ["resnet50 (224 px)", "tf_efficientnet_lite0 (224 px)"]
    assert (table.groupby("label")["median"].sum() < 1.2).all()
    with pytest.raises(RunError, match="2 settings"):
        view("conditions", runs)


@pytest.mark.parametrize(
    ("name", "draw"),
    [
        ("methods", show.spectra_figure),
        ("conditions", show.history_figure),
        ("epochs", show.epochs_figure),
        ("classes", show.classes_figure),
        ("backbones", show.shares_figure),
    ],
)
def test_what_a_view_writes_draws_its_figure_without_the_runs(
    name: str, draw: Callable[[pd.DataFrame, str], Figure], runs: Path
) -> None:
    shown = VIEWS[name](find_runs([runs]), Options())
    shown.write(name, runs)
    file = runs / f"{name}.csv"
    figures = (shown.figure, draw(measure.load_view(name, file), "title"))
    lines = [[line.get_ydata() for axes in figure.axes for line in axes.lines] for figure in figures]
    assert lines[0]
    for ours, kept in zip(*lines, strict=True):
        np.testing.assert_allclose(kept, ours, rtol=1e-4)
    header, *rows = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join([header.replace("label", "name"), *rows]), encoding="utf-8")
    with pytest.raises(RunError, match=rf"{name}\.csv: no column label"):
        measure.load_view(name, file)


def test_the_epochs_shown_are_mostly_early_ones() -> None:
    def shown(epochs: range) -> list[int]:
        return show.some_epochs(pd.DataFrame({"epoch": epochs, "index": 1, "rank": 1}))["epoch"].tolist()

    assert shown(range(16)) == [0, 1, 2, 4, 8, 15]
    assert shown(range(3, 6)) == [3, 4, 5] and shown(range(2)) == [0, 1] and shown(range(1)) == [0]


def test_tables_of_layers_and_backbones_are_in_the_order_of_their_figures(runs: Path) -> None:
    for backbone in ("zebra", "aardvark"):
        write_arrays(write_run(runs / backbone, "mpn_cov", backbone=backbone), 10.0)
    shown = VIEWS["backbones"](find_runs([runs / "zebra", runs / "seed0", runs / "aardvark"]), Options())
    drawn = [line.get_label() for line in shown.figure.axes[0].lines]
    assert [line.split("|")[1].strip() for line in shown.markdown.splitlines()[2:]] == drawn
    assert [str(label).split(" ")[0] for label in drawn] == ["zebra", "tf_efficientnet_lite0", "aardvark"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("views")


def test_views_from_the_command_line(trained: Path, train_here: Train, here: Train) -> None:
    for method in ("mpn_cov", "gap"):
        overrides = [f"method={method}", "backbone.frozen=true", "name=v", "trainer.epochs=1"]
        assert train_here(trained, *overrides).returncode == 0
    names = [argument for name in ("methods", "conditions", "epochs", "classes") for argument in ("--view", name)]
    done = succeeded(here("plot_spectra.py", *names, "results/v", "--images", 9, "--smallest", 3, cwd=trained))
    assert "share of the 3 smallest before" in done.stdout
    files = {file.name for file in (trained / "results" / "v" / "figures").glob("[!.]*")}
    assert files == {f"{n}.{k}" for n in ("spectra", "conditions", "epochs", "classes") for k in ("png", "pdf", "csv")}
    classes = pd.read_csv(trained / "results" / "v" / "figures" / "classes.csv")
    assert len(classes) == 6 and set(classes["images"]) == {3}

    run = "results/v/test_resnet/mpn_cov/seed0"
    succeeded(here("plot_spectra.py", run, "--view", "layers", "--images", 4, "--output", "out", cwd=trained))
    layers = pd.read_csv(trained / "out" / "layers.csv")
    assert layers["label"].nunique() == 3 and set(layers["images"]) == {4}
    refused(here("plot_spectra.py", "results/v", "--view", "layers", cwd=trained), "2 were given")


def test_a_second_look_sees_what_training_saved(trained: Path) -> None:
    (run,) = find_runs([trained / "results" / "v" / "test_resnet" / "mpn_cov"])
    moved = {"root": str(trained / "datasets" / "synthetic"), "cache": str(trained / "results" / "cache")}
    again, saved = look_again(run.path, 9, **moved), run.spectrum()
    np.testing.assert_allclose(again.before, saved.before, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(again.targets, saved.targets)
