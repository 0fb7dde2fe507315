"""`fgvc attribute`: the files it writes, the images it takes, what it refuses; and the pictures."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import SMALL, Train, refused, succeeded
from PIL import Image

from fgvc.errors import ConfigError
from fgvc.inference.restore import restore_run
from fgvc.studies.attribution import explain
from fgvc.studies.attribution.explain import spread
from fgvc.studies.attribution.report import band_columns, colour_limit, difference, grid_figure, overlay


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory, train_here: Train, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a trained run of SEB in `seb` on images of 96 pixels: 3 x 3 locations; trained once."""
    folder = tmp_path_factory.getbasetemp() / "attribution"
    if not folder.exists():
        folder.mkdir()
        succeeded(train_here(folder, "dataset.transform.size=96", "trainer.epochs=1", "run_dir=seb"))
    monkeypatch.chdir(folder)  # the run names its dataset relative to it
    return folder


def test_files_of_a_run(home: Path, here: Train) -> None:
    options = [
        "--images",
        "3",
        "--bands",
        "top1,1:3",
        "--method",
        "hirescam",
        "--eigenvectors",
        "2",
        "--batch-size",
        "2",
    ]
    done = succeeded(here("attribute.py", "seb", *options, cwd=home))
    assert "hirescam: " in done.stdout and " s per image, 2 bands" in done.stdout
    folder = home / "seb" / "attribution"
    record = json.loads((folder / "attribution.json").read_text(encoding="utf-8"))
    assert record["schema"] == 1 and record["run"] == "seb" and record["bands"] == {"top1": [0, 1], "1:3": [1, 3]}
    assert set(record["versions"]) > {"torch", "timm"} and set(record["seconds"]) == {"hirescam"}
    grids = ["grid_hirescam.png", "eigenvectors_largest.png", "eigenvectors_smallest.png"]
    assert record["grids"] == grids and all((folder / grid).is_file() for grid in grids)
    assert len(record["items"]) == 3 * 2
    restored = restore_run(home / "seb")
    paths = restored.images.relative_paths()
    with np.load(folder / "maps.npz") as arrays:
        maps = arrays["hirescam.1:3"]
        assert arrays["largest.maps"].shape == (3, 2, 3, 3)
        assert (arrays["largest.places"] == [0, 1]).all() and (arrays["smallest.places"] >= 2).all()
        assert (arrays["largest.eigenvalues"][:, -1] >= arrays["smallest.eigenvalues"][:, 0]).all()
    chosen = list(dict.fromkeys(item["image"] for item in record["items"]))
    of_band = [item for item in record["items"] if item["method"] == "hirescam" and item["band"] == "1:3"]
    for i, (name, item) in enumerate(zip(chosen, of_band, strict=True)):
        image, target = restored.images[paths.index(name)]
        found = explain(restored.model, image[None], method="hirescam", band=(1, 3))
        torch.testing.assert_close(torch.from_numpy(maps[i : i + 1]), found.maps, rtol=1e-3, atol=1e-5)
        names = [restored.images.classes[int(index)] for index in (target, found.predicted, found.classes)]
        assert [item["class"], item["predicted"], item["explained"]] == names
        assert item["score"] == pytest.approx(float(found.scores), abs=1e-4)
        with Image.open(folder / item["file"]) as picture:
            assert picture.size == (96, 96) and picture.mode == "RGB"


def test_files_of_the_users_own_and_of_the_test_split(home: Path, here: Train) -> None:
    images = home / "mine"
    images.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(images / "a.png")
    test = restore_run(home / "seb").images
    (images / "b.png").symlink_to((home / test.paths[2]).resolve())
    options = ["--images", "mine", "--classes", test.classes[1], "--output", "out"]
    succeeded(here("attribute.py", "seb", *options, cwd=home))
    items = json.loads((home / "out" / "attribution.json").read_text(encoding="utf-8"))["items"]
    assert [item["image"] for item in items] == [str(Path("mine", "a.png")), test.relative_paths()[2]]
    assert [item["class"] for item in items] == [None, test.classes[test.targets[2]]]
    assert {item["explained"] for item in items} == {test.classes[1]}
    assert not (home / "seb" / "attribution" / "maps" / "000_gradcam_all.png").exists()
    refused(here("attribute.py", "seb", "--images", "mine", "--classes", "true", cwd=home), "a.png is not known")


def test_a_class_with_a_comma_in_its_name_can_be_explained(tmp_path: Path, here: Train) -> None:
    classes = ["Tinca tinca", "bream", "tench", "tench, Tinca tinca"]
    for number, name in enumerate(classes):
        for split in ("train", "test"):
            path = tmp_path / "data" / split / name / "0.png"
            path.parent.mkdir(parents=True)
            Image.new("RGB", (64, 64), (60 * number, 0, 0)).save(path)
    small = [setting for setting in SMALL if "dataset=" not in setting and "options" not in setting]
    data = ["dataset=folder", f"dataset.root={tmp_path / 'data'}", "dataset.name=own", "trainer.max_steps=1"]
    assert here("train.py", *small, *data, "run_dir=run", cwd=tmp_path).returncode == 0
    for text, expected in {
        "tench, Tinca tinca": ["tench, Tinca tinca"] * 4,
        "bream,tench, Tinca tinca,tench,Tinca tinca": ["bream", "tench, Tinca tinca", "tench", "Tinca tinca"],
    }.items():
        done = here("attribute.py", "run", "--images", "4", "--classes", text, "--output", "out", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        items = json.loads((tmp_path / "out" / "attribution.json").read_text(encoding="utf-8"))["items"]
        assert [item["explained"] for item in items] == expected
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["seb", "--method", "gradcan"], ["gradcan", "choose from gradcam"]),
        (["seb", "--bands", "top99"], ["'top99' asks for 99"]),
        (["seb", "--images", "0"], ["images=0", "the test split has 9"]),
        (["seb", "--images", "nowhere.jpg"], ["nowhere.jpg", "no such file"]),
        (["seb", "--images", "seb/config.yaml"], ["config.yaml", "cannot be read"]),
        (["seb", "--classes", "auk"], ["'auk'", "the run has 3"]),
        (["seb", "--batch-size", "0"], ["batch_size must be at least 1"]),
        (["seb", "--eigenvectors", "9"], ["between 1 and 8"]),
        (["seb", "--checkpoint", "best", "--root", "seb"], ["seb"]),
        (["nothing"], ["nothing"]),
    ],
)
def test_refused(home: Path, here: Train, arguments: list[str], parts: list[str]) -> None:
    refused(here("attribute.py", *arguments, "--output", "none", cwd=home), *parts)
    assert not (home / "none").exists()


def test_a_run_without_a_spectrum_has_no_bands(tmp_path: Path, train_here: Train, here: Train) -> None:
    assert train_here(tmp_path, "method=gap", "run_dir=gap", "trainer.epochs=1").returncode == 0
    refused(here("attribute.py", "gap", "--bands", "top1", cwd=tmp_path), "normalises no covariance", "mpn_cov")
    succeeded(here("attribute.py", "gap", "--images", "3", "--classes", "true", cwd=tmp_path))
    assert (tmp_path / "gap" / "attribution" / "grid_gradcam.png").is_file()


def test_images_are_spread_over_the_classes() -> None:
    targets = [0] * 5 + [1] * 5 + [2] * 5 + [3] * 2
    for count in (1, 3, 4, 9, 17):
        chosen = spread(targets, count, seed=0)
        assert len(set(chosen)) == count and chosen == sorted(chosen)
        of_class = np.bincount([targets[i] for i in chosen], minlength=4)
        assert of_class[:3].max() - of_class[:3].min() <= 1
    assert spread(targets, 4, seed=0) == spread(targets, 4, seed=0) != spread(targets, 4, seed=1)
    assert len({targets[i] for i in spread(targets, 4, seed=3)}) == 4
    with pytest.raises(ConfigError, match="images=18"):
        spread(targets, 18, seed=0)
    with pytest.raises(ConfigError, match="seed must be at least 0, got -1"):
        spread(targets, 4, seed=-1)


def test_overlays_show_where_a_map_is_strong() -> None:
    image = np.full((8, 8, 3), [0.2, 0.4, 0.6])
    heat = np.zeros((8, 8))
    grey = overlay(image, heat)
    assert grey.dtype == np.uint8 and (grey == 102).all()
    heat[2, 3], heat[5, 6] = 3, -3
    signed, unsigned = overlay(image, heat, signed=True), overlay(image, heat)
    assert signed[2, 3, 0] > signed[2, 3, 2] + 100 and signed[5, 6, 2] > signed[5, 6, 0] + 100  # red, blue
    assert (unsigned[5, 6] == 102).all() and (unsigned[2, 3] != 102).any()
    assert np.array_equal(overlay(image, 100 * heat, signed=True), signed)


def test_a_few_outliers_do_not_hide_a_map() -> None:
    heat = np.ones((100, 100))
    heat[0, 0] = 1000
    assert colour_limit(heat) == 1
    sparse = np.zeros((100, 100))
    sparse[0, 0] = 2
    assert colour_limit(sparse) == 2 and colour_limit(0 * sparse) == 0


def test_the_difference_is_of_the_first_two_bands_on_their_own_scales() -> None:
    first, second = np.array([[4.0, 0], [0, 0]]), np.array([[0, 0.02], [0, 0]])
    found = difference(first, second)
    assert found[0, 0] > 0.9 and found[0, 1] < -0.9 and (found[1] == 0).all()
    pictures, maps = np.full((1, 2, 2, 3), 0.5), np.stack([first, second, first])[:, None]
    columns = band_columns(pictures, maps, ["a", "b", "c"], np.array([[1.0], [2.0], [3.0]]), signed=False)
    assert [column.title for column in columns] == ["image", "a", "b", "c", "a − b"]
    assert columns[-1].pixels[0][0, 0, 0] > columns[-1].pixels[0][0, 0, 2]  # red where the first has more
    assert columns[2].notes == ["score 2.00"]
    figure = grid_figure(columns, ["true: $a_bird$"], "title", "caption")
    figure.canvas.draw()
    assert len(figure.axes) == 6
