"""Every table by its name: what stands in it, what it says of missing input, and where its numbers come from."""

import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from command_line import ROOT, Done, refused
from hypothesis import given
from hypothesis import strategies as st
from run_folders import change_summary, write_config, write_run, write_spectrum
from safetensors.numpy import save_file
from scipy import stats

from fgvc.errors import RunError
from fgvc.presentation.render import Block, places, to_html, to_latex, to_markdown
from fgvc.reporting.registry import TABLES, Inputs, make_tables
from fgvc.runs.statistics import combine_p_values, holm, mcnemar, paired_bootstrap

PAPER = ROOT / "results" / "paper"


def predictions(right: int, images: int = 200, shift: int = 0) -> pd.DataFrame:
    """Of `images` images of class 0, `right` from number `shift` on are predicted so."""
    numbers = np.arange(images)
    predicted = np.where((numbers >= shift) & (numbers < shift + right), 0, 1)
    table = pd.DataFrame({"path": [f"{i}.jpg" for i in numbers], "target": 0, "predicted": predicted})
    return table.assign(confidence=0.9)


def write_predictions(path: Path, **how: int) -> None:
    predictions(**how).to_csv(path / "predictions.csv", index=False)


def runs_of(folder: Path, method: str, tops: list[int], **changes: object) -> list[Path]:
    """A run a seed, with so many of its 200 test images right."""
    paths = []
    for seed, right in enumerate(tops):
        name = method + ("-hybrid" if changes.get("label") else "")
        path = write_run(folder / name / f"seed{seed}", method, seed=seed, top1=right / 2, **changes)
        write_predictions(path, right=right, shift=seed)
        write_config(path, method={"name": method})
        paths.append(path)
    return paths


def rows_of(text: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


def test_bootstrap_is_that_of_the_binomial_where_only_one_method_errs() -> None:
    found = paired_bootstrap([predictions(200)], [predictions(150)])
    low, high = (100 * stats.binom(200, 0.25).ppf(q) / 200 for q in (0.025, 0.975))
    assert [found[name] for name in ("difference", "images", "pairs")] == [25, 200, 1]
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=0.5)
    same = paired_bootstrap([predictions(150)], [predictions(150)])
    assert [same[name] for name in ("difference", "low", "high")] == [0, 0, 0]


def test_bootstrap_averages_the_pairs_on_each_image() -> None:
    # each pair differs on 100 images, in opposite directions on the same ones: no image differs on average
    a, b = predictions(100), predictions(100, shift=100)
    found = paired_bootstrap([a, b], [b, a])
    assert [found[name] for name in ("difference", "low", "high", "pairs")] == [0, 0, 0, 2]
    elsewhere = a.assign(path="x" + a["path"])
    with pytest.raises(RunError, match="on different images"):
        paired_bootstrap([a, elsewhere], [b, elsewhere])
    with pytest.raises(RunError, match="give two evaluations of the same test split"):
        paired_bootstrap([a], [predictions(100, images=150)])


def test_an_end_of_the_interval_at_zero_is_zero_in_every_digit() -> None:
    # the three seeds lose 14, 4 and 2 images and win twice as many: thirds of an image, whose sum is 0 but for rounding
    better = [predictions(2000 + lost, 2400, 100 + lost) for lost in (14, 4, 2)]
    found = paired_bootstrap(better, [predictions(2000, 2400, 100)] * 3, resamples=2000)
    assert (
        found["difference"] == pytest.approx(100 * 20 / 7200)
        and found["low"] == 0 < found["difference"] < found["high"]
    )


def test_accuracy_marks_the_best_three_and_compares_with_the_best(tmp_path: Path) -> None:
    runs_of(tmp_path, "gap", [120, 124])
    runs_of(tmp_path, "mpn_cov", [180, 184])
    runs_of(tmp_path, "isqrt_cov", [178, 180])
    runs_of(tmp_path, "seb", [150, 150], best=99.0)
    tables, notes = make_tables(["accuracy"], Inputs((tmp_path,), PAPER))
    assert notes == []
    table = tables["accuracy"]
    text = table.texts("accuracy")["accuracy.md"]
    accuracy, differences = text.split("## Differences to the best")
    rows = rows_of(accuracy)
    assert rows["MPN-COV"][1].startswith("**91.00") and rows["iSQRT-COV"][1].startswith("*89.50")
    assert rows["SEB"][2].startswith("**99.00")  # of the best epoch
    assert rows["SEB"][1] == "75.00 ± 0.00 (3rd)" and rows["GAP"][1].startswith("61.00")
    gap = rows_of(differences)["GAP"]
    assert gap[0] == "-30.00" and "[" in gap[1]
    saved = [[pd.read_csv(tmp_path / m / f"seed{s}" / "predictions.csv") for m in ("gap", "mpn_cov")] for s in (0, 1)]
    expected = [mcnemar(*pair).p_value for pair in saved]
    row = table.frames["differences"].set_index("label").loc["GAP"]
    assert row["mcnemar_lowest"] == min(expected) and row["mcnemar_highest"] == max(expected)
    assert row["holm"] == pytest.approx(
        3 * 2 * min(expected)
    )  # the smallest of three, each 2 / 1 times that of 2 seeds
    assert gap[3] == f"{row['holm']:.2g}"


@pytest.mark.parametrize("script", ["make_tables", "plot_spectra", "study_truncation", "study_descriptors", "report"])
def test_no_results_are_written_through_a_link_out_of_a_received_folder(
    tmp_path: Path, here: Callable[..., Done], script: str
) -> None:
    (run,) = runs_of(tmp_path / "sent", "gap", [120])
    write_spectrum(run)
    (tmp_path / "mine").mkdir()
    for name in ("tables", "figures", "study", "descriptors", "report.html"):
        (tmp_path / "sent" / name).symlink_to(tmp_path / "mine" / ("x.html" if "." in name else ""))
    refused(here(f"{script}.py", "sent", cwd=tmp_path), "a link out of sent, which is not followed")
    assert list((tmp_path / "mine").iterdir()) == []


def test_p_values_are_combined_and_corrected() -> None:
    assert combine_p_values([0.03]) == 0.03
    assert combine_p_values([0.04, 0.01]) == pytest.approx(0.04)  # more than half of two are both
    assert combine_p_values([0.5, 0.02, 0.01]) == pytest.approx(1.5 * 0.02)
    assert combine_p_values([0.9, 0.8, 0.01]) == 1
    # by hand: 4 * 0.005, 3 * 0.01, then 2 * 0.03, and 0.04 no less than the one before it
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@given(st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=9), min_size=1, max_size=6))
def test_a_corrected_p_value_is_never_below_an_uncorrected_one(methods: list[list[float]]) -> None:
    combined = [combine_p_values(of_seeds) for of_seeds in methods]
    for of_seeds, uncorrected, corrected in zip(methods, combined, holm(combined), strict=True):
        assert min(np.median(of_seeds), 1) <= uncorrected <= corrected <= 1
        assert float(f"{uncorrected:.2g}") <= float(f"{corrected:.2g}")  # as the table shows them


def test_the_p_value_on_the_row_of_a_correction_is_the_one_it_corrects(tmp_path: Path) -> None:
    runs_of(tmp_path, "mpn_cov", [180, 150])
    runs_of(tmp_path, "gap", [140, 150])  # seed 0 is far worse, seed 1 the same: the median of p lies above 2 x lowest
    tables, _ = make_tables(["accuracy"], Inputs((tmp_path,), PAPER))
    row = tables["accuracy"].frames["differences"].iloc[0]
    assert row["mcnemar_lowest"] < 1e-6 and row["mcnemar_median"] <= row["mcnemar_combined"] <= row["holm"]
    text = tables["accuracy"].texts("a")["a.md"].split("## Differences to the best")[1]
    assert rows_of(text)["GAP"][2:] == [f"{row['mcnemar_combined']:.2g}", f"{row['holm']:.2g}"] == ["1", "1"]


def test_equal_values_share_a_place_and_one_alone_has_none() -> None:
    assert places([1.0, 3.0, 3.0, 2.0, math.nan], 2) == {(1, 2): 1, (2, 2): 1, (3, 2): 3}
    assert places([1.0, math.nan], 2) == {}
    # 2209, 2200 and 2197 of 2400 right, and 2208, 2198 and 2200: 6606 either way
    rounded = [float(np.mean(seeds)) for seeds in ([92.0417, 91.6667, 91.5417], [92.0, 91.5833, 91.6667])]
    assert rounded[0] != rounded[1] and places(rounded, 1) == {(0, 1): 1, (1, 1): 1}


def test_seeds_whose_predictions_cannot_be_compared_are_left_out_of_the_differences(tmp_path: Path) -> None:
    best = runs_of(tmp_path, "mpn_cov", [180, 184, 188])
    other = runs_of(tmp_path, "gap", [120, 124, 130])
    runs_of(tmp_path, "seb", [150, 150])
    (best[2] / "predictions.csv").unlink()  # of the method that all are compared with
    tables, notes = make_tables(["accuracy"], Inputs((tmp_path,), PAPER))
    rows = rows_of(tables["accuracy"].texts("a")["a.md"].split("## Differences to the best")[1])
    assert rows["GAP"][0] == "-30.00" and rows["SEB"][0] == "-16.00"  # of seeds 0 and 1
    assert notes == [f"left out of the differences: {best[2] / 'predictions.csv'}: no such file; restore it"]
    write_predictions(other[1], right=100, images=150)
    tables, notes = make_tables(["accuracy"], Inputs((tmp_path,), PAPER))
    frame = tables["accuracy"].frames["differences"].set_index("label")
    assert (frame.loc["GAP", "pairs"], frame.loc["GAP", "seeds"]) == (1, "0")
    assert len(notes) == 2 and f"{other[1]} and {best[1]}: predictions of 150 and 200 images" in " ".join(notes)
    assert "Pairs of runs: GAP 1, SEB 2." in tables["accuracy"].texts("a")["a.md"]
    (other[0] / "predictions.csv").write_text("path\n")
    tables, _ = make_tables(["accuracy"], Inputs((tmp_path,), PAPER))
    rows = rows_of(tables["accuracy"].texts("a")["a.md"].split("## Differences to the best")[1])
    assert rows["GAP"] == ["not comparable", "—", "—", "—"] and rows["SEB"][0] == "-16.00"


def test_runs_of_several_datasets_are_told_apart_and_said_so(tmp_path: Path) -> None:
    runs_of(tmp_path / "a", "mpn_cov", [180])
    runs_of(tmp_path / "b", "mpn_cov", [100], dataset="cars", num_classes=196)
    tables, notes = make_tables(["accuracy"], Inputs((tmp_path,), PAPER))
    assert notes == ["runs of 2 datasets (cub80, cars): each has a table of its own"]
    assert len(tables["accuracy"].blocks) == 3  # an overview, and one each


def test_classes_without_test_images_are_named(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path / f"seed{seed}", seed=seed, test_classes=79)
    _, notes = make_tables(["accuracy"], Inputs((tmp_path,), PAPER))
    found = "the mean class accuracy averages over 79 of 80 classes of cub80; the others have no test image"
    assert notes == [found]


def test_hybrid_stands_beside_standalone(tmp_path: Path) -> None:
    runs_of(tmp_path, "svd_pade", [160, 160], dataset="imagenet", num_classes=1000, backbone="resnet50")
    hybrid = {"dataset": "imagenet", "num_classes": 1000, "backbone": "resnet50", "label": "SVD-Padé (hybrid)"}
    runs_of(tmp_path, "svd_pade", [170, 170], **hybrid)
    tables, _ = make_tables(["hybrid"], Inputs((tmp_path,), PAPER))
    row = rows_of(tables["hybrid"].texts("hybrid")["hybrid.md"])["SVD-Padé"]
    assert row[:3] == ["80.00 ± 0.00", "85.00 ± 0.00", "+5.00"]
    assert row[4:] == [  # 100 minus the errors of the poster
        "77.33 (resnet50); 78.52 (resnet101)",
        "77.40 (resnet50); 78.60 (resnet101)",
    ]
    (cell,) = tables["hybrid"].provenance()
    assert (cell["standalone_mean"], cell["hybrid_mean"], cell["difference"], cell["seeds"]) == (80, 85, 5, "0 1")
    assert [Path(run["path"]).parent.name for run in cell["runs"]] == ["svd_pade"] * 2 + ["svd_pade-hybrid"] * 2
    assert cell["published_hybrid"] == row[5]
    for seed, difference in enumerate(["+5.00", "not comparable"]):  # of the other seed, then of none
        (tmp_path / "svd_pade" / f"seed{seed}" / "predictions.csv").unlink()
        tables, notes = make_tables(["hybrid"], Inputs((tmp_path,), PAPER))
        row = rows_of(tables["hybrid"].texts("hybrid")["hybrid.md"])["SVD-Padé"]
        assert row[:3] == ["80.00 ± 0.00", "85.00 ± 0.00", difference] and len(notes) == seed + 1
    with pytest.raises(RunError, match="hybrid protocol"):
        make_tables(["hybrid"], Inputs((write_run(tmp_path / "alone"),), PAPER))


def test_hybrid_runs_of_two_rates_stand_beside_those_of_the_same_rate(tmp_path: Path) -> None:
    for rate in (0.1, 0.2):
        for kind, label in (("alone", "SVD-Padé"), ("hybrid", "SVD-Padé (hybrid)")):
            path = write_run(tmp_path / f"{kind}{rate}", "svd_pade", label=label, top1=100 * rate + (kind == "hybrid"))
            write_config(path, method={"name": "svd_pade"}, optimizer={"lr": rate})
    tables, _ = make_tables(["hybrid"], Inputs((tmp_path,), PAPER))
    rows = rows_of(tables["hybrid"].texts("hybrid")["hybrid.md"])
    assert rows["SVD-Padé [optimizer.lr=0.1]"][:2] == ["*10.00*", "*11.00*"]
    assert rows["SVD-Padé [optimizer.lr=0.2]"][:2] == ["**20.00**", "**21.00**"]


def test_cost_counts_the_head_and_divides_by_images_and_epochs(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", "mpn_cov", epochs=10, test_images=2400, seconds={"train": 2.317, "eval": 4.8})
    (path / "checkpoints").mkdir()
    tensors = {"classifier.weight": np.zeros((80, 10)), "reduction.1.running_mean": np.zeros(64)}
    save_file(tensors, path / "checkpoints" / "last.safetensors")
    write_run(tmp_path / "bare", "gap", seconds=None)
    tables, _ = make_tables(["cost"], Inputs((tmp_path,), PAPER))
    rows = rows_of(tables["cost"].texts("cost")["cost.md"])
    assert rows["MPN-COV"] == ["800", "2,080", "0.10", "0.20", "1,200"]
    assert rows["GAP"][:4] == ["—", "2,080", "—", "—"]
    changes = {"selected_on": "validation", "validation_images": 1600, "seconds": {"train": 0.4, "eval": 8.0}}
    changes["test_images"] = 2400
    path = write_run(tmp_path / "held" / "out", "seb", epochs=10, **changes)
    write_config(path, trainer={"max_steps": 100, "batch_size": 32})  # fewer images than in ten epochs
    write_run(tmp_path / "held" / "old", "mpn_cov", **changes | {"validation_images": None})
    tables, _ = make_tables(["cost"], Inputs((tmp_path / "held",), PAPER))
    rows = rows_of(tables["cost"].texts("cost")["cost.md"])
    assert rows["SEB"][2:4] == ["0.12", "0.20"] and rows["MPN-COV"][3] == "—"


def test_condition_numbers_by_epoch_beside_the_published(tmp_path: Path) -> None:
    for seed, top in enumerate((4.0, 8.0, 16.0)):
        path = write_run(tmp_path / f"seed{seed}", "mpn_cov", seed=seed)
        before = np.array([[[top, 1.0, 0.0]] * 2, [[2 * top, 1.0, 0.5]] * 2])
        np.savez(path / "spectrum_history.npz", epochs=np.array([0, 1]), before=before)
    write_run(tmp_path / "gap", "gap")
    tables, notes = make_tables(["condition_number"], Inputs((tmp_path,), PAPER))
    text = tables["condition_number"].texts("t")["t.md"]
    measured, published = text.split("## Condition number, published")
    assert rows_of(measured)["MPN-COV"] == ["inf", "3.20e+01"]  # medians of 4, 8, 16 and 16, 32, 64
    assert rows_of(measured)["MPN-COV, of the non-zero"] == ["8.00e+00", "3.20e+01"]
    assert rows_of(measured)["GAP"] == ["—", "—"]
    assert rows_of(published)["MPN-COV"] == ["3.41e+14", "5.36e+13", "1.70e+13"]
    assert len(notes) == 1 and "no history of GAP" in notes[0] and "spectrum_history.npz" in notes[0]


@pytest.mark.parametrize("value", ["abc", ""])
def test_published_condition_numbers_must_be_numbers(tmp_path: Path, value: str) -> None:
    text = (PAPER / "condition_number_iccv21.csv").read_text(encoding="utf-8")
    (tmp_path / "condition_number_iccv21.csv").write_text(text.replace("5.36e13", value), encoding="utf-8")
    with pytest.raises(RunError, match=f"iccv21.csv, row 2: condition_number is '{value}', not a number"):
        make_tables(["condition_number"], Inputs((write_run(tmp_path / "run"),), tmp_path))


def test_what_cannot_be_read_is_noted_and_the_rest_tabulated(tmp_path: Path, here: Callable[..., Done]) -> None:
    runs_of(tmp_path / "r", "mpn_cov", [180, 184])
    (damaged,) = runs_of(tmp_path / "r", "gap", [100])
    (damaged / "summary.json").write_text("{")
    (tmp_path / "empty").mkdir()
    done = here("make_tables.py", "r", "empty", "nowhere", cwd=tmp_path)
    assert done.returncode == 0 and "91.00" in done.stdout
    notes = [line for line in done.stderr.splitlines() if line.startswith("note: left out ")]
    assert [note.split()[3].rstrip(":") for note in notes] == ["empty", "nowhere", "r/gap/seed0/summary.json"]
    assert here("make_tables.py", "r", "empty", "--strict", cwd=tmp_path).returncode == 1
    refused(here("make_tables.py", "empty", "nowhere", cwd=tmp_path), "empty: no run in it", "nowhere: no such folder")


DAMAGE = {
    "text in place of seconds": {"seconds": {"train": "x"}},
    "no seconds": {"seconds": {"train": None}},
    "a lone surrogate": {"label": "a\ud800"},
    "a lone surrogate where nobody looks": {"more": ["a\ud800"]},
    "infinity": {"peak_memory_mb": float("inf")},
    "a number of 400 digits": {"epochs": 10**400},
    "another one": {"peak_memory_mb": 10**400},
    "classes that are lists": {"classes": [["a"]]},
    "a version that is none": {"versions": {"torch": [2]}},
}


@pytest.mark.parametrize("fault", [*DAMAGE, "a configuration that is a list"])
@pytest.mark.parametrize("script", ["make_tables.py", "report.py"])
def test_one_bad_run_is_left_out_with_a_note(
    tmp_path: Path, here: Callable[..., Done], script: str, fault: str
) -> None:
    runs_of(tmp_path / "r", "mpn_cov", [180, 184])
    (bad,) = runs_of(tmp_path / "r", "gap", [100])
    if fault in DAMAGE:
        change_summary(bad, **DAMAGE[fault])
    else:
        (bad / "config.yaml").write_text("- a\n")
    done = here(script, "r", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"note: left out r/gap/seed0/{'summary.json' if fault in DAMAGE else 'config.yaml'}" in done.stderr
    (page,) = [*(tmp_path / "r").rglob("accuracy.md"), *(tmp_path / "r").rglob("report.html")]
    assert "91.00" in page.read_text(encoding="utf-8")


def test_all_tables_that_can_be_made_are_made_and_traced(tmp_path: Path, here: Callable[..., Done]) -> None:
    runs_of(tmp_path / "r", "mpn_cov", [180, 184])
    done = here("make_tables.py", "r", "--table", "all", "--provenance", "p.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made = {file.stem for file in (tmp_path / "r" / "tables").glob("*.md")}
    assert made == set(TABLES) - {"hybrid", "coarse"} and "note: no table hybrid" in done.stderr
    cells = json.loads((tmp_path / "p.json").read_text())["cells"]
    final = next(c for c in cells if c["table"] == "accuracy" and (c["origin"], c["epoch"]) == ("measured", "final"))
    assert final["top1_mean"] == 91 and final["seeds"] == "0 1" and final["commits"] == "0123abc"
    assert [Path(run["path"]) for run in final["runs"]] == [Path("r/mpn_cov/seed0"), Path("r/mpn_cov/seed1")]
    assert all(re.fullmatch("[0-9a-f]{64}", run["config_sha256"]) for run in final["runs"])
    assert {cell["table"] for cell in cells} >= {"accuracy", "cost", "gradient_bounds"}
    refused(here("make_tables.py", cwd=tmp_path), "no folder of runs given")
    refused(here("make_tables.py", "r", "--table", "hybrid", cwd=tmp_path), "hybrid.method")


def test_a_semicolon_in_a_path_parts_no_run(tmp_path: Path) -> None:
    runs_of(tmp_path / "a; b", "seb", [180, 184])
    table = make_tables(["accuracy"], Inputs((tmp_path,), PAPER))[0]["accuracy"]
    (row,) = (cell for cell in table.provenance() if cell.get("epoch") == "final" and cell.get("origin") == "measured")
    paths = [tmp_path / "a; b" / "seb" / f"seed{seed}" for seed in (0, 1)]
    assert [Path(run["path"]) for run in row["runs"]] == paths and all(run["config_sha256"] for run in row["runs"])
    assert f"{paths[0]}; {paths[1]}" in table.texts("accuracy")["accuracy.csv"]


class Tags(HTMLParser):
    """The tags of a page, and whether each is closed where it should be."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        self.seen.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


EVIL = "<img src=x> &lt;b> ![x](//example.org) [a](javascript:1) a\\|b \x1b[2J \u202e \\"


def test_no_name_is_markup_or_acts_on_a_reader_in_any_format() -> None:
    block = Block(EVIL, ["M", EVIL], [[EVIL, "1"], ["x", EVIL]], [EVIL], EVIL)
    texts = [to_markdown(EVIL, [block]), to_latex([block]), to_html(EVIL, [block])]
    assert not any(mark in text for text in texts for mark in ("\x1b", "\u202e", "<img"))
    markdown = pytest.importorskip("markdown", reason="of the documentation")
    page = markdown.markdown(texts[0], extensions=["tables"])
    tags = Tags()
    tags.feed(page)
    assert not {"img", "a"} & set(tags.seen) and tags.seen.count("td") == 4 and page.count("&amp;lt;b") == 6
    assert to_markdown("T", [Block("T", ["M"], [["a < b & c", "x"][:1], ["[0.1, 0.2]"]])]).count("\\") == 0


def test_html_is_whole_escaped_and_needs_nothing_from_elsewhere_and_marks_survive_in_every_format() -> None:
    rows = [["<script>x</script>", "1"], ["é & f", "1 ± 2"], ["", "3"]]
    block = Block('A "b" <c>', ["M", "a_b"], rows, ["note <i>"], "q", places={(1, 1): 1, (2, 1): 3})
    page = to_html("T & U", [block])
    tags = Tags()
    tags.feed(page)
    assert tags.open == [] and tags.seen.count("caption") == 1
    assert "<script>" not in page and "&lt;script&gt;" in page and "note &lt;i&gt;" in page
    assert "<strong>1 ± 2</strong>" in page and 'scope="row"' in page and 'scope="col"' in page
    assert "http" not in page and "color-scheme: light dark" in page
    assert r"\textbf{1 $\pm$ 2}" in to_latex([block]) and r"\underline{3}" in to_latex([block])
    assert "**1 ± 2**" in to_markdown("T", [block]) and "3 (3rd)" in to_markdown("T", [block])
