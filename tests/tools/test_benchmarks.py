"""The benchmark runs, saves what it prints, measures memory rightly, and its baselines compute what the layers do."""

import contextlib
import io
import json
import re
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import baselines
import cases
import condition
import features
import loading
import measure
import numpy as np
import pandas as pd
import pytest
import records
import report
import scale
import spectral
import torch
from command_line import ROOT

from fgvc.cli import exit_on_user_error
from fgvc.pooling import create_pooling, list_poolings, pooling_label
from fgvc.spectral.eigen import batched_eigh

BENCHMARKS = ROOT / "benchmarks"
TINY = ["2x8x3x3", "2x8x2x2"]


def status(*arguments: object) -> int:
    """Exit status of the script, in this process."""
    try:
        exit_on_user_error(lambda: spectral.main([str(argument) for argument in arguments]))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A result of the script, and what it printed."""
    output, printed = tmp_path_factory.mktemp("benchmark") / "spectral.json", io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert status("--shapes", *TINY, "--repetitions", 2, "--output", output) == 0
    return output, printed.getvalue()


def test_saved_result(run: tuple[Path, str]) -> None:
    saved = json.loads(run[0].read_text(encoding="utf-8"))
    assert list(saved) == ["schema", "started", "commit", "machine", "arguments", "features", "shapes"]
    assert saved["schema"] == records.SCHEMA
    assert saved["machine"]["versions"]["torch"] == version("torch")
    assert {"cpu", "cores", "system", "load", "threads", "lapack", "device"} < set(saved["machine"])
    assert saved["arguments"]["repetitions"] == 2 and saved["arguments"]["seed"] == 0
    assert [shape["shape"] for shape in saved["shapes"]] == [[2, 8, 3, 3], [2, 8, 2, 2]]
    for shape in saved["shapes"]:
        assert [case["name"] for case in shape["cases"]] == cases.list_cases()
        for case in shape["cases"]:
            assert len(case["forward_ms"]) == 2 and len(case["backward_ms"]) == (0 if case["name"] == "eigh" else 2)
            assert all(time > 0 for time in case["forward_ms"] + case["backward_ms"])
            assert case["peak_bytes"] > 0


def test_tables_name_every_method_and_come_back(run: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    path, printed = run
    labels = [*map(pooling_label, list_poolings()), "MPN-COV (exact)", "SVD-TopN (exact)", "torch.linalg.eigh alone"]
    for label in labels:
        assert len(re.findall(rf"\n\| {re.escape(label)} +\|", printed)) == len(TINY), label
    assert status("--from", path) == 0
    assert capsys.readouterr().out == printed


def test_a_ratio_is_the_median_of_the_ratios_of_the_rounds() -> None:
    eigh = records.CaseRecord("eigh", "eigh", [1.0, 2.0, 10.0], [], 10, 0.0)
    case = records.CaseRecord("a", "A", [1.0, 3.0, 15.0], [1.0, 3.0, 25.0], 2 * 4 * 8, None)
    table = report.shape_table(records.ShapeRecord([1, 2, 3, 3], [eigh, case]))
    cells = ["3.00 [2.00, 9.00]", "3.00 [2.00, 14.0]", "6.00 [4.00, 23.0]", "3.00 [2.50, 3.50]", "2.00"]
    assert f"| A (gradient not finite) | {' | '.join(cells)} |" in re.sub(" +", " ", table).splitlines()


@pytest.mark.parametrize("name", ["batch10_2cores", "batch32_2cores"])
def test_tables_of_kept_results_are_those_kept_with_them(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    kept = BENCHMARKS / "results" / name
    assert status("--from", kept.with_suffix(".json")) == 0
    assert capsys.readouterr().out == kept.with_suffix(".md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *((["--methods", "nothing"], ", ".join(cases.list_cases())), (["--profile", "nothing"], "svd_topn:exact")),
        *((["--methods", "gap:exact"], "no choice of gradient"), (["--methods", "seb@float16"], "float64, float32")),
        *((["--shapes", shape], "10x256x14x14") for shape in ("2x8x3", "2x8x3x0")),
        *(([option, "0"], "at least 1") for option in ("--repetitions", "--threads")),
        *((["--seed", "-1"], "at least 0"), (["--device", "abacus"], "choose cpu"), (["--output", "."], "give a file")),
        *((["--from", "no.json"], "no.json"), (["--features", "no.npy"], "no.npy")),
        (["--features", "no.npy", "--shapes", "2x8x3x3"], "leave out --shapes"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err


def test_a_file_of_someone_else_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes").write_text("mine")
    tiny = ["--shapes", "2x8x2x2", "--methods", "gap", "--repetitions", "1", "--output"]
    assert status(*tiny, tmp_path / "notes") == 2
    out, err = capsys.readouterr()
    assert out == "" and "notes" in err and (tmp_path / "notes").read_text() == "mine"
    assert [status(*tiny, tmp_path / "own.json") for _ in range(2)] == [0, 0]


@pytest.mark.parametrize(
    "change",
    [{"schema": 0}, {"shapes": [{}]}, {"extra": 1}, {"arguments": {"repetitions": 3}}],
    ids=["schema", "shape", "field", "counts"],
)
def test_damaged_result(
    change: dict[str, Any], run: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "damaged.json"
    path.write_text(json.dumps(json.loads(run[0].read_text(encoding="utf-8")) | change), encoding="utf-8")
    assert status("--from", path) == 2
    assert str(path) in capsys.readouterr().err


needs_sqrth = pytest.mark.skipif(not hasattr(torch.linalg, "matrix_sqrth"), reason="torch before 2.14")


@pytest.mark.parametrize(
    ("chain", "pooling"),
    [
        *((baselines.svd_chain, "mpn_cov"), (baselines.newton_schulz_chain, "isqrt_cov")),
        *((baselines.pade_chain, "mpa_lya"), (baselines.taylor_chain, "mtp_lya")),
        pytest.param(baselines.sqrth_chain, "mpn_cov", marks=needs_sqrth),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_baselines_compute_what_the_layers_do(chain: Any, pooling: str, dtype: torch.dtype) -> None:
    x = features.smooth_features((3, 8, 6, 6), seed=1).to(dtype).requires_grad_()
    layer = create_pooling(pooling, channels=8, gradient="exact" if pooling == "mpn_cov" else None)
    results = [layer(x), chain(x)]
    assert results[0].dtype == results[1].dtype == dtype
    grad = torch.randn(results[0].shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    gradients = [torch.autograd.grad(result, x, grad)[0] for result in results]
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(results[1], results[0], **tolerance)
    torch.testing.assert_close(gradients[1], gradients[0], **tolerance)


def test_a_gradient_that_is_not_finite_is_found() -> None:
    case = cases.make_case("svd_autograd", torch.zeros(2, 3, 2, 2), 0)
    assert spectral.gradient_norm(case) is None
    exact = cases.make_case("mpn_cov:exact", features.smooth_features((2, 3, 4, 4), 0), 0)
    assert spectral.gradient_norm(exact) > 0


def test_a_case_computes_in_the_precision_behind_its_name() -> None:
    x = features.smooth_features((2, 8, 3, 3), seed=1)
    wide, narrow = (cases.make_case(f"mpn_cov:exact{dtype}", x, 0) for dtype in ("", "@float32"))
    assert narrow.label == "MPN-COV (exact) [dtype=float32]"
    assert 0 < (wide.layer(x) - narrow.layer(x)).abs().max() < 1e-3


@pytest.mark.parametrize(("side", "finite"), [pytest.param(2, False, marks=needs_sqrth), (6, True)])
def test_errors_are_those_against_the_exact_layer(side: int, finite: bool) -> None:
    x = features.smooth_features((2, 8, side, side), seed=1)
    of_root, of_gradient = spectral.errors(cases.make_case("matrix_sqrth" if not finite else "svd_autograd", x, 0), 0)
    assert of_root is not None and of_root < 1e-7
    assert (of_gradient is not None and of_gradient < 1e-9) if finite else of_gradient is None
    of_root, of_gradient = spectral.errors(cases.make_case("mpn_cov:exact@float32", x, 0), 0)
    assert of_root is not None and of_gradient is not None and 1e-9 < of_root < 1e-4 > of_gradient > 1e-9
    assert spectral.errors(cases.make_case("gap", x, 0), 0) == (None, None)


def test_products_lose_the_gradient_beyond_their_condition_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(condition, "SEEDS", 1)
    monkeypatch.setattr(condition, "EXPONENTS", (4, 12))
    near, beyond = condition.measure().to_dict("records")
    error = {
        name: [float(row[f"{name}: error of gradient"].split()[0]) for row in (near, beyond)]
        for name in condition.SOLVERS
    }
    assert max(error["eigh"][0], error["products"][0]) < 1e-12 and error["eigh"][1] < 1e-5 < 0.1 < error["products"][1]
    assert (near["products warns"], beyond["products warns"]) == ("no", "yes")


def test_peak_of_known_allocations() -> None:
    size = 1 << 20
    held: list[torch.Tensor] = []

    def allocate() -> None:
        three = [torch.empty(size, dtype=torch.uint8) for _ in range(3)]
        del three[:2]  # one left
        held.append(torch.empty(size, dtype=torch.uint8))  # two
        del three
        torch.empty(3 * size, dtype=torch.uint8)  # one and three: the peak

    threads = torch.get_num_threads()
    assert measure.peak_bytes(allocate) == 4 * size
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("threads", [1, 2])
def test_peak_of_an_eigendecomposition_that_threads_would_share(threads: int) -> None:
    d, before = 96, torch.get_num_threads()
    case = cases.make_case("eigh", features.smooth_features((4, d, 4, 4), 0), 0)
    torch.set_num_threads(threads)
    try:
        peak = measure.case_peak_bytes(replace(case, layer=batched_eigh))
    finally:
        torch.set_num_threads(before)
    known = 8 * (4 * d * d + 4 * d + 2 * d * d + 6 * d + 1)  # vectors, values, and one workspace of LAPACK
    assert known <= peak <= 1.02 * known


def test_peak_of_a_backward_pass() -> None:
    x, grad = torch.ones(1000, requires_grad=True), torch.ones(1000)
    # exp keeps its result, 4000 bytes, and makes one gradient of the same size
    assert measure.case_peak_bytes(cases.Case("exp", "exp", torch.exp, x, grad)) == 2 * 4000


def test_rounds_are_interleaved() -> None:
    calls: list[str] = []

    def case(name: str) -> Any:
        return cases.Case(name, name, lambda _: calls.append(name), torch.zeros(1), None)

    times = measure.interleaved_times([case(name) for name in "abc"], repetitions=4, warm_up=2, seed=0)
    assert "".join(calls[:6]) == "aabbcc"
    assert [sorted(calls[i : i + 3]) for i in range(6, 18, 3)] == [list("abc")] * 4
    assert len({tuple(calls[i : i + 3]) for i in range(6, 18, 3)}) > 1
    assert [(len(forward), backward) for forward, backward in times] == [(4, [])] * 3


def test_features(tmp_path: Path) -> None:
    drawn = features.smooth_features((2, 64, 8, 8), seed=3)
    assert drawn.dtype == torch.float32
    assert torch.equal(drawn, features.smooth_features((2, 64, 8, 8), seed=3))
    assert 0.4 < (drawn == 0).float().mean() < 0.6
    array = np.random.default_rng(0).random((11, 4, 3, 3), dtype=np.float32)
    np.save(tmp_path / "f.npy", array.astype(np.float64))
    found = features.load_features(tmp_path / "f.npy")
    assert list(found) == [(10, 4, 3, 3)]
    assert np.array_equal(found[10, 4, 3, 3].numpy(), array[:10])
    array[0, 0, 0, 0] = np.nan
    for wrong, message in ((array, "NaN"), (array[:9], "at least 10"), (array[0], "N, C, H, W")):
        np.save(tmp_path / "w.npy", wrong)
        with pytest.raises(features.ConfigError, match=message):
            features.load_features(tmp_path / "w.npy")


def test_profile_names_the_operators(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("--profile", "svd_topn", "--shapes", "2x8x3x3") == 0
    out = capsys.readouterr().out
    assert "aten::_linalg_eigh" in out and "_SpectralDescriptorBackward" in out


def test_scale_measures_each_work_at_each_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "scale.csv"
    sizes = ["--images", "200", "400", "--classes", "5", "10", "--runs", "5", "10", "--repetitions", "1"]
    scale.main([*sizes, "--output", str(output)])
    table = pd.read_csv(output)
    assert table.groupby("work", sort=False)["size"].apply(list).to_dict() == {
        "list images": [200, 400],
        "order an epoch": [200, 400],
        "evaluate": [5, 10],
        "read runs": [5, 10],
    }
    assert (table["seconds"] > 0).all() and "grows with the power" in capsys.readouterr().out
    assert (tmp_path / "scale.png").stat().st_size > 5000
    assert scale.exponent([10, 100, 1000], [3.0, 30.0, 300.0]) == pytest.approx(1)
    assert scale.exponent([10, 100, 1000], [1.0, 100.0, 10_000.0]) == pytest.approx(2)


def test_loading_reads_the_same_pictures_as_pillow(tmp_path: Path) -> None:
    output = tmp_path / "loading.json"
    paths = loading.write_images(tmp_path / "images", 120, 90, 2)
    loading.main(["--images", str(paths[0].parent), "--size", "32", "--repetitions", "1", "--output", str(output)])
    (row,) = json.loads(output.read_text())["rows"]
    assert row["Pillow"] > 0 and row["fgvc"] > 0 and row["difference"] < 0.5
