"""The study of float32 spectra: errors on features, pairs of runs, its files, tables and figure, the script."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from command_line import Done, Train, refused, succeeded
from records import SCHEMA, CaseRecord, Record, ShapeRecord
from report import times_markdown
from run_folders import change_summary, write_config, write_run
from torch import Tensor

from fgvc.errors import ConfigError, RunError
from fgvc.runs.summary import read_run
from fgvc.spectral import EigendecompositionError
from fgvc.studies.precision import measure as errors
from fgvc.studies.precision.measure import PrecisionStudy, precision_pairs, save_precision
from fgvc.studies.precision.show import errors_figure, errors_markdown, pairs_markdown


def features(d: int = 6, images: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, d, 3, 3, generator=generator).relu()
    return x, torch.randn(images, d * (d + 1) // 2, dtype=torch.float64, generator=generator)


def test_errors_are_those_of_the_narrower_arithmetic() -> None:
    table = errors.precision_errors(*features(), ["isqrt_cov", "mpn_cov-exact", "svd_topn"])
    assert tuple(table.columns) == errors.ERROR_COLUMNS and len(table) == 3 * 3 * 3
    assert list(dict.fromkeys(table["label"])) == ["iSQRT-COV", "MPN-COV (exact)", "SVD-TopN"]
    summary = errors.summarise_errors(table).set_index(["arithmetic", "label"])
    iteration = summary.xs("iSQRT-COV", level="label")["descriptor_max"]
    assert 1e-8 < iteration["float32 spectrum"] < 1e-5 < iteration["float16 features"] < 2e-3
    assert iteration["float16 features"] < iteration["bfloat16 features"] < 2e-2
    # 3.4e7, what the published SVD-TopN lets through, does not fit into float16
    overflow = summary.pop("not finite")
    assert overflow["float16 features", "SVD-TopN"] == 3 == overflow.sum()
    summary = summary.drop(index=("float16 features", "SVD-TopN"))
    assert (summary["gradient_median"] <= summary["gradient_max"]).all() and (summary["no convergence"] == 0).all()


def test_failures_are_counted_and_not_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = errors._passed, []

    def failing(pool: errors.Pooling, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(len(x))
        if len(calls) == 2:  # the first is the reference
            raise EigendecompositionError("no convergence")
        descriptor, gradient = real(pool, x, grad)
        return descriptor, gradient * torch.nan if len(calls) == 3 else gradient

    monkeypatch.setattr(errors, "_passed", failing)
    table = errors.precision_errors(*features(), ["mpn_cov"])
    assert table["failure"].tolist()[:4] == ["no convergence", "not finite", "", ""]
    row = errors.summarise_errors(table).iloc[0]
    assert (row["images"], row["no convergence"], row["not finite"]) == (3, 1, 1)
    assert row["gradient_max"] == table["gradient"][2] < 1e-3
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="'gap' has no spectrum"):
        errors.precision_errors(*features(), ["gap"])


def test_eigenvalues_by_decade() -> None:
    left, right = torch.linalg.qr(torch.randn(8, 4, dtype=torch.float64)).Q, torch.randn(5, 5, dtype=torch.float64)
    right[:, 0] = 1  # centred: orthogonal to the constant
    sizes = torch.tensor([1, 3e-2, 2e-4, 5e-8], dtype=torch.float64)
    x = (left * sizes.sqrt() @ torch.linalg.qr(right).Q[:, 1:].T)[None, :, None]
    table = errors.eigenvalue_errors(x).set_index("decade")
    assert table["eigenvalues"].to_dict() == {-1: 1, -2: 1, -4: 1, -8: 1}
    assert table["null"].to_dict() == {-1: 0, -2: 0, -4: 0, -8: 1}
    assert table.loc[-8, "error_max"] == 1 and table.loc[-1, "error_max"] < 1e-5


def trained(path: Path, seed: int, dtype: str, predicted: list[int], **changes: object) -> Path:
    """A run of four images of class 0, 0, 1, 1."""
    right = sum(p == t for p, t in zip(predicted, [0, 0, 1, 1], strict=True))
    label = "MPN-COV" + ("" if dtype == "float64" else f" [dtype={dtype}]")
    folder = write_run(path, "mpn_cov", top1=25 * right, best=50, seed=seed, spectral_dtype=dtype, label=label)
    write_config(folder, seed=seed, run_dir=str(path), method={"name": "mpn_cov", "spectral_dtype": dtype, **changes})
    table = pd.DataFrame({"path": list("abcd"), "target": [0, 0, 1, 1], "predicted": predicted})
    table["target_class"], table["predicted_class"] = table["target"], table["predicted"]
    table.assign(confidence=0.5, rank=1).to_csv(folder / "predictions.csv", index=False)
    return folder


def test_pairs_are_runs_that_differ_in_the_precision_alone(tmp_path: Path) -> None:
    paths = [
        trained(tmp_path / "wide", 0, "float64", [0, 0, 1, 0]),
        trained(tmp_path / "narrow", 0, "float32", [1, 1, 1, 1]),
        trained(tmp_path / "alone", 1, "float32", [0, 0, 1, 1]),
        trained(tmp_path / "other", 1, "float64", [0, 0, 1, 1], reduction=8),
    ]
    pairs = precision_pairs([read_run(path) for path in paths])
    assert pairs.to_numpy().tolist() == [["MPN-COV", 0, 75, 50, -25, 4, 3, 2, 1, 0]]
    assert "| MPN-COV |     1 |      75.00 |      50.00 |" in pairs_markdown(pairs)
    with pytest.raises(RunError, match="no two runs differ in"):
        precision_pairs([read_run(path) for path in paths[1:]])
    twin = trained(tmp_path / "twin", 0, "float32", [0, 0, 1, 1])
    with pytest.raises(RunError, match="twin have the same configuration"):
        precision_pairs([read_run(path) for path in (*paths, twin)])


def test_a_study_survives_its_files_and_the_table_joins_equal_rows(tmp_path: Path) -> None:
    x, grad = features()
    table = errors.precision_errors(x, grad, ["isqrt_cov", "mpn_cov", "svd_trunc"])
    shape = {"channels": 6, "locations": 9}
    frames = (errors.summarise_errors(table), errors.eigenvalue_errors(x), table)
    study = PrecisionStudy(*(frame.assign(**shape) for frame in frames))
    assert all(path.is_file() for path in save_precision(study, tmp_path))
    loaded = PrecisionStudy(*(pd.read_csv(tmp_path / f"{name}.csv") for name in PrecisionStudy._fields))
    assert np.allclose(loaded.errors["gradient_max"], study.errors["gradient_max"], rtol=1e-3)
    text = errors_markdown(loaded.errors, "arithmetic")
    assert "| MPN-COV, SVD-Trunc " in text and "float16 features: gradient" in text and "0 of 18" in text
    axes = errors_figure(loaded.images, "a test").axes[0]
    assert len(axes.collections) == 3 and axes.get_xscale() == "log"


def test_times_are_compared_round_by_round() -> None:
    eigh = CaseRecord("eigh", "eigh", [1.0] * 3, [], 1, 0.0)
    wide = CaseRecord("seb", "SEB", [1.0, 2.0, 10.0], [1.0, 2.0, 10.0], 1, 1.0)
    narrow = CaseRecord("seb@float32", "SEB [dtype=float32]", [0.5, 1.0, 8.0], [0.5, 1.0, 8.0], 1, 1.0)
    record = Record(SCHEMA, "", None, {}, {}, "", [ShapeRecord([2, 8, 3, 3], [eigh, wide, narrow])])
    (row,) = times_markdown(record).splitlines()[2:]
    assert [cell.strip() for cell in row.split("|")[1:-1]] == ["SEB", "4", "0.50 [0.50, 0.65]"]


def test_the_script_on_a_trained_run(tmp_path: Path, train_here: Train, here: Train) -> None:
    succeeded(train_here(tmp_path, "run_dir=wide", "method=mpn_cov", "trainer.epochs=1"))
    narrow = change_summary(shutil.copytree(tmp_path / "wide", tmp_path / "narrow"), spectral_dtype="float32")
    config = (narrow / "config.yaml").read_text()
    (narrow / "config.yaml").write_text(config.replace("spectral_dtype: float64", "spectral_dtype: float32"))

    def study(*arguments: object) -> Done:
        return here("study_precision.py", "wide", *arguments, "--images", 4, cwd=tmp_path)

    methods = ["--methods", "isqrt_cov", "mpn_cov", "svd_topn"]
    found = succeeded(study(*methods, "--trained", "wide", "narrow", "--output", "out"))
    assert "Relative errors, d = 8" in found.stdout and "| MPN-COV |     1 |" in found.stdout
    files = {"errors.csv", "eigenvalues.csv", "images.csv", "pairs.csv", "precision.png", "precision.pdf"}
    assert {path.name for path in (tmp_path / "out").glob("[!.]*")} == files
    refused(study("--methods", "seb-magic"), "unknown gradient 'magic'")
    refused(here("study_precision.py", "wide", "narrow", cwd=tmp_path), "both have 8 channels")
    refused(here("study_precision.py", "nowhere", cwd=tmp_path), "nowhere does not exist")
