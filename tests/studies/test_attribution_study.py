"""The study of attributions: what it measures of trained runs, its tables, files and figure, what it refuses."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from command_line import Train, refused, succeeded
from miniature import write_miniature

from fgvc.data import boxes_in_view, create_dataset
from fgvc.errors import ConfigError, DatasetError, RunError
from fgvc.inference.restore import restore_run
from fgvc.models import create_model
from fgvc.runs import find_finished
from fgvc.runs.summary import read_run
from fgvc.spectral import Band
from fgvc.studies.attribution import explain, measure
from fgvc.studies.attribution import show as shown
from fgvc.studies.attribution.study import (
    COLUMNS,
    AttributionStudy,
    load_attribution_study,
    mean_map,
    save_attribution_study,
    study_attribution,
    tables,
)
from fgvc.studies.truncation.bands import evaluate_bands

BIRDS = [
    *("dataset=cub", "dataset.root=birds", "dataset.transform.size=64"),
    *("backbone.name=test_resnet", "backbone.weights=null", "backbone.frozen=true", "method.reduction=6"),
    *("trainer.epochs=1", "trainer.batch_size=4", "trainer.workers=0"),
]


@pytest.mark.slow
def test_two_runs_explain_and_judge_each_other(tmp_path: Path, here: Train) -> None:
    root = write_miniature("cub", tmp_path / "birds")
    for method in ("mpn_cov", "gap"):
        succeeded(here("train.py", *BIRDS, f"method={method}", f"run_dir=runs/{method}", cwd=tmp_path))
    options = ("--images", 4, "--bands", "top1,1:", "--method", "hirescam", "--steps", 3, "--output", "out")
    done = succeeded(here("study_attribution.py", "runs", *options, "--boxes", cwd=tmp_path))
    assert "4 of 4 images" in done.stderr and "| MPN-COV, top1 " in done.stdout and "inside the box" in done.stdout
    files = {f"{name}.csv" for name in COLUMNS} | {"attribution.png", "attribution.pdf"}
    assert {path.name for path in (tmp_path / "out").glob("[!.]*")} == files

    study = load_attribution_study(tmp_path / "out")
    assert_heads_do_what_the_table_says(study, tmp_path)
    assert_areas_are_those_of_explain(study, tmp_path / "runs" / "mpn_cov")
    extents = study.extents.set_index(["label", "band", "method"])
    data = create_dataset("cub", root=root, split="test", boxes=True)
    restored = restore_run(tmp_path / "runs" / "mpn_cov")
    boxes = boxes_in_view(data.with_transform(restored.images.transform), [0, 2, 3, 5])
    central = measure.share_inside(measure.centre_maps(4, (64, 64)), boxes).mean().item()
    assert extents.loc[tuple(measure.CENTRE), "inside"] == pytest.approx(central, rel=1e-3)
    even = measure.share_inside(torch.ones(4, 64, 64), boxes).mean().item()  # which is the boxes' share of the area
    assert extents.loc[tuple(measure.CENTRE), "box_area"] == pytest.approx(even, rel=1e-3)

    study_here = ("study_attribution.py", "runs", "--bands")
    refused(here(*study_here, "top1", "--images", 7, cwd=tmp_path), "images=7: the test split of birds has 6")
    refused(here(*study_here, "top1", "--method", "magic", cwd=tmp_path), "unknown attribution magic")
    refused(here(*study_here, "top99", cwd=tmp_path), "band 'top99' asks for 99 of")
    (root / "bounding_boxes.txt").unlink()
    with pytest.raises(DatasetError, match="it holds the bounding boxes"):
        study_attribution(find_finished([tmp_path / "runs"])[0], images=4, bands=["top1"], boxes=True)
    succeeded(here("train.py", *BIRDS, "method=mpn_cov", "seed=1", "run_dir=runs/other", cwd=tmp_path))
    with pytest.raises(RunError, match="differ in the weights of their backbones"):
        study_attribution(find_finished([tmp_path / "runs"])[0], images=4, bands=["top1"])


@pytest.mark.parametrize("option", [{"steps": 0}, {"cell": 0}, {"seed": -1}])
def test_numbers_out_of_range_end_a_study_before_it_begins(option: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(option))} must be at least"):
        study_attribution([], **option)  # type: ignore[arg-type]


def assert_heads_do_what_the_table_says(study: AttributionStudy, folder: Path) -> None:
    heads = study.heads.set_index(["label", "band"])
    assert list(heads.index) == [("GAP", "all"), ("MPN-COV", "all"), ("MPN-COV", "top1"), ("MPN-COV", "1:")]
    by_band = evaluate_bands(folder / "runs" / "mpn_cov", [Band(0, 1), Band(1, None)])
    sums = by_band.groupby("start")[["right", "images"]].sum()
    assert heads.loc[("MPN-COV", "top1"), "top1"] == pytest.approx(100 * sums.loc[0, "right"] / 6, abs=0.01)
    assert heads.loc[("MPN-COV", "1:"), "top1"] == pytest.approx(100 * sums.loc[1, "right"] / 6, abs=0.01)
    parts = heads["margin"]
    assert parts["MPN-COV", "top1"] + parts["MPN-COV", "1:"] == pytest.approx(parts["MPN-COV", "all"], abs=1e-3)
    table = read_run(folder / "runs" / "gap").predictions()
    # `rank` is the place of the true class, 1 for the highest of three
    assert heads.loc[("GAP", "all"), "above"] == pytest.approx(100 * (3 - table["rank"]).mean() / 2, abs=0.01)
    assert heads.loc[("GAP", "all"), "top1"] == pytest.approx(100 * (table["rank"] == 1).mean(), abs=0.01)


def assert_areas_are_those_of_explain(study: AttributionStudy, run: Path) -> None:
    restored = restore_run(run)
    model = create_model("test_resnet", method="mpn_cov", num_classes=3, reduction=6)
    model.backbone, model.head = restored.backbone, restored.head
    images = torch.stack([restored.images[i][0] for i in (0, 2, 3, 5)])
    classes = torch.tensor([restored.images.targets[i] for i in (0, 2, 3, 5)])
    maps = explain(model.eval(), images, method="hirescam", band=(1, None), classes=classes).maps
    curves = measure.deletion_insertion(model.backbone, [model.head], images, classes, maps[None], steps=3, cell=16)
    areas = study.areas.set_index(["label", "band", "method", "judge", "judge_band"])
    for kind in measure.KINDS:
        expected = curves.auc(kind).mean().item()
        assert areas.loc[("MPN-COV", "1:", "hirescam", "MPN-COV", "all"), kind] == pytest.approx(expected, rel=1e-3)
    assert ("MPN-COV", "1:", "hirescam", "GAP", "all") in areas.index
    assert ("GAP", "all", "hirescam", "MPN-COV", "top1") not in areas.index
    whole = study.heads.set_index(["label", "band"])["whole"]
    assert whole[("MPN-COV", "all")] == pytest.approx(curves.deletion[0, 0, :, 0].mean().item(), rel=1e-3)


MAPS = [measure.MapSource("SEB", band, method) for method in ("gradcam", "hirescam") for band in ("all", "top1", "1:")]


def fabricated(seed: int, shift: float = 0.0, images: int = 12) -> measure.MapMeasures:
    """Three heads; deletion under head j of map k of image b starts at 0.6 and ends at 0.1, 0.1 k + shift between."""
    model = create_model("test_resnet", method="seb", num_classes=3, reduction=4)
    heads = [measure.Head("SEB", seed, band, None, model) for band in ("all", "top1", "1:")]
    maps = [*MAPS, measure.RANDOM, measure.CENTRE]
    rng = torch.Generator().manual_seed(seed)
    deletion = torch.empty(3, len(maps), images, 3, dtype=torch.float64)
    deletion[..., 0], deletion[..., 2] = 0.6, 0.1
    deletion[..., 1] = 0.1 * torch.arange(len(maps))[None, :, None] + shift
    cells = torch.rand(len(maps), images, 3, 4, generator=rng, dtype=torch.float64)
    cells[4] = cells[3]  # the two bands of one method agree
    half = torch.full((len(maps), images), 0.25, dtype=torch.float64)
    half[0, 0] = torch.nan
    cells[0, 0] = 0
    cells[2] -= 0.5  # evidence against the class
    shares = torch.tensor([0, 0.5, 1], dtype=torch.float64)
    no_boxes = (torch.full_like(half, torch.nan), torch.full((images,), torch.nan))
    return measure.MapMeasures(heads, maps, measure.Curves(shares, deletion, deletion.flip(-1)), cells, half, *no_boxes)


HEADS = [
    {"label": "SEB", "seed": seed, "band": band, "top1": top1 + seed, "above": 50.0, "margin": 0.0, "images": 12}
    | {"whole": 0.6, "reference": 0.1}
    for seed in (0, 1)
    for band, top1 in (("all", 90.0), ("top1", 70.0), ("1:", 1.0))
]


@pytest.fixture
def study() -> AttributionStudy:
    return tables([fabricated(0), fabricated(1, shift=0.02)], HEADS)


def test_numbers_are_averaged_over_seeds_and_paired_by_image(study: AttributionStudy) -> None:
    areas = study.areas.set_index(["label", "band", "method", "judge", "judge_band"])
    row = areas.loc[("SEB", "1:", "gradcam", "SEB", "top1")]
    # trapezoid of 0.6, 0.2 + 0.01 on average over seeds, 0.1
    assert row["deletion"] == pytest.approx((0.6 / 2 + 0.21 + 0.1 / 2) / 2) == row["insertion"]
    assert row["deletion_low"] == pytest.approx(row["deletion"]) == row["deletion_high"]
    assert (row["seeds"], row["images"]) == (2, 12)
    differences = study.differences.set_index(["band", "method", "other_band", "other_method"])
    assert differences.loc[("top1", "gradcam", "1:", "gradcam"), "deletion"] == pytest.approx(-0.05)
    assert differences.loc[("all", "hirescam", "none", "centre"), "insertion"] == pytest.approx(-0.2)
    assert ("all", "gradcam", "all", "hirescam") not in differences.index  # of one method only
    assert set(study.differences["judge_band"]) == set(study.curves["judge_band"]) == {"all"}
    curves = study.curves[(study.curves["method"] == "hirescam") & (study.curves["band"] == "all")]
    assert curves["deletion"].tolist() == pytest.approx([0.6, 0.31, 0.1])
    assert curves["insertion"].tolist() == pytest.approx([0.1, 0.31, 0.6])


def test_intervals_are_a_bootstrap_over_images() -> None:
    part = fabricated(0, images=400)
    noise = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    part.curves.deletion[0, 0, :, 1] += noise
    (row,) = tables([part], HEADS[:3]).areas.head(1).to_dict("records")
    expected = 1.96 * float(noise.std()) / 400**0.5 / 2
    assert row["deletion"] == pytest.approx(0.175 + float(noise.mean()) / 2)
    assert row["deletion_high"] - row["deletion"] == pytest.approx(expected, rel=0.15)
    assert row["deletion"] - row["deletion_low"] == pytest.approx(expected, rel=0.15)


def test_agreement_has_its_yardsticks(study: AttributionStudy) -> None:
    table = study.agreement.set_index(["between", "band", "method", "other"])
    assert table.loc[("bands", "all", "hirescam", "top1"), "mean"] == pytest.approx(1)
    assert abs(table.loc[("bands", "all", "gradcam", "top1"), "mean"]) < 0.5
    assert table.loc[("methods", "all", "gradcam", "hirescam"), "seeds"] == 2
    assert table.loc[("seeds", "1:", "gradcam", "another seed"), "seeds"] == 1
    assert ("centre", "1:", "hirescam", "centre") in table.index
    assert "random" not in set(study.agreement["method"]) | set(study.agreement["other"])


def test_an_empty_map_counts_as_empty_and_in_no_mean(study: AttributionStudy) -> None:
    extents = study.extents.set_index(["band", "method"])
    assert extents.loc[("all", "gradcam"), "empty"] == pytest.approx(1 / 12)
    assert extents.loc[("all", "gradcam"), "half_area"] == 0.25 and np.isnan(extents.loc[("all", "gradcam"), "inside"])
    for of in MAPS:
        assert mean_map(study, of).shape == (3, 4) and mean_map(study, of).mean() == pytest.approx(1)
    assert np.allclose(mean_map(study, MAPS[3]), mean_map(study, MAPS[4]))
    for place, images in ((0, slice(1, None)), (2, slice(None))):  # of the first map the first image is empty
        seeds = [fabricated(seed).cells[place, images].clamp(min=0) for seed in (0, 1)]
        expected = torch.stack([(part / part.mean(dim=(1, 2), keepdim=True)).mean(dim=0) for part in seeds]).mean(dim=0)
        assert np.allclose(mean_map(study, MAPS[place]), expected)


def test_a_study_survives_its_files_and_is_drawn(study: AttributionStudy, tmp_path: Path) -> None:
    assert all(path.is_file() for path in save_attribution_study(study, tmp_path))
    loaded = load_attribution_study(tmp_path)
    for name, table in study._asdict().items():
        pd.testing.assert_frame_equal(getattr(loaded, name), table, check_dtype=False, rtol=1e-2)
    text = shown.study_markdown(loaded)
    assert "| SEB, 1:" in text and "1.50 ± 0.71" in text and "| Centred Gaussian" not in text
    line = next(line for line in text.splitlines() if line.startswith("| centred Gaussian"))
    assert " – | " in line
    pairs = shown.differences_markdown(loaded.differences, [("top1", "1:")])
    assert "top1 − 1:" in pairs and "-0.050 [-0.050, -0.050]" in pairs and "2 x 12" in pairs and "HiResCAM" in pairs
    agreement = shown.agreement_markdown(loaded.agreement)
    assert re.search(r"\| bands +\| +SEB \| +top1 \| .*\| +1.00 \[1.00, 1.00\] \|", agreement)
    figure = shown.attribution_figure(loaded)
    names = [line.get_label() for line in figure.subfigs[0].axes[0].lines]
    assert names == ["all", "top1", "1:", "random map", "centred Gaussian"]
    assert len(figure.subfigs[1].axes) == 5
    assert shown.attribution_figure(loaded, "gradcam", "SEB").subfigs[0].get_suptitle().startswith("Grad-CAM, SEB")
    (tmp_path / "areas.csv").write_text("label\nx\n")
    with pytest.raises(RunError, match=r"areas\.csv: no column"):
        load_attribution_study(tmp_path)
