"""Calibration of a run: a temperature T, fitted on images it was not trained on and saved in RUN/calibration.json.

Probabilities are softmax(logits / T). T > 0 does not change the order of the classes, so no accuracy changes.
[Guo, Pleiss, Sun, Weinberger, On Calibration of Modern Neural Networks, ICML 2017]

Shapes: N images, K classes.
"""

import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator, PartialState
from scipy.optimize import brentq
from torch import Tensor, nn

from fgvc.errors import RunError, UserError
from fgvc.foreign import read_json_object
from fgvc.inference.restore import restore_run
from fgvc.io import locked, sha256, write_json_atomic
from fgvc.provenance import source_state, versions
from fgvc.runs.folder import RunFolder
from fgvc.runs.summary import read_run
from fgvc.training.batches import Loader, create_loader, progress_bar
from fgvc.training.environment import create_accelerator
from fgvc.training.setup import open_validation

BINS = 15
"""Number of bins of equal width, as in Guo et al."""
FOLDS = 5
TEMPERATURES = (0.05, 20.0)
"""Search range of T; if the optimum is outside, the images determine no temperature."""


@dataclass(frozen=True)
class ProbabilityMeasures:
    """How well probabilities agree with the true classes.

    Attributes:
        calibration_error: Expected calibration error of the predicted class in per cent, over `BINS` bins.
        loss: Mean cross-entropy (negative log-likelihood of the true class), in nats.
        brier: Mean over images of the squared distance between probabilities and truth, 0 to 2.
    """

    calibration_error: float
    loss: float
    brier: float


def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """Return the temperature with the least cross-entropy, computed in float64.

    The cross-entropy is convex in 1/T, so the zero of its derivative is the minimum. If it still falls at an end of
    `TEMPERATURES`, that end is returned, see `is_determined`. There is no minimum if every image is right (each lower
    temperature is better) or if the logits carry no information (each higher one is better).

    Args:
        logits: (N, K) for images that the model was not trained on.
        targets: (N,) class indices.

    Raises:
        ValueError: no image, or logits that are not finite.
    """
    if len(targets) == 0 or not torch.isfinite(logits).all():
        raise ValueError("a temperature needs finite logits of at least one image")
    true = logits.gather(1, targets[:, None])[:, 0].double()  # (N, K) -> (N,)

    def slope(log_temperature: float) -> float:
        """Return the derivative of the cross-entropy by 1/T: the mean over images of E[z] - z_true; it falls with T."""
        parts = (part.double() for part in torch.split(logits, _rows(logits)))
        expected = [((z / np.exp(log_temperature)).softmax(dim=1) * z).sum(dim=1) for z in parts]
        return float((torch.cat(expected) - true).mean())

    low, high = np.log(TEMPERATURES)
    if slope(low) <= 0:
        return TEMPERATURES[0]
    if slope(high) >= 0:
        return TEMPERATURES[1]
    return float(np.exp(brentq(slope, low, high, xtol=1e-10)))


def is_determined(temperature: float) -> bool:
    """Return whether the best temperature lies within `TEMPERATURES`."""
    return TEMPERATURES[0] < temperature < TEMPERATURES[1]


def cross_fitted(logits: Tensor, targets: Tensor) -> Tensor:
    """Return for each image a temperature that was fitted without it: (N, K), (N,) -> (N,) float64.

    The images are split at random into `FOLDS` parts (N parts if N is smaller). Each part gets the temperature fitted
    on the other parts. Measures at these temperatures estimate those on new images of the same kind.

    Raises ValueError: fewer than two images, or as in `fit_temperature`.
    """
    if len(targets) < 2:
        raise ValueError("cross-fitting needs two images")
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    temperatures = torch.empty(len(targets), dtype=torch.float64)
    for part in order.tensor_split(min(FOLDS, len(targets))):
        others = torch.ones(len(targets), dtype=torch.bool)
        others[part] = False
        temperatures[part] = fit_temperature(logits[others], targets[others])
    return temperatures


def probabilities(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Return softmax(logits / T) in float64: (N, K) -> (N, K); `temperature` is one number or one per image (N,)."""
    t = torch.as_tensor(temperature, dtype=torch.float64, device=logits.device)
    return (logits.double() / t[..., None]).softmax(dim=-1)


def measure_probabilities(
    logits: Tensor, targets: Tensor, temperature: float | Tensor = 1.0
) -> tuple[ProbabilityMeasures, pd.DataFrame]:
    """Return the measures of `probabilities` and their `reliability_curve`.

    `logits` are (N, K), `targets` (N,) class indices; the temperature is one number, or one per image (N,).
    """
    temperatures = torch.as_tensor(temperature, dtype=torch.float64).expand(len(targets))
    columns = []
    parts = (torch.split(tensor, _rows(logits)) for tensor in (logits, targets, temperatures))
    for part, classes, t in zip(*parts, strict=True):
        probability = probabilities(part, t)
        confidence, predicted = probability.max(dim=1)
        true = probability.gather(1, classes[:, None])[:, 0]
        columns.append(torch.stack([confidence, predicted == classes, true, probability.square().sum(dim=1)]))
    confidence, right, true, squares = torch.cat(columns, dim=1)
    # sum over classes of (p - e_true)^2, without the one-hot matrix
    brier = (squares - 2 * true + 1).mean()
    curve = reliability_curve(confidence, right)
    tiny = torch.finfo(true.dtype).tiny
    loss = float(-true.clamp_min(tiny).log().mean())
    return ProbabilityMeasures(calibration_error(curve), loss, float(brier)), curve


def _rows(logits: Tensor) -> int:
    """Return the number of images at a time that keeps the float64 arrays of (N, K) logits at some MB."""
    return max(2**20 // logits.shape[1], 1)


def reliability_curve(confidence: Tensor, right: Tensor, bins: int = BINS) -> pd.DataFrame:
    """Return accuracy against confidence, one row per bin that holds images.

    Bins have equal width and include their upper end, as in Guo et al.

    Args:
        confidence: (N,) probability of the predicted class.
        right: (N,) whether the prediction is right.
        bins: number of bins.

    Returns:
        Columns lower, upper (the bin's ends), images, confidence (mean), accuracy (share); all from 0 to 1.
    """
    edges = np.linspace(0, 1, bins + 1)
    values = confidence.double().cpu().numpy()
    place = np.clip(np.searchsorted(edges, values, side="left") - 1, 0, bins - 1)
    images = np.bincount(place, minlength=bins)
    count = np.maximum(images, 1)
    curve = pd.DataFrame(
        {
            "lower": edges[:-1],
            "upper": edges[1:],
            "images": images,
            "confidence": np.bincount(place, values, minlength=bins) / count,
            "accuracy": np.bincount(place, right.double().cpu().numpy(), minlength=bins) / count,
        }
    )
    return curve[images > 0].reset_index(drop=True)


def calibration_error(curve: pd.DataFrame) -> float:
    """Return the expected calibration error in per cent: mean |accuracy - confidence|, weighted by images."""
    distance = (curve["accuracy"] - curve["confidence"]).abs()
    return 100 * float((distance * curve["images"]).sum() / curve["images"].sum())


_log = logging.getLogger(__name__)

_SCHEMA = 1


@dataclass(frozen=True)
class Calibration:
    """How the probabilities of one checkpoint were calibrated.

    Attributes:
        checkpoint: "last" or "best".
        temperature: Divisor of the logits. None if the images determine none: every prediction is right, or a
            temperature from a part of them makes the loss of the others no smaller.
        split: Images the temperature was fitted on: "validation", or "test" if the run had no validation images.
        images: Number of images in that split.
        record: Entry of this checkpoint in calibration.json, see docs/prediction.md.
    """

    checkpoint: str
    temperature: float | None
    split: str
    images: int
    record: dict[str, Any]

    @property
    def text(self) -> str:
        """One line: the fitted temperature, and the calibration error and loss before and after."""
        on = f"{self.images:,} {self.split} images"
        if self.temperature is None:
            return f"{self.checkpoint} weights: {on} determine no temperature; probabilities stay uncalibrated"
        before, after = (self.record[when] for when in ("before", "after"))
        return (
            f"{self.checkpoint} weights: temperature {self.temperature:.3f} from {on}; calibration error "
            f"{before['calibration_error']:.2f} % before, {after['calibration_error']:.2f} % after, "
            f"loss {before['loss']:.4f} before, {after['loss']:.4f} after (cross-fitted)"
        )


def calibrate_run(
    path: str | Path, *, checkpoint: str = "last", root: str | None = None, cache: str | None = None
) -> Calibration:
    """Fit the temperature of a run's saved weights and save it in calibration.json, replacing an older one.

    See `fit_calibration` for arguments and errors; RunError too where calibration.json is no calibration.
    """
    _require_own(RunFolder(Path(path)).calibration_file)  # before the work
    calibration = fit_calibration(Path(path), checkpoint=checkpoint, root=root, cache=cache)
    keep_calibration(Path(path), calibration)
    return calibration


def calibrate_finished(path: Path, cache: str) -> None:
    """Calibrate the last weights of a run that has just been trained, unless they are; log why they cannot be."""
    if PartialState().num_processes > 1:  # a calibration is the work of one process
        _log.info("%s is not calibrated: fgvc calibrate %s", path, path)
        return
    try:
        if RunFolder(path).is_finished() and read_calibration(path) is None:
            _log.info("%s: %s", path, calibrate_run(path, cache=cache).text)
    except UserError as error:
        _log.warning("%s is not calibrated: %s", path, error)


def fit_calibration(
    path: Path, *, checkpoint: str = "last", root: str | None = None, cache: str | None = None
) -> Calibration:
    """Fit the temperature of a run's saved weights and measure its effect on the error; write nothing.

    The fit uses the validation images, or the test split if the run had none when it was trained: what lies in val/
    since then may be training images of the run. The error afterwards is cross-fitted: each image is measured with a
    temperature fitted without it.

    Args:
        path: the run folder.
        checkpoint, root, cache: as in `restore_run`.

    Raises:
        RunError: not a run; its weights are missing, damaged, of another architecture, or give logits that are not
            finite; or there are fewer than two images.
        DatasetError, WeightsError: as in training.
    """
    config = RunFolder(path).read_config(root=root)
    recorded = read_run(path).images
    has_validation = "validation_content" in recorded
    if "train_content" not in recorded:  # an earlier version
        has_validation = config.trainer.val_fraction > 0 or open_validation(config) is not None
    split = "validation" if has_validation else "test"
    config.trainer.precision = "no"  # logits in float32, as in a prediction
    accelerator = create_accelerator(config, path, training=False)
    restored = restore_run(path, accelerator.device, checkpoint=checkpoint, root=root, cache=cache, split=split)
    trainer, module = config.trainer, accelerator.prepare(restored.trained)
    loader = create_loader(restored.inputs(), trainer.workers, accelerator, batch_size=trainer.eval_batch_size)
    logits, targets = collect_logits(module, loader, accelerator, split)  # (N, num_classes), (N,)
    if not torch.isfinite(logits).all():
        raise RunError(f"{path}: the {checkpoint} weights give logits that are not finite; train the run again")
    if len(targets) < 2:
        raise RunError(f"{path}: {len(targets)} {split} images are too few to calibrate on")
    found = fit_temperature(logits, targets)
    before = measure_probabilities(logits, targets)
    after = before
    if is_determined(found):
        after = measure_probabilities(logits, targets, cross_fitted(logits, targets))
    # of too few images it does harm to others: those of another fold
    temperature, after = (found, after) if after[0].loss < before[0].loss else (None, before)
    record = {
        "temperature": temperature,
        "split": split,
        "images": len(targets),
        "weights": _weights_digest(path, checkpoint),
        "folds": min(FOLDS, len(targets)),
        "bins": BINS,
        "top1": round(100 * float((logits.argmax(dim=1) == targets).double().mean()), 4),
        "before": _recorded(*before),
        "after": _recorded(*after),
        "root": config.dataset.root,
        "note": restored.note,
        "versions": versions(),
        **source_state(),
    }
    return Calibration(checkpoint, temperature, split, len(targets), record)


def keep_calibration(path: Path, calibration: Calibration) -> None:
    """Write a calibration to a run's calibration.json; the entry of the other checkpoint stays.

    Raises RunError: the file is no calibration; it is unchanged.
    """
    file = RunFolder(path).calibration_file
    with locked(path / ".calibration.lock", on_wait=lambda: None):  # a parallel write must not drop the other entry
        _require_own(file)
        records = {**_read(file), calibration.checkpoint: calibration.record}
        write_json_atomic(file, {"schema": _SCHEMA, "checkpoints": records})


def read_calibration(path: Path, checkpoint: str = "last") -> Calibration | None:
    """Return the calibration of a run's saved weights; None if there is none or it belongs to other weights.

    Raises RunError: the weights are missing.
    """
    record = _read(RunFolder(path).calibration_file).get(checkpoint)
    if record is None or record["weights"] != _weights_digest(path, checkpoint):
        return None
    return Calibration(checkpoint, record["temperature"], record["split"], record["images"], record)


def _require_own(file: Path) -> None:
    """Raise RunError if something lies at `file` that has not the form of a calibration."""
    if not os.path.lexists(file):
        return
    try:
        content = read_json_object(file)
        own = content.get("schema") == _SCHEMA and isinstance(content.get("checkpoints"), dict)
    except (OSError, ValueError):
        own = False
    if not own:
        raise RunError(f"{file} is no calibration of this version and is not replaced; move or delete it")


@torch.inference_mode()
def collect_logits(model: nn.Module, loader: Loader, accelerator: Accelerator, name: str) -> tuple[Tensor, Tensor]:
    """Return logits (N, num_classes) float32 and targets (N,) on the CPU, of all processes.

    A fit reads all logits some fifty times, so they are kept: 4 bytes each, 400 MB for 10,000 images of 10,000 classes.
    """
    model.eval()
    logits, targets = [], []
    for inputs, classes in progress_bar(loader, name, accelerator):
        batch_logits, batch_targets = accelerator.gather_for_metrics((model(inputs).float(), classes))
        logits.append(batch_logits.cpu())
        targets.append(batch_targets.cpu())
    return torch.cat(logits), torch.cat(targets)


def _recorded(measures: ProbabilityMeasures, curve: pd.DataFrame) -> dict[str, Any]:
    return {
        **{name: round(value, 6) for name, value in asdict(measures).items()},
        "reliability": curve.round(6).to_dict("records"),
    }


def _weights_digest(path: Path, checkpoint: str) -> str:
    file = RunFolder(path).weights_file(checkpoint)
    if not file.is_file():
        raise RunError(f"{file} is missing: {path} has no {checkpoint} weights; name a finished run")
    return sha256(file)


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """Return the entries of a calibration.json by checkpoint; empty if it is missing or, with a warning, unusable."""
    if not file.is_file():
        return {}
    try:
        content = read_json_object(file)
        if content["schema"] != _SCHEMA:
            raise ValueError(f"schema {content['schema']}, not {_SCHEMA}")
        records = dict(content["checkpoints"])
        for checkpoint, record in records.items():
            _check(checkpoint, record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("%s cannot be used (%s); calibrate the run again", file, error)
        return {}
    return records


def _check(checkpoint: str, record: dict[str, Any]) -> None:
    """Raise ValueError or KeyError if an entry has an unknown checkpoint, or a needed field is missing or wrong."""
    temperature = record["temperature"]
    number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if temperature is not None and not (number and is_determined(temperature)):
        raise ValueError(f"temperature {temperature!r}")
    known = checkpoint in ("last", "best") and record["split"] in ("validation", "test")
    counted = isinstance(record["images"], int) and 0 < record["images"] < 1 << 32
    if not (known and counted and isinstance(record["weights"], str)):
        raise ValueError(f"unknown record {checkpoint!r}")
