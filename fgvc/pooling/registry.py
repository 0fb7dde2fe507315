"""The table of poolings by name, the one place that knows which method is which layer."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from fgvc.errors import ConfigError
from fgvc.pooling.layers import CovariancePooling, GlobalAveragePooling, Pooling
from fgvc.spectral import GRADIENTS, matrix_sqrt, newton_schulz_sqrt, scaling_eigen_branch


@dataclass(frozen=True)
class _Method:
    """One pooling method.

    Attributes:
        label: its name in tables and figures.
        build: (channels, [gradient,] **options) -> module.
        second_order: whether it reads products of channels, so that a channel reduction before it makes sense.
        gradient: the published gradient rule, or None where there is no choice.
    """

    label: str
    build: Callable[..., Pooling]
    second_order: bool = True
    gradient: str | None = None


def _isqrt_cov(channels: int, iterations: int = 5) -> Pooling:
    if not isinstance(iterations, int) or iterations < 1:
        raise ConfigError(f"iterations of isqrt_cov must be a whole number of at least 1, got {iterations!r}")
    return CovariancePooling(channels, partial(newton_schulz_sqrt, iterations=iterations))


def _mpn_cov(channels: int, gradient: str) -> Pooling:
    return CovariancePooling(channels, partial(matrix_sqrt, gradient=gradient))


def _seb(channels: int, gradient: str) -> Pooling:
    return CovariancePooling(channels, partial(scaling_eigen_branch, gradient=gradient))


_METHODS: dict[str, _Method] = {
    "gap": _Method("GAP", GlobalAveragePooling, second_order=False),
    "isqrt_cov": _Method("iSQRT-COV", _isqrt_cov),  # Li, Xie, Wang, Gao, CVPR 2018
    "mpn_cov": _Method("MPN-COV", _mpn_cov, gradient="ordinary"),  # Li, Xie, Wang, Zuo, ICCV 2017
    "seb": _Method("SEB", _seb, gradient="ordinary"),  # Song, Sebe, Wang, T-PAMI 2022
}


def _method(name: str) -> _Method:
    if name not in _METHODS:
        raise ConfigError(f"unknown pooling method {name!r}; choose one of {', '.join(_METHODS)}")
    return _METHODS[name]


def list_poolings() -> list[str]:
    """Names that `create_pooling` takes, in the order of the tables."""
    return list(_METHODS)


def is_second_order(name: str) -> bool:
    """Whether the method reads products of channels (all but GAP). Raises ConfigError for an unknown name."""
    return _method(name).second_order


def pooling_label(name: str, gradient: str | None = None) -> str:
    """Name of the method in tables and figures; a gradient other than the published one is added: "SEB (exact)".

    Raises:
        ConfigError: unknown method.
    """
    method = _method(name)
    return method.label if gradient in (None, method.gradient) else f"{method.label} ({gradient})"


def create_pooling(name: str, *, channels: int, gradient: str | None = None, **options: Any) -> Pooling:
    """Build a pooling layer.

    Args:
        name: one of `list_poolings()`.
        channels: C of its input (B, C, H, W).
        gradient: a rule in `fgvc.spectral.GRADIENTS` in place of the published one (None: as published).
        options: of the method, e.g. `iterations=5` for isqrt_cov.

    Returns:
        A module (B, C, H, W) -> (B, module.out_features), float32 (float64 for float64 input).

    Raises:
        ConfigError: unknown method, gradient or option (the valid ones are listed), or a gradient where there is none.
    """
    method = _method(name)
    if channels < 1:
        raise ConfigError(f"channels must be at least 1, got {channels}")
    if gradient is not None and method.gradient is None:
        raise ConfigError(f"method {name!r} has no choice of gradient, got gradient={gradient!r}; leave it out")
    if gradient is not None and gradient not in GRADIENTS:
        raise ConfigError(f"unknown gradient {gradient!r}; choose one of {', '.join(GRADIENTS)}")
    valid = [key for key in inspect.signature(method.build).parameters if key not in ("channels", "gradient")]
    unknown = sorted(set(options) - set(valid))
    if unknown:
        raise ConfigError(
            f"unknown option {', '.join(unknown)} of method {name!r}; it takes {', '.join(valid) or 'none'}"
        )
    chosen = {} if method.gradient is None else {"gradient": gradient or method.gradient}
    return method.build(channels, **chosen, **options)
