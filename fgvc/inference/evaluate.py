"""Evaluation of a finished run, with one or several views of each test image: accuracy, and on request retrieval.

Retrieval is whether the nearest images of an image are of its class, by cosine similarity. The measures are those of
Musgrave, Belongie, Lim, "A metric learning reality check", ECCV 2020.
"""

import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from fgvc.data import VIEWS, TransformSpec, ViewTransform, resized_spec
from fgvc.errors import ConfigError, RunError
from fgvc.foreign import read_json_object
from fgvc.inference.calibrate import calibration_error, reliability_curve
from fgvc.inference.restore import Restored, restore_run
from fgvc.io import require_own, to_csv, to_json, write_output
from fgvc.provenance import source_state, versions
from fgvc.runs.config import RunConfig
from fgvc.runs.folder import RunFolder
from fgvc.runs.statistics import coarse_accuracy, shot_accuracy, tree_distance
from fgvc.runs.summary import Accuracy, read_run
from fgvc.training.batches import Loader, create_loader
from fgvc.training.environment import create_accelerator
from fgvc.training.evaluation import ViewAverage, evaluate
from fgvc.training.setup import inference_batch_size

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunEvaluation:
    """A run's result on its test split.

    Attributes:
        name: Name in the file names, e.g. "last", "best-mirror", "last-ten_crop-resize256".
        title: Two lines: run and accuracy, then checkpoint and views.
        accuracy: Accuracy in per cent.
        predictions: Table with one row per image, see `Evaluation.predictions`.
        classes: Class names by class index.
        coarse: Accuracy at the coarser labels of the classes, see `coarse_accuracy`; no rows if there are none.
        record: Content of evaluation-NAME.json.
        folder: Folder of the files.
        retrieval: Retrieval of the test images among themselves; None where nobody asked for it.
    """

    name: str
    title: str
    accuracy: Accuracy
    predictions: pd.DataFrame
    classes: list[str]
    coarse: pd.DataFrame
    record: dict[str, Any]
    folder: Path
    retrieval: "Retrieval | None" = None

    @property
    def files(self) -> list[Path]:
        """The files that `evaluate_run` wrote."""
        return [self.folder / f"evaluation-{self.name}.json", self.folder / f"predictions-{self.name}.csv"]

    @property
    def text(self) -> str:
        """The accuracies: of the classes, by their number of training images, and at each coarser level."""
        accuracy, over = self.accuracy, f"{self.record['test_classes']} of {len(self.classes)} classes"
        lines = [
            f"top-1 {accuracy.top1:.2f} %   top-5 {accuracy.top5:.2f} %   mean of {over} {accuracy.mean_class:.2f} %"
        ]
        shots = self.record["shots"] or {}
        if len(shots) > 1:
            parts = [f"{name} ({part['classes']} classes) {part['top1']:.2f} %" for name, part in shots.items()]
            lines.append(f"by number of training images: {'   '.join(parts)}")
        for row in self.coarse.to_dict("records"):
            inside = "" if pd.isna(row["inside"]) else f"   {row['inside']:.1f} % of the mistakes stay inside it"
            images = len(self.predictions)
            of = "" if row["images"] == images else f" of the {row['images']} of {images} images with a label"
            lines.append(f"{row['level']} ({row['groups']}) {row['accuracy']:.2f} %{of}{inside}")
        if (distance := self.record["tree_distance"]) is not None:
            lines.append(f"mean tree distance of the mistakes {distance:.2f} (1 to {len(self.coarse) + 1})")
        return "\n".join(lines)


def evaluate_run(
    path: Path,
    *,
    checkpoint: str = "last",
    views: str = "single",
    resize_size: int | None = None,
    root: str | None = None,
    cache: str | None = None,
    output: Path | None = None,
    retrieval: bool = False,
) -> RunEvaluation:
    """Evaluate saved weights of a run on its test split; write evaluation-NAME.json and predictions-NAME.csv.

    Only the test split is read. If the backbone is frozen, a single view uses the cached feature maps, as in training.
    All other views go through backbone and head, and nothing is cached.

    Args:
        path: the run folder.
        checkpoint: "last" or "best".
        views: "single", "mirror" or "ten_crop"; logits of several views are averaged, see `ViewTransform`.
        resize_size: pixels before the crop; None means as in the run.
        root, cache: as in `restore_run`.
        output: folder of the files; None means the run folder.
        retrieval: whether to add `measure_retrieval` of the test images' descriptors among themselves to the record.

    Raises:
        ConfigError: unknown views, or sizes that leave no room for them; retrieval with several views, or of a split
            without two images of a class.
        RunError: not a run; its weights are missing, damaged, of another architecture, or give a loss that is not
            finite.
        DatasetError, WeightsError: as in training.
    """
    accelerator = create_accelerator(RunFolder(path).read_config(), path, training=False)
    restored = restore_run(path, accelerator.device, checkpoint=checkpoint, root=root, cache=cache)
    own = restored.images.transform
    assert isinstance(own, TransformSpec)
    transform = ViewTransform(resized_spec(own, resize_size), views)
    if views == "ten_crop" and not transform.has_room:
        _log.warning("resize_size equals size: square images give ten equal crops; --resize-size N makes room")
    folder, name = path if output is None else output, _name(checkpoint, transform, own)
    _require_free(folder, name)  # before the work
    if output is not None and (folder / f"evaluation-{name}.json").exists():
        other = read_json_object(folder / f"evaluation-{name}.json").get("run")
        if other not in (None, str(path.resolve())):
            raise RunError(f"{folder} holds the evaluation of {other}; give another --output")
    if retrieval and views != "single":
        raise ConfigError(f"retrieval compares one descriptor of each image; it takes views=single, not {views}")
    start = time.perf_counter()
    descriptors: list[Tensor] = []
    if retrieval:  # kept on the way to the logits, so that the images go through the network once
        restored.head.pooling.register_forward_hook(lambda _, __, output: descriptors.append(output.float().cpu()))
    module, loader = module_and_loader(restored, transform, own, accelerator)
    evaluation = evaluate(module, loader, accelerator, "test")
    if not math.isfinite(evaluation.loss):
        raise RunError(f"{path}: the {checkpoint} weights give a loss of {evaluation.loss}; train the run again")
    spec, run = transform.spec, read_run(path)
    predictions = evaluation.predictions(restored.images.relative_paths(), restored.images.classes)
    levels = run.coarse or restored.images.coarse
    coarse = coarse_accuracy(predictions, levels)
    distances = tree_distance(evaluation.targets.numpy(), evaluation.predicted.numpy(), levels)
    mistakes = distances[distances > 0]
    reliability = reliability_curve(evaluation.confidence, evaluation.predicted == evaluation.targets)
    record = {
        "run": str(path.resolve()),
        "views": transform.views,
        "size": spec.size,
        "resize": spec.resize,
        "resize_size": spec.resize_size,
        "images": len(evaluation.targets),
        "test_classes": len(set(evaluation.targets.tolist())),
        **asdict(evaluation.accuracy),
        "loss": round(evaluation.loss, 6),
        "calibration_error": round(calibration_error(reliability), 4),
        "coarse": {row.pop("level"): row for row in json.loads(coarse.round(4).to_json(orient="records"))},
        "tree_distance": round(float(mistakes.mean()), 4) if levels and len(mistakes) else None,
        "shots": run.class_sizes
        and shot_accuracy(evaluation.targets.numpy(), evaluation.predicted.numpy(), run.class_sizes),
        "checkpoint": checkpoint,
        "seconds": round(time.perf_counter() - start, 3),
        "root": restored.config.dataset.root,
        "note": restored.note,
        "versions": versions(),
        **source_state(),
    }
    found = measure_retrieval(torch.cat(descriptors), evaluation.targets) if retrieval else None
    if found is not None:
        record["retrieval"] = found.as_dict()
    result = RunEvaluation(
        name=name,
        title=_title(restored.config, run.label, record),
        accuracy=evaluation.accuracy,
        predictions=predictions,
        classes=restored.images.classes,
        coarse=coarse,
        record=record,
        folder=folder,
        retrieval=found,
    )
    write_output(result.files[0], to_json(record))
    write_output(result.files[1], to_csv(result.predictions, None))
    return result


def _require_free(folder: Path, name: str) -> None:
    """Raise FileExistsError if a file that an evaluation or its report would write is somebody else's."""
    for kind in ("evaluation", "predictions", "per_class", "confusion", "confusions"):
        for file in folder.glob(f"{kind}-{name}.*"):
            require_own(file)


def module_and_loader(
    restored: Restored, transform: ViewTransform, own: TransformSpec, accelerator: Accelerator
) -> tuple[nn.Module, Loader]:
    """Return the module and its batches: cached feature maps if they hold this view, otherwise images."""
    config = restored.config
    if config.backbone.frozen and transform == ViewTransform(own.deterministic()):
        inputs, trainer = restored.inputs(), config.trainer
        loader: Loader = create_loader(inputs, trainer.workers, accelerator, batch_size=trainer.eval_batch_size)
        return accelerator.prepare(restored.trained), loader
    # each image takes the memory of several views
    batch_size = max(inference_batch_size(config, restored.device) // VIEWS[transform.views], 1)
    images: Any = restored.images.with_transform(transform)
    loader = create_loader(images, config.trainer.workers, accelerator, batch_size=batch_size)
    return accelerator.prepare(ViewAverage(restored.model)), loader


def _name(checkpoint: str, transform: ViewTransform, own: TransformSpec) -> str:
    resize_size = transform.spec.resize_size
    views = [] if transform.views == "single" else [transform.views]
    return "-".join([checkpoint, *views, *([] if resize_size == own.resize_size else [f"resize{resize_size}"])])


def _title(config: RunConfig, label: str, record: dict[str, Any]) -> str:
    run = f"{label}, {config.dataset.name}, {config.backbone.name}, seed {config.seed}"
    cut = "" if record["resize_size"] == record["size"] else f" cut from {record['resize_size']}"
    how = f"{record['checkpoint']} weights, views: {record['views']}, {record['size']} px{cut}"
    return f"{run}: top-1 {record['top1']:.2f} %\n{record['images']:,} test images, {how}"


RECALL_AT = (1, 2, 4, 8)
_CHUNK = 1 << 24  # similarities at a time, 64 MiB


@dataclass(frozen=True)
class Retrieval:
    """How well the images of a class find each other.

    Attributes:
        queries: Number of images with at least one other image of their class. Only these are queries.
        recall: Per cent of the queries with an image of their class among the k nearest, by k.
        map_at_r: Mean average precision at R in per cent, see `measure_retrieval`.
    """

    queries: int
    recall: dict[int, float]
    map_at_r: float

    def as_dict(self) -> dict[str, float]:
        """The numbers by name: queries, recall_at_1, ..., map_at_r."""
        recall = {f"recall_at_{k}": round(value, 4) for k, value in self.recall.items()}
        return {"queries": self.queries, **recall, "map_at_r": round(self.map_at_r, 4)}

    @property
    def text(self) -> str:
        """One line."""
        recall = "   ".join(f"recall@{k} {value:.2f} %" for k, value in self.recall.items())
        return f"{recall}   mAP@R {self.map_at_r:.2f} %   ({self.queries:,} queries)"


@torch.no_grad()
def measure_retrieval(descriptors: Tensor, targets: Tensor, recall_at: Sequence[int] = RECALL_AT) -> Retrieval:
    """Let each image look for its class among all others (leave-one-out), by cosine similarity in float32.

    A query with R other images of its class has the average precision at R: the mean over ranks i = 1 to R of the
    precision among the first i where rank i is right, and of 0 where it is wrong. An image that is alone in its class
    is no query, but others may find it. The memory is that of the descriptors and 64 MiB of similarities, or one row of
    N where that is more. The order of equal similarities is not defined.

    Args:
        descriptors: (N, D), of any norm; a descriptor of zeros has similarity 0 to all.
        targets: (N,) int64 class indices, on the same device.
        recall_at: numbers k of nearest images; more than there are counts as all.

    Raises:
        ConfigError: no class has two images.
        ValueError: a descriptor is not finite.
    """
    if not descriptors.isfinite().all():
        raise ValueError(f"{int((~descriptors.isfinite().all(dim=1)).sum())} descriptors are NaN or infinite")
    unit = F.normalize(descriptors.float(), dim=1)
    relevant = torch.bincount(targets)[targets] - 1  # R of each image, (N,)
    queries = torch.nonzero(relevant)[:, 0]
    if len(queries) == 0:
        raise ConfigError(f"none of {len(targets)} images has another one of its class, so nothing can be retrieved")
    depth = min(max(*recall_at, int(relevant.max())), len(targets) - 1)
    ranks = torch.arange(1, depth + 1, device=targets.device)
    hits, precisions = torch.zeros(len(recall_at), dtype=torch.int64), 0.0
    for rows in torch.split(queries, max(_CHUNK // len(targets), 1)):
        similarity = unit[rows] @ unit.T  # (Q, N)
        similarity[torch.arange(len(rows)), rows] = -torch.inf  # an image does not find itself
        right = targets[similarity.topk(depth).indices] == targets[rows, None]  # (Q, depth)
        hits += torch.stack([right[:, :k].any(dim=1).sum() for k in recall_at]).cpu()
        number = relevant[rows, None]
        average = (right * (ranks <= number) * right.cumsum(dim=1) / ranks / number).sum(dim=1)
        precisions += float(average.double().sum())
    count = len(queries)
    recall = {k: 100 * hit / count for k, hit in zip(recall_at, hits.tolist(), strict=True)}
    return Retrieval(count, recall, 100 * precisions / count)
