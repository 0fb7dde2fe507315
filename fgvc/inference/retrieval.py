"""Retrieval: whether the nearest images of an image are of its class, by cosine similarity.

The measures are those of Musgrave, Belongie, Lim, "A metric learning reality check", ECCV 2020.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fgvc.errors import ConfigError

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
