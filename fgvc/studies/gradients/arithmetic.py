"""The arithmetic behind the published gradients, and the published numbers: errors of 1 / (1 - r), bounds of K~ and L.

With l_i >= l_j two eigenvalues and r = l_j / l_i, the published chain needs 1 / (l_i - l_j) = (1 / l_i) 1 / (1 - r) and
approximates 1 / (1 - r) by a Taylor polynomial or a Padé approximant. [Song, Sebe, Wang, ICCV 2021]
"""

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path

import mpmath
import pandas as pd
import torch

from fgvc.io import read_csv
from fgvc.presentation.render import NOT_MEASURED, Block
from fgvc.spectral import EIGENVALUE_FLOOR, GRADIENTS, SQRT
from fgvc.spectral.maps import Eigenvalues as Spectrum
from fgvc.spectral.maps import NewtonSchulzRoot
from fgvc.spectral.pade_coefficients import DENOMINATOR, NUMERATOR
from fgvc.spectral.rules import PublishedChain, pade_ratio

RATIOS = ("0.1", "0.3", "0.5", "0.7", "0.9", "0.99", "0.999")
"""The published values of r."""
DEGREE = 100
DIGITS = 20
"""Decimal digits of the published coefficients."""


def approximation_errors(published: Path) -> pd.DataFrame:
    """|approximation - 1 / (1 - r)| of both approximants at `RATIOS`.

    Args:
        published: approximation_error_iccv21.csv.

    Returns:
        One row an approximant ("Taylor", "Padé") and r, and for each the error in several arithmetics:

        published: as printed, text.
        exact: in rational numbers: of Taylor r^101 / (1 - r), of Padé with the coefficients rounded to float64, as
            every layer uses them.
        digits20: in the arithmetic that the published coefficients were solved in, coefficients not rounded.
        float64: of what this package's layers compute, Taylor as (1 - r^101) / (1 - r), Padé by Horner's scheme; the
            difference to 1 / (1 - r), r rounded to float64, is exact.
        source: of the printed figure.

    Raises:
        RunError: the file is missing or damaged.
    """
    printed = read_csv(published, ("method", "r", "error", "source"), as_text=True).set_index(["method", "r"])
    rows = [
        (name, r, exact(Fraction(r)), _error_at_20_digits(name, r), float(_error_in_float64(name, float(r))))
        for name, exact in (("Taylor", lambda r: float(r ** (DEGREE + 1) / (1 - r))), ("Padé", _pade_error))
        for r in RATIOS
    ]
    table = pd.DataFrame(rows, columns=["method", "r", "exact", "digits20", "float64"])
    table = table.join(printed[["error", "source"]].rename(columns={"error": "published"}), on=["method", "r"])
    return table[["method", "r", "published", "exact", "digits20", "float64", "source"]]


def _pade_error(r: Fraction) -> float:
    def value(coefficients: Sequence[float]) -> Fraction:
        return sum((Fraction(c) * r**k for k, c in enumerate(coefficients)), Fraction(0))

    return float(abs(value(NUMERATOR) / value(DENOMINATOR) - 1 / (1 - r)))


@cache
def _solved() -> tuple[list[mpmath.mpf], list[mpmath.mpf], list[mpmath.mpf]]:
    """Coefficients at 20 digits, constant term first: Taylor, and the Padé approximant's numerator and denominator."""
    with mpmath.workdps(DIGITS):
        taylor = mpmath.taylor(lambda r: 1 / (1 - r), 0, DEGREE)
        return taylor, *mpmath.pade(taylor, DEGREE // 2, DEGREE // 2)


def _error_at_20_digits(name: str, r: str) -> float:
    taylor, numerator, denominator = _solved()
    with mpmath.workdps(DIGITS):
        at = mpmath.mpf(r)
        if name == "Taylor":
            value = mpmath.polyval(taylor[::-1], at)
        else:
            value = mpmath.polyval(numerator[::-1], at) / mpmath.polyval(denominator[::-1], at)
        return float(abs(value - 1 / (1 - at)))


def _error_in_float64(name: str, r: float) -> Fraction:
    ones = torch.ones(1, 1, 1, dtype=torch.float64)
    computed = pade_ratio(r * ones) if name == "Padé" else _chain("taylor").reciprocal_gap(ones, r * ones)
    return abs(Fraction(float(computed)) - 1 / (1 - Fraction(r)))


def gradient_bounds(published: Path) -> pd.DataFrame:
    """Largest value of each rule's K~ (of the entries of L where a rule has none) over eigenvalues from the floor up.

    Args:
        published: gradient_bounds_iccv21.csv.

    Returns:
        One row a rule: method (label), quantity ("K~" or "L"), form (analytic), bound (its value), float64 (the largest
        that this package's rule returns, see `_largest`), published (as printed, text), trigger, source.

    Raises:
        RunError: the file is missing or damaged.
    """
    eps = EIGENVALUE_FLOOR
    meet, tie = "two eigenvalues that meet", "two equal eigenvalues at the floor"
    beside_zero = "λ_N at the floor, beside 0; float64: two kept ones that meet"
    rows = [
        ("MPN-COV", "K~", "1 / (λ_i − λ_j)", math.inf, _largest("ordinary"), meet),
        ("SVD-Trunc", "K~", "T", 1e10, _largest("trunc"), "two eigenvalues closer than 1 / T"),
        ("SVD-Taylor", "K~", "(K + 1) / ε", (DEGREE + 1) / eps, _largest("taylor"), tie),
        ("SVD-PI", "K~", "T / ε", 20 / eps, _largest("power_iteration"), tie),
        ("SVD-Padé", "K~", "|P(1) / Q(1)| / ε", _pade_at_one(), _largest("pade"), f"{tie}; float64: {meet}"),
        ("SVD-TopN", "K~", "1 / λ_N", 1 / eps, _largest("topn_published"), beside_zero),
        ("SVD-Newton", "L", "(3 / 2)^10 / √(tr S)", 1.5**10, _newton_slope(), "two null eigenvalues, with tr S = 1"),
        ("exact", "L", "1 / (2 √ε)", 0.5 / math.sqrt(eps), _exact_at_floor(), "two eigenvalues just above the floor"),
    ]
    table = pd.DataFrame(rows, columns=["method", "quantity", "form", "bound", "float64", "trigger"])
    printed = read_csv(published, ("method", "bound", "source"), as_text=True).set_index("method")
    table = table.join(printed[["bound", "source"]].rename(columns={"bound": "published"}), on="method")
    return table[["method", "quantity", "form", "bound", "float64", "published", "trigger", "source"]]


def _chain(name: str) -> PublishedChain:
    rule = GRADIENTS[name]
    assert isinstance(rule, PublishedChain)
    return rule


def _largest(name: str) -> float:
    """Largest |K~| of a rule in float64: at ties and next neighbours, spread evenly from the floor to twice the floor.

    There neighbours are closest. Thirds of the range are among the points: a third up, r = low / high of neighbours
    changes from 1 - 2^-52 to 1 - 2^-53.
    """
    low = EIGENVALUE_FLOOR * torch.linspace(1, 2, 3 * 2**12 + 1, dtype=torch.float64)[:, None, None]
    above = torch.nextafter(low, torch.full_like(low, torch.inf))
    gap = _chain(name).reciprocal_gap
    return float(torch.maximum(gap(low, low).abs(), gap(above, low).abs()).max())


def _pade_at_one() -> float:
    """|P(1) / Q(1)| / eps in the arithmetic that the published coefficients were solved in."""
    _, numerator, denominator = _solved()
    with mpmath.workdps(DIGITS):
        return float(abs(sum(numerator) / sum(denominator)) / EIGENVALUE_FLOOR)


def _newton_slope() -> float:
    """df/dl of the iteration at a null eigenvalue of a matrix of trace 1; the other eigenvalue has all the trace."""
    lam = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    f = NewtonSchulzRoot(10)
    return float(f.pullback(lam, torch.tensor([[1.0, 0.0]], dtype=torch.float64))[0, 0])


def _exact_at_floor() -> float:
    """L of two equal eigenvalues, the smallest that do not count as null."""
    floor = torch.full((1, 2), EIGENVALUE_FLOOR, dtype=torch.float64)
    spectrum = Spectrum(torch.nextafter(floor, torch.ones_like(floor)))
    return float(GRADIENTS["exact"](SQRT, spectrum).off_diagonal[0, 0, 1])


_ARITHMETICS = {"exact": "exact arithmetic", "digits20": "20 digits", "float64": "float64"}

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
        rows.append([f"{method}, published", *part["published"]])
        rows += [[f"{method}, {name}", *map(_error, part[column])] for column, name in _ARITHMETICS.items()]
    header = ["Approximation, degree 100", *(f"r = {r}" for r in ratios)]
    notes = [
        *_ERROR_NOTES,
        "Bold: the smaller error of the two approximations in the same arithmetic.",
        *_sources(table),
    ]
    caption = (
        "Absolute error of two approximations of 1 / (1 − r) of degree 100, published and in three arithmetics. There "
        "are no seeds."
    )
    title = "Error of the approximations of 1 / (1 - r)"
    return Block(title, header, rows, notes, caption, "approximation_error", _smaller_errors(rows))


def _smaller_errors(rows: list[list[str]]) -> dict[tuple[int, int], int]:
    """Marks of the smaller error of each column and arithmetic; equal ones have none."""
    kinds, marks = 1 + len(_ARITHMETICS), {}
    for kind, j in itertools.product(range(kinds), range(1, len(rows[0]))):
        errors = {i: float(rows[i][j]) for i in range(kind, len(rows), kinds)}
        if len(set(errors.values())) > 1:
            marks[min(errors, key=lambda row: errors[row]), j] = 1
    return marks


def gradient_bounds_block(table: pd.DataFrame) -> Block:
    """Of `fgvc.studies.gradients.arithmetic.gradient_bounds`: one row a rule."""
    rows = []
    for row in table.to_dict("records"):
        published = NOT_MEASURED if pd.isna(row["published"]) else str(row["published"])
        bounds = [_bound(row["bound"]), published, _bound(row["float64"])]
        rows.append([row["method"], f"|{row['quantity']}|", row["form"], *bounds, row["trigger"]])
    header = ["Gradient", "Of", "Form", "Bound", "Published", "float64", "Reached by"]
    caption = (
        "Upper bounds of the gradients of the matrix square root, published and computed in float64. There are no "
        "seeds."
    )
    notes = [*_BOUND_NOTES, *_sources(table)]
    return Block("Upper bounds of the gradients", header, rows, notes, caption, "gradient_bounds")


def _sources(table: pd.DataFrame) -> list[str]:
    return [f"Published: {source}" for source in dict.fromkeys(table["source"].dropna())]


def _bound(value: float) -> str:
    return "infinite" if math.isinf(value) else f"{value:.2e}"


def _error(value: float) -> str:
    """As many digits as are printed: one, or all before the point."""
    return f"{value:.0f}" if value >= 10 else "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-")
