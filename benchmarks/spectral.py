"""Time and peak memory, forward and backward, of every pooling against plain torch on the same features.

python benchmarks/spectral.py --output spectral.json
python benchmarks/spectral.py --shapes 10x256x7x7 --methods mpn_cov:exact isqrt_cov newton_schulz_autograd
python benchmarks/spectral.py --methods rivals --output rivals.json
python benchmarks/spectral.py --from spectral.json
python benchmarks/spectral.py --profile mpn_cov:exact --shapes 10x256x28x28
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import torch
from cases import REFERENCE, RIVALS, Case, check_name, exact_case, list_cases, make_case
from features import SMOOTH_FIELD, Shape, load_features, smooth_features
from machine import benchmark_facts
from measure import case_peak_bytes, interleaved_times, operator_table, run_case
from records import KIND, SCHEMA, CaseRecord, Record, ShapeRecord, load_record, save_record
from report import head, markdown, shape_table
from torch import Tensor

from fgvc.cli import exit_on_user_error
from fgvc.errors import ConfigError
from fgvc.io import require_own
from fgvc.provenance import commit_label, source_state

SHAPES = ("10x256x7x7", "10x256x14x14", "10x256x28x28", "32x512x14x14")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", metavar="BxCxHxW", help=f"default: {' '.join(SHAPES)}")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help=f"default: {' '.join(list_cases())}")
    parser.add_argument("--features", type=Path, help=".npy file (N, C, H, W) to measure on, in batches of 10 and 32")
    parser.add_argument("--repetitions", type=int, default=15, help="timed rounds (default 15)")
    parser.add_argument("--warm-up", type=int, default=2, help="untimed runs of each candidate before (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="of features, incoming gradients, order (default 0)")
    parser.add_argument("--threads", type=int, help="of torch (default: as torch chooses); 1 where cores are shared")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda (never run by the authors)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--output", type=Path, help="JSON file to save everything in")
    what.add_argument("--from", type=Path, dest="saved", metavar="FILE", help="print a saved result, measure nothing")
    what.add_argument("--profile", metavar="METHOD", help="print the operators of one candidate instead")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    given = parse_arguments(arguments)
    if given.saved:
        print(markdown(load_record(given.saved)))
        return
    check_settings(given)
    # set even to what it is: MKL then stops choosing by itself, as it would from the first memory measurement on
    torch.set_num_threads(given.threads or torch.get_num_threads())
    inputs = make_inputs(given)
    chosen = RIVALS if given.methods == ["rivals"] else given.methods or list_cases()
    names = [given.profile] if given.profile else list(dict.fromkeys([REFERENCE, *chosen]))
    for shape in inputs:
        for name in names:
            check_name(name, channels=shape[1])  # before the first of many minutes
    if given.profile:
        for shape, features in inputs.items():
            print(f"{given.profile} at {'x'.join(map(str, shape))}, one thread\n")
            print(operator_table(make_case(given.profile, features.to(given.device), given.seed)))
        return
    record = new_record(given, names, list(inputs))
    print(head(record), flush=True)
    for number, (shape, features) in enumerate(inputs.items(), start=1):
        print(f"measuring {'x'.join(map(str, shape))}, {number} of {len(inputs)}", file=sys.stderr)
        found = measure_shape([make_case(name, features.to(given.device), given.seed) for name in names], shape, given)
        print(f"\n{shape_table(found)}", flush=True)
        record = replace(record, shapes=[*record.shapes, found])
        if given.output:
            save_record(given.output, record)  # after each, so that an interruption costs one shape


def check_settings(given: argparse.Namespace) -> None:
    """Raise ConfigError for a number out of range, a device that is not here, or settings that contradict."""
    if given.repetitions < 1 or given.warm_up < 1:
        raise ConfigError(f"--repetitions {given.repetitions} --warm-up {given.warm_up}: both must be at least 1")
    if given.threads is not None and given.threads < 1:
        raise ConfigError(f"--threads {given.threads}: must be at least 1")
    if not 0 <= given.seed < 2**63:
        raise ConfigError(f"--seed {given.seed}: must be at least 0 and below 2^63")
    if given.device not in ("cpu", "cuda") or (given.device == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"--device {given.device}: not available here, choose cpu or, with a GPU, cuda")
    if given.features and given.shapes:
        raise ConfigError("--features brings its own shapes; leave out --shapes")
    if given.output and given.output.is_dir():
        raise ConfigError(f"--output {given.output}: is a folder, give a file")
    if given.output:
        require_own(given.output, KIND)  # before the work


def make_inputs(given: argparse.Namespace) -> dict[Shape, Tensor]:
    """The features (B, C, H, W) of each shape."""
    if given.features:
        return load_features(given.features)
    return {shape: smooth_features(shape, given.seed) for shape in map(parse_shape, given.shapes or SHAPES)}


def parse_shape(text: str) -> Shape:
    parts = text.split("x")
    if len(parts) != 4 or not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise ConfigError(f"--shapes {text}: expected four numbers above 0 as in 10x256x14x14 (B x C x H x W)")
    batch, channels, height, width = map(int, parts)
    return batch, channels, height, width


def new_record(given: argparse.Namespace, names: list[str], shapes: list[Shape]) -> Record:
    """A record without results yet."""
    settings = {"methods": names, "shapes": [list(shape) for shape in shapes]}
    settings |= {"repetitions": given.repetitions, "warm_up": given.warm_up, "seed": given.seed}
    settings |= {"threads": given.threads, "device": given.device}
    settings |= {"features": given.features and str(given.features)}
    source = f"file {given.features.name}, its first images" if given.features else SMOOTH_FIELD
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Record(SCHEMA, started, commit_label(source_state()), benchmark_facts(given.device), settings, source, [])


def measure_shape(cases: list[Case], shape: Shape, given: argparse.Namespace) -> ShapeRecord:
    """Times first, then memory, gradients and errors in runs of their own."""
    times = interleaved_times(cases, given.repetitions, given.warm_up, given.seed)
    records = [
        CaseRecord(
            case.name,
            case.label,
            forward,
            backward,
            case_peak_bytes(case),
            gradient_norm(case),
            *errors(case, given.seed),
        )
        for case, (forward, backward) in zip(cases, times, strict=True)
    ]
    return ShapeRecord(list(shape), records)


def gradient_norm(case: Case) -> float | None:
    """Norm of the features' gradient, None where it is not finite, 0 without a backward pass."""
    gradient = run_case(case)
    if gradient is None:
        return 0.0
    norm = float(gradient.double().norm())
    return norm if gradient.isfinite().all() else None


def errors(case: Case, seed: int) -> tuple[float | None, float | None]:
    """Errors of descriptor and gradient as `CaseRecord` has them, on the features in float64."""
    exact = exact_case(case.name)
    if exact is None:
        return None, None
    results = []
    for name in (case.name, exact):
        wide = make_case(name, case.x.detach().double(), seed)
        descriptor = wide.layer(wide.x)
        results.append((descriptor.detach(), *torch.autograd.grad(descriptor, wide.x, wide.grad)))
    of_descriptor, of_gradient = (
        float((ours - right).norm() / right.norm()) for ours, right in zip(*results, strict=True)
    )
    return of_descriptor, of_gradient if math.isfinite(of_gradient) else None


if __name__ == "__main__":
    exit_on_user_error(main)
