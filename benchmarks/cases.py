"""What can be measured, by name: every pooling of fgvc and the baselines."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from baselines import (
    NEWTON_SCHULZ_ITERATIONS,
    eigh_alone,
    newton_schulz_chain,
    pade_chain,
    plain_covariance,
    sqrth_chain,
    svd_chain,
    taylor_chain,
)
from torch import Tensor

from fgvc.errors import ConfigError
from fgvc.pooling import Pooling, create_pooling, list_poolings, pooling_label, published_gradient
from fgvc.spectral.products import SOLVERS

REFERENCE = "eigh"
_CHAINS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "svd_autograd": ("textbook SVD, autograd", svd_chain),
    "matrix_sqrth": ("torch.linalg.matrix_sqrth", sqrth_chain),
    "mpa_lya_released": ("MPA-Lya as released", pade_chain),
    "mtp_lya_released": ("MTP-Lya as released", taylor_chain),
    "newton_schulz_autograd": (f"Newton-Schulz, {NEWTON_SCHULZ_ITERATIONS} iterations, autograd", newton_schulz_chain),
}
# whose published gradient is not that of the function computed are measured with the right one too
_EXACT_TOO = ("mpn_cov", "svd_topn")
EXACT_ROOT = "mpn_cov:exact"
_BY_PRODUCTS = (f"{EXACT_ROOT}@products", "seb:exact@products")
RIVALS = (*_CHAINS, "isqrt_cov", "mpa_lya", "mtp_lya", "mpn_cov", EXACT_ROOT, "seb", *_BY_PRODUCTS)
"""Ways to the square root of a covariance, those of fgvc last: what `--methods rivals` stands for."""


@dataclass(frozen=True)
class Case:
    """One candidate on one input.

    Attributes:
        name: as `--methods` takes it.
        label: as the table names it.
        layer: x -> descriptor.
        x: input, a leaf with gradient where there is a backward pass to measure.
        grad: dLoss/d descriptor, None for a candidate without backward pass.
    """

    name: str
    label: str
    layer: Callable[[Tensor], Any]
    x: Tensor
    grad: Tensor | None


def list_cases() -> list[str]:
    """All names, the reference and the baselines first; a pooling's gradient stands behind a colon.

    Behind an @ may stand its precision, `mpn_cov:exact@float32`, or its solver, `mpn_cov:exact@products`.
    """
    poolings = [
        name
        for pooling in list_poolings()
        for name in ([pooling, f"{pooling}:exact"] if pooling in _EXACT_TOO else [pooling])
    ]
    return [REFERENCE, *_CHAINS, *poolings, *_BY_PRODUCTS]


def exact_case(name: str) -> str | None:
    """The candidate that this one is judged by: the same map with its exact gradient; None for one without a spectrum.

    What approximates the square root is judged by the square root.
    """
    pooling = _parts(name)[0]
    if name in _CHAINS or pooling in ("isqrt_cov", "mpa_lya", "mtp_lya"):
        return EXACT_ROOT
    if name == REFERENCE or published_gradient(pooling) is None:
        return None
    return f"{pooling}:exact"


def check_name(name: str, channels: int) -> None:
    """Raise ConfigError where `name` is none of `list_cases` and no pooling with one of its gradients."""
    if name == REFERENCE or name in _CHAINS:
        return
    if _parts(name)[0] not in list_poolings():
        raise ConfigError(
            f"unknown method {name!r}; choose of {', '.join(list_cases())}, or a pooling with another gradient, "
            "precision or solver as POOLING:GRADIENT@DTYPE or POOLING:exact@products; or give rivals alone"
        )
    _pooling(name, channels)


def make_case(name: str, features: Tensor, seed: int) -> Case:
    """The candidate of this name on features (B, C, H, W) float32, with a Gaussian incoming gradient."""
    if name == REFERENCE:
        return Case(name, "torch.linalg.eigh alone", eigh_alone, plain_covariance(features), None)
    layer: Callable[[Tensor], Tensor]
    if name in _CHAINS:
        label, layer = _CHAINS[name]
    else:
        pooling, gradient, how = _parts(name)
        label = pooling_label(pooling, gradient, {} if how == {"dtype": "float64"} else how)
        layer = _pooling(name, features.shape[1]).to(features.device)
    x = features.detach().requires_grad_()
    with torch.no_grad():
        result = layer(x)
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(result.shape, generator=generator).to(result)
    return Case(name, label, layer, x, grad)


def _parts(name: str) -> tuple[str, str | None, dict[str, str]]:
    """Pooling, gradient (None: as published) and precision or solver of POOLING[:GRADIENT][@DTYPE or @products]."""
    method, _, how = name.partition("@")
    pooling, _, gradient = method.partition(":")
    return pooling, gradient or None, {"solver": how} if how in SOLVERS else {"dtype": how or "float64"}


def _pooling(name: str, channels: int) -> Pooling:
    pooling, gradient, how = _parts(name)
    # the default of svd_topn, which has none for 50 channels or fewer
    options: dict[str, Any] = {"keep": max(1, channels - 50)} if pooling == "svd_topn" else {}
    return create_pooling(pooling, channels=channels, gradient=gradient, **how, **options)
