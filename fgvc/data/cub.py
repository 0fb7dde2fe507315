"""CUB-200-2011 in its official layout [Wah, Branson, Welinder, Perona, Belongie, Caltech CNS-TR-2011-001]."""

from pathlib import Path

from fgvc.data.birds import BirdFormat, read_birds
from fgvc.data.dataset import Samples

_FORMAT = BirdFormat(dataset="cub", folder="CUB_200_2011", numeric_ids=True, unused_classes=True)


def read_cub(root: Path, split: str, *, boxes: bool = False) -> Samples:
    """Read one split of the official layout, in the order of images.txt.

    Args:
        root: the folder CUB_200_2011 or its parent. A subset of the classes or images is fine.
        split: "train" or "test", by train_test_split.txt.
        boxes: read bounding_boxes.txt, too.

    Raises:
        DatasetError: a file is missing, malformed or disagrees with another one; an image is missing; empty split.
    """
    return read_birds(_FORMAT, root, split, boxes)
