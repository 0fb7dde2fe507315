"""Make every table and figure of the documentation from the results kept in `results/`, and the page of all settings.

python tools/make_docs.py            # rewrites what is stale
python tools/make_docs.py --check    # changes nothing, names what is stale, exits with 1 if anything is

A new table is a line in TABLES and a pair of comments in a page, a new figure a line in FIGURES; see
documents. How the kept files were made is in results/cub80/README.md.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from documents import FromFiles, draw_figure, figure_is_current, stale_pages, write_pages
from matplotlib.figure import Figure
from overview import overview_figure
from settings_page import settings_page

from fgvc.cli import exit_on_user_error
from fgvc.io import read_csv, write_text_atomic
from fgvc.presentation.render import Block, block_markdown, markdown_table, mean_and_spread, with_spread
from fgvc.presentation.style import by_method, method_order
from fgvc.reporting.accuracy import load_accuracy, table_blocks
from fgvc.reporting.calibration_report import MEASURES, TIMES, reliability_figure
from fgvc.reporting.run_tables import cost_block, differences_block
from fgvc.runs.statistics import two_level_interval
from fgvc.studies.attribution import show as attributions
from fgvc.studies.attribution.study import COLUMNS, load_attribution_study, read_study_table
from fgvc.studies.descriptors import show as descriptors
from fgvc.studies.gradients.arithmetic import approximation_error_block, gradient_bounds_block
from fgvc.studies.gradients.loewner import load_picture
from fgvc.studies.gradients.show import gradients_markdown, loewner_figure
from fgvc.studies.precision import show as precision
from fgvc.studies.precision.measure import SUMMARY_COLUMNS
from fgvc.studies.rates import show as rates
from fgvc.studies.rates.measure import RATE_COLUMNS, curves, right_answers
from fgvc.studies.smoothness.measure import load_smoothness, summarise_smoothness, with_ranges
from fgvc.studies.smoothness.show import smoothness_figure
from fgvc.studies.spectra import show as spectra
from fgvc.studies.spectra.measure import load_view
from fgvc.studies.spectra.show import spectra_figure
from fgvc.studies.spectra.views import conditions_block
from fgvc.studies.truncation import show as bands
from fgvc.studies.truncation.measure import band_table, chance, effects, load_study
from fgvc.training.launch import choices

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from growth import load_samples
from records import load_record
from report import choice_markdown, times_markdown
from soak_plot import soak_figure

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SETTINGS = ROOT / "docs" / "settings.md"
FIGURE_FOLDER = ROOT / "docs" / "figures"

EXACT = "MPN-COV (exact)"
RESCALED = "MPN-COV (exact) [scale=2.65]"
SETTING = "cub80, tf_efficientnet_lite0 (frozen), 224 px, reduction 64, 15 epochs"


def of_frame(make: Callable[[pd.DataFrame], str | Figure]) -> Callable[[Path], str | Figure]:
    """From a CSV file by way of its frame."""
    return lambda path: make(read_csv(path, ()))


def beta_markdown(table: pd.DataFrame, reference: str) -> str:
    """Gradient norm and beta of each method, and its beta over that of a reference step by step: medians [quartiles].

    Methods at the same seed and step start from the same weights.
    """
    summary, measured = summarise_smoothness(table).set_index("label"), with_ranges(table)
    base = measured[measured["label"] == reference].set_index(["seed", "step"])["beta"]
    rows = []
    for label in sorted(summary.index, key=method_order):
        row = summary.loc[label]
        ratios = (measured[measured["label"] == label].set_index(["seed", "step"])["beta"] / base).dropna()
        low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75], method="inverted_cdf")
        beta = f"{row['beta']:.3g} [{row['beta_lower']:.3g}, {row['beta_upper']:.3g}]"
        numbers = [f"{row[name]:.3g}" for name in ("gradient_norm", "loss_range", "relative_change")]
        rows.append([str(label), str(row["points"]), *numbers, beta, f"{middle:.3g} [{low:.3g}, {high:.3g}]"])
    header = ["Method", "points", "‖g‖", "range of the loss", "‖Δg‖ / ‖g‖", "β", f"β over that of {reference}"]
    return markdown_table(header, rows)


def calibrations_markdown(table: pd.DataFrame) -> str:
    """A `calibrations_table` by label, means over the runs."""
    header = ["Method", "n", "Temperature"]
    header += [f"{name} {when}" for name in ("ECE %", "loss", "Brier") for when in TIMES]
    rows = []
    for label, part in by_method(table):
        cells = [mean_and_spread(part["temperature"], 3)]
        for name, places in zip(MEASURES, (2, 3, 3), strict=True):
            cells += [mean_and_spread(part[f"{name}_{when}"], places) for when in TIMES]
        rows.append([label, str(len(part)), *cells])
    return markdown_table(header, rows)


def load_rates(path: Path) -> pd.DataFrame:
    """The table of the study of rates."""
    return read_csv(path, RATE_COLUMNS, names=("listed", "right", "commit"))


def of_optimizer(name: str) -> Callable[[Path], str]:
    """The curves of the runs with one optimiser."""
    return lambda path: rates.curves_markdown(load_rates(path).query(f"optimizer == {name!r}"))


def end_to_end_markdown(path: Path) -> str:
    """Top-1 of each head that was trained with a part of the backbone, a row for each rate of the classifier."""
    means = curves(load_rates(path).query("dataset == 'birds40' and optimizer == 'sgd'")).sort_values(
        ["mean", "label"], ascending=[False, True]
    )
    rows = [
        [row["label"], f"{row['rate']:.3g}", str(row["n"]), with_spread(row["mean"], row["std"])]
        for row in means.to_dict("records")
    ]
    return markdown_table(["Head", "Rate of the classifier", "Seeds", "Top-1"], rows)


def arms(path: Path) -> pd.DataFrame:
    """The cars of that table: a label for each head and factor of the classifier, at the rate of all else."""
    table = load_rates(path).query("dataset == 'cars40' and not label.str.startswith('SVD')")
    moved = table["label"].where(table["rate"] / table["lr"] < 10, table["label"] + ", classifier rate × c²")
    return table.assign(label=moved, rate=table["lr"])


def truncation_markdown(path: Path) -> str:
    """What heads that keep a part of the eigenvalues lose to the root at the same rate, and the verdict on 2 points."""
    table = load_rates(path)
    roots, rows = table[table["label"] == EXACT], []
    for (dataset, optimizer, label), cut in table[table["label"].str.startswith("SVD-TopN")].groupby(
        ["dataset", "optimizer", "label"]
    ):
        root = cut[["dataset", "optimizer", "lr", "rate", "seed", "listed"]].merge(roots)
        difference = 100.0 * (right_answers(cut) - right_answers(root))
        low, high = two_level_interval(difference, level=0.95)
        verdict = "loses less than 2" if low > -2 else "loses more than 2" if high < -2 else "undecided"
        top1 = [f"{runs['top1'].mean():.2f}" for runs in (root, cut)]
        name = f"{dataset}, {'AdamW' if optimizer == 'adamw' else 'SGD'}"
        rows.append([name, label, *top1, f"{difference.mean():+.2f} [{low:+.2f}, {high:+.2f}]", verdict])
    return markdown_table(["Set", "Head", "Root", "Top-1", "Difference [95 %]", "Verdict"], rows)


def long_tail_markdown(path: Path) -> str:
    """Accuracies of each head and way of training, by the number of training images of the classes."""
    columns = {"top1": "Top-1", "mean_class": "Mean over classes", "medium": "Medium classes", "few": "Few"}
    rows = []
    for (label, variant), runs in read_csv(path, tuple(columns)).groupby(["label", "variant"], sort=False):
        cells = [with_spread(runs[name].mean(), runs[name].std()) for name in columns]
        rows.append([label, variant, str(len(runs)), *cells])
    return markdown_table(["Head", "Training images", "Seeds", *columns.values()], rows)


def as_written(path: Path) -> str:
    """A CSV file of text as it stands."""
    table = read_csv(path, (), as_text=True)
    return markdown_table(list(table.columns), table.to_numpy().tolist())


def accuracy(path: Path) -> str:
    (block,) = table_blocks(load_accuracy(path))
    return block_markdown(block)


def arithmetic(make: Callable[[pd.DataFrame], Block], *computed: str) -> Callable[[Path], str]:
    """A table of arithmetic, as one machine computed it: rounding in float64 differs between processors."""

    def of_path(path: Path) -> str:
        table = read_csv(path, ("published", "float64", *computed), as_text=True).replace("", None)
        return block_markdown(make(table.astype(dict.fromkeys(("float64", *computed), "float64"))))

    return of_path


def effects_table(reference: str, *labels: str) -> Callable[[Path], str]:
    """Effects against a reference; of all labels where none are given."""

    def make(grid: Path) -> str:
        runs = load_study(grid.parent).grid
        runs = runs[runs["label"].isin([reference, *labels])] if labels else runs
        return bands.effects_markdown(effects(runs, reference), reference)

    return make


def effects_plot(grid: Path) -> Figure:
    runs = load_study(grid.parent).grid
    return bands.effects_figure(effects(runs, EXACT), runs, EXACT)


def bands_plot(grid: Path, *_: Path) -> Figure:
    study = load_study(grid.parent)
    return bands.bands_figure(band_table(study, EXACT), chance(study))


def pairs_table(path: Path) -> str:
    pairs = read_csv(path, ("label",))
    return descriptors.pairs_markdown(pairs[pairs["label"] == "iSQRT-COV"])


def embedding_plot(embedding: Path, pairs: Path) -> Figure:
    return descriptors.embedding_figure(read_csv(embedding, ("label", "x", "y")), read_csv(pairs, ("label",)))


def float32_errors(path: Path) -> str:
    errors = read_csv(path, SUMMARY_COLUMNS)
    return precision.errors_markdown(errors[errors["arithmetic"] == "float32 spectrum"], "channels")


def autocast_errors(path: Path) -> str:
    errors = read_csv(path, SUMMARY_COLUMNS)
    return precision.errors_markdown(errors[errors["channels"] == 64], "arithmetic")


def without_seb(path: Path) -> pd.DataFrame:
    """Of a study of attributions; SEB has one seed there."""
    table = read_study_table(path)
    return table[table["label"] != "SEB"]


def attribution_areas(areas: Path, extents: Path) -> str:
    return attributions.areas_markdown(without_seb(areas), read_study_table(extents), "MPN-COV")


def attribution_differences(path: Path) -> str:
    return attributions.differences_markdown(without_seb(path), [("top8", "8:"), ("top1", "1:"), ("all", "top8")])


def attribution_agreement(path: Path) -> str:
    """Of two seeds, two heads, and of the bands those that part the spectrum."""
    table = without_seb(path)
    pairs = pd.Series(list(zip(table["band"], table["other"], strict=True)), index=table.index)
    parts = table["between"].isin(["seeds", "heads"]) | pairs.isin([("all", "top8"), ("all", "8:"), ("top8", "8:")])
    return attributions.agreement_markdown(table[parts])


def attribution_plot(path: Path, *_: Path) -> Figure:
    return attributions.attribution_figure(load_attribution_study(path.parent), "decomposition", "MPN-COV")


def cub80(*names: str) -> tuple[str, ...]:
    return tuple(f"results/cub80/{name}.csv" for name in names)


STUDY = cub80("truncation/grid", "truncation/bands", "truncation/band_classes")
GRID = cub80("amplification/grid")
ATTRIBUTION = cub80(*(f"attribution/{name}" for name in COLUMNS))
RATES = ("results/rates/rates.csv",)

TABLES: dict[str, FromFiles[str]] = {
    "rates_curves": FromFiles(RATES, of_optimizer("sgd")),
    "rates_curves_adamw": FromFiles(RATES, of_optimizer("adamw")),
    "end_to_end": FromFiles(("results/end_to_end/rates.csv",), end_to_end_markdown),
    "end_to_end_rates": FromFiles(
        ("results/end_to_end/rates.csv",), lambda path: rates.curves_markdown(arms(path).query("seed == 0"))
    ),
    "end_to_end_best": FromFiles(
        ("results/end_to_end/rates.csv",), lambda path: rates.best_markdown(arms(path), EXACT, 1)
    ),
    "end_to_end_truncation": FromFiles(("results/end_to_end/rates.csv",), truncation_markdown),
    "long_tail": FromFiles(("results/long_tail/accuracies.csv",), long_tail_markdown),
    "rates_shifts": FromFiles(RATES, lambda path: rates.shifts_markdown(load_rates(path), EXACT)),
    "rates_best": FromFiles(RATES, lambda path: rates.best_markdown(load_rates(path), EXACT, 0.5)),
    "demo": FromFiles(("results/synthetic/one_seed.csv",), accuracy),
    "demo_seeds": FromFiles(("results/synthetic/accuracy.csv",), accuracy),
    "cub80_frozen": FromFiles(cub80("frozen/accuracy"), accuracy),
    "cub80_differences": FromFiles(
        cub80("frozen/differences"), of_frame(lambda t: block_markdown(differences_block(t)))
    ),
    "cub80_collection": FromFiles(cub80("collection/accuracy"), accuracy),
    "cub80_collection_differences": FromFiles(
        cub80("collection/differences"), of_frame(lambda t: block_markdown(differences_block(t)))
    ),
    "cub80_collection_cost": FromFiles(cub80("collection/cost"), of_frame(lambda t: block_markdown(cost_block(t)))),
    "cub80_maps": FromFiles(cub80("collection/maps_accuracy"), accuracy),
    "cub80_maps_differences": FromFiles(
        cub80("collection/maps_differences"), of_frame(lambda t: block_markdown(differences_block(t)))
    ),
    "cub80_cost": FromFiles(cub80("frozen/cost"), of_frame(lambda t: block_markdown(cost_block(t)))),
    "cub80_calibration": FromFiles(cub80("calibration/calibration"), of_frame(calibrations_markdown)),
    "first_sets": FromFiles(("results/first/sets.csv",), as_written),
    "first_steps": FromFiles(("results/first/steps.csv",), as_written),
    "cub80_seconds": FromFiles(cub80("earlier/seconds"), as_written),
    "cub80_hybrid": FromFiles(cub80("hybrid/accuracy"), accuracy),
    "cub80_views": FromFiles(cub80("earlier/views"), as_written),
    "cub80_finetune": FromFiles(cub80("earlier/finetune"), as_written),
    "cub80_conditions": FromFiles(
        cub80("frozen/conditions"),
        lambda path: block_markdown(conditions_block(load_view("conditions", path).query("label != 'GAP'"))),
    ),
    "cub80_truncation": FromFiles(
        STUDY[:1],
        effects_table(
            EXACT, "SVD-TopN (exact) [keep=8]", "SVD-TopN (exact) [keep=14]", "SVD-TopN [keep=14]", "SVD-TopN [keep=40]"
        ),
    ),
    "cub80_bands": FromFiles(STUDY, lambda grid, *_: bands.bands_markdown(band_table(load_study(grid.parent), EXACT))),
    "cub80_bands_adamw": FromFiles(cub80("bands_adamw/grid"), effects_table(EXACT)),
    "cub80_rates": FromFiles(cub80("earlier/truncation_rates"), as_written),
    "cub80_truncation_adamw": FromFiles(cub80("earlier/truncation_adamw"), as_written),
    "cub80_gradients": FromFiles(
        cub80("gradients/gradients"), of_frame(lambda t: gradients_markdown(t[t["method"] != "seb"]).split("\n\n")[0])
    ),
    "cub80_seb": FromFiles(GRID, effects_table(RESCALED, "SEB", EXACT)),
    "cub80_amplification": FromFiles(GRID, effects_table(EXACT)),
    "cub80_smoothness": FromFiles(cub80("smoothness/sgd"), lambda path: beta_markdown(load_smoothness(path), EXACT)),
    "cub80_neighbours": FromFiles(cub80("descriptors/neighbours"), of_frame(descriptors.neighbours_markdown)),
    "cub80_pairs": FromFiles(cub80("descriptors/pairs"), pairs_table),
    "cub80_correlations": FromFiles(cub80("descriptors/correlations"), of_frame(descriptors.correlations_markdown)),
    "cub80_attribution_heads": FromFiles(
        cub80("attribution/heads"), lambda path: attributions.heads_markdown(without_seb(path))
    ),
    "cub80_attribution_areas": FromFiles(cub80("attribution/areas", "attribution/extents"), attribution_areas),
    "cub80_attribution_differences": FromFiles(cub80("attribution/differences"), attribution_differences),
    "cub80_attribution_agreement": FromFiles(cub80("attribution/agreement"), attribution_agreement),
    "precision_float32": FromFiles(cub80("precision/errors"), float32_errors),
    "precision_autocast": FromFiles(cub80("precision/errors"), autocast_errors),
    "precision_eigenvalues": FromFiles(cub80("precision/eigenvalues"), of_frame(precision.eigenvalues_markdown)),
    "precision_accuracy": FromFiles(cub80("precision/pairs"), of_frame(precision.pairs_markdown)),
    "precision_times": FromFiles(
        ("benchmarks/results/precision_1thread.json",), lambda path: times_markdown(load_record(path))
    ),
    "rivals": FromFiles(("benchmarks/results/rivals_1thread.json",), lambda path: choice_markdown(load_record(path))),
    "choose_projected": FromFiles(
        ("benchmarks/results/projected_1thread.json",), lambda path: choice_markdown(load_record(path))
    ),
    "choose": FromFiles(("benchmarks/results/poolings_1thread.json",), lambda path: choice_markdown(load_record(path))),
    "products_condition": FromFiles(("benchmarks/results/products_condition.csv",), as_written),
    "approximation_error": FromFiles(
        ("results/arithmetic/approximation_error.csv",), arithmetic(approximation_error_block, "exact", "digits20")
    ),
    "gradient_bounds": FromFiles(
        ("results/arithmetic/gradient_bounds.csv",), arithmetic(gradient_bounds_block, "bound")
    ),
}
FIGURES: dict[str, FromFiles[Figure]] = {
    "overview": FromFiles(("results/cub80/frozen/accuracy.csv", "results/first/cars98/accuracy.csv"), overview_figure),
    "demo_spectra": FromFiles(
        ("results/synthetic/spectra.csv",),
        lambda path: spectra_figure(
            load_view("methods", path), "synthetic, tf_efficientnet_lite0 (frozen), 192 px, 20 epochs"
        ),
    ),
    "cub80_spectra": FromFiles(
        cub80("frozen/spectra"), lambda path: spectra_figure(load_view("methods", path), SETTING)
    ),
    "cub80_conditions": FromFiles(
        cub80("frozen/conditions"), lambda path: spectra.history_figure(load_view("conditions", path), SETTING)
    ),
    "cub80_epochs": FromFiles(
        cub80("frozen/epochs"), lambda path: spectra.epochs_figure(load_view("epochs", path), SETTING)
    ),
    "cub80_classes": FromFiles(
        cub80("frozen/classes"), lambda path: spectra.classes_figure(load_view("classes", path), SETTING)
    ),
    "cub80_layers": FromFiles(
        cub80("frozen/layers"), lambda path: spectra.shares_figure(load_view("methods", path), SETTING)
    ),
    "cub80_backbones": FromFiles(
        cub80("frozen/backbones"),
        lambda path: spectra.shares_figure(load_view("methods", path), "cub80, MPN-COV, reduction 64, 224 px"),
    ),
    "cub80_bands": FromFiles(STUDY, bands_plot),
    "cub80_amplification": FromFiles(GRID, effects_plot),
    "cub80_calibration": FromFiles(
        cub80("calibration/reliability"),
        of_frame(
            lambda t: reliability_figure(t, "cub80, tf_efficientnet_lite0 (frozen), test split, three seeds each")
        ),
    ),
    "cub80_smoothness": FromFiles(cub80("smoothness/sgd"), lambda path: smoothness_figure(load_smoothness(path))),
    "cub80_embedding": FromFiles(cub80("descriptors/embedding", "descriptors/pairs"), embedding_plot),
    "cub80_precision": FromFiles(
        cub80("precision/images"),
        of_frame(lambda t: precision.errors_figure(t, "cub80, 64 test images of each of three heads")),
    ),
    "cub80_attribution": FromFiles(ATTRIBUTION, attribution_plot),
    "soak": FromFiles(
        ("benchmarks/results/soak_60min.csv",),
        lambda path: soak_figure(load_samples(path), "synthetic set, end to end, 145 epochs, one loader worker"),
    ),
    "rates_sgd": FromFiles(RATES, lambda path: rates.rates_figure(load_rates(path), "sgd")),
    "rates_adamw": FromFiles(RATES, lambda path: rates.rates_figure(load_rates(path), "adamw")),
    "loewner": FromFiles(
        cub80("gradients/loewner"), lambda path: loewner_figure(load_picture(path), "64 of 2400 test images of cub80")
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, exit with 1 if anything is stale")
    check = parser.parse_args().check

    figures = {FIGURE_FOLDER / f"{name}.png": kept for name, kept in FIGURES.items()}
    stale = [path for path, kept in figures.items() if not figure_is_current(path, kept, ROOT)]
    pages = stale_pages(PAGES, TABLES, ROOT) if check else write_pages(PAGES, TABLES, ROOT)
    if not check:
        for path in stale:
            draw_figure(path, figures[path], ROOT)
    settings = settings_page(choices(ROOT / "configs"))
    if not SETTINGS.is_file() or SETTINGS.read_text(encoding="utf-8") != settings:
        pages.append(SETTINGS)
        if not check:
            write_text_atomic(SETTINGS, settings)
    for path in [*pages, *stale]:
        print(f"{'stale' if check else 'written'}: {path.relative_to(ROOT)}")
    if check and (pages or stale):
        sys.exit(1)


if __name__ == "__main__":
    exit_on_user_error(main)
