"""The tables of arithmetic as they are read."""

import pandas as pd
from command_line import ROOT

from fgvc.presentation.render import Block
from fgvc.studies.gradients.arithmetic import (
    approximation_error_block,
    approximation_errors,
    gradient_bounds,
    gradient_bounds_block,
)

PAPER = ROOT / "results" / "paper"


def rows_of(block: Block) -> dict[str, list[str]]:
    assert all(len(row) == len(block.header) for row in block.rows)
    return {row[0]: row[1:] for row in block.rows}


def test_errors_stand_under_what_is_printed() -> None:
    block = approximation_error_block(approximation_errors(PAPER / "approximation_error_iccv21.csv"))
    assert block.header[1:] == [f"r = {r}" for r in ("0.1", "0.3", "0.5", "0.7", "0.9", "0.99", "0.999")]
    rows = rows_of(block)
    arithmetics = ("published", "exact arithmetic", "20 digits", "float64")
    assert list(rows) == [f"{name}, {arithmetic}" for name in ("Taylor", "Padé") for arithmetic in arithmetics]
    assert rows["Taylor, published"] == ["9e-19", "7e-18", "2e-21", "8e-16", "2e-4", "36", "904"]
    assert rows["Taylor, exact arithmetic"] == ["1e-101", "2e-53", "8e-31", "8e-16", "2e-4", "36", "904"]
    assert rows["Padé, published"][-2:] == rows["Padé, exact arithmetic"][-2:] == ["8e-13", "3e-10"]
    assert rows["Taylor, float64"][2] == "0"
    assert block.notes[-1] == "Published: Song, Sebe, Wang, ICCV 2021, degree 100"


def test_bounds_stand_beside_what_is_printed() -> None:
    block = gradient_bounds_block(gradient_bounds(PAPER / "gradient_bounds_iccv21.csv"))
    assert block.header[3:6] == ["Bound", "Published", "float64"]
    rows = rows_of(block)
    assert rows["MPN-COV"][2:4] == ["infinite", "infinite"]
    assert rows["SVD-Padé"][2:4] == ["6.00e+36", "6.00e36"]
    assert rows["SVD-Taylor"][:5] == ["|K~|", "(K + 1) / ε", "4.55e+17", "4.55e17", "4.55e+17"]
    assert rows["SVD-PI"][2:4] == ["9.01e+16", "not published"]
    assert rows["exact"][:5] == ["|L|", "1 / (2 √ε)", "3.36e+07", "not published", "3.36e+07"]


def test_a_figure_that_is_not_published_is_said_to_be() -> None:
    frame = pd.DataFrame(
        {"method": ["Padé"], "r": ["0.2"], "published": [None], "exact": [3e-9], "digits20": [0.0], "float64": [12.4]}
    ).assign(source=None)
    block = approximation_error_block(frame)
    assert [row[1] for row in block.rows] == ["not published", "3e-9", "0", "12"]
    assert not any(note.startswith("Published") for note in block.notes)
