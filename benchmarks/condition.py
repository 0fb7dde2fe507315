"""Error of the square root and of its gradient by condition number: solver "products" against solver "eigh".

python benchmarks/condition.py --output benchmarks/results/products_condition.csv

The features have a covariance with known eigenvectors and eigenvalues, from 1 down to 1 / condition in even steps on a
log scale, so that the square root and the gradient of the features are known to rounding. 64 channels, 14 x 14
locations, two images a seed. Relative errors: median and largest over the seeds.
"""

import argparse
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from machine import benchmark_facts, machine_line
from torch import Tensor

from fgvc.io import to_csv, write_text_atomic
from fgvc.presentation.render import markdown_table
from fgvc.provenance import commit_label, source_state
from fgvc.spectral import ConditionWarning, upper_triangle
from fgvc.spectral.descriptor import spectral_descriptor, symmetric_gradient
from fgvc.spectral.maps import SQRT
from fgvc.spectral.products import products_descriptor

CHANNELS, LOCATIONS, SEEDS = 64, 196, 10
EXPONENTS = range(2, 15, 2)
SOLVERS = {"eigh": lambda x: spectral_descriptor(x, SQRT), "products": products_descriptor}


def known_case(condition: float, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features (2, C, M), the incoming gradient, and the exact descriptor and gradient of the features."""
    generator = torch.Generator().manual_seed(seed)

    def orthonormal(rows: int) -> Tensor:
        noise = torch.randn(2, rows, CHANNELS, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(noise - noise.mean(dim=1, keepdim=True) if rows == LOCATIONS else noise).Q

    vectors, basis = orthonormal(CHANNELS), orthonormal(LOCATIONS)
    root = torch.logspace(0, -math.log10(condition) / 2, CHANNELS, dtype=torch.float64)
    grad = torch.randn(2, CHANNELS * (CHANNELS + 1) // 2, generator=generator, dtype=torch.float64)
    inner = vectors.mT @ symmetric_gradient(grad, CHANNELS) @ vectors / (root[:, None] + root)
    of_features = 2 / math.sqrt(LOCATIONS) * vectors @ (inner * root) @ basis.mT
    x = math.sqrt(LOCATIONS) * vectors * root @ basis.mT
    return x, grad, upper_triangle(vectors * root @ vectors.mT), of_features


def errors(solver: str, condition: float, seed: int) -> tuple[float, float, bool]:
    """Relative errors of descriptor and gradient, and whether the next call warns."""
    x, grad, *exact = known_case(condition, seed)
    x.requires_grad_()
    descriptor = SOLVERS[solver](x)
    found = (descriptor.detach(), *torch.autograd.grad(descriptor, x, grad))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        SOLVERS[solver](known_case(1.0, seed)[0])
    of_descriptor, of_gradient = (float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))
    return of_descriptor, of_gradient, any(warning.category is ConditionWarning for warning in caught)


def measure() -> pd.DataFrame:
    """A row a condition number, as text."""
    rows = []
    for exponent in EXPONENTS:
        row = {"Condition number": f"1e{exponent}"}
        for solver in SOLVERS:
            found = np.array([errors(solver, 10.0**exponent, seed) for seed in range(SEEDS)])
            for column, values in zip(("error", "error of gradient"), found.T[:2], strict=True):
                row[f"{solver}: {column}"] = f"{np.median(values):.0e} ({values.max():.0e})"
        row["products warns"] = {0: "no", SEEDS: "yes"}.get(int(found[:, 2].sum()), "sometimes")
        rows.append(row)
    return pd.DataFrame(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="CSV file to save the table in")
    output = parser.parse_args(arguments).output
    machine = benchmark_facts()
    print(f"{machine_line(machine)}; torch {machine['versions']['torch']}, {machine['threads']} threads")
    print(f"commit {commit_label(source_state())}; seeds 0 to {SEEDS - 1}: median (largest)\n")
    table = measure()
    print(markdown_table(list(table.columns), table.to_numpy().tolist()))
    if output:
        write_text_atomic(output, to_csv(table))


if __name__ == "__main__":
    main()
