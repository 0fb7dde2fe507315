"""Time and memory against the number of images, classes and runs, with the fitted exponents.

python benchmarks/scale.py --output scale.csv
python benchmarks/scale.py --output small.csv --images 1000 10000 --classes 100 1000 --runs 10 100
"""

import argparse
import json
import multiprocessing
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from machine import benchmark_facts, machine_line
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fgvc.cli import exit_on_user_error
from fgvc.data import fingerprint, read_splits
from fgvc.io import to_csv, write_output
from fgvc.presentation.style import PAGE_WIDTH, figure_style, new_figure, save_figure
from fgvc.provenance import commit_label, source_state
from fgvc.reporting import make_tables
from fgvc.reporting.registry import Inputs
from fgvc.resources import resource_folder
from fgvc.runs.summary import readable_runs
from fgvc.training.batches import StepBatches
from fgvc.training.evaluation import evaluate

KIND = "scale benchmark"
LIMIT = 1.05
"""Largest exponent of time that is called proportional."""


def list_images(folder: Path, images: int) -> Callable[[], object]:
    """A folder of that many files in 100 classes is read, checked over its splits, and its digest computed."""
    for number in range(images):
        path = folder / ("test" if number % 10 == 9 else "train") / f"class{number // 10 % 100:03d}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return lambda: [fingerprint(split) for split in read_splits("folder", folder).values()]


def order_epoch(_: Path, images: int) -> Callable[[], object]:
    """The images of an epoch are shuffled and cut into the batches of two processes."""
    return lambda: sum(map(len, StepBatches(images, 64, seed=0, process=1, processes=2)))


def evaluate_classes(_: Path, classes: int) -> Callable[[], object]:
    """2,000 images are evaluated with that many classes, and their predictions made a table."""
    torch.manual_seed(0)
    model, inputs = nn.Linear(32, classes), torch.randn(2000, 32)
    loader = DataLoader(TensorDataset(inputs, torch.arange(2000) % classes), batch_size=50)

    def run() -> object:
        found = evaluate(model, loader, Accelerator(cpu=True), "test")
        return found.predictions([str(i) for i in range(2000)], [f"class {i}" for i in range(classes)])

    return run


def read_runs(folder: Path, runs: int) -> Callable[[], object]:
    """Finished runs, five methods with their seeds, are read and the table of accuracies is made."""
    labels = {"gap": "GAP", "isqrt_cov": "iSQRT-COV", "mpn_cov": "MPN-COV", "seb": "SEB", "svd_pade": "SVD-Padé"}
    for number in range(runs):
        method, seed = list(labels)[number % 5], number // 5
        accuracy = {"top1": 80 + number % 7, "top5": 95.0, "mean_class": 80.0, "epoch": 15}
        summary = {"name": "scale", "method": method, "label": labels[method], "gradient": None, "dataset": "cub80"}
        summary |= {"num_classes": 80, "train_images": 2317, "test_images": 2400, "image_size": 224, "seed": seed}
        summary |= {"backbone": "tf_efficientnet_lite0", "frozen": True, "reduction": 64, "out_features": 2080}
        summary |= {"epochs": 15, "status": "finished", "reason": None, "final": accuracy}
        summary |= {"best": accuracy | {"selected_on": "test"}, "peak_memory_mb": 1200.0, "versions": {}}
        summary |= {"seconds": {"features": 80.0, "train": 20.0, "eval": 6.0, "total": 110.0}}
        path = folder / method / f"seed{seed}"
        path.mkdir(parents=True)
        (path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")

    def run() -> object:
        readable_runs([folder])
        return make_tables(["accuracy"], Inputs((folder,), resource_folder("results/paper")))

    return run


WORK: dict[str, tuple[str, Callable[[Path, int], Callable[[], object]]]] = {
    "list images": ("images", list_images),
    "order an epoch": ("images", order_epoch),
    "evaluate": ("classes", evaluate_classes),
    "read runs": ("runs", read_runs),
}


def measured(make: Callable[[Path, int], Callable[[], object]], size: int, repetitions: int) -> tuple[float, float]:
    """Median seconds, and MiB by which the peak of the memory rose, in a process of their own."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def child() -> None:
        folder = Path(tempfile.mkdtemp())
        try:
            run = make(folder, size)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            times = []
            for _ in range(repetitions):
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
            risen = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            sender.send((float(np.median(times)), risen))
        finally:
            shutil.rmtree(folder)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the measurement at {size} failed")
    seconds, risen = receiver.recv()
    return seconds, risen


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """The slope of log value against log size; what each call costs anyway lowers it, what grows faster raises it."""
    return float(np.polyfit(np.log(sizes), np.log(np.maximum(values, 1e-9)), 1)[0])


def scale_figure(table: pd.DataFrame) -> Figure:
    """Seconds and MiB against size, a line for each kind of work; grey: proportional growth."""
    with figure_style():
        figure = new_figure(PAGE_WIDTH, 2.6)
        panels = figure.subplots(1, 2)
        for axes, column, name in zip(panels, ("seconds", "risen_mb"), ("seconds", "MiB more"), strict=True):
            for (work, of), part in table.groupby(["work", "of"], sort=False):
                axes.loglog(part["size"], part[column], "o-", markersize=3, label=f"{work} ({of})")
            sizes = np.array([table["size"].min(), table["size"].max()])
            axes.loglog(sizes, table[column].max() * sizes / sizes[1], color="#BBBBBB", linewidth=0.8, zorder=0)
            axes.set_xlabel("number")
            axes.set_ylabel(name)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", frameon=False, ncols=4)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--classes", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--runs", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--repetitions", type=int, default=3, help="of each; the median counts (default 3)")
    parser.add_argument("--output", type=Path, required=True, help="CSV file to save the measurements in")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    facts = benchmark_facts()
    print(f"{machine_line(facts)}\ncommit {commit_label(source_state()) or 'unknown'}, one thread")
    rows = []
    for name, (what, make) in WORK.items():
        found = []
        for size in sorted(getattr(given, what)):
            seconds, risen = measured(make, size, given.repetitions)
            found.append((size, seconds, risen))
            rows.append({"work": name, "of": what, "size": size, "seconds": seconds, "risen_mb": risen})
            print(f"{name:15} {size:>9,} {what:8} {seconds:9.4f} s  {risen:8.1f} MiB more", flush=True)
        sizes, times, _ = zip(*found, strict=True)
        slope = exponent(sizes, times)
        print(
            f"{name:15} time grows with the power {slope:.2f} of the {what}" + (": too fast" if slope > LIMIT else "")
        )
    table = pd.DataFrame(rows)
    write_output(given.output, to_csv(table, None), KIND)
    save_figure(scale_figure(table), given.output.with_suffix(""))


if __name__ == "__main__":
    exit_on_user_error(main)
