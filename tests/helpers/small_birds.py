"""A dataset of 15 tiny images in the layout of CUB-200-2011: as an archive on a server, with a card of its own."""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from archives import tar_bytes
from file_server import FileServer
from PIL import Image

from fgvc.data import prepare_dataset
from fgvc.data.prepare import Prepared

CLASSES, TRAIN, TEST = 3, 3, 2  # images of each class


def image_bytes(number: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def cub_files(missing_images: int = 0) -> dict[str, bytes]:
    """A small set in the layout of CUB-200-2011."""
    names, labels, train = [], [], []
    for target in range(CLASSES):
        for number in range(TRAIN + TEST):
            names.append(f"{target + 1:03}.Bird_{target}/{number}.png")
            labels.append(target + 1)
            train.append(int(number < TRAIN))
    kept = len(names) - missing_images
    files = {f"images/{name}": image_bytes(index) for index, name in enumerate(names[:kept])}
    tables = {"images": names[:kept], "image_class_labels": labels[:kept], "train_test_split": train[:kept]}
    tables["classes"] = [f"{target + 1:03}.Bird_{target}" for target in range(CLASSES)]
    for table, values in tables.items():
        lines = [f"{number} {value}\n" for number, value in enumerate(values, start=1)]
        files[f"{table}.txt"] = "".join(lines).encode()
    return {f"CUB_200_2011/{name}": content for name, content in files.items()}


@dataclass
class Place:
    """Cards, a server with the archive, and a root that does not exist yet."""

    folder: Path
    server: FileServer
    archive: bytes

    @property
    def root(self) -> Path:
        return self.folder / "data" / "cub"

    def write_card(self, **changes: Any) -> None:
        archive = {"name": "birds.tgz", "url": self.server.url("/birds.tgz"), "size": len(self.archive)}
        archive |= {"md5": hashlib.md5(self.archive).hexdigest(), **changes.pop("archive", {})}
        card = {"title": "Small birds", "citation": "none", "licence": "none", "homepage": None, "layout": "as CUB"}
        card |= {"archives": [archive], "manual": "Ask the birds.", "train": "experiment=birds", "classes": CLASSES}
        card |= {"splits": {"train": CLASSES * TRAIN, "test": CLASSES * TEST}}
        card |= {"images_per_class": {"train": [TRAIN, TRAIN], "test": [TEST, TEST]}}
        (self.folder / "cards").mkdir(exist_ok=True)
        (self.folder / "cards" / "cub.yaml").write_text(yaml.safe_dump(card | changes))

    def prepare(self, *archives: Path, **options: Any) -> Prepared:
        return prepare_dataset("cub", cards=self.folder / "cards", root=self.root, archives=archives, **options)

    def serve(self, files: dict[str, bytes]) -> None:
        self.archive = tar_bytes(files, "w:gz")
        self.server.files["/birds.tgz"] = self.archive
        self.write_card()
