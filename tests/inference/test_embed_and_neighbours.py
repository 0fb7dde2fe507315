"""Descriptors of images, the nearest training images, and retrieval among test images: in Python and by commands."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from command_line import Train, refused, succeeded, trainable
from miniature import write_coloured
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.decomposition import PCA

import fgvc
from fgvc.errors import ImageError
from fgvc.inference.evaluate import measure_retrieval
from fgvc.inference.neighbours import load_neighbours
from fgvc.inference.predict import find_images
from fgvc.presentation.style import class_name
from fgvc.runs.config import DatasetConfig, MethodConfig, TrainerConfig, TransformConfig
from fgvc.training import train_run

Copy = Callable[[str], Path]
CLASSES = ["001.Great_$x$_Auk", "=1+1", "Gänsegeier"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs on 3 x 4 training and 3 x 3 test images: `tuned`, whose backbone was trained, and `frozen`."""
    folder = tmp_path_factory.mktemp("home")
    write_coloured(folder / "data", CLASSES)
    for name in ("tuned", "frozen"):
        config = trainable(
            folder,
            name=name,
            run_dir=str(folder / name),
            dataset=DatasetConfig(name="folder", root=str(folder / "data"), transform=TransformConfig(size=64)),
            method=MethodConfig(name="seb", reduction=6),
            trainer=TrainerConfig(batch_size=6, workers=0, epochs=1),
        )
        config.backbone.frozen = name == "frozen"
        config.cache.dtype = "float32"  # maps as `predict` computes them
        train_run(config)
    return folder


@pytest.fixture
def copy(home: Path, tmp_path: Path) -> Copy:
    """A copy of a run to be written into."""
    return lambda name: Path(shutil.copytree(home / name, tmp_path / name))


@pytest.mark.parametrize("name", ["tuned", "frozen"])
def test_a_descriptor_is_what_the_classifier_reads(name: str, home: Path) -> None:
    predictor = fgvc.load_run(home / name)
    files = find_images(home / "data" / "test")[:6]
    descriptors = predictor.embed(files)
    assert descriptors.shape == (6, 6 * 7 // 2) and descriptors.dtype == torch.float32
    with torch.no_grad():
        logits = predictor.model.head.classifier(descriptors)
    torch.testing.assert_close(logits, torch.stack([found.logits for found in predictor.predict(files)]))
    with Image.open(files[0]) as image:
        sources = [files[0], str(files[0]), image, files[0].read_bytes(), np.asarray(image)]
        for source in sources:
            torch.testing.assert_close(predictor.embed(source), descriptors[0])
        torch.testing.assert_close(predictor.embed(np.asarray(image)[None]), descriptors[:1])
    assert predictor.embed([]).shape == (0, 21)
    with pytest.raises(ImageError, match=r"none\.png"):
        predictor.embed(home / "none.png")


def test_embed_writes_the_same_numbers_in_every_format(home: Path, here: Train, tmp_path: Path) -> None:
    images = home / "data" / "test"
    expected = fgvc.load_run(home / "frozen").embed(find_images(images)).numpy()
    for ending in ("parquet", "npz", "csv"):
        done = succeeded(here("embed.py", home / "frozen", images, "--output", f"x.{ending}", cwd=tmp_path))
        assert done.stdout == f"9 images, 21 numbers each\nwritten: x.{ending}\n"
    names = [str(path) for path in find_images(images)]
    for table in (pd.read_parquet(tmp_path / "x.parquet"), pd.read_csv(tmp_path / "x.csv")):
        assert list(table) == ["path", *(f"d{number}" for number in range(21))]
        assert table["path"].tolist() == names
        np.testing.assert_array_equal(table.iloc[:, 1:].to_numpy(np.float32), expected)
    with np.load(tmp_path / "x.npz") as archive:
        assert archive["paths"].tolist() == names and archive["descriptors"].dtype == np.float32
        np.testing.assert_array_equal(archive["descriptors"], expected)


def test_pca_is_scikit_learns_on_these_images(home: Path, here: Train, tmp_path: Path) -> None:
    images = home / "data" / "test"
    arguments = (home / "frozen", images, "--output", "x.npz", "--pca")
    done = succeeded(here("embed.py", *arguments, 3, cwd=tmp_path))
    assert "PCA fitted on these 9 images: 3 of 21 numbers, " in done.stdout and "9 images, 3 numbers" in done.stdout
    with np.load(tmp_path / "x.npz") as archive:
        found = archive["descriptors"]
    expected = PCA(3).fit_transform(fgvc.load_run(home / "frozen").embed(find_images(images)).double().numpy())
    np.testing.assert_allclose(abs(found), abs(expected), atol=1e-3 * abs(expected).max())
    before = (tmp_path / "x.npz").read_bytes()
    for size in (0, 9):
        refused(here("embed.py", *arguments, size, cwd=tmp_path), f"pca={size}", "from 1 to 8")
    one = next(images.rglob("*.png"))
    refused(here("embed.py", home / "frozen", one, "--output", "y.csv", "--pca", 1, cwd=tmp_path), "two or more images")
    assert (tmp_path / "x.npz").read_bytes() == before and not (tmp_path / "y.csv").exists()


def test_embed_leaves_out_what_is_no_image_and_keeps_files_of_others(home: Path, here: Train, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    shutil.copy(home / "data" / "test" / CLASSES[1] / "0.png", tmp_path / "photos" / "b.png")
    (tmp_path / "photos" / "a.png").write_text("no image")
    refused(here("embed.py", home / "frozen", "photos", "--output", "x.csv", cwd=tmp_path), "a.png", "1 of 2 images")
    assert pd.read_csv(tmp_path / "x.csv")["path"].tolist() == ["photos/b.png"]
    (tmp_path / "mine.parquet").write_text("mine")
    for name in ("mine.parquet", "x.txt"):
        refused(here("embed.py", home / "frozen", "photos", "--output", name, cwd=tmp_path), name)
    assert (tmp_path / "mine.parquet").read_text() == "mine"


@pytest.mark.parametrize("name", ["tuned", "frozen"])
def test_the_nearest_image_of_a_training_image_is_itself(name: str, copy: Copy, home: Path) -> None:
    index = load_neighbours(copy(name), cache=str(home / "cache"))
    predictor, files = fgvc.load_run(home / name), index.images.paths
    descriptors = predictor.embed(files)
    found = index.nearest(descriptors, 12)
    unit = torch.nn.functional.normalize(descriptors.double(), dim=1)
    distances = 1 - unit @ unit.T
    for query, row in enumerate(found):
        assert row[0].distance == pytest.approx(0, abs=1e-5)
        if name == "tuned":  # a random backbone sees hardly a difference
            assert row[0].index == query
        assert [near.distance for near in row] == pytest.approx(
            [float(distances[query, n.index]) for n in row], abs=1e-5
        )
        assert [near.distance for near in row] == pytest.approx(distances[query].sort().values.tolist(), abs=1e-5)
        assert [near.name for near in row] == [files[near.index].parent.name for near in row]


def test_neighbours_prints_distances_and_draws_a_sheet(copy: Copy, home: Path, here: Train, tmp_path: Path) -> None:
    run, image = copy("tuned"), home / "data" / "train" / CLASSES[0] / "2.png"
    done = succeeded(here("neighbours.py", run, image, "-k", 3, cwd=tmp_path))
    lines = done.stdout.splitlines()
    name = class_name(CLASSES[0])
    assert lines[0] == str(image) and " ".join(lines[1].split()) == f"0.0000 {name} train/{CLASSES[0]}/2.png"
    sheet = run / "neighbours" / "2.png"
    assert lines[4] == f"written: {sheet}"
    with Image.open(sheet) as pixels:
        assert pixels.width > 4 * 200
    refused(here("neighbours.py", run, image, "-k", 13, cwd=tmp_path), "k=13", "12 training images")
    sheet.write_text("mine")
    refused(here("neighbours.py", run, image, cwd=tmp_path), str(sheet))
    (tmp_path / "bad.png").write_text("no image")
    done = here("neighbours.py", run, tmp_path / "bad.png", image, "--no-sheets", cwd=tmp_path)
    refused(done, "bad.png", "1 of 2 images")
    assert done.stdout.count("\n") == 6


def test_neighbours_needs_the_dataset(copy: Copy, home: Path, here: Train, tmp_path: Path) -> None:
    run, image = copy("frozen"), home / "data" / "train" / CLASSES[0] / "2.png"
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(home / "data"), str(tmp_path / "gone")))
    refused(here("neighbours.py", run, image, cwd=tmp_path), str(tmp_path / "gone"))
    succeeded(here("neighbours.py", run, image, "--root", home / "data", "--sheets", "sheets", cwd=tmp_path))
    assert (tmp_path / "sheets" / "2.png").is_file() and not (run / "neighbours").exists()


def test_kept_descriptors_count_only_for_the_same_weights_and_images(copy: Copy, home: Path, tmp_path: Path) -> None:
    run = copy("tuned")
    data = Path(shutil.copytree(home / "data", tmp_path / "data"))
    root = str(data)
    load_neighbours(run, root=root)
    file = run / "neighbours" / "descriptors-last.npz"

    def forge() -> None:
        """Replace the kept descriptors, so that their use shows."""
        with np.load(file) as archive:
            np.savez(file, key=archive["key"], descriptors=np.eye(12, 21, dtype=np.float32))

    def is_used() -> bool:
        return load_neighbours(run, root=root).nearest(torch.eye(12, 21), 1)[5][0].distance < 1e-6

    forge()
    assert is_used()
    image = data / "train" / CLASSES[0] / "0.png"
    os.utime(image, ns=(1, 1))
    assert not is_used()
    file.unlink()
    load_neighbours(run, root=root)
    forge()
    weights = run / "checkpoints" / "last.safetensors"
    tensors = load_file(weights)
    tensors["head.reduction.0.weight"] += 0.01
    save_file(tensors, weights)
    assert not is_used()
    forge()
    file.write_bytes(file.read_bytes()[:200])
    assert not is_used()


@pytest.mark.parametrize("name", ["tuned", "frozen"])
def test_evaluate_adds_retrieval_on_request(name: str, home: Path, here: Train, tmp_path: Path) -> None:
    done = succeeded(here("evaluate.py", home / name, "--output", "plain", cwd=tmp_path))
    assert "retrieval" not in done.stdout
    done = succeeded(here("evaluate.py", home / name, "--retrieval", "--output", "out", cwd=tmp_path))
    plain, record = (json.loads((tmp_path / at / "evaluation-last.json").read_text()) for at in ("plain", "out"))
    assert record.keys() - plain.keys() == {"retrieval"} and record["top1"] == plain["top1"]
    files = find_images(home / "data" / "test")
    descriptors = fgvc.load_run(home / name).embed(files)
    expected = measure_retrieval(descriptors, torch.tensor([CLASSES.index(file.parent.name) for file in files]))
    assert record["retrieval"] == expected.as_dict() and f"retrieval: {expected.text}" in done.stdout
    options = ("--retrieval", "--views", "mirror", "--output", "views")
    refused(here("evaluate.py", home / name, *options, cwd=tmp_path), "views=single, not mirror")
