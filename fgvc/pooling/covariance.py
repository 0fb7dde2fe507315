"""Poolings whose descriptor is the upper triangle of a normalised covariance, (B, C, H, W) -> (B, C (C + 1) / 2).

iSQRT-COV normalises it by an iteration, Cho-TMLR and iSICE by other functions of a matrix. All others map its
eigenvalues: such a method is one small function at the end of this file, and `SpectralPooling` is the layer of all of
them.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from fgvc.errors import ConfigError
from fgvc.pooling.registry import Method, Pooling, add_method, register_pooling
from fgvc.spectral import (
    GRADIENTS,
    SCALED_SQRT,
    SQRT,
    AmplifiedSquareRoot,
    EigenvalueMap,
    GradientRule,
    Keep,
    Logarithm,
    LogCholesky,
    MatrixMap,
    PadeRoot,
    Power,
    Rescaled,
    SparseInverse,
    TaylorRoot,
    covariance,
    covariance_eigenvalues,
    lyapunov,
    matrix_descriptor,
    matrix_map,
    newton,
    newton_schulz_descriptor,
    newton_schulz_sqrt,
    power_iteration,
    taylor,
    trunc,
)
from fgvc.spectral.descriptor import layer_descriptor
from fgvc.spectral.eigen import symmetric_eigh
from fgvc.spectral.maps import band
from fgvc.spectral.precision import check_iterations, spectral_dtype
from fgvc.spectral.products import products_descriptor, uses_products
from fgvc.spectral.spectral_map import apply_layer, spectral_layer


class CovariancePooling(Pooling):
    """Base of the poolings whose descriptor is the upper triangle of a normalised covariance.

    (B, C, H, W) -> (B, C (C + 1) / 2). Computes in float64, or float32 by option, with autocast off; the result is
    float32, or float64 for float64 input.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels * (channels + 1) // 2)

    def normalise(self, cov: Tensor) -> Tensor:
        """The normalisation alone, (B, C, C) -> (B, C, C)."""
        raise NotImplementedError


@register_pooling("isqrt_cov", "iSQRT-COV", source="Li, Xie, Wang, Gao, CVPR 2018")
class NewtonSchulzPooling(CovariancePooling):
    """Covariance normalised by Newton-Schulz iteration (iSQRT-COV); see `fgvc.spectral.newton_schulz_descriptor`.

    Args:
        channels: C.
        iterations: Number of iterations, from 1 to 100.
        dtype: Working precision, float64 or float32.

    Raises:
        ValueError: `iterations` out of range, or another `dtype`.
    """

    def __init__(self, channels: int, iterations: int = 5, dtype: str | torch.dtype = torch.float64) -> None:
        super().__init__(channels)
        check_iterations(iterations)
        self.iterations = iterations
        self.dtype = spectral_dtype(dtype)

    def pool(self, x: Tensor) -> Tensor:
        return newton_schulz_descriptor(x, self.iterations, dtype=self.dtype)

    def normalise(self, cov: Tensor) -> Tensor:
        return newton_schulz_sqrt(cov, self.iterations, dtype=self.dtype)


class SpectralPooling(CovariancePooling):
    """Covariance normalised by a map of its eigenvalues; see `fgvc.spectral.spectral_descriptor`.

    Args:
        channels: C.
        f, gradient, keep, eigh_device, dtype: as in `spectral_descriptor`.
        solver: "eigh", or "products": by matrix products for features with more locations than channels. With fewer the
            covariance is singular; it is decomposed then, as are the matrices of `normalise`.

    Raises:
        ValueError: unknown gradient, one that does not apply to `f`, `keep` below 1 or no band, another `dtype`, or
            what `matrix_sqrt` refuses for this solver.
    """

    def __init__(
        self,
        channels: int,
        f: EigenvalueMap,
        gradient: str | GradientRule,
        *,
        keep: Keep | None = None,
        eigh_device: str = "auto",
        dtype: str | torch.dtype = torch.float64,
        solver: str = "eigh",
    ) -> None:
        super().__init__(channels)
        self.layer = spectral_layer(f, gradient, keep, eigh_device, dtype)
        self.products = uses_products(solver, f, gradient, keep, dtype)

    def by_products(self, x: Tensor) -> bool:
        """Whether `x` (B, C, H, W) is pooled by matrix products alone; its shape decides, no value does."""
        return self.products and x.shape[2:].numel() > self.channels

    def pool(self, x: Tensor) -> Tensor:
        return products_descriptor(x, self.layer.f) if self.by_products(x) else layer_descriptor(x, self.layer)

    def normalise(self, cov: Tensor) -> Tensor:
        return apply_layer(cov, self.layer)


@torch.no_grad()
def pooling_spectrum(pool: Pooling, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues of the covariance of a pooling's input, and of the normalised matrix.

    Args:
        pool: any pooling.
        x: its input, (B, C, H, W).

    Returns:
        before: (B, C) float64, descending, eigenvalues of the covariance of `x`; see `covariance_eigenvalues`.
        after: the same of the normalised matrix, or None for a pooling without one (GAP, B-CNN, CBP).
    """
    before = covariance_eigenvalues(x)
    if not isinstance(pool, CovariancePooling):
        return before, None
    return before, symmetric_eigh(pool.normalise(covariance(x)))[0].flip(-1)


MappedEigenvalues = EigenvalueMap | tuple[EigenvalueMap, Keep]
"""What a spectral method is: a map of the eigenvalues, or the map and which of the eigenvalues it sees."""
SpectralMethod = TypeVar("SpectralMethod", bound=Callable[..., MappedEigenvalues])


def register_spectral_pooling(
    name: str, label: str, *, source: str, gradient: str | Callable[..., GradientRule]
) -> Callable[[SpectralMethod], SpectralMethod]:
    """Decorator of a function that returns a map of the eigenvalues: makes it a choice of `method=`.

    Its parameters are the options of the method; they need defaults, and its docstring says what they are. A parameter
    `channels`, the number of eigenvalues, is no option. With the map it may return which eigenvalues the map sees.

    Args:
        name, label, source: as in `register_pooling`.
        gradient: Published gradient: a name in `fgvc.spectral.GRADIENTS`, or the function that makes the rule. Its
            parameters are then options that go with this gradient, and its name is added to `GRADIENTS`, so that every
            spectral method can take this gradient.
    """
    make_rule = None if isinstance(gradient, str) else gradient
    published = gradient if isinstance(gradient, str) else gradient.__name__
    rule_options = list(inspect.signature(make_rule).parameters) if make_rule else []
    if make_rule and published not in GRADIENTS:
        GRADIENTS[published] = make_rule()

    def register(method: SpectralMethod) -> SpectralMethod:
        parameters = list(inspect.signature(method).parameters)

        def build(
            channels: int, gradient: str, eigh_device: str, dtype: torch.dtype, solver: str, **options: Any
        ) -> SpectralPooling:
            rule: str | GradientRule = gradient
            if make_rule and gradient == published:
                rule = make_rule(**{key: options.pop(key) for key in rule_options if key in options})
            if "channels" in parameters:
                options["channels"] = channels
            mapped = method(**options)
            f, keep = mapped if isinstance(mapped, tuple) else (mapped, None)
            return SpectralPooling(channels, f, rule, keep=keep, eigh_device=eigh_device, dtype=dtype, solver=solver)

        entry = Method(
            label,
            source,
            build,
            shared=list(inspect.signature(build).parameters)[:-1],
            options=[key for key in parameters if key != "channels"],
            gradient=published,
            gradients=GRADIENTS,
            gradient_options=rule_options,
        )
        add_method(name, entry)
        return method

    return register


@register_spectral_pooling("mpn_cov", "MPN-COV", source="Li, Xie, Wang, Zuo, ICCV 2017", gradient="ordinary")
def mpn_cov(alpha: float = 0.5, scale: float = 1.0) -> EigenvalueMap:
    """Matrix power normalisation, scale * S^alpha.

    Args:
        alpha: Power of the eigenvalues, from -10 to 10, not 0.
        scale: Constant factor of the result, above 0; not in the paper, the control for a layer that scales.
    """
    power = SQRT if alpha == 0.5 else Power(alpha)
    rescaled = Rescaled(power, scale)  # checks the number
    return power if scale == 1 else rescaled


@register_spectral_pooling("svd_pade", "SVD-Padé", source="Song, Sebe, Wang, ICCV 2021", gradient="pade")
def svd_pade() -> EigenvalueMap:
    """Square root, with the gradient of a Padé approximant of degree [50/50]."""
    return SQRT


@register_spectral_pooling("svd_taylor", "SVD-Taylor", source="Song, Sebe, Wang, ICCV 2021", gradient=taylor)
def svd_taylor() -> EigenvalueMap:
    """Square root, with the gradient of a Taylor polynomial; option `degree`, see `fgvc.spectral.taylor`."""
    return SQRT


@register_spectral_pooling(
    "svd_pi", "SVD-PI", source="Wang, Dang, Hu, Fua, Salzmann, NeurIPS 2019", gradient=power_iteration
)
def svd_pi() -> EigenvalueMap:
    """Square root, with the gradient of power iteration; option `iterations`, see `fgvc.spectral.power_iteration`."""
    return SQRT


@register_spectral_pooling("svd_newton", "SVD-Newton", source="Song, Sebe, Wang, ICCV 2021", gradient=newton)
def svd_newton() -> EigenvalueMap:
    """Square root, with the gradient of Newton-Schulz iteration; option `iterations`, see `fgvc.spectral.newton`."""
    return SQRT


@register_spectral_pooling("svd_trunc", "SVD-Trunc", source="Song, Sebe, Wang, ICCV 2021", gradient=trunc)
def svd_trunc() -> EigenvalueMap:
    """Square root, with a gradient that is cut off at a limit; option `limit`, see `fgvc.spectral.trunc`."""
    return SQRT


@register_spectral_pooling("svd_topn", "SVD-TopN", source="Song, Sebe, Wang, ICCV 2021", gradient="topn_published")
def svd_topn(channels: int, keep: int | Sequence[int | None] | None = None) -> MappedEigenvalues:
    """Square root of the largest eigenvalues; the others are set to `EIGENVALUE_FLOOR`.

    Args:
        channels: Number of eigenvalues.
        keep: Number of eigenvalues that are kept, channels - 50 by default; or a pair as in `spectral_map`.

    Raises:
        ConfigError: nothing would be kept, or nothing dropped.
    """
    if keep is None and channels <= 50:
        raise ConfigError(
            f"svd_topn drops 50 of the {channels} eigenvalues by default: give keep=N (a study: --keep N)"
        )
    seen: Any = channels - 50 if keep is None else tuple(keep) if isinstance(keep, list) else keep
    start, stop = band(seen)  # type: ignore[misc]  # checks it; None of None alone
    if start >= channels:
        raise ConfigError(f"svd_topn with keep={keep} drops all {channels} eigenvalues; lower its start")
    if start == 0 and (stop is None or stop >= channels):
        raise ConfigError(f"svd_topn with keep={keep} drops none of {channels} eigenvalues; use mpn_cov for all")
    return SQRT, seen


@register_spectral_pooling("seb", "SEB", source="Song, Sebe, Wang, T-PAMI 2022", gradient="ordinary")
def seb() -> EigenvalueMap:
    """Square root times one number per image: the Scaling Eigen Branch, see `fgvc.spectral.scaling_eigen_branch`."""
    return SCALED_SQRT


@register_spectral_pooling("seb_spectral", "SEB-spectral (ours)", source="ours", gradient="exact")
def seb_spectral(amplification: float = 1.0, temperature: float = 1.0) -> EigenvalueMap:
    """Square root with amplified small eigenvalues; the options are those of `fgvc.spectral.seb_spectral`."""
    return AmplifiedSquareRoot(amplification, temperature)


@register_spectral_pooling("log_cov", "Log-COV", source="Ionescu, Vantzos, Sminchisescu, ICCV 2015", gradient="exact")
def log_cov(ridge: float = 1e-3) -> EigenvalueMap:
    """Matrix logarithm of S + ridge I.

    Args:
        ridge: Number added to the eigenvalues, at least 0.
    """
    return Logarithm(ridge)


@register_spectral_pooling("mpa_lya", "MPA-Lya", source="Song, Sebe, Wang, ICLR 2022", gradient=lyapunov)
def mpa_lya() -> EigenvalueMap:
    """Square root by a matrix Padé approximant; option `iterations` of the gradient, see `fgvc.spectral.lyapunov`."""
    return PadeRoot()


@register_spectral_pooling("mtp_lya", "MTP-Lya", source="Song, Sebe, Wang, ICLR 2022", gradient=lyapunov)
def mtp_lya() -> EigenvalueMap:
    """Square root by a matrix Taylor polynomial; option `iterations` of the gradient, see `fgvc.spectral.lyapunov`."""
    return TaylorRoot()


@register_spectral_pooling("pow_tmlr", "Pow-TMLR", source="Chen, Song, Wu, Liu, Sebe, ICLR 2025", gradient="exact")
def pow_tmlr() -> EigenvalueMap:
    """2 (S^{1/2} - I), with the root itself; the released code approximates it by Newton-Schulz iteration."""
    return Rescaled(SQRT, 2.0, shift=-2.0)


@register_spectral_pooling("scale_pow", "ScalePow", source="Chen, Song, Wu, Liu, Sebe, ICLR 2025", gradient="exact")
def scale_pow() -> EigenvalueMap:
    """2 S^{1/2}, with the root itself, as in `pow_tmlr`."""
    return Rescaled(SQRT, 2.0)


@register_spectral_pooling(
    "inverse_cov", "Inv-COV", source="Rahman, Koniusz, Wang, Zhou, Moghadam, Sun, CVPR 2023", gradient="exact"
)
def inverse_cov(ridge: float = 1e-3) -> EigenvalueMap:
    """Inverse of S + ridge I: partial correlations but for their scale.

    The baseline of the paper on iSICE. Its released code approximates the inverse by Newton-Schulz iteration and adds
    random numbers up to 1e-9 in place of a ridge; this is the inverse.

    Args:
        ridge: Number added to the eigenvalues, at least 0. A null eigenvalue becomes 1 / ridge, at 0 4.5e15.
    """
    return Power(-1.0, ridge)


class MatrixPooling(CovariancePooling):
    """Covariance normalised by what is no map of its eigenvalues, see `fgvc.spectral.matrix_map`.

    Args:
        channels: C.
        f: the function.
        dtype: working precision, float64 or float32.
    """

    def __init__(self, channels: int, f: MatrixMap, dtype: str | torch.dtype) -> None:
        super().__init__(channels)
        self.f = f
        self.dtype = spectral_dtype(dtype)

    def pool(self, x: Tensor) -> Tensor:
        return matrix_descriptor(x, self.f, dtype=self.dtype)

    def normalise(self, cov: Tensor) -> Tensor:
        return matrix_map(cov, self.f, dtype=self.dtype)


@register_pooling("chol_cov", "Cho-TMLR", source="Chen, Song, Wu, Liu, Sebe, ICLR 2025")
class CholeskyPooling(MatrixPooling):
    """Cholesky factor with the logarithm of its diagonal, see `fgvc.spectral.LogCholesky`.

    Args:
        channels: C.
        ridge: Number added to the diagonal of the covariance, above 0.
        dtype: Working precision, float64 or float32.

    Raises:
        ValueError: `ridge` is not above 0, or another `dtype`.
    """

    def __init__(self, channels: int, ridge: float = 1e-6, dtype: str | torch.dtype = torch.float64) -> None:
        super().__init__(channels, LogCholesky(ridge), dtype)


@register_pooling("isice", "iSICE", source="Rahman, Koniusz, Wang, Zhou, Moghadam, Sun, CVPR 2023")
class SparseInversePooling(MatrixPooling):
    """Sparse inverse of the covariance by proximal steps, see `fgvc.spectral.SparseInverse`.

    Args:
        channels: C.
        steps: Number of steps, at least 2; the last moves nothing.
        sparsity: Weight of the sum of all entries' sizes, at least 0.
        rate: Size of the first step, above 0.
        dtype: Working precision, float64 or float32.

    Raises:
        ValueError: a number out of range, or another `dtype`.
    """

    def __init__(
        self,
        channels: int,
        steps: int = 5,
        sparsity: float = 0.01,
        rate: float = 1.0,
        dtype: str | torch.dtype = torch.float64,
    ) -> None:
        super().__init__(channels, SparseInverse(steps, sparsity, rate), dtype)
