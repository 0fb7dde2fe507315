"""New images named by the model of a run: in Python, by `fgvc predict`, and their calibration."""

import contextlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from command_line import Done, Train, refused, trainable
from PIL import Image
from run_folders import change_summary
from safetensors.torch import load_file, save_file

import fgvc
from fgvc.data import ImageDataset, decode_rgb
from fgvc.data.dataset import Samples
from fgvc.errors import ConfigError, ImageError, RunError
from fgvc.inference.calibrate import fit_temperature, read_calibration
from fgvc.inference.predict import Prediction
from fgvc.inference.restore import restore_run
from fgvc.io import read_csv
from fgvc.reporting.predictions import Named, summary
from fgvc.runs.config import DatasetConfig, MethodConfig, OptimizerConfig, TrainerConfig, TransformConfig
from fgvc.spectral import EigendecompositionError
from fgvc.training import train_run

Copy = Callable[..., Path]
CLASSES = ["=1+1", "$x^2$ & co", "Gänsegeier"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs on images in folders, `tuned` with a validation part and `frozen` without."""
    folder = tmp_path_factory.mktemp("home")
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for target, name in enumerate(CLASSES):
            (folder / "data" / split / name).mkdir(parents=True)
            for number in range(8):
                pixels = rng.integers(0, 100, (40, 48, 3))
                pixels[..., target if number % 4 else target - 1] += 150  # a quarter has the colour of another class
                file = folder / "data" / split / name / f"{number}.png"
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file)
    for name, frozen, fraction, rate in (("tuned", False, 0.5, 0.01), ("frozen", True, 0.0, 0.03)):
        transform = TransformConfig(size=32, resize_size=36)
        config = trainable(
            folder,
            name=name,
            run_dir=str(folder / name),
            dataset=DatasetConfig(name="folder", root=str(folder / "data"), transform=transform),
            method=MethodConfig(name="gap"),
            trainer=TrainerConfig(batch_size=6, workers=0, epochs=6 if frozen else 4, val_fraction=fraction),
            optimizer=OptimizerConfig(name="adamw", lr=rate),
        )
        config.backbone.frozen = frozen
        config.cache.dtype = "float32"  # maps as `predict` computes them
        train_run(config)
    return folder


@pytest.fixture
def copy(home: Path, tmp_path: Path) -> Copy:
    """A copy of a run to be written into, far too sure of its answers: a temperature helps it."""

    def make(name: str, sure: float = 8.0) -> Path:
        run = Path(shutil.copytree(home / name, tmp_path / name))
        for file in (run / "checkpoints").glob("*.safetensors"):
            weights = load_file(file)
            save_file({key: sure * value if "classifier" in key else value for key, value in weights.items()}, file)
        return run

    return make


@pytest.fixture
def predict(here: Train, tmp_path: Path) -> Train:
    return lambda *arguments: here("predict.py", *arguments, cwd=tmp_path)


def without_data(run: Path) -> Path:
    """The same run on a machine without its images."""
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("/data", "/elsewhere"))
    return run


@pytest.mark.parametrize("name", ["tuned", "frozen"])
def test_a_predictor_repeats_the_runs_own_predictions_without_its_data(name: str, home: Path, tmp_path: Path) -> None:
    run = without_data(Path(shutil.copytree(home / name, tmp_path / name)))
    predictor = fgvc.load_run(run)
    recorded = pd.read_csv(run / "predictions.csv")
    paths = [home / "data" / path for path in recorded["path"]]
    found = predictor.predict(paths)
    assert [one.name for one in found] == [predictor.classes[index] for index in recorded["predicted"]]
    assert predictor.classes == sorted(CLASSES) and not predictor.calibrated
    assert [one.probabilities[0] for one in found] == pytest.approx(recorded["confidence"].tolist(), abs=1e-5)
    for path, together in zip(paths, found, strict=True):
        alone = predictor.predict(str(path))
        assert alone.names == together.names and sum(alone.probabilities) == pytest.approx(1)
        assert alone.probabilities == pytest.approx(together.probabilities, abs=1e-4)


def test_a_large_photograph_is_read_as_in_training(home: Path, tmp_path: Path) -> None:
    Image.effect_noise((600, 400), 60).convert("RGB").save(tmp_path / "large.jpg", quality=95)
    predictor = fgvc.load_run(home / "tuned")
    samples = Samples(["bird"], [tmp_path / "large.jpg"], [0], upright=True)
    expected, _ = ImageDataset(samples, tmp_path, predictor.transform)[0]
    for image in (tmp_path / "large.jpg", (tmp_path / "large.jpg").read_bytes()):
        assert torch.equal(predictor.prepare(image), expected)
    assert not torch.equal(predictor.transform(decode_rgb(tmp_path / "large.jpg")), expected)


def test_an_open_image_is_read_as_its_file(home: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    colour = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    alpha = Image.fromarray(rng.integers(0, 256, (40, 60, 4), dtype=np.uint8))
    colour.save(tmp_path / "turned.jpg", exif=turned)
    colour.save(tmp_path / "turned.tif", exif=turned)
    colour.convert("CMYK").save(tmp_path / "print.jpg")
    alpha.save(tmp_path / "glass.png")
    colour.quantize(8).save(tmp_path / "palette.png", transparency=0)
    Image.fromarray(rng.integers(0, 65536, (40, 60), dtype=np.uint16)).save(tmp_path / "deep.png")
    predictor = fgvc.load_run(home / "tuned")
    for path in sorted(tmp_path.iterdir()):
        expected = predictor.transform(decode_rgb(path, upright=True))
        with Image.open(path) as image:
            size, mode = image.size, image.mode
            assert torch.equal(predictor.prepare(image), expected), path
            assert torch.equal(predictor.prepare(image), expected), path  # which left the image as it was
            assert (image.size, image.mode) == (size, mode)
        assert torch.equal(predictor.prepare(path), expected)
    assert not torch.equal(predictor.prepare(tmp_path / "turned.jpg"), predictor.prepare(colour))


def test_what_cannot_be_named_is_refused(home: Path, tmp_path: Path) -> None:
    predictor = fgvc.load_run(home / "tuned")
    image = Image.new("RGB", (40, 40))
    assert len(predictor.predict(image, top=99).names) == 3 and predictor.predict([]) == []
    with pytest.raises(ConfigError, match="top=0"):
        predictor.predict(image, top=0)
    with pytest.raises(ImageError, match=r"gone\.png cannot be read"):
        predictor.predict(tmp_path / "gone.png")
    with pytest.raises(ImageError, match="the image cannot be read: pixels are 32-bit"):
        predictor.predict([image, Image.new("F", (40, 40))])


def test_an_image_may_be_an_array_a_tensor_or_the_content_of_a_file(home: Path, tmp_path: Path) -> None:
    predictor, pixels = fgvc.load_run(home / "tuned"), np.random.default_rng(0).integers(0, 256, (40, 60, 4), np.uint8)
    colour, grey = pixels[..., :3], pixels[..., 0]
    tensor, path = torch.from_numpy(colour).movedim(2, 0), tmp_path / "a.png"
    Image.fromarray(colour).save(path)
    with path.open("rb") as file:
        for image in (colour, tensor, tensor / 255, (tensor / 255).double(), path.read_bytes(), str(path), file):
            assert torch.equal(predictor.prepare(image), predictor.prepare(Image.fromarray(colour))), type(image)
    for image in (grey, torch.from_numpy(grey)[None], torch.from_numpy(grey)[None] / 255):
        assert torch.equal(predictor.prepare(image), predictor.prepare(Image.fromarray(grey)))
    assert torch.equal(predictor.prepare(pixels), predictor.prepare(Image.fromarray(pixels)))
    expected = predictor.predict(path).probabilities
    batches = ([path.read_bytes()], (colour,), colour[None], tensor[None])
    assert all(predictor.predict(images)[0].probabilities == expected for images in batches)
    assert predictor.predict(path.read_bytes()).probabilities == predictor.predict(tensor).probabilities == expected


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((40, 40, 3)), r"float64 of shape \(40, 40, 3\); give"),
        (np.zeros((3, 40, 40), np.uint8), r"uint8 of shape \(3, 40, 40\); give"),
        (np.zeros((40, 0, 3), np.uint8), r"\(40, 0, 3\): it is empty"),
        (torch.zeros(40, 40, 3), r"torch.float32 of shape \(40, 40, 3\); give"),
        (torch.zeros(3, 0, 40), r"\(3, 0, 40\): it is empty"),
        (torch.full((3, 40, 40), -2.1), "numbers below 0, above 1 or NaN; give those before normalising"),
        (torch.full((3, 40, 40), np.nan), "numbers below 0, above 1 or NaN"),
        (torch.zeros(3, 40, 40, dtype=torch.int64), "torch.int64"),
        (Image.new("RGB", (0, 0)), "0 x 0 pixels: it is empty"),
        (Image.new("RGB", (1, 6000)), "1 x 6000 pixels, one side more than 100 times the other"),
        (b"", "not an image"),
        (b"<html></html>", "not an image"),
        (None, "NoneType; give a Pillow image, a path,"),
        (3, "int; give"),
        ({"a": 1}, "dict; give"),
    ],
)
def test_what_is_no_image_is_refused_by_its_type(home: Path, image: Any, words: str) -> None:
    predictor = fgvc.load_run(home / "tuned")
    for images in (image, [image]):
        with pytest.raises(ImageError, match=f"the image cannot be read: .*{words}"):
            predictor.predict(images)


def test_widths_that_the_weights_do_not_have_take_no_memory(copy: Copy) -> None:
    run = copy("frozen")
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("hidden: []", f"hidden:\n  - {10**12}"))
    with pytest.raises(
        RunError, match=rf"last\.safetensors belongs .* no layer of shape \({10**12}, .*config\.yaml or .* asks"
    ):
        fgvc.load_run(run)
    # a tensor of no size is no layer, and classes have weights too
    weights = run / "checkpoints" / "last.safetensors"
    save_file(load_file(weights) | {"x": torch.empty(10**12, 0)}, weights)
    with pytest.raises(RunError, match="no layer of shape"):
        fgvc.load_run(run)
    more = change_summary(copy("tuned"), classes=[str(number) for number in range(1000)])
    with pytest.raises(RunError, match=r"no layer of shape \(1000, "):
        fgvc.load_run(more)


def test_weights_of_a_type_without_tests_of_their_numbers_are_refused(copy: Copy) -> None:
    run = copy("tuned")
    weights = run / "checkpoints" / "last.safetensors"
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(RunError, match=r"last\.safetensors is damaged: .*Float8"):
        fgvc.load_run(run)


def test_weights_that_give_no_numbers_are_refused(copy: Copy) -> None:
    run = copy("tuned")
    file = run / "checkpoints" / "last.safetensors"
    weights = load_file(file)
    save_file({**weights, "head.classifier.bias": weights["head.classifier.bias"] * torch.nan}, file)
    with pytest.raises(RunError, match=r"last\.safetensors holds NaN or infinity \(head\.classifier\.bias\)"):
        fgvc.load_run(run)
    save_file({**weights, "head.classifier.weight": weights["head.classifier.weight"] * 1e38}, file)
    with pytest.raises(RunError, match="not finite"):
        fgvc.load_run(run).predict(Image.new("RGB", (40, 40)))
    with pytest.raises(RunError, match="not finite"):
        fgvc.calibrate_run(run)


@pytest.mark.parametrize(("name", "split", "images"), [("tuned", "validation", 12), ("frozen", "test", 24)])
def test_a_temperature_comes_from_images_that_were_held_out(name: str, split: str, images: int, copy: Copy) -> None:
    run = copy(name)
    found = fgvc.calibrate_run(str(run))
    assert (found.split, found.images) == (split, images)
    held_out = restore_run(run, torch.device("cpu"), split=split).images
    trained_on = restore_run(run, torch.device("cpu"), split="train").images
    assert not set(held_out.paths) & set(trained_on.paths) and len(held_out) == images
    logits = torch.stack([one.logits for one in fgvc.load_run(run).predict(held_out.paths)])
    expected = fit_temperature(logits, torch.tensor(held_out.targets))
    assert found.temperature == pytest.approx(expected, rel=1e-3)
    assert found.record["top1"] == pytest.approx(
        100 * float((logits.argmax(dim=1) == torch.tensor(held_out.targets)).float().mean()), abs=1e-3
    )
    assert found.record["after"]["loss"] != found.record["before"]["loss"]
    assert sum(row["images"] for row in found.record["before"]["reliability"]) == images


def test_a_calibration_holds_for_its_own_weights(copy: Copy, home: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, image = copy("frozen"), next((home / "data" / "test").rglob("*.png"))
    plain = fgvc.load_run(run).predict(image)
    last, best = fgvc.calibrate_run(run), fgvc.calibrate_run(run, checkpoint="best")
    assert read_calibration(run) == last and read_calibration(run, "best") == best
    predictor = fgvc.load_run(run)
    found = predictor.predict(image)
    assert found.calibrated and not plain.calibrated and found.names == plain.names
    shares = (found.logits.double() / predictor.temperature).softmax(dim=0)
    assert found.probabilities == pytest.approx(shares.sort(descending=True).values.tolist())
    assert found.probabilities != pytest.approx(plain.probabilities, rel=1e-3)

    file = run / "checkpoints" / "last.safetensors"
    save_file({key: 1.01 * value for key, value in load_file(file).items()}, file)
    assert not fgvc.load_run(run).calibrated and fgvc.load_run(run, "best").calibrated
    of_no_use = [{"temperature": value} for value in ("hot", "1.5", True, 1e-320, 10**400)]
    of_no_use += [{"images": -7}, {"images": 1 << 62}, {"split": "moon"}]
    tampered = [json.dumps({"schema": 1, "checkpoints": {"best": best.record | change}}) for change in of_no_use]
    for damage in ("{", '{"schema": 99}', "[]", *tampered):
        caplog.clear()
        (run / "calibration.json").write_text(damage)
        assert not fgvc.load_run(run, "best").calibrated and "calibrate the run again" in caplog.text
    fgvc.calibrate_run(run, checkpoint="best")
    assert fgvc.load_run(run, "best").calibrated


def test_a_temperature_that_harms_other_images_is_not_kept(copy: Copy) -> None:
    found = fgvc.calibrate_run(copy("frozen", sure=1.0))  # 24 images, a quarter of them named wrong on purpose
    assert found.temperature is None and found.record["after"] == found.record["before"]


def test_images_without_a_temperature_leave_the_run_uncalibrated(copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    run = copy("frozen")
    monkeypatch.setattr("fgvc.inference.calibrate.fit_temperature", lambda *_: 0.05)  # as where all are right
    assert "determine no temperature" in fgvc.calibrate_run(run).text
    predictor = fgvc.load_run(run)
    assert (predictor.calibrated, predictor.temperature) == (False, 1.0) and predictor.calibration is not None


def test_command_line_names_one_image(predict: Train, copy: Copy, home: Path) -> None:
    run, image = copy("frozen"), home / "data" / "test" / CLASSES[0] / "1.png"
    fgvc.calibrate_run(run)
    done = predict(run, image, "--top", 2)
    assert done.returncode == 0, done.stderr
    expected = fgvc.load_run(run).predict(image, top=2)
    assert expected.calibrated
    lines = done.stdout.splitlines()
    assert lines[0] == str(image) and lines[-1] == f"written: {run / 'predicted' / '1.png'}"
    assert "probabilities are calibrated: temperature" in lines[-2] and lines[-2].endswith("from 24 test images")
    for line, name, share in zip(lines[1:-2], expected.names, expected.probabilities, strict=True):
        assert line.strip() == f"{100 * share:.2f} %  {name}"
    assert Image.open(run / "predicted" / "1.png").width > 900
    assert "note: " not in done.stderr


def test_command_line_prints_one_json_document(predict: Train, copy: Copy, home: Path, tmp_path: Path) -> None:
    run, image = without_data(copy("tuned")), home / "data" / "test" / CLASSES[1] / "0.png"
    done = predict(run, image, image.parent.parent / CLASSES[2] / "0.png", "--json", "--overlay", tmp_path / "drawn")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["schema"], document["checkpoint"], document["calibrated"]) == (1, "last", False)
    assert (document["temperature"], document["calibrated_on"], document["run"]) == (1.0, None, str(run))
    assert [one["overlay"] for one in document["images"]] == [
        str(tmp_path / "drawn" / f"0{end}.png") for end in ("", "-2")
    ]
    assert sorted(pair["class"] for pair in document["images"][0]["predictions"]) == sorted(CLASSES)
    assert "probabilities are not calibrated" in done.stderr and "fgvc calibrate" in done.stderr


def test_command_line_names_a_folder_and_tells_broken_files(predict: Train, copy: Copy, tmp_path: Path) -> None:
    folder, run = tmp_path / "photographs", copy("frozen")
    fgvc.calibrate_run(run)
    (folder / "deep").mkdir(parents=True)
    for name in ("b.png", "deep/=cmd().png", "a.png"):
        Image.new("RGB", (50, 40), "teal").save(folder / name)
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image either")
    done = predict(run, folder)
    assert done.returncode == 2 and "note: " not in done.stderr, done.stderr
    assert "error: 1 of 4 images failed, for the reasons above: " + str(folder / "broken.jpg") in done.stderr
    table = run / "predicted" / "photographs.csv"
    lines = done.stdout.splitlines()
    assert lines[0] == "images: 4, named: 3, different names: 1" and lines[-1] == f"written: {table}"
    assert re.fullmatch(r"most frequent: .* 3", lines[1]) and len(lines) == 8  # not a block an image
    assert sum(str(folder) in line for line in lines[3:6]) == 3
    found = read_csv(table, ("path", "name_1", "probability_1", "name_3", "error"))
    names = ["a.png", "b.png", "broken.jpg", "deep/=cmd().png"]
    assert found["path"].tolist() == [str(folder / name) for name in names]
    assert found["error"].notna().tolist() == [False, False, True, False]
    assert found["name_1"].isna().tolist() == [False, False, True, False]
    assert set(found["name_1"].dropna()) <= set(CLASSES)
    assert sorted(path.name for path in (run / "predicted").glob("[!.]*")) == ["photographs.csv"]
    (folder / "broken.jpg").unlink()
    assert predict(run, folder, "--csv", tmp_path / "good.csv", "--strict").returncode == 0


def test_notes_are_printed_where_an_image_fails(predict: Train, copy: Copy, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    done = predict(copy("frozen"), tmp_path / "broken.jpg", "--strict")
    assert done.returncode == 2 and "note: probabilities are not calibrated" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("adapter", "options", "words"),
    [("cub", {"crop": "bbox"}, "cut to the object's box"), ("aircraft", {}, "without the banner of 20 rows")],
)
def test_what_the_dataset_cut_off_its_images_is_said(
    copy: Copy, home: Path, predict: Train, adapter: str, options: dict[str, str], words: str
) -> None:
    run = copy("frozen")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["dataset"] |= {"adapter": adapter, "options": options}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    (note,) = fgvc.load_run(run).notes
    done = predict(run, next((home / "data" / "test").rglob("*.png")))
    assert note.startswith(f"the run read images {words}") and f"note: {note}" in done.stderr


def test_a_folder_of_the_same_name_does_not_replace_the_last_ones_table(
    predict: Train, copy: Copy, tmp_path: Path
) -> None:
    run, colours = copy("frozen"), {"a": "teal", "b": "red"}
    for parent, colour in colours.items():
        (tmp_path / parent / "photos").mkdir(parents=True)
        Image.new("RGB", (50, 40), colour).save(tmp_path / parent / "photos" / f"{colour}.png")
    for parent, file in (("a", "photos.csv"), ("b", "photos-2.csv"), ("a", "photos.csv"), ("b", "photos-2.csv")):
        done = predict(run, tmp_path / parent / "photos")
        assert done.returncode == 0 and done.stdout.endswith(f"written: {run / 'predicted' / file}\n")
        (path,) = read_csv(run / "predicted" / file, ("path",))["path"]
        assert path == str(tmp_path / parent / "photos" / f"{colours[parent]}.png")
    assert len(list((run / "predicted").glob("*.csv"))) == 2


def test_a_summary_tells_the_least_sure_and_the_most_frequent_names() -> None:
    def of(path: str, name: str, share: float) -> Named:
        prediction = Prediction((name,), (share,), False, torch.zeros(1))
        return Named(Path(path), prediction)

    named = [of(f"{i}.jpg", "001.Wren" if i % 3 else "Sea_Eagle\x1b[2J", 0.9 - i / 100) for i in range(9)]
    named.append(Named(Path("bad.jpg"), None, "bad.jpg: not an image"))
    assert summary(named, lowest=2).splitlines() == [
        "images: 10, named: 9, different names: 2",
        "most frequent: Wren 6, Sea Eagle\\x1b[2J 3",
        "mean confidence 86.00 %; the lowest:",
        "   82.00 %  Wren  8.jpg",
        "   83.00 %  Wren  7.jpg",
    ]
    assert summary(named[-1:]) == "images: 1, named: 0"


def test_no_image_and_no_strange_file_is_written_over(
    predict: Callable[..., Done], here: Callable[..., Done], copy: Callable[[str], Path], tmp_path: Path
) -> None:
    run, photos = copy("frozen"), tmp_path / "photos"
    photos.mkdir()
    for name in ("bird.png", "note.png"):
        Image.new("RGB", (50, 40), "teal").save(photos / name)
    (tmp_path / "mine.csv").write_text("mine")
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    image = photos / "bird.png"
    refused(predict(run, photos, "--overlay", photos), "bird.png is one of the images")
    refused(predict(run, image, "--no-overlay", "--csv", image), "bird.png is one of the images")
    refused(predict(run, image, "--no-overlay", "--csv", photos / "note.png"), "note.png", "give another path")
    refused(predict(run, image, "--no-overlay", "--csv", tmp_path / "mine.csv"), "mine.csv", "give another path")
    refused(predict(run, image, "--no-overlay", "--csv", run / "predictions.csv"), "predictions.csv: exists")
    refused(here("report.py", run, "--output", run / "summary.json", cwd=tmp_path), "summary.json: exists")
    refused(here("make_tables.py", run, "--provenance", run / "config.yaml", cwd=tmp_path), "config.yaml: exists")
    overlays = tmp_path / "ov"
    refused(
        predict(run, image, "--overlay", overlays, "--csv", overlays / "bird.png"), "of the table and of an overlay"
    )
    output = ("--output", "tb", "--provenance", "tb/accuracy.csv")
    refused(here("make_tables.py", run, *output, cwd=tmp_path), "--provenance tb/accuracy.csv is the file of a table")
    refused(predict(run, image, "--csv", tmp_path / ".fgvc-made.json"), "is the record of the files")
    assert not overlays.exists() and not (tmp_path / "tb").exists() and not (tmp_path / ".fgvc-made.json").exists()
    assert {path: path.read_bytes() for path in before} == before
    for _ in range(2):  # a command may be repeated
        assert predict(run, image).returncode == 0 and predict(run, photos, "--overlay", tmp_path / "o").returncode == 0
        assert here("report.py", run, cwd=tmp_path).returncode == 0
        assert here("make_tables.py", run, "--provenance", "p.json", cwd=tmp_path).returncode == 0
        assert here("evaluate.py", run, cwd=tmp_path).returncode == 0
    drawn = run / "predicted" / "bird.png"
    refused(predict(run, drawn, "--overlay", drawn.parent), "bird.png is one of the images")
    refused(here("report.py", run, "--output", "p.json", cwd=tmp_path), "p.json: exists")
    arguments = ("attribute.py", run, "--images", drawn, "--output", drawn.parent)
    refused(here(*arguments, cwd=tmp_path), "where the results are written")


def test_one_odd_image_does_not_spoil_the_others(
    predict: Callable[..., Done], copy: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong with it: in the transform, in the model, or in its overlay; and whatever ends the command."""
    paths = [tmp_path / f"{name}.png" for name in "abcd"]
    for number, path in enumerate(paths):
        Image.new("RGB", (50, 40), (number, 0, 0)).save(path)
    odd = "no room for an image of this form"
    prepare, logits = fgvc.Predictor.prepare, fgvc.Predictor.logits

    def fails(self: fgvc.Predictor, image: Path) -> torch.Tensor:
        if image.stem == "b":
            raise MemoryError(odd)
        return prepare(self, image)

    def nan(self: fgvc.Predictor, batch: torch.Tensor) -> torch.Tensor:
        if any(torch.equal(one, prepare(self, paths[1])) for one in batch):
            raise RunError(odd)
        return logits(self, batch)

    def singular(self: fgvc.Predictor, batch: torch.Tensor) -> torch.Tensor:
        with contextlib.suppress(RunError):
            return nan(self, batch)
        raise EigendecompositionError(odd)

    def stops(self: fgvc.Predictor, image: Path) -> torch.Tensor:
        if image.stem == "e":
            raise KeyboardInterrupt
        return prepare(self, image)

    run = copy("frozen")
    for number, (name, function) in enumerate((("prepare", fails), ("logits", nan), ("logits", singular))):
        with monkeypatch.context() as patched:
            patched.setattr(fgvc.Predictor, name, function)
            done = predict(run, *paths, "--csv", tmp_path / f"{number}.csv")
        refused(done, odd, "1 of 4 images failed", str(paths[1]))
        found = pd.read_csv(tmp_path / f"{number}.csv")
        assert found["name_1"].notna().tolist() == [True, False, True, True]
        assert all(str(path) in done.stdout for path in paths if path.stem != "b")
        assert (run / "predicted" / "d.png").is_file()
    with monkeypatch.context() as patched:
        patched.setattr(fgvc.Predictor, "prepare", stops)
        last = Path(shutil.copy(paths[0], tmp_path / "e.png"))
        assert predict(run, *paths, last, "--no-overlay", "--csv", tmp_path / "part.csv").returncode == 130
    assert len(pd.read_csv(tmp_path / "part.csv")) == 4


def test_command_line_refuses_in_one_line(predict: Train, copy: Copy, home: Path, tmp_path: Path) -> None:
    run, image = copy("frozen"), next((home / "data" / "test").rglob("*.png"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jpg").write_text("no image")
    for arguments, parts in (
        ((run, tmp_path / "gone.jpg"), ("gone.jpg: no such file or folder",)),
        ((run, tmp_path / "empty"), ("empty: no image files",)),
        ((run, tmp_path / "text.jpg"), ("text.jpg cannot be read: not an image",)),
        ((tmp_path / "no_run", image), ("no_run is not a run folder",)),
        ((run, image, "--top", 0), ("top=0 must be at least 1",)),
    ):
        done = predict(*arguments)
        refused(done, *parts)
        assert done.stderr.count("\n") == 1 or "no_run" not in str(arguments), done.stderr
    assert not (run / "predicted").exists()


def test_one_bad_argument_does_not_stop_the_others(
    predict: Train, here: Train, copy: Copy, home: Path, tmp_path: Path
) -> None:
    run, image = copy("frozen"), next((home / "data" / "test").rglob("*.png"))
    (tmp_path / "gone.jpg").symlink_to("nowhere")
    (tmp_path / "circle.jpg").symlink_to("circle.jpg")
    (tmp_path / "empty").mkdir()
    bad = [tmp_path / name for name in ("gone.jpg", "circle.jpg", "empty")]
    for script, more in (("predict.py", ()), ("neighbours.py", ()), ("embed.py", ("--output", "found.csv"))):
        done = here(script, run, bad[0], image, *bad[1:], *more, cwd=tmp_path)
        refused(
            done, "3 of 4 images failed", "gone.jpg: no such file", "circle.jpg: no such file", "empty: no image files"
        )
        assert image.name in done.stdout or script == "embed.py"
    assert len(pd.read_csv(tmp_path / "found.csv")) == 1
    (tmp_path / "a\nb.jpg").write_text("no image")
    lines = predict(run, image, tmp_path / "a\nb.jpg").stderr.splitlines()
    assert any(line.startswith("error: 1 of 2 images failed") and line.endswith("leave them out") for line in lines)
    done = here("calibrate.py", copy("tuned"), tmp_path / "nope", run, cwd=tmp_path)
    refused(done, "nope is not a run folder", "1 of 3 failed, for the reasons above: ")
    assert done.stdout.count("weights: ") == 2 and (run / "calibration.json").is_file()


def test_a_run_calibrates_itself_at_its_end_and_prediction_never_does(
    predict: Callable[..., Done], train_here: Train, home: Path, tmp_path: Path
) -> None:
    """Prediction acts on no setting of the folder, which someone else may have sent."""
    assert train_here(tmp_path, "run_dir=run", "trainer.val_fraction=0.5").returncode == 0
    run, image = tmp_path / "run", next((home / "data" / "test").rglob("*.png"))
    assert read_calibration(run) is not None
    (run / "calibration.json").unlink()
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["cache"] |= {"dir": str(tmp_path / "theirs"), "max_gb": 1e-9}
    settings["dataset"] |= {"root": str(tmp_path / "made"), "options": settings["dataset"]["options"]}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    done = predict(run, image)
    assert done.returncode == 0 and "note: probabilities are not calibrated; on the machine" in done.stderr
    assert "probabilities are not calibrated" in done.stdout and not (run / "calibration.json").exists()
    assert not (tmp_path / "theirs").exists() and not (tmp_path / "made").exists()


def test_a_strangers_run_writes_nothing_outside_and_asks_no_network(
    here: Callable[..., Done], copy: Callable[[str], Path], home: Path, tmp_path: Path
) -> None:
    run, image = copy("frozen"), next((home / "data" / "test").rglob("*.png"))
    original = (run / "config.yaml").read_text()
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name in ("features-0.npy", "features-0.json"):
        (theirs / name).write_bytes(b"{}")

    def change(part: str, **values: object) -> None:
        settings = yaml.safe_load(original)
        settings[part] |= values
        (run / "config.yaml").write_text(yaml.safe_dump(settings))

    change("cache", dir=str(theirs), max_gb=1e-9)
    for script in ("evaluate.py", "calibrate.py"):
        done = here(script, run, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in theirs.iterdir()) == ["features-0.json", "features-0.npy"]
    for adapter, options in (("synthetic", {}), ("hf", {"path": "someone/else"})):
        change("dataset", adapter=adapter, root=str(tmp_path / "made"), options=options)
        refused(here("evaluate.py", run, cwd=tmp_path), "made is not there", "--root")
    assert not (tmp_path / "made").exists()
    for name in ("hf_hub:someone/else", "hf-hub:someone/else", "local-dir:/etc"):
        change("backbone", name=name)
        refused(here("predict.py", run, image, cwd=tmp_path), name, "may not ask for")
    elsewhere = {"url": "http://127.0.0.1:9/weights.pth", "hf_hub_id": None}
    for options in ({"pretrained_cfg_overlay": elsewhere}, {"checkpoint_path": str(image)}):
        change("backbone", pretrained=True, weights=None, options=options)
        refused(here("predict.py", run, image, cwd=tmp_path), f"backbone.options={{{next(iter(options))}}}")


@pytest.mark.parametrize(
    ("part", "values", "words"),
    [
        ("hybrid", {"method": "isqrt_cov"}, "set hybrid.switch_epoch"),
        ("trainer", {"workers": -1}, "trainer.workers must be at least 0"),
        ("trainer", {"eval_batch_size": 0}, "trainer.eval_batch_size"),
        ("optimizer", {"lr": float("nan")}, "optimizer.lr must be a finite number"),
        ("dataset.transform", {"resize_size": 10**9}, "resize_size must be from 1 to 4096"),
        ("dataset.transform", {"size": 20000, "resize_size": None}, "size must be from 1 to 4096"),
        ("backbone", {"weights": "package:__main__"}, "no such package"),
        ("backbone", {"weights": "~nouser/w.pth"}, "~nouser/w.pth does not exist"),
        ("backbone", {"options": {"num_classes": 10**9}}, "backbone.options={num_classes}"),
        ("dataset", {"root": "~nouser/x"}, "~nouser/x"),
    ],
)
def test_settings_of_a_strangers_run_are_checked(
    here: Callable[..., Done],
    copy: Callable[[str], Path],
    home: Path,
    tmp_path: Path,
    part: str,
    values: dict[str, object],
    words: str,
) -> None:
    run, image = copy("frozen"), next((home / "data" / "test").rglob("*.png"))
    settings = yaml.safe_load((run / "config.yaml").read_text())
    place = settings
    for key in part.split("."):
        place = place[key]
    place |= values
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    if "root" not in values:  # a prediction needs no images
        refused(here("predict.py", run, image, cwd=tmp_path), words)
    refused(here("evaluate.py", run, cwd=tmp_path), words)


LINKS = ("config.yaml", "summary.json", "checkpoints", "checkpoints/last.safetensors", "predictions.csv")


@pytest.mark.parametrize("name", [*LINKS, "predicted", "exports", ".lock", "calibration.json", "metrics.csv"])
def test_a_link_out_of_a_run_folder_is_not_followed(
    name: str, here: Callable[..., Done], copy: Callable[[str], Path], home: Path, tmp_path: Path
) -> None:
    run, target = copy("tuned"), tmp_path / "secret"
    if (run / name).exists():
        (run / name).rename(target)
    else:
        target.mkdir()
    (run / name).symlink_to(target)
    before = sorted(tmp_path.rglob("*"))
    image = next((home / "data" / "test").rglob("*.png"))
    for script, *arguments in (
        ("predict.py", run, image),
        ("evaluate.py", run),
        ("report.py", run),
        ("make_tables.py", run),
        ("export.py", run, "--to", "safetensors"),
        ("calibrate.py", run),
    ):
        refused(here(script, *arguments, cwd=tmp_path), str(run / name), "a link out of the run folder")
    assert sorted(tmp_path.rglob("*")) == before


def test_calibrating_several_runs_writes_tables_and_diagrams(here: Train, copy: Copy, tmp_path: Path) -> None:
    runs = (copy("tuned"), copy("frozen"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "reliability.csv").write_text("mine")
    refused(here("calibrate.py", *runs, "--output", "mine", cwd=tmp_path), "reliability.csv", "did not make it")
    assert not list(tmp_path.rglob("calibration.json"))
    done = here("calibrate.py", *runs, "--output", "found", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "from 12 validation images" in done.stdout and "from 24 test images" in done.stdout
    table = read_csv(
        tmp_path / "found" / "calibration.csv", ("label", "split", "temperature", "loss_before", "loss_after")
    )
    assert table["split"].tolist() == ["validation", "test"]
    record = json.loads((tmp_path / "frozen" / "calibration.json").read_text())["checkpoints"]["last"]
    assert table["temperature"][1] == pytest.approx(record["temperature"], rel=1e-5)
    assert table["calibration_error_after"][1] == pytest.approx(record["after"]["calibration_error"], rel=1e-5)
    curves = read_csv(tmp_path / "found" / "reliability.csv", ("label", "when", "images", "confidence", "accuracy"))
    assert curves["images"].sum() == 2 * (12 + 24) and set(curves["when"]) == {"before", "after"}
    assert {file.name for file in (tmp_path / "found").glob("rel*")} == {
        f"reliability.{kind}" for kind in ("csv", "png", "pdf")
    }
