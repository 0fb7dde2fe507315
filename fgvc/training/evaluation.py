"""Accuracy of a model on a split, and its prediction for each image."""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from fgvc.runs.summary import Accuracy
from fgvc.training.batches import Loader, progress_bar

_METRIC_BATCH = 4096  # images at a time, since the metrics take several times the memory of their logits


@dataclass(frozen=True)
class Evaluation:
    """Result on one split, in the order of its images.

    Attributes:
        accuracy: Accuracy in per cent.
        loss: Mean cross-entropy, without label smoothing.
        targets: True class indices (N,).
        predicted: Predicted class indices (N,).
        confidence: Softmax probability (N,) of the predicted class.
        rank: Rank (N,) of the true class among the logits; 1 for a right prediction.
    """

    accuracy: Accuracy
    loss: float
    targets: Tensor
    predicted: Tensor
    confidence: Tensor
    rank: Tensor

    def predictions(self, paths: list[str], classes: list[str]) -> pd.DataFrame:
        """Return one row per image: path, target, predicted, target_class, predicted_class, confidence, rank.

        Args:
            paths: paths of the N images.
            classes: name of each class index.
        """
        target, predicted = self.targets.tolist(), self.predicted.tolist()
        return pd.DataFrame(
            {
                "path": paths,
                "target": target,
                "predicted": predicted,
                "target_class": [classes[index] for index in target],
                "predicted_class": [classes[index] for index in predicted],
                "confidence": self.confidence.numpy(),
                "rank": self.rank.numpy(),
            }
        )


class ViewAverage(nn.Module):
    """Mean logits over the views of an image: (B, V, 3, H, W) -> (B, num_classes)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, views: Tensor) -> Tensor:
        # (B, V, 3, H, W) -> (B V, 3, H, W); channels last: faster inference on a CPU
        images = views.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        logits = self.model(images).float()  # averaging in half precision would round
        mean: Tensor = logits.unflatten(0, views.shape[:2]).mean(dim=1)  # (B V, K) -> (B, V, K) -> (B, K)
        return mean


class MeanClassAccuracy(MulticlassAccuracy):
    """Mean over the classes that have images of the share of theirs that is right; NaN without images.

    The macro average of torchmetrics counts a class without images as 0 as soon as it is predicted once.
    """

    def compute(self) -> Tensor:
        right, wrong = torch.as_tensor(self.tp), torch.as_tensor(self.fn)  # counts by class, (num_classes,)
        images = right + wrong
        return (right / images)[images > 0].mean()


def accuracy_metrics(num_classes: int) -> MetricCollection:
    """Return the three accuracies as torchmetrics, from 0 to 1."""
    return MetricCollection(
        {
            "top1": MulticlassAccuracy(num_classes, average="micro"),
            "top5": MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro"),
            "mean_class": MeanClassAccuracy(num_classes, average="macro"),
        },
        # torchmetrics would merge metrics with equal states after the first batch and then report one value for both;
        # top-1 and top-5 are equal if all images of that batch are right
        compute_groups=False,
    )


@torch.inference_mode()
def collect_logits(
    model: nn.Module,
    loader: Loader,
    accelerator: Accelerator,
    name: str,
    *,
    before_batch: Callable[[], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return logits (N, num_classes) float32 and targets (N,) on the CPU; arguments as in `evaluate`."""
    model.eval()
    logits, targets = [], []
    for batch in progress_bar(loader, name, accelerator):
        if before_batch is not None:
            before_batch()
        batch_logits, batch_targets = accelerator.gather_for_metrics((model(batch[0]).float(), batch[1]))
        logits.append(batch_logits.cpu())
        targets.append(batch_targets.cpu())
    return torch.cat(logits), torch.cat(targets)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Loader,
    num_classes: int,
    accelerator: Accelerator,
    name: str,
    *,
    before_batch: Callable[[], None] | None = None,
) -> Evaluation:
    """Run `model` over a loader in evaluation mode.

    Args:
        model: inputs -> logits (B, num_classes).
        loader: batches of (inputs, targets), unshuffled.
        num_classes: width of the logits.
        accelerator: accelerator that gathers from all processes, without the padding of the last batch.
        name: name in the progress bar.
        before_batch: function to call before each batch, in all processes.
    """
    all_logits, all_targets = collect_logits(model, loader, accelerator, name, before_batch=before_batch)
    metrics = accuracy_metrics(num_classes)
    for start in range(0, len(all_targets), _METRIC_BATCH):
        metrics.update(all_logits[start : start + _METRIC_BATCH], all_targets[start : start + _METRIC_BATCH])
    confidence, predicted = all_logits.softmax(dim=1).max(dim=1)
    values = {key: round(100 * float(value), 4) for key, value in metrics.compute().items()}
    loss = float(nn.functional.cross_entropy(all_logits, all_targets))
    return Evaluation(Accuracy(**values), loss, all_targets, predicted, confidence, _rank(all_logits, all_targets))


def _rank(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the rank of the true class, from 1: (N, K), (N,) -> (N,); of equal logits, the lower index ranks first."""
    own = logits.gather(1, targets[:, None])
    earlier = torch.arange(logits.shape[1]) < targets[:, None]
    return 1 + ((logits > own) | ((logits == own) & earlier)).sum(dim=1)
