"""Coarser labels in the loss, and how far in their tree mistakes are."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import SMALL, Train, refused, succeeded
from forked_runs import train_until
from PIL import Image

from fgvc.data import ImageDataset
from fgvc.data.dataset import Samples
from fgvc.errors import ConfigError
from fgvc.runs.config import TrainerConfig
from fgvc.runs.statistics import tree_distance
from fgvc.training.learner import create_objective, soft_labels

pytestmark = pytest.mark.usefixtures("uncalibrated")

TREE = {"family": ["f", "f", "g", "h"], "order": ["o", "o", "o", "p"]}
DISTANCES = [[0, 1, 2, 3], [1, 0, 2, 3], [2, 2, 0, 3], [3, 3, 3, 0]]


def test_the_distance_is_the_height_of_the_node_above_both() -> None:
    classes = np.arange(4)
    assert tree_distance(classes[:, None], classes, TREE).tolist() == DISTANCES
    unknown = tree_distance(classes, classes[::-1], TREE | {"order": ["o", "o", "o", ""]})
    assert np.isnan(unknown[[0, 3]]).all() and unknown[1:3].tolist() == [2, 2]


@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
@pytest.mark.parametrize("mixup", [0.0, 1.0])
def test_the_loss_asks_for_classes_near_in_the_tree(loss: str, mixup: float) -> None:
    """It is lowest where the probabilities are those of the formula, written out here."""
    powers = [[math.exp(-5 * d / 3) for d in row] for row in DISTANCES]
    expected = torch.tensor([[p / sum(row) for p in row] for row in powers])
    assert torch.allclose(soft_labels(TREE, 5.0), expected, atol=1e-7)
    images = ImageDataset(Samples(list("abcd"), [Path("x.png")] * 4, [0, 1, 2, 3], coarse=TREE), Path())
    objective = create_objective(TrainerConfig(hierarchy=5.0, loss=loss, mixup=mixup), images, torch.device("cpu"))
    _, targets = objective.mix(torch.zeros(4, 1, 1, 1), torch.arange(4))
    shares = torch.eye(4)[targets] if targets.ndim == 1 else targets
    best = shares @ expected
    logits = (best.log() if loss == "cross_entropy" else best.logit()).requires_grad_()
    objective.mean(logits, targets).backward()
    assert logits.grad is not None and logits.grad.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("coarse", "message"), [({}, "add coarse.csv"), ({"family": ["f", "", ""]}, "2 of 3 classes .* 'family'")]
)
def test_a_tree_that_does_not_cover_the_classes_is_refused(coarse: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        soft_labels(coarse, 4.0)


def test_the_command_trains_with_a_tree_and_reports_the_distance(tmp_path: Path, here: Train) -> None:
    for number, name in enumerate("abcd"):
        for split, count in (("train", 3), ("test", 2)):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (64, 64), (60 * number, 10 * i, 0)).save(tmp_path / "data" / split / name / f"{i}.png")
    small = [word for word in SMALL if not word.lstrip("+").startswith(("dataset=", "dataset.options"))]
    own = ["train.py", *small, "dataset=folder", "dataset.root=data", "run_dir=run", "trainer.epochs=1"]
    frozen = ["backbone.frozen=true", "cache.dir=cache", "trainer.hierarchy=4"]
    refused(here(*own, *frozen, cwd=tmp_path), "coarse.csv")
    assert not list((tmp_path / "cache").glob("*.npy"))  # before maps are computed
    (tmp_path / "data" / "coarse.csv").write_text("class,family,order\na,f,o\nb,f,o\nc,g,o\nd,h,p\n")
    refused(here(*own, "trainer.hierarchy=4", "trainer.label_smoothing=0.1", cwd=tmp_path), "label_smoothing=0, got")
    succeeded(here(*own, "trainer.hierarchy=4", cwd=tmp_path))
    done = succeeded(here("evaluate.py", "run", cwd=tmp_path))
    distance = json.loads((tmp_path / "run" / "evaluation-last.json").read_text())["tree_distance"]
    lines = (tmp_path / "run" / "predictions.csv").read_text().splitlines()[1:]
    pairs = [tuple(int(cell) for cell in line.split(",")[1:3]) for line in lines]
    mistakes = [DISTANCES[target][predicted] for target, predicted in pairs if target != predicted]
    assert distance == pytest.approx(np.mean(mistakes), abs=1e-3)

    # another tree is another run, finished or stopped
    stopped = [*own[1:], "run_dir=stopped", "trainer.save_steps=1"]
    assert train_until(tmp_path, [*stopped, "trainer.hierarchy=4"], ("evaluation", 1), base=[]) < 0
    (tmp_path / "data" / "coarse.csv").write_text("class,family,order\na,f,o\nb,g,o\nc,g,o\nd,h,p\n")
    refused(here(*own, "trainer.hierarchy=4", cwd=tmp_path), "is finished, on other coarser labels")
    refused(here("train.py", *stopped, "trainer.hierarchy=4", cwd=tmp_path), "began with other coarser labels than")
    (tmp_path / "data" / "coarse.csv").unlink()
    assert f"mean tree distance of the mistakes {distance:.2f} (1 to 3)" in done.stdout
