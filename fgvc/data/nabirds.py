"""NABirds [Van Horn, Branson, Farrell, Haber, Barry, Ipeirotis, Perona, Belongie, CVPR 2015]."""

from pathlib import Path

from fgvc.data.birds import BirdFormat, read_birds
from fgvc.data.dataset import Samples

_FORMAT = BirdFormat(dataset="nabirds", folder="nabirds", numeric_ids=False, unused_classes=False)


def read_nabirds(root: Path, split: str, *, boxes: bool = False) -> Samples:
    """Read one split of the official layout, in the order of images.txt.

    classes.txt lists the whole hierarchy; the classes are those that hold an image in either split, in the order of
    their ids. Where two of them share a name, the id is added to both.

    Args:
        root: the folder nabirds or its parent.
        split: "train" or "test", by train_test_split.txt.
        boxes: read bounding_boxes.txt, too.

    Raises:
        DatasetError: a file is missing, malformed or disagrees with another one; an image is missing; empty split.
    """
    return read_birds(_FORMAT, root, split, boxes)
