"""Images a second from JPEG to the network's input, on one core: as fgvc reads them, and by Pillow alone.

python benchmarks/loading.py --output loading.json
python benchmarks/loading.py --images FOLDER --size 224
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import benchmark_facts, machine_line
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from fgvc.cli import exit_on_user_error
from fgvc.data import TransformSpec, decode_rgb, image_files
from fgvc.io import to_json, write_output
from fgvc.provenance import commit_label, source_state

SIZES = ((500, 375), (1600, 1200), (3000, 2000))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of images (default: made here, of three sizes)")
    parser.add_argument("--size", type=int, default=448, help="pixels of the input (default 448)")
    parser.add_argument("--count", type=int, default=40, help="images of each kind (default 40)")
    parser.add_argument("--repetitions", type=int, default=5, help="passes over the images (default 5)")
    parser.add_argument("--output", type=Path, help="JSON file to save everything in")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    facts = benchmark_facts()
    print(f"{machine_line(facts)}\ncommit {commit_label(source_state()) or 'unknown'}, to {given.size} px, one thread")
    spec = TransformSpec(size=given.size, mean=MEAN, std=STD, interpolation="bicubic", training=False)
    pillow = v2.Compose(
        [
            v2.Resize([given.size], interpolation=InterpolationMode.BICUBIC),
            v2.CenterCrop(given.size),
            *(v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor(), v2.Normalize(MEAN, STD)),
        ]
    )
    ways: dict[str, Callable[[Path], Tensor]] = {
        "Pillow": lambda path: pillow(decode_rgb(path)),
        "fgvc": lambda path: spec(decode_rgb(path, side=spec.shorter_side)),
    }
    rows = []
    with tempfile.TemporaryDirectory() as place:
        if given.images is None:
            kinds = {f"{w}x{h}": write_images(Path(place), w, h, given.count) for w, h in SIZES}
        else:
            kinds = {str(given.images): image_files(given.images)[: given.count]}
        for kind, paths in kinds.items():
            row: dict[str, Any] = {"images": kind, **images_a_second(ways, paths, given.repetitions)}
            pairs = [(spec.picture(ways["fgvc"](path)), spec.picture(ways["Pillow"](path))) for path in paths]
            row["difference"] = 255 * statistics.mean(float((a - b).abs().mean()) for a, b in pairs)
            print(*(f"{key} {value:.3g}" if isinstance(value, float) else value for key, value in row.items()))
            rows.append(row)
    print("images a second, medians; difference: mean over pixels and channels, of 255 levels")
    if given.output is not None:
        record = {"machine": facts, "commit": commit_label(source_state()), "size": given.size, "rows": rows}
        write_output(given.output, to_json(record), "loading benchmark")


def images_a_second(
    ways: dict[str, Callable[[Path], Tensor]], paths: Sequence[Path], repetitions: int
) -> dict[str, float]:
    """Medians over passes in turn, in seconds of this process, so that others on the machine count less."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repetitions):
        for name, way in ways.items():
            start = time.process_time()
            for path in paths:
                way(path)
            times[name].append(time.process_time() - start)
    return {name: len(paths) / statistics.median(spent) for name, spent in times.items()}


def write_images(folder: Path, width: int, height: int, count: int) -> list[Path]:
    """Smooth pictures with noise, about as large in bytes as photographs."""
    folder.mkdir(exist_ok=True)
    rng, paths = np.random.default_rng(0), []
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        picture = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = (picture + rng.integers(-8, 9, picture.shape, dtype=np.int16)).clip(0, 255).astype(np.uint8)
        paths.append(folder / f"{width}x{height}-{number}.jpg")
        Image.fromarray(noisy).save(paths[-1], quality=90)
    return paths


if __name__ == "__main__":
    exit_on_user_error(main)
