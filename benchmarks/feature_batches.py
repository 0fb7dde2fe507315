"""Batches of cached feature maps: images per second of whole batches against maps that are collated one by one.

python benchmarks/feature_batches.py
python benchmarks/feature_batches.py --map 2048x14x14 --images 256 --batch-size 32
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from machine import benchmark_facts
from torch.utils.data import DataLoader

from fgvc.data import FeatureSet
from fgvc.data.dataset import open_maps
from fgvc.training.batches import StepBatches, create_loader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--map", default="320x7x7", help="shape of a map (default 320x7x7)")
    parser.add_argument("--images", type=int, default=2000, help="number of images (default 2000)")
    parser.add_argument("--batch-size", type=int, default=32, help="images in a step (default 32)")
    parser.add_argument("--repetitions", type=int, default=9, help="timed epochs of each (default 9)")
    given = parser.parse_args()
    print(benchmark_facts())
    print(f"maps {given.map}, {given.images} images, batches of {given.batch_size}, seed 0, images/s: median (range)")
    accelerator, rng = Accelerator(), np.random.default_rng(0)
    shape = (1, given.images, *map(int, given.map.split("x")))
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("float32", "float16"):
            path = Path(folder) / f"{dtype}.npy"
            np.save(path, rng.standard_normal(shape, dtype=np.float32).astype(dtype))
            features = FeatureSet({path: open_maps(path)}, [0] * given.images, ["a"], seconds=0.0, from_cache=True)
            order = StepBatches(given.images, given.batch_size, seed=0)
            loaders: dict[str, Iterable[tuple[torch.Tensor, torch.Tensor]]] = {
                "one by one": DataLoader(features, batch_sampler=order),
                "whole": create_loader(features, 0, accelerator, batch_sampler=order),
            }
            for (one, _), (whole, _) in zip(*loaders.values(), strict=True):
                assert torch.equal(one.to(accelerator.device), whole)
            speeds: dict[str, list[float]] = {name: [] for name in loaders}
            for _ in range(given.repetitions):
                for name, loader in loaders.items():
                    start = time.perf_counter()
                    for maps, _ in loader:
                        maps.to(accelerator.device)
                    if accelerator.device.type == "cuda":
                        torch.cuda.synchronize()
                    speeds[name].append(given.images / (time.perf_counter() - start))
            for name, found in speeds.items():
                middle = statistics.median(found)
                print(f"{dtype}, {name}: {middle:,.0f} ({min(found):,.0f} to {max(found):,.0f})")


if __name__ == "__main__":
    main()
