import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import ROOT
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from run_folders import write_run, write_spectrum

from fgvc.presentation.style import METHOD_STYLES, figure_style, method_order, method_style, new_figure, save_figure
from fgvc.runs import find_runs
from fgvc.studies.spectra.measure import MethodSpectrum, curve_table, pool_spectra
from fgvc.studies.spectra.show import plot_eigenvalues, spectra_figure, spectra_markdown

REPOSITORY = ROOT


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for method, channels in (("seb", 64), ("isqrt_cov", 64), ("gap", 320)):
        for seed in (0, 1):
            path = write_run(tmp_path / "runs" / method / f"seed{seed}", method, seed=seed)
            write_spectrum(path, channels=channels, images=12, seed=seed)
    return tmp_path / "runs"


def plot_spectra(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "scripts" / "plot_spectra.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": "utf-8"},
    )


def test_every_method_has_its_own_look_that_depends_on_its_label_alone() -> None:
    styles = {label: method_style(label) for label in [*METHOD_STYLES, "SVD-TopN (exact)", "SEB (exact)"]}
    assert len({style.color for style in styles.values()}) == len(styles)
    assert len({(style.dash, style.marker) for style in METHOD_STYLES.values()}) == len(METHOD_STYLES)
    assert styles["SVD-TopN (exact)"].marker == styles["SVD-TopN"].marker
    assert method_style("a new method") == method_style("a new method")


def test_colours_of_known_methods_show_on_white_paper() -> None:
    for label, style in METHOD_STYLES.items():
        luminance = np.dot([0.2126, 0.7152, 0.0722], np.array(to_rgb(style.color)) ** 2.2)
        assert 1.05 / (luminance + 0.05) > 1.9, label


def test_order_of_labels() -> None:
    labels = ["Zeta", "SEB (exact)", "SEB", "Alpha", "GAP", "SVD-PI"]
    assert sorted(labels, key=method_order) == ["GAP", "SVD-PI", "SEB", "SEB (exact)", "Alpha", "Zeta"]


def test_curve_is_the_median_over_images_of_all_seeds() -> None:
    before = np.array([[9.0, 1.0], [7.0, 2.0], [5.0, 3.0]])
    with figure_style():
        axes = new_figure(3.3, 2.5).subplots()
        plot_eigenvalues(axes, curve_table([MethodSpectrum("SEB", (0, 1), before, before**0.5)]), "before")
    (line,) = axes.lines
    np.testing.assert_array_equal(line.get_xdata(), [1, 2])
    np.testing.assert_array_equal(line.get_ydata(), [7, 2])
    assert axes.get_yscale() == "log" and line.get_color() == METHOD_STYLES["SEB"].color


def test_axes_end_at_the_numerical_rank_not_at_rounding_noise(folder: Path) -> None:
    figure = spectra_figure(curve_table(pool_spectra(find_runs([folder]))), "title")
    for axes, methods in zip(figure.axes, (3, 2), strict=True):
        assert len(axes.lines) == methods
        bottom, top = axes.get_ylim()
        assert 1e-6 < bottom < top < 1e6
        assert 48 < axes.get_xlim()[1] < 60
        for line in axes.lines:
            values = np.asarray(line.get_ydata())
            assert (values[:48] > bottom).all() and (values[48:] < bottom).all()


def test_legend_is_in_the_order_of_the_tables_and_outside_the_panels(folder: Path) -> None:
    figure = spectra_figure(curve_table(pool_spectra(find_runs([folder]))), "title")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "GAP (d = 320)",
        "iSQRT-COV (d = 64)",
        "SEB (d = 64)",
    ]
    figure.draw_without_rendering()
    for axes in figure.axes:
        assert not legend.get_window_extent().overlaps(axes.get_window_extent())


@pytest.mark.parametrize("before", [np.zeros((2, 4)), np.ones((1, 1))], ids=["constant features", "one channel"])
def test_degenerate_spectra_are_drawn(tmp_path: Path, before: np.ndarray) -> None:
    written = save_figure(
        spectra_figure(curve_table([MethodSpectrum("GAP", (0,), before, None)]), "title"), tmp_path / "figure"
    )
    assert all(path.stat().st_size > 1000 for path in written)


def test_same_figure_is_the_same_file_with_embedded_fonts(folder: Path, tmp_path: Path) -> None:
    spectra = curve_table(pool_spectra(find_runs([folder])))
    first, second = (save_figure(spectra_figure(spectra, "title"), tmp_path / name) for name in ("a", "b"))
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
    pdf = first[1].read_bytes()
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf


def test_table_pools_the_seeds(folder: Path) -> None:
    lines = spectra_markdown(pool_spectra(find_runs([folder]))).splitlines()
    gap, isqrt, _ = ([part.strip() for part in line.split("|")[1:-1]] for line in lines[2:])
    assert gap[:5] == ["GAP", "2", "24", "320", "48"] and gap[8] == gap[10] == "–"
    assert isqrt[:5] == ["iSQRT-COV", "2", "24", "64", "48"]


def test_script_writes_png_and_pdf(folder: Path, tmp_path: Path) -> None:
    write_run(folder / "broken", seed=5, status="failed", reason=None, final=None, best=None)
    result = plot_spectra(folder, "--output", tmp_path / "figures")
    assert result.returncode == 0
    assert result.stderr == f"note: left out {folder / 'broken'}: status failed\n"
    assert re.search(r"\| GAP +\| +2 \| +24 \| +320 \|", result.stdout)
    image = imread(tmp_path / "figures" / "spectra.png")
    assert image.shape[1] == round(6.9 * 300)
    assert (tmp_path / "figures" / "spectra.pdf").read_bytes().startswith(b"%PDF")


def test_script_refuses_runs_of_several_datasets(folder: Path) -> None:
    write_spectrum(write_run(folder / "cub", dataset="cub", seed=9))
    result = plot_spectra(folder)
    assert result.returncode == 2 and "2 settings" in result.stderr and "Traceback" not in result.stderr
    assert not (folder / "figures").exists()


def test_script_names_a_missing_spectrum(tmp_path: Path) -> None:
    path = write_run(tmp_path / "seb")
    result = plot_spectra(tmp_path)
    assert result.returncode == 2 and str(path / "spectrum.npz") in result.stderr
