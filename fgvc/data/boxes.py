"""Where the bounding boxes of a dataset lie in the images as a model sees them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fgvc.data.dataset import ImageDataset
from fgvc.data.image_file import UnreadableImageError
from fgvc.data.transforms import TransformSpec
from fgvc.errors import DatasetError


def boxes_in_view(dataset: ImageDataset, indices: Sequence[int]) -> Tensor:
    """Bounding boxes after the dataset's own crop and transform.

    Args:
        dataset: with boxes, and a `TransformSpec` that gives the same result each time.
        indices: of its images.

    Returns:
        (len(indices), 4) float64: left, top, right, bottom in pixels of the transformed image, clipped to it. Of a box
        that the transform cuts off nothing is left: its area is 0.

    Raises:
        DatasetError: the dataset has no boxes, or an image cannot be read.
        ValueError: another transform.
    """
    spec = dataset.transform
    if not isinstance(spec, TransformSpec):
        raise ValueError(f"expected images with a TransformSpec, got {type(spec).__name__}")
    if dataset.boxes is None:
        raise DatasetError(
            f"{dataset.root}: no bounding boxes were read; only cub, cars, aircraft, dogs and nabirds have them, read "
            "with dataset.options.boxes=true"
        )
    found = []
    for index in indices:
        try:
            size = dataset.decode(index).size
        except UnreadableImageError as error:
            raise DatasetError(f"{dataset.paths[index]}: {error}; replace it") from error
        x, y = dataset.region(index).corner
        left, top, right, bottom = dataset.boxes[index]
        found.append(spec.box((left - x, top - y, right - x, bottom - y), size))
    return torch.tensor(found, dtype=torch.float64).reshape(-1, 4)
