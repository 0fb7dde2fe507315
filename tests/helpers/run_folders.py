"""Fabricated run folders, as the training writes them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fgvc.runs.summary import Run, readable_runs

LABELS = {"gap": "GAP", "bilinear": "B-CNN", "isqrt_cov": "iSQRT-COV", "mpn_cov": "MPN-COV", "seb": "SEB"}
LABELS |= {"svd_pade": "SVD-Padé", "svd_topn": "SVD-TopN"}


def find_runs(paths: Iterable[Path]) -> list[Run]:
    """All runs in some folders, each of which can be read."""
    runs, notes = readable_runs(paths)
    assert not notes
    return runs


def accuracy(top1: float, epoch: int = 15) -> dict[str, Any]:
    """Accuracies that differ from each other, so that a mix-up shows."""
    return {"top1": top1, "top5": min(top1 + 7, 100), "mean_class": top1 - 0.5, "epoch": epoch}


def write_run(
    path: Path, method: str = "seb", *, top1: float = 91.0, best: float | None = None, **changes: Any
) -> Path:
    """Write a run folder without a spectrum; `changes` replace fields of the summary, `selected_on` that of `best`."""
    selected_on = changes.pop("selected_on", "test")
    gradient = changes.get("gradient")
    label = LABELS[method] + (f" ({gradient})" if gradient else "")
    summary: dict[str, Any] = {"name": "cub80_frozen", "method": method, "gradient": None, "label": label}
    summary |= {"dataset": "cub80", "num_classes": 80, "train_images": 2317, "test_images": None, "image_size": 224}
    summary |= {"backbone": "tf_efficientnet_lite0", "frozen": True, "reduction": None if method == "gap" else 64}
    summary |= {"out_features": 2080, "seed": 0, "epochs": 15, "status": "finished", "reason": None}
    summary |= {"final": accuracy(top1), "best": accuracy(top1 + 0.3 if best is None else best, 12)}
    summary["best"]["selected_on"] = selected_on
    summary |= {"seconds": {"features": 80.1, "train": 20.0, "eval": 6.0, "total": 110.0}, "peak_memory_mb": 1200.0}
    summary |= {"versions": {}, "commit": "0123abc", "command": "train.py"}
    path.mkdir(parents=True)
    (path / "summary.json").write_text(json.dumps(summary | changes), encoding="utf-8")
    return path


def change_summary(path: Path, **changes: Any) -> Path:
    """Replace fields of the summary of a run folder."""
    file = path / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    return path


def write_config(path: Path, **config: Any) -> None:
    """Write config.yaml of a run folder (JSON is YAML)."""
    (path / "config.yaml").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")


def write_spectrum(path: Path, *, images: int = 40, channels: int = 64, locations: int = 49, seed: int = 0) -> None:
    """Write spectrum.npz of a run folder: covariances of correlated ReLU features and, but for GAP, their root."""
    method = json.loads((path / "summary.json").read_text())["method"]
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(channels, channels)) * np.arange(1, channels + 1) ** -0.7
    scale = rng.lognormal(0, 0.4, size=(images, 1, 1))
    features = np.maximum(scale * (mixing @ rng.normal(size=(images, channels, locations))), 0).astype(np.float32)
    centred = features.astype(np.float64) - features.mean(axis=2, keepdims=True, dtype=np.float64)
    before = np.linalg.eigvalsh(centred @ centred.transpose(0, 2, 1) / locations)[:, ::-1]
    arrays = {"before": before}
    if method not in ("gap", "bilinear"):
        root = np.sqrt(np.maximum(before, 2.2e-16))
        factor = 1 + np.sqrt((before * np.exp(-2 * before)).sum(axis=1, keepdims=True)) if method == "seb" else 1
        arrays["after"] = factor * root
    np.savez(path / "spectrum.npz", **arrays)


def write_metrics(path: Path, *, epochs: int = 4, level: float = 80.0) -> None:
    """Write metrics.csv of a run folder: top-1 rises to `level`, the losses fall."""
    lines = ["epoch,lr,train_loss,train_top1,test_loss,test_top1"]
    for epoch in range(1, epochs + 1):
        lines.append(f"{epoch},0.001,{2 / epoch},{level * (1 - 0.5 / epoch)},{3 / epoch},{level - 20 / epoch}")
    (path / "metrics.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_history(path: Path, *, epochs: int = 3, images: int = 8, channels: int = 6) -> None:
    """Write spectrum_history.npz of a run folder: the largest eigenvalue grows with the epoch."""
    rows = np.sort(np.random.default_rng(0).uniform(0.1, 1, size=(images, channels)))[:, ::-1]
    before = np.stack([rows * (1 + epoch * (np.arange(channels) == 0)) for epoch in range(epochs)])
    np.savez(path / "spectrum_history.npz", epochs=np.arange(epochs), before=before, after=before**0.5)


def write_predictions(path: Path, classes: list[str], *, images: int = 6, seed: int = 0) -> None:
    """Write predictions.csv of a run folder, `images` a class, some of them wrong, and the names to its summary."""
    rng = np.random.default_rng(seed)
    target = np.repeat(np.arange(len(classes)), images)
    predicted = np.where(rng.random(len(target)) < 0.3, rng.integers(0, len(classes), len(target)), target)
    lines = [f"{i}.jpg,{t},{p},0.9" for i, (t, p) in enumerate(zip(target, predicted, strict=True))]
    (path / "predictions.csv").write_text("\n".join(["path,target,predicted,confidence", *lines]) + "\n")
    change_summary(path, classes=classes)


def write_attribution(path: Path, *, items: int = 2, **changes: Any) -> None:
    """Write attribution/ of a run folder: maps of one colour and a grid; `changes` replace fields of each item."""
    from PIL import Image

    folder = path / "attribution"
    (folder / "maps").mkdir(parents=True)
    Image.new("RGB", (64, 48), "orange").save(folder / "grid_gradcam.png")
    record: dict[str, Any] = {"schema": 1, "run": path.name, "versions": {}, "items": [], "grids": ["grid_gradcam.png"]}
    for number in range(items):
        Image.new("RGB", (32, 32), (10 * number % 255, 80, 80)).save(folder / "maps" / f"{number}.png")
        item = {"image": f"images/{number // 2}.jpg", "class": "wren", "predicted": "robin", "explained": "robin"}
        item |= {"method": "gradcam", "band": "top16", "score": 1.5, "file": f"maps/{number}.png"}
        record["items"].append(item | changes)
    (folder / "attribution.json").write_text(json.dumps(record), encoding="utf-8")
