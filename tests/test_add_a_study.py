"""The study of docs/how_to/add_a_study.md, on runs whose answer is known."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import ROOT
from run_folders import write_run

from fgvc.errors import RunError
from fgvc.runs import Spectrum, read_run


def test_the_documented_study_finds_what_is_in_the_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "how_to" / "add_a_study.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
    path = write_run(tmp_path / "run")
    spectra = np.array([[1.0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])  # effective rank 1 to 4
    Spectrum(spectra, None, np.zeros(4, int), np.array([3, 1, 0, 2])).write(path / "spectrum.npz")
    rows = [("a", 0, 0, 0.9), ("b", 0, 1, 0.9), ("c", 1, 1, 0.9), ("d", 1, 0, 0.9)]  # c and a are right: ranks 3 and 4
    (path / "predictions.csv").write_text(
        "path,target,predicted,confidence\n" + "\n".join(",".join(map(str, row)) for row in rows) + "\n"
    )
    table = names["accuracy_by_rank"]([read_run(path)])
    assert table["top1"].tolist() == [0, 0, 100, 100] and table["rank"].round(6).tolist() == [1, 2, 3, 4]
    assert names["rank_figure"](table).axes[0].get_legend_handles_labels()[1] == ["SEB"]
    Spectrum(spectra, None).write(path / "spectrum.npz")
    with pytest.raises(RunError, match="names no images"):
        names["accuracy_by_rank"]([read_run(path)])
