"""The accuracy table: measured over seeds, published next to it, in four formats, and by its script."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from command_line import ROOT, Done, Train, refused, run
from run_folders import accuracy, change_summary, find_runs, write_config, write_run

from fgvc.errors import RunError
from fgvc.presentation.render import to_latex, to_markdown
from fgvc.presentation.style import method_order
from fgvc.reporting.accuracy import accuracy_table, load_published, table_blocks

PAPER = ROOT / "results" / "paper"


def tabulate(folder: Path) -> pd.DataFrame:
    return accuracy_table(find_runs([folder]), load_published(PAPER))


def markdown(table: pd.DataFrame) -> str:
    return to_markdown("Accuracy", table_blocks(table))


def cell(table: pd.DataFrame, label: str, origin: str, epoch: str) -> "pd.Series[object]":
    (row,) = (
        row for _, row in table.iterrows() if (row["label"], row["origin"], row["epoch"]) == (label, origin, epoch)
    )
    return row


def markdown_rows(text: str) -> list[dict[str, str]]:
    """Rows of the Markdown tables of a text, by column title, without marks of the best."""
    rows, header = [], None
    for line in text.splitlines():
        if not line.startswith("|"):
            header = None
            continue
        cells = [part.strip().strip("*").removesuffix(" (3rd)") for part in re.split(r"(?<!\\)\|", line)[1:-1]]
        if header is None:
            header = cells
        elif not set(line) <= set("|:- "):
            rows.append(dict(zip(header, cells, strict=True)))
    return rows


def test_mean_and_sample_deviation_over_seeds(tmp_path: Path) -> None:
    for seed, (final, best) in enumerate([(90.0, 91.0), (91.0, 91.5), (93.0, 95.0)]):
        path = write_run(tmp_path / f"seed{seed}", seed=seed, top1=final, best=best)
    change_summary(path, final=accuracy(93.0) | {"top5": None})  # as with fewer than five classes
    table = tabulate(tmp_path)
    final, best = (cell(table, "SEB", "measured", epoch) for epoch in ("final", "best"))
    # by hand: mean 274 / 3, squared deviations (16 + 1 + 25) / 9, over n - 1 = 2
    assert final["top1_mean"] == pytest.approx(274 / 3) and final["top1_std"] == pytest.approx((42 / 9 / 2) ** 0.5)
    assert best["top1_mean"] == pytest.approx(92.5) and best["top1_std"] == pytest.approx(4.75**0.5)
    assert pd.isna(final["top5_mean"]) and best["top5_mean"] == pytest.approx((98 + 98.5 + 100) / 3)
    assert final["mean_class_mean"] == pytest.approx(274 / 3 - 0.5)
    assert (final["n"], final["seeds"]) == (3, "0 1 2")
    (row,) = markdown_rows(markdown(table))
    assert (row["n"], row["Final"], row["Best (selected on test)"]) == ("3", "91.33 ± 1.53", "92.50 ± 2.18")


def test_best_epochs_selected_on_different_splits_are_never_mixed(tmp_path: Path) -> None:
    write_run(tmp_path / "a", seed=0, best=95.0, selected_on="test")
    write_run(tmp_path / "b", seed=1, best=85.0, selected_on="validation")
    text = markdown(tabulate(tmp_path))
    rows = markdown_rows(text)
    assert {row["Best (selected on test)"] for row in rows if "Best (selected on test)" in row} == {"95.00"}
    assert {row["Best (selected on validation)"] for row in rows if "Best (selected on validation)" in row} == {"85.00"}


def test_published_stand_beside_measured_of_the_same_dataset_only(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "isqrt_cov", dataset="cub", num_classes=200, top1=80.0, best=81.0)
    write_run(tmp_path / "b", "gap", dataset="cub", num_classes=200, top1=70.0)
    text = markdown(tabulate(tmp_path))
    rows = {row["Method"]: row for row in markdown_rows(text)}
    assert list(rows) == sorted(rows, key=method_order)
    isqrt = rows["iSQRT-COV"]
    assert (isqrt["Final"], isqrt["Best (selected on test)"]) == ("80.00", "81.00")  # one seed has no deviation
    for column, value, source in (
        ("Published final", "85.95", "ICCV21 poster table 5"),
        ("Published best (on test)", "86.45", "ICCV21 poster table 5"),
    ):
        assert re.fullmatch(rf"{value} \[\d\]", isqrt[column])
        assert f"- {isqrt[column].split()[1]} published: {source}\n" in text
    assert isqrt["Published, epoch unstated"] == "—"  # "iSQRT-COV (32K-d)" is another method
    assert rows["GAP"]["Published final"] == "—"
    assert rows["GAP"]["Published, epoch unstated"].startswith("88.45 [")
    assert (rows["MPN-COV"]["Final"], rows["MPN-COV"]["n"]) == ("—", "0")
    assert rows["SVD-TopN"]["Published final"].startswith("did not converge [")
    assert "TransFG" not in rows


def test_subset_of_a_dataset_has_no_published_number(tmp_path: Path) -> None:
    for name in ("cub80", "cub"):  # the latter read in parts: 80 of its 200 classes
        write_run(tmp_path / name, "isqrt_cov", dataset=name)
        text = markdown(tabulate(tmp_path / name))
        assert "85.95" not in text and "ublished" not in text


def test_settings_have_their_own_blocks_and_an_overview(tmp_path: Path) -> None:
    write_run(tmp_path / "a", top1=90.0)
    write_run(tmp_path / "b", frozen=False, top1=80.0)
    write_run(tmp_path / "c", "gap", top1=70.0)
    text = markdown(tabulate(tmp_path))
    assert "(frozen), 224 px" in text and "(fine-tuned), 224 px" in text and "85.00" not in text
    overview = {row["Method"]: list(row.values())[1:] for row in markdown_rows(text)[:2]}
    assert overview["SEB"] == ["80.00", "80.30", "90.00", "90.30"]
    assert overview["GAP"] == ["—", "—", "70.00", "70.30"]
    assert text.count("- —: not measured.\n") == 1 and "not measured" not in text.replace("- —: not measured.", "")
    assert "| **80.00** | **80.30** |" not in text and "**90.00**" in text  # one alone is no best
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## Overview, top-1 in %",
        "## Accuracy, top-1 in %: fine-tuned",
        "## Accuracy, top-1 in %: frozen",
    ]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("85,95", r"fgvc_iccv21\.csv, row 1: 7 cells under 6 columns"),
        ("n/a", "iSQRT-COV on cub is 'n/a'"),
        ("8595", "iSQRT-COV on cub is '8595'"),
    ],
)
def test_damaged_published_numbers_are_refused(tmp_path: Path, damage: str, message: str) -> None:
    for file in PAPER.glob("*.csv"):
        (tmp_path / file.name).write_text(file.read_text(encoding="utf-8").replace("85.95", damage), encoding="utf-8")
    runs = find_runs([write_run(tmp_path / "run", dataset="cub", num_classes=200)])
    with pytest.raises(RunError, match=message):
        accuracy_table(runs, load_published(tmp_path))


def test_missing_or_foreign_published_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"fgvc_iccv21\.csv: no such file"):
        load_published(tmp_path)
    (tmp_path / "fgvc_iccv21.csv").write_text("a,b\n1,2\n")
    with pytest.raises(RunError, match="no column method, dataset"):
        load_published(tmp_path)


def test_latex_is_balanced_and_escaped(tmp_path: Path) -> None:
    write_run(tmp_path / "a", dataset="cub", num_classes=200, label="[50%_off] & {more} \\ $#~^|<>")
    write_run(tmp_path / "b", dataset="cub", num_classes=200, seed=1)
    text = to_latex(table_blocks(tabulate(tmp_path)))
    assert r"{[}50\%\_off{]} \& \{more\} \textbackslash{} \$\#\textasciitilde{}\textasciicircum{}" in text
    assert r"\textasciicircum{}\textbar{}\textless{}\textgreater{}" in text
    assert text.count(r"\begin{") == text.count(r"\end{") > 0
    bare = re.sub(r"\\[\\{}%&$#_]", "", text)
    assert bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0
    columns = re.findall(r"\\begin\{tabular\}\{([lr]+)\}", text)
    bodies = re.findall(r"\\midrule\n(.*?)\\bottomrule", text, re.DOTALL)
    for sides, body in zip(columns, bodies, strict=True):
        assert {len(re.split(r"(?<!\\)&", line)) for line in body.splitlines()} == {len(sides)}


def test_names_cannot_break_the_markdown(tmp_path: Path) -> None:
    write_run(tmp_path / "a", label="one|two\nthree")
    (row,) = markdown_rows(markdown(tabulate(tmp_path)))
    assert row["Method"] == "one\\|two three"


def test_script_tabulates_the_finished_and_notes_the_rest(tmp_path: Path, here: Train) -> None:
    for seed in (0, 1):
        write_run(tmp_path / f"seed{seed}", seed=seed, top1=90.0)
    write_run(tmp_path / "stopped", seed=2, status="stopped", reason="interrupted", final=None, best=None)
    done = here("make_tables.py", ".", cwd=tmp_path)
    assert done.returncode == 0 and "note: left out stopped: status stopped (interrupted)\n" in done.stderr
    for kind in ("md", "tex", "html", "csv"):
        file = Path("tables", f"accuracy.{kind}")
        text = (tmp_path / file).read_text(encoding="utf-8")
        assert ("90," if kind == "csv" else "90.00") in text and str(file) in done.stdout
    assert (tmp_path / "tables" / "accuracy.md").read_text(encoding="utf-8") in done.stdout


def test_rates_are_rows_of_their_own_and_what_is_left_out_stands_in_the_files(
    tmp_path: Path, here: Callable[..., Done]
) -> None:
    for number, (rate, top1) in enumerate(((0.1, 10.0), (0.1, 12.0), (0.001, 30.0))):
        path = write_run(tmp_path / f"run{number}", "gap", seed=number, top1=top1)
        write_config(path, method={"name": "gap"}, optimizer={"lr": rate})
    write_config(write_run(tmp_path / "other", "seb", top1=5.0), method={"name": "seb"}, optimizer={"lr": 0.1})
    write_run(tmp_path / "stopped", "seb", status="stopped", reason="killed", final=None, best=None)
    done = here("make_tables.py", tmp_path, "--output", tmp_path / "tables", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "tables" / "accuracy.md").read_text(encoding="utf-8")
    assert re.search(r"^\| GAP \[optimizer.lr=0.001\] +\| +1 \| +\*\*30.00", text, re.M), text
    assert re.search(r"^\| GAP \[optimizer.lr=0.1\] +\| +2 \| +\*11.00 ± 1.41", text, re.M), text
    for kind in ("md", "tex", "html"):
        page = (tmp_path / "tables" / f"accuracy.{kind}").read_text(encoding="utf-8")
        assert "status stopped (killed)" in page, kind
    noted = "the methods differ in optimizer.lr (0.1: GAP [optimizer.lr=0.1], SEB; 0.001: GAP [optimizer.lr=0.001])"
    assert noted in text.replace("\\", "")


def test_script_shows_a_traceback_where_that_is_asked_for(tmp_path: Path) -> None:
    refused(run("make_tables.py", ".", cwd=tmp_path), "summary.json")
    assert "Traceback" in run("make_tables.py", ".", "--debug", cwd=tmp_path).stderr


def test_script_survives_a_reader_that_leaves(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "make_tables.py"), str(tmp_path)],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        # buffered, so that the pipe is found broken only when the buffer is flushed at the end
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
    )
    os.close(write)
    assert (result.returncode, result.stderr) == (141, "")
    assert (tmp_path / "tables" / "accuracy.csv").is_file()
