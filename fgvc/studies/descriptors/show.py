"""Figures and tables of a descriptor study, from its small tables."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from fgvc.presentation.render import markdown_table, mean_and_spread
from fgvc.presentation.style import COLUMN_WIDTH, by_method, class_name, figure_style, method_order, new_figure

# no black among them: wrong predictions have a black edge
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933")
_MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")


def confusable_classes(pairs: pd.DataFrame, count: int = 8) -> list[str]:
    """Up to `count` classes of the pairs that are most often confused, pair by pair."""
    ordered = pairs.sort_values(["confused", "distance"], ascending=[False, True])
    names: dict[str, None] = {}
    for row in ordered.to_dict("records"):
        new = {row["first"]: None, row["second"]: None}
        if len(names | new) > count:
            break
        names |= new
    return list(names)


def plot_embedding(axes: Axes, embedding: pd.DataFrame, classes: Sequence[str]) -> None:
    """Draw a map of the test images: these classes in colour, a wrong prediction with a black edge, all others grey.

    `embedding` is a table of `embed`; `classes` are at most eight.
    """
    others = embedding[~embedding["class"].isin(classes)]
    axes.scatter(others["x"], others["y"], s=1.5, color="#CCCCCC", linewidths=0)
    for name, colour, marker in zip(classes, _COLOURS, _MARKERS, strict=False):
        part = embedding[embedding["class"] == name]
        wrong = (part["predicted_class"] != part["class"]).to_numpy()
        edges = ["black" if is_wrong else "none" for is_wrong in wrong]
        shown = class_name(name)
        axes.scatter(
            part["x"], part["y"], s=9, color=colour, marker=marker, edgecolors=edges, linewidths=0.6, label=shown
        )
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(True)


def embedding_figure(embedding: pd.DataFrame, pairs: pd.DataFrame) -> Figure:
    """A figure of one column: the map, with the classes of the most confused pairs in colour, all others grey."""
    label = embedding["label"].iloc[0]
    classes = confusable_classes(pairs[pairs["label"] == label])
    with figure_style():
        figure = new_figure(COLUMN_WIDTH, 3.9)
        axes = figure.subplots()
        plot_embedding(axes, embedding, classes)
        axes.set_title(f"t-SNE of the descriptors of {label}\nblack edge: taken for another class", fontsize=7)
        legend = figure.legend(loc="outside lower center", frameon=False, ncols=2, fontsize=6, handletextpad=0.2)
        for handle in legend.legend_handles:
            if isinstance(handle, PathCollection):
                handle.set_edgecolor("none")
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure


def pairs_markdown(pairs: pd.DataFrame) -> str:
    """The eight pairs of classes whose mean descriptors are closest, of one label."""
    rows = []
    for row in pairs.sort_values("distance").head(8).to_dict("records"):
        counts = [str(row[name]) for name in ("first_as_second", "second_as_first")]
        shares = [f"{row[name]:.1f}" for name in ("confused", "accuracy")]
        rows.append(
            [f"{class_name(row['first'])}, {class_name(row['second'])}", f"{row['distance']:.3g}", *counts, *shares]
        )
    header = ["Pair", "distance of means", "first as second", "second as first"]
    return markdown_table([*header, "confused, % of both", "right, % of both"], rows)


def correlations_markdown(correlations: pd.DataFrame) -> str:
    """Rank correlation of closeness and confusion, with its interval, a row for each label."""
    rows = [
        [row["label"], f"{row['value']:.2f}", f"[{row['low']:.2f}, {row['high']:.2f}]"]
        if pd.notna(row["value"])
        else [row["label"], "not defined", "not defined"]
        for row in sorted(correlations.to_dict("records"), key=lambda row: method_order(row["label"]))
    ]
    return markdown_table(["Method", "Spearman's correlation", "95 % interval"], rows)


def neighbours_markdown(neighbours: pd.DataFrame) -> str:
    """Leave-one-out accuracy by nearest neighbours, a row for each label, mean over seeds."""
    columns = [(metric, k) for metric in dict.fromkeys(neighbours["metric"]) for k in dict.fromkeys(neighbours["k"])]
    rows = []
    for label, part in by_method(neighbours):
        cells = [part.loc[(part["metric"] == metric) & (part["k"] == k), "top1"] for metric, k in columns]
        rows.append([label, str(part["seed"].nunique()), *(mean_and_spread(values) for values in cells)])
    return markdown_table(["Method", "n", *(f"{metric}, k = {k}" for metric, k in columns)], rows)
