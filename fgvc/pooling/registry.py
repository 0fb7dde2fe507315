"""Poolings by name: what a pooling is, the decorator that registers one where its code is, and how one is built."""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fgvc.errors import ConfigError
from fgvc.spectral.covariance import check_features
from fgvc.spectral.eigen import DEVICES
from fgvc.spectral.precision import spectral_dtype

SHARED = ("channels", "map_channels", "gradient", "eigh_device", "dtype", "solver")
"""Arguments of `create_pooling` that are handed to a method if it takes them; its other parameters are its options."""


class Pooling(nn.Module):
    """Base of the poolings: (B, channels, H, W) -> (B, out_features); a pooling defines `pool`.

    Args:
        channels: C of the input.
        out_features: Length of the descriptor.

    Raises:
        ConfigError: one of them is no whole number of at least 1, or `out_features` is 2^31 or more.
        ValueError: when called, for features of another shape or another number of channels.
        TypeError: when called, for features that are not floating point.
    """

    def __init__(self, channels: int, out_features: int) -> None:
        super().__init__()
        self.channels = whole_number("channels", channels, at_least=1)
        self.out_features = whole_number("out_features", out_features, at_least=1, below=2**31)

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        return self.pool(x)

    def pool(self, x: Tensor) -> Tensor:
        """The descriptor (B, out_features) of features that were checked, (B, channels, H, W) or (B, channels, M)."""
        raise NotImplementedError

    def check(self, x: Tensor) -> None:
        """Raise what the class says for features that the pooling cannot take."""
        check_features(x)
        if x.shape[1] != self.channels:
            raise ValueError(f"built for {self.channels} channels, got features of shape {tuple(x.shape)}")

    def extra_repr(self) -> str:
        return f"channels={self.channels}, out_features={self.out_features}"


def whole_number(name: str, value: int, *, at_least: int, below: int | None = None) -> int:
    """`value`, where it is an int in range; ConfigError otherwise."""
    # bool is an int to Python, but True channels are a mistake
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ConfigError(f"{name} must be a whole number of at least {at_least}, got {value!r}")
    if below is not None and value >= below:
        raise ConfigError(f"{name} must be below {below}, got {value!r}")
    return value


PoolingType = TypeVar("PoolingType", bound=type[Pooling])


@dataclass(frozen=True)
class Method:
    """A pooling by name.

    Attributes:
        label: Name in tables and figures.
        source: Paper, or "ours".
        build: Function or class that makes the layer; it takes all of `shared` and `options` by name.
        shared: Names of those of `SHARED` that `build` takes.
        options: Names of the method's options.
        reduced: Whether the head reduces the channels in front of it.
        gradient: Name of the published gradient; None if there is no choice of gradient.
        gradients: Names of all gradients to choose from.
        gradient_options: Names of the options that go with the published gradient alone.
    """

    label: str
    source: str
    build: Callable[..., Pooling]
    shared: Sequence[str]
    options: Sequence[str]
    reduced: bool = True
    gradient: str | None = None
    gradients: Collection[str] = ()
    gradient_options: Sequence[str] = ()


class _Methods(dict[str, Method]):
    def __missing__(self, name: str) -> Method:
        raise ConfigError(f"unknown pooling method {name!r}; choose one of {', '.join(self)}")


_METHODS = _Methods()


def add_method(name: str, method: Method) -> None:
    """Add a method to the table; the two decorators do this.

    Raises:
        ValueError: The name is taken.
    """
    if name in _METHODS:
        raise ValueError(f"there is a pooling method {name!r} already; choose another name")
    _METHODS[name] = method


def register_pooling(
    name: str, label: str, *, source: str, reduced: bool = True, gradients: Sequence[str] = ()
) -> Callable[[PoolingType], PoolingType]:
    """Decorator of a `Pooling` class: makes it a choice of `create_pooling` and of `method=`.

    The class takes `channels` and, if it has a use for them, `map_channels`, `gradient`, `eigh_device`, `dtype` (a
    torch dtype) and `solver`. Its other parameters are the options of the method; they need defaults, and its docstring
    says what they are. It raises ConfigError, ValueError or TypeError for a value that it refuses.

    A method that maps the eigenvalues of the covariance is a function instead, see
    `fgvc.pooling.covariance.register_spectral_pooling`.

    Args:
        name: Name in configurations, e.g. "isqrt_cov".
        label: Name in tables and figures, e.g. "iSQRT-COV".
        source: Paper, e.g. "Li, Xie, Wang, Gao, CVPR 2018", or "ours".
        reduced: Whether the head reduces the channels in front of it, as it does for covariances.
        gradients: Names of the gradients that the class takes as `gradient`, the published one first.
    """

    def register(pooling: PoolingType) -> PoolingType:
        parameters = list(inspect.signature(pooling).parameters)
        method = Method(
            label,
            source,
            build=pooling,
            shared=[key for key in parameters if key in SHARED],
            options=[key for key in parameters if key not in SHARED],
            reduced=reduced,
            gradient=gradients[0] if gradients else None,
            gradients=gradients,
        )
        add_method(name, method)
        return pooling

    return register


def list_poolings() -> list[str]:
    """Names that `create_pooling` takes, in the order of the tables: that in which they are registered."""
    return list(_METHODS)


def is_reduced(name: str) -> bool:
    """Whether the head reduces the channels in front of the method. Raises ConfigError for an unknown name."""
    return _METHODS[name].reduced


def published_gradient(name: str) -> str | None:
    """The gradient rule a method has by default, None where there is no choice. Raises ConfigError if unknown."""
    return _METHODS[name].gradient


def pooling_source(name: str) -> str:
    """The paper that a method is from, or "ours". Raises ConfigError for an unknown name."""
    return _METHODS[name].source


def pooling_label(name: str, gradient: str | None = None, options: Mapping[str, Any] | None = None) -> str:
    """Name of the method in tables and figures, with what is not as published: "SEB (exact)", "MPN-COV [alpha=0.25]".

    Raises:
        ConfigError: unknown method.
    """
    label = _METHODS[name].label
    if gradient not in (None, _METHODS[name].gradient):
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
    map_channels: Sequence[int] = (),
    gradient: str | None = None,
    eigh_device: str = "auto",
    dtype: str | torch.dtype = "float64",
    solver: str = "eigh",
    **options: Any,
) -> Pooling:
    """Build a pooling layer.

    Args:
        name: one of `list_poolings()`.
        channels: C of its input (B, C, H, W).
        map_channels: channels of each map where the input holds those of several layers, for "hbp"; the sum is C.
        gradient: gradient in place of the published one (None: as published); for a method that maps eigenvalues, a
            rule in `fgvc.spectral.GRADIENTS`.
        eigh_device: where eigendecompositions run: "auto", "same" (as the features) or "cpu" (as the papers do). Of no
            effect on methods without one.
        dtype: precision of the covariance and all that is made of it, "float64" or "float32", whatever autocast does.
            Of no effect on methods without one, which compute in float32.
        solver: "eigh", or "products" for a square root or "seb" with gradient "exact", see docs/spectral.md.
        options: of the method, e.g. `iterations=5` for "isqrt_cov"; they are described where it is registered, and
            listed in docs/spectral.md. Options of the published gradient go with it.

    Returns:
        A module (B, C, H, W) -> (B, module.out_features), float32 (float64 for float64 input).

    Raises:
        ConfigError: unknown method, gradient, solver or option (the valid ones are listed), a gradient or solver where
            there is none or where it does not apply, or an option's value out of range.
    """
    method = _METHODS[name]
    whole_number("channels", channels, at_least=1)  # before a method makes something of it
    if eigh_device not in DEVICES:
        raise ConfigError(f"unknown eigh_device {eigh_device!r}; choose one of {', '.join(DEVICES)}")
    try:
        shared: dict[str, Any] = {"channels": channels, "eigh_device": eigh_device, "solver": solver}
        shared["map_channels"] = map_channels
        shared["dtype"] = spectral_dtype(dtype)
        if solver != "eigh" and "solver" not in method.shared:
            raise ConfigError(f"method {name!r} has no choice of solver, got solver={solver!r}; leave it out")
        if gradient is not None and not method.gradients:
            raise ConfigError(f"method {name!r} has no choice of gradient, got gradient={gradient!r}; leave it out")
        if gradient is not None and gradient not in method.gradients:
            raise ConfigError(f"unknown gradient {gradient!r}; choose one of {', '.join(method.gradients)}")
        shared["gradient"] = gradient or method.gradient
        valid = [*method.options, *(method.gradient_options if gradient in (None, method.gradient) else ())]
        unknown = sorted(set(options) - set(valid))
        if unknown:
            raise ConfigError(
                f"unknown option {', '.join(unknown)} of method {name!r}; "
                f"{'with this gradient ' if method.gradient_options else ''}it takes {', '.join(valid) or 'none'}"
            )
        return method.build(**{key: shared[key] for key in method.shared}, **options)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:  # a value that the layer refuses
        raise ConfigError(f"method {name!r}: {error}") from error
