"""The published tables that are arithmetic: what is printed beside what is computed."""

from collections.abc import Hashable, Mapping
from typing import Any

import pandas as pd

from fgvc.reporting.blocks import Block

_REPRODUCED = (
    "Reproduced to every printed digit: Taylor from r = 0.7 on, Padé from r = 0.99 on. The other printed figures are "
    "of the size of rounding in float64 or below it; they depend on an arithmetic that is not stated, and are not "
    "reproduced."
)


def approximation_error_block(table: pd.DataFrame) -> Block:
    """Of `fgvc.analysis.approximation.approximation_errors`: one row an approximant and arithmetic."""
    ratios = list(dict.fromkeys(table["r"]))
    rows = []
    for method in dict.fromkeys(table["method"]):
        part = table[table["method"] == method].set_index("r")
        rows.append([f"{method}, published", *(part["published"].fillna("not published").loc[ratios])])
        rows.append([f"{method}, exact arithmetic", *map(_error, part["exact"].loc[ratios])])
        rows.append([f"{method}, float64", *map(_error, part["float64"].loc[ratios])])
    notes = [
        "Exact arithmetic: of Taylor r^101 / (1 - r); of Padé with the coefficients rounded to float64, in rational "
        "numbers. float64: what this package's layers compute, Taylor in closed form, Padé by Horner's scheme.",
        _REPRODUCED,
    ]
    header = ["Approximation, degree 100", *(f"r = {r}" for r in ratios)]
    return Block("Error of the approximations of 1 / (1 - r)", header, rows, notes)


def gradient_bounds_block(table: pd.DataFrame) -> Block:
    """Of `fgvc.analysis.approximation.gradient_bounds`."""
    rows = [
        [row["method"], f"|{row['quantity']}|", row["form"], _bound(row["computed"]), *_texts(row), row["trigger"]]
        for row in table.to_dict("records")
    ]
    notes = [
        "K~ stands in place of 1 / (λ_i − λ_j) and is multiplied by the difference of the eigenvalues' images; ε = "
        "2.2e-16 is the floor of the eigenvalues. L: entries of the Loewner matrix itself, for rules without a K~.",
        "SVD-Padé's published bound is the quotient of the coefficients' sums in the arithmetic of 20 digits in which "
        "they were solved; in float64 Q(1) = 0, and the layer returns 0 there.",
    ]
    header = ["Gradient", "Quantity", "Form", "Computed", "Published", "Reached by"]
    return Block("Upper bounds of the gradients", header, rows, notes)


def _texts(row: Mapping[Hashable, Any]) -> list[str]:
    return ["not published" if pd.isna(row["published"]) else str(row["published"])]


def _bound(value: float) -> str:
    return "infinite" if value == float("inf") else f"{value:.2e}"


def _error(value: float) -> str:
    """As many digits as are printed: one, or all before the point."""
    return f"{value:.0f}" if value >= 10 else "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-")
