"""Fabricated run folders, as the training writes them."""

import json
from pathlib import Path
from typing import Any

import numpy as np

LABELS = {
    "gap": "GAP",
    "bilinear": "B-CNN",
    "isqrt_cov": "iSQRT-COV",
    "mpn_cov": "MPN-COV",
    "svd_pade": "SVD-Padé",
    "svd_topn": "SVD-TopN",
    "seb": "SEB",
}


def accuracy(top1: float, epoch: int = 15) -> dict[str, Any]:
    """Accuracies that differ from each other, so that a mix-up shows."""
    return {"top1": top1, "top5": min(top1 + 7, 100), "mean_class": top1 - 0.5, "epoch": epoch}


def write_run(
    path: Path, method: str = "seb", *, top1: float = 91.0, best: float | None = None, **changes: Any
) -> Path:
    """Write a run folder without a spectrum; `changes` replace fields of the summary, `selected_on` that of `best`."""
    selected_on = changes.pop("selected_on", "test")
    gradient = changes.get("gradient")
    summary: dict[str, Any] = {
        "name": "cub80_frozen",
        "method": method,
        "gradient": None,
        "label": LABELS[method] + (f" ({gradient})" if gradient else ""),
        "dataset": "cub80",
        "backbone": "tf_efficientnet_lite0",
        "frozen": True,
        "reduction": None if method == "gap" else 64,
        "image_size": 224,
        "seed": 0,
        "epochs": 15,
        "num_classes": 80,
        "train_images": 2317,
        "test_images": 2400,
        "out_features": 2080,
        "final": accuracy(top1),
        "best": accuracy(top1 + 0.3 if best is None else best, 12) | {"selected_on": selected_on},
        "seconds": {"features": 80.1, "train": 20.0, "eval": 6.0, "total": 110.0},
        "peak_memory_mb": 1200.0,
        "status": "finished",
        "reason": None,
        "versions": {},
        "commit": "0123abc",
        "command": "train.py",
    }
    path.mkdir(parents=True)
    (path / "summary.json").write_text(json.dumps(summary | changes), encoding="utf-8")
    return path


def write_config(path: Path, **config: Any) -> None:
    """Write config.yaml of a run folder (JSON is YAML)."""
    (path / "config.yaml").write_text(json.dumps(config), encoding="utf-8")


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
