"""The published tables that are arithmetic: what is printed beside what is computed."""

import math

import pandas as pd

from fgvc.presentation.render import Block

_ARITHMETICS = {
    "exact": "exact arithmetic",
    "digits20": "20 digits",
    "float64": "float64",
}

_ERROR_NOTES = (
    "Exact arithmetic: of Taylor r^101 / (1 − r); of Padé with the coefficients rounded to float64, in rational "
    "numbers. 20 digits: coefficients as they were solved, not rounded, and evaluated in the same arithmetic. float64: "
    "what this package's layers compute, Taylor in closed form, Padé by Horner's scheme.",
    "Reproduced to every printed digit, by exact arithmetic: Taylor from r = 0.7 on, Padé at r = 0.99 and 0.999.",
    "The other printed figures cannot come from one arithmetic. Taylor: an error of 2e-21 at r = 0.5 takes 70 bits (20 "
    "digits), in which those at 0.1 and 0.3 stay below 1e-20, or are 7e-18 and 2e-17 if r is first rounded to float64. "
    "Padé: rounded coefficients alone err by 1e-17 at r = 0.5, more than the 1e-21 printed; unrounded ones by 9e-18 at "
    "r = 0.99, less than the 8e-13 printed.",
)

_BOUND_NOTES = (
    "K~ stands in place of 1 / (λ_i − λ_j) and is multiplied by the difference of the eigenvalues' images; ε = 2.2e-16 "
    "is the floor of the eigenvalues. L: entries of the Loewner matrix itself, for rules without a K~.",
    "Bound: value of the form. float64: the largest that this package's rule returns at equal and at neighbouring "
    "eigenvalues near the floor; for MPN-COV, SVD-Padé and SVD-TopN it is 0 at equal ones.",
    "SVD-Padé: P(1) / Q(1) in the 20 digits in which the coefficients were solved; in float64 Q(1) = 0.",
    "SVD-TopN: the printed bound is that of a kept eigenvalue beside 0. It leaves out two kept eigenvalues that meet, "
    "where the gradient is that of MPN-COV.",
)


def approximation_error_block(table: pd.DataFrame) -> Block:
    """Of `fgvc.studies.gradients.arithmetic.approximation_errors`: one row an approximant and arithmetic."""
    ratios = list(dict.fromkeys(table["r"]))
    rows = []
    for method in dict.fromkeys(table["method"]):
        part = table[table["method"] == method].set_index("r").loc[ratios]
        rows.append([f"{method}, published", *part["published"].fillna("not published")])
        rows += [[f"{method}, {name}", *map(_error, part[column])] for column, name in _ARITHMETICS.items()]
    header = ["Approximation, degree 100", *(f"r = {r}" for r in ratios)]
    notes = [*_ERROR_NOTES, *_sources(table)]
    return Block("Error of the approximations of 1 / (1 - r)", header, rows, notes)


def gradient_bounds_block(table: pd.DataFrame) -> Block:
    """Of `fgvc.studies.gradients.arithmetic.gradient_bounds`: one row a rule."""
    rows = [
        [
            row["method"],
            f"|{row['quantity']}|",
            row["form"],
            _bound(row["bound"]),
            "not published" if pd.isna(row["published"]) else str(row["published"]),
            _bound(row["float64"]),
            row["trigger"],
        ]
        for row in table.to_dict("records")
    ]
    header = ["Gradient", "Quantity", "Form", "Bound", "Published", "float64", "Reached by"]
    return Block("Upper bounds of the gradients", header, rows, [*_BOUND_NOTES, *_sources(table)])


def _sources(table: pd.DataFrame) -> list[str]:
    return [f"Published: {source}" for source in dict.fromkeys(table["source"].dropna())]


def _bound(value: float) -> str:
    return "infinite" if math.isinf(value) else f"{value:.2e}"


def _error(value: float) -> str:
    """As many digits as are printed: one, or all before the point."""
    return f"{value:.0f}" if value >= 10 else "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-")
