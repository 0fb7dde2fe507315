"""HBP and MGCrP, which project the features themselves: values, number by number; training on several maps."""

from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import trainable
from PIL import Image
from torch import Tensor

import fgvc
from fgvc.errors import ConfigError
from fgvc.inference.evaluate import evaluate_run
from fgvc.inference.export import export_run
from fgvc.models import create_model, load_checkpoint
from fgvc.pooling import CrossCovariancePooling, HierarchicalBilinearPooling, create_pooling
from fgvc.runs.config import BackboneConfig, MethodConfig
from fgvc.runs.folder import RunFolder
from fgvc.training.run import train_run


def features(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def projected(x: np.ndarray, weights: dict[str, Tensor], layer: int) -> np.ndarray:
    weight, bias = (weights[f"projections.{layer}.{part}"].double().numpy() for part in ("weight", "bias"))
    found: np.ndarray = np.einsum("wc,bcm->bwm", weight[..., 0], x) + bias[:, None]
    return found


def rooted(product: np.ndarray) -> np.ndarray:
    root = np.sign(product) * np.sqrt(np.abs(product) + 1e-8)
    normalised: np.ndarray = root / np.linalg.norm(root, axis=1, keepdims=True)
    return normalised


def test_hbp_multiplies_each_pair_of_maps() -> None:
    pool, x = HierarchicalBilinearPooling(9, map_channels=[2, 3, 4], width=5), features(2, 9, 3, 4)
    flat, weights = x.flatten(2).numpy(), pool.state_dict()
    maps = [projected(part, weights, i) for i, part in enumerate(np.split(flat, [2, 5], axis=1))]
    pairs = [rooted((maps[i] * maps[j]).mean(axis=2)) for i, j in ((0, 1), (0, 2), (1, 2))]
    torch.testing.assert_close(pool(x), torch.from_numpy(np.concatenate(pairs, axis=1)))


def test_hbp_of_one_map_multiplies_two_projections_of_it() -> None:
    pool, x = HierarchicalBilinearPooling(4, width=5), features(2, 4, 3, 3)
    left, right = (projected(x.flatten(2).numpy(), pool.state_dict(), layer) for layer in (0, 1))
    torch.testing.assert_close(pool(x), torch.from_numpy(rooted((left * right).mean(axis=2))))


def test_mgcrp_takes_the_root_of_the_largest_singular_value() -> None:
    pool = CrossCovariancePooling(6, heads=2, width=4, iterations=200)
    x = features(3, 6, 5, 5)
    weight = pool.projection.weight.detach().double().numpy()[..., 0]
    found = np.einsum("wc,bcm->bwm", weight, x.flatten(2).numpy())
    found = (found - found.mean(axis=2, keepdims=True)).reshape(3, 2, 2, 4, 25)  # image, side, head, channel, location
    descriptors = []
    for image in found:
        for left, right in zip(image[0], image[1], strict=True):
            u, s, vt = np.linalg.svd(left @ right.T / 25)
            largest = np.outer(u[:, 0], vt[0])
            rest = left @ right.T / 25 - s[0] * largest
            descriptors.append(np.sqrt(s[0]) * largest + rest / (np.sqrt(s[0]) + 1e-5))
    torch.testing.assert_close(pool(x), torch.from_numpy(np.stack(descriptors).reshape(3, -1)))


def test_mgcrp_starts_its_one_iteration_from_what_it_learns() -> None:
    pool, x = CrossCovariancePooling(6, heads=1, width=4), features(2, 6, 5, 5)
    pool(x).square().sum().backward()
    assert pool.start.grad is not None and pool.start.grad.abs().max() > 0
    cross = torch.einsum("bim,bjm->bij", *self_projected(pool, x)) / 25
    u = torch.nn.functional.normalize(cross @ pool.start.double(), dim=1)
    v = torch.nn.functional.normalize(torch.einsum("bij,bi->bj", cross, u), dim=1)
    value = torch.einsum("bi,bij,bj->b", u, cross, v)[:, None, None]
    largest = u[:, :, None] * v[:, None]
    expected = value.sqrt() * largest + (cross - value * largest) / (value.sqrt() + 1e-5)
    torch.testing.assert_close(pool(x), expected.flatten(1))


def self_projected(pool: CrossCovariancePooling, x: Tensor) -> list[Tensor]:
    found = torch.einsum("wc,bcm->bwm", pool.projection.weight[..., 0].double(), x.flatten(2))
    found = found - found.mean(dim=2, keepdim=True)
    return [found[:, :4], found[:, 4:]]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "hbp", "map_channels": [2, 3]}, r"map_channels \[2, 3\] sum up to 5, but the input has 6"),
        ({"name": "hbp", "width": 0}, "width must be a whole number"),
        ({"name": "hbp", "width": 2**30, "map_channels": [2, 2, 2]}, "out_features must be below"),
        ({"name": "mgcrp", "heads": 0}, "heads must be a whole number"),
        ({"name": "mgcrp", "width": 2.5}, "width must be a whole number"),
        ({"name": "mgcrp", "iterations": 0}, "iterations must be a whole number"),
        ({"name": "mgcrp", "alpha": 0}, "alpha must be above 0"),
        ({"name": "mgcrp", "gradient": "exact"}, "no choice of gradient"),
    ],
)
def test_impossible_options_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        create_pooling(channels=6, **settings)  # type: ignore[arg-type]


def test_a_run_on_three_maps_predicts_and_exports(tmp_path: Path) -> None:
    method = MethodConfig("hbp", options={"width": 8})
    config = trainable(tmp_path, method=method, backbone=BackboneConfig("test_resnet", frozen=True, maps=3))
    config.trainer.epochs = 2
    path = train_run(config)
    summary = RunFolder(path).read_summary()
    assert summary["label"] == "HBP [width=8]" and summary["reduction"] is None and summary["out_features"] == 24
    assert evaluate_run(path).accuracy.top1 == summary["final"]["top1"]
    predictor = fgvc.load_run(path)
    picture = Image.new("RGB", (64, 64), (200, 30, 30))
    logits = predictor.predict(picture, top=3).logits
    folder = export_run(path, to="safetensors")
    assert "maps of its last 3 layers" in (folder / "README.md").read_text()
    model = create_model("test_resnet", method="hbp", num_classes=3, image_size=64, maps=3, width=8).eval()
    load_checkpoint(model, folder / "model.safetensors")
    torch.testing.assert_close(model(predictor.prepare(picture)[None])[0], logits, rtol=1e-4, atol=1e-4)
