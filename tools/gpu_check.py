"""What fgvc does on a GPU, in ten minutes: speed, memory, numbers against the CPU, a killed run. One JSON, one page.

python tools/gpu_check.py --output gpu_check
python tools/gpu_check.py --output gpu_check --only poolings step
python tools/gpu_check.py --output quick --device cpu --quick
"""

import argparse
import contextlib
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fgvc.cli import exit_on_user_error
from fgvc.errors import ConfigError
from fgvc.io import to_json, write_output
from fgvc.models import create_model
from fgvc.pooling import Pooling, create_pooling, list_poolings, published_gradient
from fgvc.presentation.render import markdown_table
from fgvc.provenance import commit_label, machine_facts, source_state, versions
from fgvc.runs.compare import compare_runs
from fgvc.runs.summary import read_run

Row = dict[str, Any]
KIND = "GPU check"
BY_PRODUCTS = ("mpn_cov", "seb")
"""Poolings with `solver="products"`."""


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        shapes: Features of a pooling, (B, C, H, W).
        backbone, pixels, batch: Model of the training step, and its input.
        reduction: Number of channels in front of the pooling of the model.
        images: Images of the training runs, half of them for the test.
        workers: Processes that read images.
        repetitions: Timed repetitions; the table has their median.
    """

    shapes: Sequence[tuple[int, int, int, int]]
    backbone: str
    reduction: int
    pixels: int
    batch: int
    images: int
    workers: int
    repetitions: int


FULL = Size(
    shapes=((10, 256, 7, 7), (10, 256, 14, 14), (10, 256, 28, 28), (32, 512, 14, 14)),
    backbone="resnet50",
    reduction=256,
    pixels=448,
    batch=16,
    images=512,
    workers=8,
    repetitions=10,
)
QUICK = Size(
    shapes=((2, 12, 3, 3), (2, 12, 4, 4)),
    backbone="test_resnet",
    reduction=8,
    pixels=64,
    batch=4,
    images=16,
    workers=1,
    repetitions=1,
)


class Check:
    """Measures on one device.

    Args:
        device: "cuda" or "cpu".
        size: how much.
        folder: folder of the training runs, new.
    """

    def __init__(self, device: str, size: Size, folder: Path) -> None:
        self.device, self.size, self.folder = torch.device(device), size, folder

    def poolings(self) -> Iterator[Row]:
        """Forward and backward of every pooling, each way to compute it, and its distance from the CPU's float64."""
        generator = torch.Generator().manual_seed(0)
        for shape in self.size.shapes:
            # smooth maps with some correlation between channels, as features have
            mixed = torch.randn(shape[1], shape[1], generator=generator) / shape[1] ** 0.5
            features = torch.einsum("ij,bjhw->bihw", mixed, torch.randn(shape, generator=generator)).relu()
            for name in list_poolings():
                truths: dict[Any, tuple[Tensor, Tensor]] = {}
                for how, options in self._ways(name):
                    row: Row = {"shape": "x".join(map(str, shape)), "pooling": name, "computed": how}
                    with noted(row):
                        pool = _pooling(name, shape[1], options)
                        row |= self._timed(lambda x, pool=pool: pool(x), features)
                        if shape != self.size.shapes[-1]:  # the largest takes the CPU too long
                            rule = options.get("gradient")
                            if rule not in truths:
                                truths[rule] = _passed(_pooling(name, shape[1], options | {"solver": "eigh"}), features)
                            truth = truths[rule]
                            found = _passed(pool, features.to(self.device))
                            row |= {"output_error": _distance(found[0], truth[0])}
                            row |= {"gradient_error": _distance(found[1], truth[1])}
                    yield row

    def _ways(self, name: str) -> list[tuple[str, Row]]:
        if published_gradient(name) is None:
            return [("", {})]
        ways: list[tuple[str, Row]] = [("eigh here", {"eigh_device": "same"})]
        if self.device.type != "cpu":
            ways.append(("eigh on the CPU", {"eigh_device": "cpu"}))
        if name in BY_PRODUCTS:
            exact = {"gradient": "exact"}
            ways += [
                ("eigh here, exact", {**exact, "eigh_device": "same"}),
                ("products", {**exact, "solver": "products"}),
            ]
        return ways

    def step(self) -> Iterator[Row]:
        """A training step of the whole model: without a covariance, with one, and in less precision."""
        for method, options in (("gap", {}), ("isqrt_cov", {}), ("mpn_cov", {}), ("seb", {}), ("seb", _PRODUCTS)):
            for precision in ("float32", "bf16", "fp16"):
                row: Row = {"method": method, **options, "precision": precision}
                with noted(row):
                    row |= self._step(method, options, precision, compiled=False)
                yield row

    def compile(self) -> Iterator[Row]:
        """The same step under torch.compile."""
        for method, options in (("gap", {}), ("isqrt_cov", {}), ("mpn_cov", {}), ("mpn_cov", _PRODUCTS)):
            row: Row = {"method": method, **options, "precision": "bf16", "compiled": True}
            with noted(row):
                row |= self._step(method, options, "bf16", compiled=True)
            yield row

    def _step(self, method: str, options: Row, precision: str, *, compiled: bool) -> Row:
        size, device = self.size, self.device
        model: nn.Module = create_model(
            size.backbone, method=method, num_classes=200, reduction=size.reduction, **options
        )
        model = model.to(device, memory_format=torch.channels_last).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        images = torch.randn(size.batch, 3, size.pixels, size.pixels, device=device)
        images = images.contiguous(memory_format=torch.channels_last)
        targets = torch.arange(size.batch, device=device) % 200
        kinds = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
        # code for the CPU takes minutes to compile and is not what is asked
        backend = "inductor" if device.type == "cuda" else "aot_eager"
        called: Callable[[Tensor], Tensor] = torch.compile(model, backend=backend) if compiled else model

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast(device.type, kinds[precision], enabled=kinds[precision] is not None):
                loss = nn.functional.cross_entropy(called(images).float(), targets)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

        measured = self._measured(step)
        return {"images_per_s": round(1e3 * size.batch / measured["ms"], 1), **measured}

    def runs(self) -> Iterator[Row]:
        """`fgvc train` on JPEGs with the whole loop; then the same, killed after its first epoch and continued."""
        row: Row = {"run": f"{self.size.backbone}, isqrt_cov, {self.size.pixels} px, {self.size.workers} workers"}
        with noted(row):
            write_images(self.folder / "images", self.size.images)
            self._train("straight").wait()
            run = read_run(self.folder / "straight")
            assert run.final is not None
            count = run.epochs * self.size.images // 2
            row |= {"train_images_per_s": round(count / run.seconds["train"], 1), "peak_memory_mb": run.peak_memory_mb}
        yield row
        row = {"run": "killed and continued"}
        with noted(row):
            process = self._train("killed")
            while process.poll() is None and not (self.folder / "killed" / "metrics.csv").exists():
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
            process.wait()
            self._train("killed").wait()
            compared = compare_runs(self.folder / "straight", self.folder / "killed")
            row |= {"identical": compared.identical, "verdict": compared.verdict}
        yield row

    def _train(self, name: str) -> "subprocess.Popen[bytes]":
        size = self.size
        settings = [f"dataset.root={self.folder / 'images'}", "dataset=folder", f"run_dir={self.folder / name}"]
        settings += [f"backbone.name={size.backbone}", "method=isqrt_cov", f"dataset.transform.size={size.pixels}"]
        settings += ["trainer.epochs=2", f"trainer.batch_size={size.batch}", f"trainer.workers={size.workers}"]
        settings += [f"trainer.device={self.device.type}", f"method.reduction={size.reduction}"]
        settings += ["name=gpu_check", "trainer.min_steps=null", "backbone.pretrained=false", "backbone.weights=null"]
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen([sys.executable, "-m", "fgvc", "train", *settings], stdout=log, stderr=log)

    def _timed(self, layer: Callable[[Tensor], Tensor], features: Tensor) -> Row:
        x = features.to(self.device).requires_grad_()
        grad = torch.ones_like(layer(x.detach()))

        def passes() -> None:
            torch.autograd.grad(layer(x), x, grad)

        return self._measured(passes)

    def _measured(self, run: Callable[[], None]) -> Row:
        """Median milliseconds after two calls that do not count, and on a GPU the peak of the memory in MB."""
        gpu = self.device.type == "cuda"
        times = []
        for number in range(self.size.repetitions + 2):
            if gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            run()
            if gpu:
                torch.cuda.synchronize()
            if number >= 2:
                times.append(1e3 * (time.perf_counter() - start))
        row: Row = {"ms": round(statistics.median(times), 3), "spread_ms": round(max(times) - min(times), 3)}
        return row | ({"peak_mb": round(torch.cuda.max_memory_allocated() / 2**20)} if gpu else {})


_PRODUCTS: Row = {"gradient": "exact", "solver": "products"}
CHECKS = ("poolings", "step", "compile", "runs")


@contextlib.contextmanager
def noted(row: Row) -> Iterator[None]:
    """An error becomes part of the result: on a new machine each is news, and none may hide the others."""
    try:
        yield
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]


def _pooling(name: str, channels: int, options: Row) -> Pooling:
    keep = {"keep": max(1, channels - 50)} if name == "svd_topn" else {}
    torch.manual_seed(0)  # the same weights on each device
    return create_pooling(name, channels=channels, **options, **keep).eval()  # dropcov draws random numbers in training


def _passed(pool: Pooling, features: Tensor) -> tuple[Tensor, Tensor]:
    """The descriptor and the gradient of its entries' sum, on the CPU."""
    pool, x = pool.to(features.device), features.detach().clone().requires_grad_()
    result = pool(x)
    (gradient,) = torch.autograd.grad(result.sum(), x)
    return result.detach().cpu(), gradient.cpu()


def _distance(found: Tensor, true: Tensor) -> float:
    return float((found - true).norm() / true.norm())


def write_images(folder: Path, count: int) -> None:
    """JPEGs of 500 x 375 pixels in train/ and test/, two classes that differ in colour."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for number in range(count // 2):
            coarse = rng.integers(0, 200, (15, 20, 3), dtype=np.uint8)
            coarse[..., number % 2] += 55
            path = folder / split / ("red", "green")[number % 2] / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)


def page(record: Row) -> str:
    """The result in Markdown."""
    machine = record["machine"]
    lines = ["# GPU check", ""]
    lines += [f"{record['device']}, torch {record['versions']['torch']}, {machine['cpu']}, {machine['cores']} cores,"]
    lines += [f"commit {record['commit'] or 'unknown'}, {record['seconds']:.0f} s. Times are medians."]
    lines += ["Errors are distances from the same layer on the CPU, in units of the norm.", ""]
    for name, rows in record["checks"].items():
        columns = list(dict.fromkeys(key for row in rows for key in row))
        cells = [[_cell(row.get(column, "")) for column in columns] for row in rows]
        lines += [f"## {name}", "", str(getattr(Check, name).__doc__), "", markdown_table(columns, cells), ""]
    return "\n".join(lines)


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1 else str(value)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="new folder for the results and the training runs")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that the script works")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=CHECKS, help="leave the other checks out")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    given = parser.parse_args(arguments)
    if given.output.exists():
        raise ConfigError(f"--output {given.output} exists; give a new folder")
    if given.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("torch finds no GPU here; give --device cpu --quick to try the script")
    given.output.mkdir(parents=True)
    check = Check(given.device, QUICK if given.quick else FULL, given.output.resolve())
    record: Row = {
        "device": torch.cuda.get_device_name() if given.device == "cuda" else "cpu",
        "commit": commit_label(source_state()),
        "machine": machine_facts(),
        "versions": versions(),
        "quick": given.quick,
        "checks": {},
    }
    start = time.perf_counter()
    for name in given.only:
        rows = record["checks"][name] = []
        for row in getattr(check, name)():
            rows.append(row)
            print(name, *(f"{key}={value}" for key, value in row.items()), flush=True)
        record["seconds"] = time.perf_counter() - start
        # after each check: what is measured stays, whatever happens to the next
        write_output(given.output / "gpu_check.json", to_json(record), KIND)
        write_output(given.output / "gpu_check.md", page(record), KIND)
    print(f"written: {given.output / 'gpu_check.json'}, {given.output / 'gpu_check.md'}")


if __name__ == "__main__":
    exit_on_user_error(main)
