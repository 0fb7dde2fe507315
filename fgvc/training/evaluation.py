"""Accuracy of a model on a split, and its prediction for each image."""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fgvc.runs.summary import Accuracy
from fgvc.training.batches import Loader, progress_bar


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


def accuracies(targets: Tensor, rank: Tensor) -> Accuracy:
    """Return the accuracies of N images; the mean over the classes leaves out those without images.

    Args:
        targets: true class indices (N,).
        rank: rank (N,) of the true class, see `Evaluation`.
    """
    right = rank == 1
    images = targets.bincount()  # (number of classes)
    shares = targets[right].bincount(minlength=len(images)) / images
    values = right.float().mean(), (rank <= 5).float().mean(), shares[images > 0].mean()
    return Accuracy(*(round(100 * float(value), 4) for value in values))


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Loader,
    accelerator: Accelerator,
    name: str,
    *,
    before_batch: Callable[[], None] | None = None,
) -> Evaluation:
    """Run `model` over a loader in evaluation mode.

    The logits of one batch are kept at a time: of each image five numbers remain.

    Args:
        model: inputs -> logits (B, num_classes).
        loader: batches of (inputs, targets), unshuffled.
        accelerator: accelerator that gathers from all processes, without the padding of the last batch.
        name: name in the progress bar.
        before_batch: function to call before each batch, in all processes.
    """
    model.eval()
    indices, measures = [], []
    for inputs, classes in progress_bar(loader, name, accelerator):
        if before_batch is not None:
            before_batch()
        logits = model(inputs).float()
        counted = torch.stack([classes, logits.argmax(dim=1), true_rank(logits, classes)], dim=1)  # (B, 3)
        losses = nn.functional.cross_entropy(logits, classes, reduction="none")
        measured = torch.stack([logits.softmax(dim=1).amax(dim=1), losses], dim=1)  # (B, 2)
        counted, measured = accelerator.gather_for_metrics((counted, measured))
        indices.append(counted)
        measures.append(measured)
    targets, predicted, rank = torch.cat(indices).cpu().unbind(dim=1)
    confidence, losses = torch.cat(measures).cpu().unbind(dim=1)
    return Evaluation(accuracies(targets, rank), float(losses.double().mean()), targets, predicted, confidence, rank)


def true_rank(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the rank of the true class, from 1: (N, K), (N,) -> (N,); of equal logits, the lower index ranks first."""
    own = logits.gather(1, targets[:, None])
    earlier = torch.arange(logits.shape[1], device=logits.device) < targets[:, None]
    return 1 + ((logits > own) | ((logits == own) & earlier)).sum(dim=1)
