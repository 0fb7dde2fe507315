"""Error of SVD-TopN's published gradient, relative to the exact one, by the number of locations.

python benchmarks/topn_leak.py

The features are rectified normal numbers with 256 channels. 206 eigenvalues are kept. `fused` is the pooling of fgvc,
which knows null eigenvalues. `float64` decomposes a covariance centred in float64. `float32` decomposes one that is
centred by a matrix of float32, as in the released layer.
"""

from collections.abc import Callable

import torch
from machine import benchmark_facts, machine_line
from torch import Tensor

from fgvc.pooling import create_pooling
from fgvc.spectral import covariance, matrix_sqrt, upper_triangle

CHANNELS, KEPT, SEEDS = 256, 206, 10


def centred_in_float32(x: Tensor) -> Tensor:
    """Covariance (B, C, C) as the released layer computes it, X J X^T with J in float32."""
    features, m = x.flatten(2).double(), x[0, 0].numel()
    centring = torch.eye(m) / m - torch.full((m, m), 1 / m / m)
    return features @ centring.double() @ features.mT


LAYERS: dict[str, Callable[[Tensor, str], Tensor]] = {
    "fused": lambda x, rule: create_pooling("svd_topn", channels=CHANNELS, gradient=rule)(x),
    "float64": lambda x, rule: upper_triangle(matrix_sqrt(covariance(x), rule, keep=KEPT)),
    "float32": lambda x, rule: upper_triangle(matrix_sqrt(centred_in_float32(x), rule, keep=KEPT)),
}


def error(layer: Callable[[Tensor, str], Tensor], side: int, scale: float, seed: int) -> float:
    """||published - exact|| / ||exact|| of the gradient that reaches the features of one image."""
    generator = torch.Generator().manual_seed(seed)
    x = (scale * torch.randn(1, CHANNELS, side, side, generator=generator).relu()).requires_grad_()
    weights = torch.randn(1, CHANNELS * (CHANNELS + 1) // 2, generator=generator)
    rules = ("exact", "topn_published")
    exact, published = (torch.autograd.grad((layer(x, rule) * weights).sum(), x)[0] for rule in rules)
    return float((published - exact).norm() / exact.norm())


def main() -> None:
    machine = benchmark_facts()
    print(f"{machine_line(machine)}; torch {machine['versions']['torch']}; seeds 0 to {SEEDS - 1}: lowest to highest\n")
    print("| locations | features times | fused | float64 | float32 |\n| --: | --: | --: | --: | --: |")
    for side in (14, 28):
        for scale in (1.0, 0.1):
            errors = [sorted(error(layer, side, scale, seed) for seed in range(SEEDS)) for layer in LAYERS.values()]
            cells = " | ".join(f"{found[0]:.1e} to {found[-1]:.1e}" for found in errors)
            print(f"| {side} x {side} | {scale:g} | {cells} |")


if __name__ == "__main__":
    main()
