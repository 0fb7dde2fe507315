"""The published arithmetic: reproduced to the printed digits where it can be, and what the layers make of it."""

import math
from fractions import Fraction
from pathlib import Path

import pandas as pd
import pytest
import torch
from command_line import ROOT

from fgvc.errors import RunError
from fgvc.studies.gradients.arithmetic import approximation_errors, gradient_bounds

ERRORS = ROOT / "results" / "paper" / "approximation_error_iccv21.csv"
BOUNDS = ROOT / "results" / "paper" / "gradient_bounds_iccv21.csv"
EPS = torch.finfo(torch.float64).eps


@pytest.fixture(scope="module")
def errors() -> pd.DataFrame:
    return approximation_errors(ERRORS).set_index(["method", "r"])


@pytest.fixture(scope="module")
def bounds() -> pd.DataFrame:
    return gradient_bounds(BOUNDS).set_index("method")


def reads_as(value: float, printed: str) -> bool:
    """Whether a value has the printed digits once it is rounded to as many."""
    digits = len(printed.split("e")[0].replace(".", ""))
    return float(f"{value:.{digits - 1}e}") == float(printed)


def test_errors_are_reproduced_to_the_printed_digits_where_they_can_be(errors: pd.DataFrame) -> None:
    found = {key for key, row in errors.iterrows() if reads_as(row["exact"], row["published"])}
    taylor = {("Taylor", r) for r in ("0.7", "0.9", "0.99", "0.999")}
    assert found == taylor | {("Padé", "0.99"), ("Padé", "0.999")}
    assert errors["published"].notna().all() and errors["source"].str.contains("ICCV 2021").all()


def test_the_other_printed_errors_are_not_of_one_arithmetic(errors: pd.DataFrame) -> None:
    """What the table's notes say of them."""
    exact, digits = errors["exact"], errors["digits20"]
    assert (digits[[("Taylor", "0.1"), ("Taylor", "0.3")]] < 1e-20).all()
    assert reads_as(exact["Padé", "0.5"], "1e-17") and reads_as(digits["Padé", "0.99"], "9e-18")
    rounded_r = {r: float(abs(1 / (1 - Fraction(float(r))) - 1 / (1 - Fraction(r)))) for r in ("0.1", "0.3", "0.5")}
    assert reads_as(rounded_r["0.1"], "7e-18") and reads_as(rounded_r["0.3"], "2e-17") and rounded_r["0.5"] == 0
    assert reads_as(2.0**-69, "2e-21")  # the step of 70 bits just below 2


def test_float64_errs_by_rounding_and_cancellation_only(errors: pd.DataFrame) -> None:
    # 1 / (1 - r) carries an error of about eps / (1 - r)^2 where 1 - r is rounded; Taylor that of the truncation
    for (method, r), row in errors.iterrows():
        rounding = 4 * EPS / (1 - float(r)) ** 2
        truncation = row["exact"] if method == "Taylor" else 0
        assert abs(row["float64"] - truncation) <= rounding, (method, r)


def test_bounds_are_reproduced_to_the_printed_digits(bounds: pd.DataFrame) -> None:
    printed = bounds["published"].dropna()
    assert set(printed.index) == {"MPN-COV", "SVD-Trunc", "SVD-Taylor", "SVD-Padé", "SVD-TopN"}
    assert printed.pop("MPN-COV") == "infinite" and bounds.loc["MPN-COV", "bound"] == math.inf
    for method, text in printed.items():
        assert reads_as(bounds.loc[method, "bound"], text), method


def test_bounds_that_the_rules_reach_in_float64(bounds: pd.DataFrame) -> None:
    reached = ["SVD-Trunc", "SVD-Taylor", "SVD-PI", "SVD-Newton", "exact"]
    assert bounds.loc[reached, "float64"].to_numpy() == pytest.approx(bounds.loc[reached, "bound"].to_numpy(), rel=1e-6)
    # next neighbours at the floor, 1 / (2^-52 eps), for whatever does not smooth
    assert bounds.loc[["MPN-COV", "SVD-TopN"], "float64"].to_numpy() == pytest.approx(2 * [1 / (EPS * EPS)])
    assert 1e31 < bounds.loc["SVD-Padé", "float64"] < bounds.loc["MPN-COV", "float64"]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    damaged = tmp_path / "errors.csv"
    damaged.write_text("method,r\nTaylor,0.1\n")
    with pytest.raises(RunError, match=r"errors\.csv: no column error, source"):
        approximation_errors(damaged)
    with pytest.raises(RunError, match=r"absent\.csv"):
        gradient_bounds(tmp_path / "absent.csv")
