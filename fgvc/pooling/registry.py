"""The table of poolings by name, the one place that knows which method is which layer."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fgvc.errors import ConfigError
from fgvc.pooling.bilinear import BilinearPooling, CompactBilinearPooling
from fgvc.pooling.layers import GlobalAveragePooling, NewtonSchulzPooling, Pooling, SpectralPooling
from fgvc.spectral import (
    GRADIENTS,
    SCALED_SQRT,
    SQRT,
    AmplifiedSquareRoot,
    EigenvalueMap,
    GradientRule,
    Keep,
    Logarithm,
    Power,
    Rescaled,
    newton,
    power_iteration,
    taylor,
    trunc,
)
from fgvc.spectral.eigen import DEVICES
from fgvc.spectral.precision import spectral_dtype


@dataclass(frozen=True)
class _Plain:
    """A method without a choice of gradient: `build` is (channels[, dtype], **options) -> module."""

    label: str
    build: Callable[..., Pooling]
    second_order: bool = True


@dataclass(frozen=True)
class _Spectral:
    """A method that maps the eigenvalues of the covariance.

    Attributes:
        label: its name in tables and figures.
        gradient: name of the published gradient rule ("exact" for a method of our own).
        rule: **options -> the published rule; options that it takes belong to the gradient and go with it.
        f: **options -> map of the eigenvalues.
        keep: (channels, keep) -> eigenvalues that are kept, or None for all of them.
    """

    label: str
    gradient: str
    rule: Callable[..., GradientRule] | None = None
    f: Callable[..., EigenvalueMap] = lambda: SQRT
    keep: Callable[..., Keep] | None = None
    second_order: bool = True


def _square_root(alpha: float = 0.5, scale: float = 1.0) -> EigenvalueMap:
    power = SQRT if alpha == 0.5 else Power(alpha)
    return power if scale == 1 else Rescaled(power, scale)


def _kept(channels: int, keep: int | Sequence[int | None] | None = None) -> Keep:
    if keep is None and channels <= 50:
        raise ConfigError(f"svd_topn drops the 50 smallest eigenvalues by default, of {channels}: give it keep=N")
    if isinstance(keep, Sequence) and not isinstance(keep, str):
        if keep and isinstance(keep[0], int) and keep[0] >= channels:
            raise ConfigError(f"svd_topn with keep={list(keep)} drops all {channels} eigenvalues; lower its start")
        return tuple(keep)  # type: ignore[return-value]  # a configuration has lists; the layer checks what they hold
    return channels - 50 if keep is None else keep


_OF_EVERY_METHOD = ("channels", "dtype")
_METHODS: dict[str, _Plain | _Spectral] = {
    "gap": _Plain("GAP", GlobalAveragePooling, second_order=False),
    "bilinear": _Plain("B-CNN", BilinearPooling),  # Lin, RoyChowdhury, Maji, ICCV 2015
    "compact_bilinear": _Plain("CBP", CompactBilinearPooling),  # Gao, Beijbom, Zhang, Darrell, CVPR 2016
    "isqrt_cov": _Plain(
        "iSQRT-COV", lambda channels, dtype, iterations=5: NewtonSchulzPooling(channels, iterations, dtype)
    ),
    "mpn_cov": _Spectral("MPN-COV", "ordinary", f=_square_root),  # Li, Xie, Wang, Zuo, ICCV 2017
    "svd_pade": _Spectral("SVD-Padé", "pade"),  # this and the next five as compared by Song, Sebe, Wang, ICCV 2021
    "svd_taylor": _Spectral("SVD-Taylor", "taylor", taylor),
    "svd_pi": _Spectral("SVD-PI", "power_iteration", power_iteration),
    "svd_newton": _Spectral("SVD-Newton", "newton", newton),
    "svd_trunc": _Spectral("SVD-Trunc", "trunc", trunc),
    "svd_topn": _Spectral("SVD-TopN", "topn_published", keep=_kept),
    "seb": _Spectral("SEB", "ordinary", f=lambda: SCALED_SQRT),  # Song, Sebe, Wang, T-PAMI 2022
    "seb_spectral": _Spectral("SEB-spectral (ours)", "exact", f=AmplifiedSquareRoot),
    "log_cov": _Spectral("Log-COV", "exact", f=lambda ridge=1e-3: Logarithm(ridge)),  # Ionescu et al., ICCV 2015
}


def _method(name: str) -> _Plain | _Spectral:
    if name not in _METHODS:
        raise ConfigError(f"unknown pooling method {name!r}; choose one of {', '.join(_METHODS)}")
    return _METHODS[name]


def list_poolings() -> list[str]:
    """Names that `create_pooling` takes, in the order of the tables."""
    return list(_METHODS)


def is_second_order(name: str) -> bool:
    """Whether the method reads products of channels (all but GAP). Raises ConfigError for an unknown name."""
    return _method(name).second_order


def published_gradient(name: str) -> str | None:
    """The gradient rule a method has by default, None where there is no choice. Raises ConfigError if unknown."""
    method = _method(name)
    return method.gradient if isinstance(method, _Spectral) else None


def pooling_label(name: str, gradient: str | None = None, options: Mapping[str, Any] | None = None) -> str:
    """Name of the method in tables and figures, with what is not as published: "SEB (exact)", "MPN-COV [alpha=0.25]".

    Raises:
        ConfigError: unknown method.
    """
    label = _method(name).label
    if gradient not in (None, published_gradient(name)):
        label = f"{label} ({gradient})"
    if options:
        label = f"{label} [{', '.join(f'{key}={_shown(value)}' for key, value in sorted(options.items()))}]"
    return label


def _shown(value: Any) -> str:
    """An option's value; a band of eigenvalues as the slice that it is."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ":".join("" if part is None else str(part) for part in value)
    return str(value)


def create_pooling(
    name: str,
    *,
    channels: int,
    gradient: str | None = None,
    eigh_device: str = "auto",
    dtype: str | torch.dtype = "float64",
    **options: Any,
) -> Pooling:
    """Build a pooling layer.

    Args:
        name: one of `list_poolings()`.
        channels: C of its input (B, C, H, W).
        gradient: a rule in `fgvc.spectral.GRADIENTS` in place of the published one (None: as published).
        eigh_device: where eigendecompositions run: "auto", "same" (as the features) or "cpu" (as the papers do). Of no
            effect on methods without one.
        dtype: precision of the covariance and all that is made of it, "float64" or "float32", whatever autocast does.
            Of no effect on methods without one, which compute in float32.
        options: of the method: isqrt_cov, svd_pi, svd_newton(iterations), mpn_cov(alpha, scale), svd_taylor(degree),
            svd_trunc(limit), svd_topn(keep, N or a pair as in `fgvc.spectral.spectral_map`),
            seb_spectral(amplification, temperature), log_cov(ridge), compact_bilinear(out_features, seed). Options of
            the published gradient go with it.

    Returns:
        A module (B, C, H, W) -> (B, module.out_features), float32 (float64 for float64 input).

    Raises:
        ConfigError: unknown method, gradient or option (the valid ones are listed), a gradient where there is none or
            where it does not apply, or an option's value out of range.
    """
    method = _method(name)
    if channels < 1:
        raise ConfigError(f"channels must be at least 1, got {channels}")
    if eigh_device not in DEVICES:
        raise ConfigError(f"unknown eigh_device {eigh_device!r}; choose one of {', '.join(DEVICES)}")
    try:
        working = spectral_dtype(dtype)
        if isinstance(method, _Plain):
            if gradient is not None:
                raise ConfigError(f"method {name!r} has no choice of gradient, got gradient={gradient!r}; leave it out")
            _check_options(name, options, [method.build])
            pooling: Pooling = _call(method.build, {"channels": channels, "dtype": working, **options})
            return pooling
        layer = _layer(name, method, channels, gradient, options)
        return SpectralPooling(channels, **layer, eigh_device=eigh_device, dtype=working)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:  # a value that the layer refuses
        raise ConfigError(f"method {name!r}: {error}") from error


def _layer(
    name: str, method: _Spectral, channels: int, gradient: str | None, options: dict[str, Any]
) -> dict[str, Any]:
    """Map, gradient rule and kept eigenvalues of a spectral method, as `SpectralPooling` takes them."""
    if gradient is not None and gradient not in GRADIENTS:
        raise ConfigError(f"unknown gradient {gradient!r}; choose one of {', '.join(GRADIENTS)}")
    rule = method.rule if gradient in (None, method.gradient) else None
    _check_options(name, options, [part for part in (method.f, rule, method.keep) if part is not None])
    return {
        "f": _call(method.f, options),
        "gradient": gradient or method.gradient if rule is None else _call(rule, options),
        "keep": None if method.keep is None else _call(method.keep, {"channels": channels, **options}),
    }


def _call(part: Callable[..., Any], given: dict[str, Any]) -> Any:
    """Call `part` with those of the given arguments that it takes."""
    return part(**{key: given[key] for key in inspect.signature(part).parameters if key in given})


def _options(parts: Sequence[Callable[..., Any]]) -> list[str]:
    return [key for part in parts for key in inspect.signature(part).parameters if key not in _OF_EVERY_METHOD]


def _check_options(name: str, options: dict[str, Any], parts: Sequence[Callable[..., Any]]) -> None:
    """Raise ConfigError where a name in `options` is no parameter of any of `parts`."""
    unknown = sorted(set(options) - set(_options(parts)))
    if unknown:
        raise ConfigError(
            f"unknown option {', '.join(unknown)} of method {name!r}; "
            f"with this gradient it takes {', '.join(_options(parts)) or 'none'}"
        )
