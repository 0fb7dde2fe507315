import csv
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from command_line import ROOT
from run_folders import accuracy, write_config, write_run

from fgvc.errors import RunError
from fgvc.io import to_csv
from fgvc.presentation.render import to_latex, to_markdown
from fgvc.reporting.accuracy import accuracy_table, table_blocks
from fgvc.reporting.published import load_published
from fgvc.runs import find_runs

REPOSITORY = ROOT
PAPER = REPOSITORY / "results" / "paper"


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


def make_tables(*arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "scripts" / "make_tables.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": "utf-8"} | environment,
    )


def test_mean_and_sample_deviation_over_seeds(tmp_path: Path) -> None:
    for seed, (final, best) in enumerate([(90.0, 91.0), (91.0, 91.5), (93.0, 95.0)]):
        write_run(tmp_path / f"seed{seed}", seed=seed, top1=final, best=best)
    table = tabulate(tmp_path)
    final, best = (cell(table, "SEB", "measured", epoch) for epoch in ("final", "best"))
    # by hand: mean 274 / 3, squared deviations (16 + 1 + 25) / 9, over n - 1 = 2
    assert final["top1_mean"] == pytest.approx(274 / 3) and final["top1_std"] == pytest.approx((42 / 9 / 2) ** 0.5)
    assert best["top1_mean"] == pytest.approx(92.5) and best["top1_std"] == pytest.approx(4.75**0.5)
    assert final["top5_mean"] == pytest.approx((97 + 98 + 100) / 3)
    assert final["mean_class_mean"] == pytest.approx(274 / 3 - 0.5)
    assert (final["n"], final["seeds"]) == (3, "0 1 2")
    (row,) = markdown_rows(markdown(table))
    assert (row["n"], row["Final"], row["Best (selected on test)"]) == ("3", "91.33 ± 1.53", "92.50 ± 2.18")


def test_one_seed_has_no_deviation(tmp_path: Path) -> None:
    write_run(tmp_path / "run", top1=90.0)
    (row,) = markdown_rows(markdown(tabulate(tmp_path)))
    assert (row["n"], row["Final"]) == ("1", "90.00")


def test_too_few_classes_for_top5_leaves_it_empty(tmp_path: Path) -> None:
    write_run(tmp_path / "run", final=accuracy(90.0) | {"top5": None})
    assert pd.isna(cell(tabulate(tmp_path), "SEB", "measured", "final")["top5_mean"])


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
    rows = {row["Method"]: row for row in markdown_rows(markdown(tabulate(tmp_path)))}
    isqrt = rows["iSQRT-COV"]
    assert (isqrt["Final"], isqrt["Best (selected on test)"]) == ("80.00", "81.00")
    assert re.fullmatch(r"85\.95 \[\d\]", isqrt["Published final"])
    assert re.fullmatch(r"86\.45 \[\d\]", isqrt["Published best (on test)"])
    assert isqrt["Published, epoch unstated"] == "not published"  # "iSQRT-COV (32K-d)" is another method
    assert rows["GAP"]["Published final"] == "not published"
    assert rows["GAP"]["Published, epoch unstated"].startswith("88.45 [")
    assert (rows["MPN-COV"]["Final"], rows["MPN-COV"]["n"]) == ("not measured", "0")
    assert rows["SVD-TopN"]["Published final"].startswith("did not converge [")
    assert "TransFG" not in rows


def test_every_published_number_names_its_source(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "mpn_cov", dataset="cub", num_classes=200, top1=80.0)
    text = markdown(tabulate(tmp_path))
    row = next(row for row in markdown_rows(text) if row["Method"] == "MPN-COV")
    for column, source in (
        ("Published final", "ICCV21 poster table 5"),
        ("Published, epoch unstated", "authors' demo README (resnet50)"),
    ):
        number = row[column].split()[1]
        assert f"- {number} published: {source}\n" in text


def test_subset_of_a_dataset_has_no_published_number(tmp_path: Path) -> None:
    for name in ("cub80", "cub"):  # the latter read in parts: 80 of its 200 classes
        write_run(tmp_path / name, "isqrt_cov", dataset=name)
        text = markdown(tabulate(tmp_path / name))
        assert "85.95" not in text and f"Not published: no number for the dataset {name} with 80 classes." in text


def test_settings_have_their_own_blocks_and_an_overview(tmp_path: Path) -> None:
    write_run(tmp_path / "a", top1=90.0)
    write_run(tmp_path / "b", frozen=False, top1=80.0)
    write_run(tmp_path / "c", "gap", top1=70.0)
    text = markdown(tabulate(tmp_path))
    assert "(frozen), 224 px" in text and "(fine-tuned), 224 px" in text and "85.00" not in text
    overview = {row["Method"]: list(row.values())[1:] for row in markdown_rows(text)[:2]}
    assert overview["SEB"] == ["80.00", "80.30", "90.00", "90.30"]
    assert overview["GAP"] == ["not measured", "not measured", "70.00", "70.30"]


def test_methods_stand_in_their_fixed_order(tmp_path: Path) -> None:
    for method in ("seb", "svd_topn", "mpn_cov", "gap", "isqrt_cov", "svd_pade"):
        write_run(tmp_path / method, method)
    write_run(tmp_path / "exact", "svd_topn", gradient="exact")
    write_run(tmp_path / "other", label="Another")
    labels = [row["Method"] for row in markdown_rows(markdown(tabulate(tmp_path)))]
    expected = ["GAP", "iSQRT-COV", "MPN-COV", "SVD-Padé", "SVD-TopN", "SVD-TopN (exact)", "SEB", "Another"]
    assert labels == expected


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
    assert r"\textasciicircum{}\textbar{}\textless{}\textgreater{} &" in text
    assert text.count(r"\begin{") == text.count(r"\end{") > 0
    bare = re.sub(r"\\[\\{}%&$#_]", "", text)
    assert bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0
    body = re.search(r"\\begin\{tabular\}\{(l r*)?(lr*)\}(.*?)\\end\{tabular\}", text, re.DOTALL)
    assert body is not None
    widths = {len(re.split(r"(?<!\\)&", line)) for line in body[3].splitlines() if line.endswith(r"\\")}
    assert widths == {len(body[2])}


def test_csv_is_tidy(tmp_path: Path) -> None:
    write_run(tmp_path / "a", top1=90.0)
    rows = list(csv.DictReader(io.StringIO(to_csv(tabulate(tmp_path)))))
    row = next(row for row in rows if (row["origin"], row["epoch"]) == ("measured", "final"))
    assert (row["top1_mean"], row["top5_mean"], row["mean_class_mean"], row["n"]) == (
        "90",
        "97",
        "89.5",
        "1",
    )
    assert {row["state"] for row in rows} == {"ok", "not published"}
    assert row["runs"] == str(tmp_path / "a")


def test_names_cannot_break_the_markdown(tmp_path: Path) -> None:
    write_run(tmp_path / "a", label="one|two\nthree")
    (row,) = markdown_rows(markdown(tabulate(tmp_path)))
    assert row["Method"] == "one\\|two three"


def test_script_writes_four_files_and_says_where(tmp_path: Path) -> None:
    write_run(tmp_path / "a" / "b", top1=90.0)
    result = make_tables(tmp_path, "--strict")
    assert (result.returncode, result.stderr) == (0, "")
    for kind in ("md", "tex", "html", "csv"):
        file = tmp_path / "tables" / f"accuracy.{kind}"
        assert ("90," if kind == "csv" else "90.00") in file.read_text(encoding="utf-8") and str(file) in result.stdout
    assert (tmp_path / "tables" / "accuracy.md").read_text(encoding="utf-8") in result.stdout


def test_script_tabulates_the_finished_and_notes_the_rest(tmp_path: Path) -> None:
    write_run(tmp_path / "a", top1=90.0)
    write_run(tmp_path / "b", seed=1, status="stopped", reason="interrupted", final=None, best=None)
    lenient, strict = make_tables(tmp_path), make_tables(tmp_path, "--strict")
    assert (lenient.returncode, strict.returncode) == (0, 1)
    for result in (lenient, strict):
        assert "| 90.00 |" in result.stdout.replace("  ", "")
        assert result.stderr == f"note: left out {tmp_path / 'b'}: status stopped (interrupted)\n"


def test_script_notes_averages_over_different_configurations(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_config(write_run(tmp_path / f"seed{seed}", seed=seed), optimizer={"lr": 0.1 + seed})
    result = make_tables(tmp_path, "--strict")
    assert result.returncode == 1 and "optimizer.lr differs" in result.stderr


def test_script_ends_a_users_mistake_with_2_and_one_message(tmp_path: Path) -> None:
    result = make_tables(tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and "summary.json" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Traceback" in make_tables(tmp_path, "--debug").stderr
    assert "Traceback" in make_tables(tmp_path, FGVC_DEBUG="1").stderr
    assert make_tables().returncode == 2


def test_script_survives_a_reader_that_leaves(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(
        [sys.executable, str(REPOSITORY / "scripts" / "make_tables.py"), str(tmp_path)],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        # buffered, so that the pipe is found broken only when the buffer is flushed at the end
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": ""},
    )
    os.close(write)
    assert (result.returncode, result.stderr) == (141, "")
    assert (tmp_path / "tables" / "accuracy.csv").is_file()
