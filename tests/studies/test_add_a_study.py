"""The study of docs/how_to/add_a_study.md, on runs whose answer is known."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from command_line import ROOT
from run_folders import write_run

from fgvc.runs import Spectrum, read_run

PAGE = (ROOT / "docs" / "how_to" / "add_a_study.md").read_text(encoding="utf-8")


def a_run(path: Path) -> Path:
    """Four images of effective rank 1 to 4; those of rank 3 and 4 are right."""
    path = write_run(path)
    spectra = np.array([[1.0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    Spectrum(spectra, None, np.zeros(4, int), np.array([3, 1, 0, 2])).write(path / "spectrum.npz")
    rows = [("a", 0, 0, 0.9), ("b", 0, 1, 0.9), ("c", 1, 1, 0.9), ("d", 1, 0, 0.9)]
    lines = [",".join(map(str, row)) for row in rows]
    (path / "predictions.csv").write_text("\n".join(["path,target,predicted,confidence", *lines, ""]))
    return path


def test_the_documented_study_finds_what_is_in_the_runs(tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(block, names)
    path = a_run(tmp_path / "run")
    table, notes = names["accuracy_by_rank"]([read_run(path)])
    assert table["top1"].tolist() == [0, 0, 100, 100] and table["rank"].round(6).tolist() == [1, 2, 3, 4]
    assert notes == []
    assert names["rank_figure"](table).axes[0].get_legend_handles_labels()[1] == ["SEB"]
    (path / "spectrum.npz").unlink()
    table, (note,) = names["accuracy_by_rank"]([read_run(path)])
    assert table.empty and "spectrum.npz" in note


def test_its_script_writes_table_and_figure(tmp_path: Path) -> None:
    """In a copy of the package, with the files where the page puts them."""
    shutil.copytree(ROOT / "fgvc", tmp_path / "fgvc", ignore=shutil.ignore_patterns("__pycache__"))
    folder = tmp_path / "fgvc" / "studies" / "rank"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    for name, block in zip(("measure", "show"), re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL), strict=True):
        (folder / f"{name}.py").write_text(block, encoding="utf-8")
    (script,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "study_rank.py").write_text(script, encoding="utf-8")
    command = [sys.executable, "study_rank.py", a_run(tmp_path / "runs" / "a").parent]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "| SEB" in done.stdout, done.stderr
    assert {file.name for file in (tmp_path / "runs" / "rank").glob("[!.]*")} == {"rank.csv", "rank.png", "rank.pdf"}
