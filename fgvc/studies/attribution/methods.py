"""Attributions by name; those from gradients, of the pixels and of the backbone's map; those from eigenvectors.

A class activation map runs the backbone once; each band costs one pass forward and back through the head.

Every method takes the score y of an `ExplainedScore` and returns maps (K, B, H, W). It raises ConfigError where an
option is out of its range, and RunError where a gradient is not finite.

What each eigenvector of an image's covariance sees needs no gradient. With Xc (d, M) the centred features that the
pooling reads, S = Xc Xc^T / M = sum_i l_i u_i u_i^T, x_p a column of Xc:

    (u_i^T x_p)^2                energy of location p along u_i; its sum over the M locations is M l_i
    f(l_i) / l_i (u_i^T x_p) (u_i^T W x_p) / M      what location p adds to the logit through eigenvalue i

for a linear classifier y = <W, F(S)> + b, F(S) = sum_i f(l_i) u_i u_i^T. Since u_i = sum_p (u_i^T x_p) x_p / (M l_i),
the second sums to f(l_i) u_i^T W u_i over the locations, and to y - b over locations and eigenvalues.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import torch
from captum.attr import IntegratedGradients
from torch import Tensor, nn

from fgvc.errors import ConfigError, RunError
from fgvc.models import FineGrainedModel
from fgvc.pooling import CovariancePooling, SpectralPooling
from fgvc.runs.spectra import numerical_rank
from fgvc.spectral.covariance import centred, covariance
from fgvc.spectral.descriptor import symmetric_gradient
from fgvc.spectral.eigen import symmetric_eigh
from fgvc.spectral.maps import Eigenvalues
from fgvc.studies.attribution.perturbation import extremal, occlusion, reference_images, rise
from fgvc.studies.attribution.score import (
    TOGETHER,
    BandLike,
    ExplainedScore,
    frozen_evaluation,
    prepare_images,
    require_finite,
    resolve_bands,
)
from fgvc.studies.truncation.bands import ALL, restrict_spectrum

_ROUNDING = 1e-6  # up to this part of its mean size the mean of a gradient over the locations counts as zero


def gradcam(score: ExplainedScore) -> Tensor:
    """Grad-CAM [Selvaraju et al., ICCV 2017] at the backbone's map A: max(0, sum_c w_c A_c), w_c = mean of dy / dA_c.

    A covariance does not change when a constant is added to a channel. So the gradient by what it reads has mean zero
    over the locations, and Grad-CAM gets its weights only from the ReLU of the reduction, which takes out some
    locations. Where it takes out none or all of them, the map is zero.

    Raises RunError: a covariance head has no reduction, so that every map would be rounding noise.
    """
    head = score.model.head
    if isinstance(head.pooling, CovariancePooling) and isinstance(head.reduction, nn.Identity):
        raise RunError(
            "gradcam weighs channels by their mean gradient over the locations, and that of a covariance is zero "
            "without a reduction in front of it; use method=hirescam"
        )

    def combine(gradient: Tensor, features: Tensor) -> Tensor:
        weights = gradient.mean(dim=(2, 3), keepdim=True)
        rounding = weights.abs() <= _ROUNDING * gradient.abs().mean(dim=(1, 2, 3), keepdim=True)
        return (weights.masked_fill(rounding, 0) * features).sum(dim=1).clamp(min=0)

    return _activation_maps(score, combine)


def hirescam(score: ExplainedScore) -> Tensor:
    """HiResCAM [Draelos and Carin, 2020] at the backbone's map A: sum_c A_c dy / dA_c at each location, signed."""
    return _activation_maps(score, lambda gradient, features: (gradient * features).sum(dim=1))


def _activation_maps(score: ExplainedScore, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Maps (K, B, H, W); `combine` makes (B, h, w) of the gradient and the backbone's map, (B, C, h, w) each."""
    maps = []
    for band in score.bands:
        features = score.features.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(score.values(features, band).sum(), features)
        require_finite(gradient, f"gradients by the backbone's map (band {band})")
        maps.append(combine(gradient, features.detach()))
    return score.upsample(torch.stack(maps))


def integrated_gradients(score: ExplainedScore, steps: int = 32, reference: str = "mean") -> Tensor:
    """Integrated gradients [Sundararajan, Taly, Yan, ICML 2017], by captum.

    (x - r) times the mean of dy / dx on the way from r to x, summed over the three channels and signed. A map sums to
    y(x) - y(r), up to the error of the integral.

    Args:
        score: the score y; each band is integrated on its own.
        steps: nodes of the Gauss-Legendre rule.
        reference: r, see `reference_images`.
    """
    if steps < 1:
        raise ConfigError(f"integrated_gradients needs steps of at least 1, got {steps}")
    options = {"target": score.classes, "n_steps": steps, "internal_batch_size": max(TOGETHER, len(score.images))}
    start, maps = reference_images(score.images, reference), []
    for band in score.bands:
        integral = IntegratedGradients(lambda x, band=band: score.logits(score.model.backbone(x), band))
        parts = integral.attribute(score.images, start, **options)
        require_finite(parts, f"integrated gradients (band {band})")
        maps.append(parts.sum(dim=1))
    return torch.stack(maps)


_RECTIFIERS = (nn.ReLU, nn.ReLU6)
_ACTIVATION_MODULES = ("torch.nn.modules.activation", "timm.layers.activations", "timm.layers.activations_me")


def guided_backprop(score: ExplainedScore) -> Tensor:
    """Guided backpropagation [Springenberg et al., ICLR 2015 workshop]: each ReLU passes only positive gradients back.

    The map is the size of the gradient that arrives, summed over the three channels. ReLU6 counts as a ReLU that is cut
    off above: captum's rule is for nn.ReLU only and would silently skip those of EfficientNet-Lite.

    Raises RunError: the backbone has no ReLU or ReLU6, or other activations, for which there is no such rule.
    """
    parts = list(score.model.backbone.modules())
    activations = [part for part in parts if type(part).__module__ in _ACTIVATION_MODULES]
    others = {type(part).__name__ for part in activations if not isinstance(part, (*_RECTIFIERS, nn.Identity))}
    if others or not any(isinstance(part, _RECTIFIERS) for part in parts):
        raise RunError(
            f"guided_backprop has a rule for ReLU and ReLU6 only, and this backbone has "
            f"{', '.join(sorted(others)) or 'no module of either'}; use method=integrated_gradients"
        )

    def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # on the output: an inplace activation does not allow a backward hook on the module
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient.clamp(min=0))  # type: ignore[no-untyped-call]  # torch's

    images, maps = score.images.clone().requires_grad_(), []
    with ExitStack() as hooks:
        for part in score.model.modules():
            if isinstance(part, _RECTIFIERS):
                hooks.enter_context(part.register_forward_hook(hook))
        features = score.model.backbone(images)
        for band in score.bands:
            (gradient,) = torch.autograd.grad(score.values(features, band).sum(), images, retain_graph=True)
            require_finite(gradient, f"gradients by the pixels (band {band})")
            maps.append(gradient.abs().sum(dim=1))
    return torch.stack(maps)


class EigenvectorMaps(NamedTuple):
    """Energies along n eigenvectors at each location, float64.

    Attributes:
        eigenvalues: Eigenvalues (B, n), descending.
        maps: (u_i^T x_p)^2, (B, n, h, w); each sums to h w times its eigenvalue.
        places: Places of the eigenvalues in the spectrum of their image, (B, n), 0 for the largest.
        shares: Shares of the trace, (B, n).
    """

    eigenvalues: Tensor
    maps: Tensor
    places: Tensor
    shares: Tensor


@torch.no_grad()
def eigenvector_maps(
    model: FineGrainedModel, images: Tensor, count: int = 8, *, smallest: bool = False
) -> EigenvectorMaps:
    """Where in each image its eigenvectors are strong.

    `count` eigenvectors of each image, of the largest eigenvalues or the smallest numerically non-zero ones. Raises
    ConfigError where there are fewer channels; the rest as `explain`.
    """
    with frozen_evaluation(model):
        read = model.pooling_input(prepare_images(model, images))
    if not 1 <= count <= read.shape[1]:
        raise ConfigError(
            f"count must lie between 1 and {read.shape[1]}, the channels that the pooling reads; got {count}"
        )
    eigenvalues, projections = _decompose(read)
    first = torch.zeros(len(read), dtype=torch.int64, device=read.device)
    if smallest:
        first = torch.as_tensor(numerical_rank(eigenvalues.cpu().numpy()), device=read.device).clamp(min=count) - count
    places = first[:, None] + torch.arange(count, device=read.device)  # (B, n)
    chosen = torch.take_along_dim(projections, places[:, :, None], dim=1)
    maps = chosen.square().view(*chosen.shape[:2], *read.shape[2:])  # (B, n, M) -> (B, n, h, w)
    values, trace = eigenvalues.gather(1, places), eigenvalues.sum(dim=1, keepdim=True)
    return EigenvectorMaps(values, maps, places, values / trace.clamp(min=torch.finfo(trace.dtype).tiny))


@torch.no_grad()
def band_energy(model: FineGrainedModel, images: Tensor, band: BandLike) -> Tensor:
    """Share of each location's centred energy that lies along the eigenvectors of a band: (B, h, w), from 0 to 1.

    0 where a location has no energy. Arguments and errors as `explain`.
    """
    with frozen_evaluation(model):
        features = model.backbone(prepare_images(model, images))
        read = model.head.pooling_input(features)
        (resolved,) = resolve_bands(model, features, [band])
    energies = _decompose(read)[1].square()  # (B, d, M)
    start, stop = resolved or ALL
    inside, total = energies[:, start:stop].sum(dim=1), energies.sum(dim=1)
    return torch.where(total > 0, inside / torch.where(total > 0, total, 1), 0).view(len(read), *read.shape[2:])


def _decompose(read: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (B, d), descending, and u_i^T x_p (B, d, M) of what the pooling reads (B, d, h, w), float64."""
    eigenvalues, eigenvectors = symmetric_eigh(covariance(read))
    return eigenvalues.flip(-1), eigenvectors.flip(-1).mT @ centred(read, torch.float64)


@torch.no_grad()
def decomposition(score: ExplainedScore) -> Tensor:
    """What each location adds to the logit through the eigenvalues of a band, signed (ours; see the module).

    The maps are exact parts of the logit. Over all eigenvalues and locations they sum to y - b; maps of disjoint bands
    add up where f maps each eigenvalue by itself. Dropped and null eigenvalues belong to no location and are left out;
    a map gives them nothing that counts (a root) or log(ridge) (Log-COV).

    Returns:
        (K, B, H, W), upsampled without scaling: their mean is the locations' mean.

    Raises:
        RunError: the head has no linear classifier on a covariance.
    """
    head = score.model.head
    if not isinstance(head.pooling, CovariancePooling):
        raise RunError(
            f"decomposition needs eigenvalues, and {type(head.pooling).__name__} normalises no covariance; "
            "use method=hirescam"
        )
    if not isinstance(head.classifier, nn.Linear):
        raise RunError("decomposition needs a linear classifier; this one has hidden layers (method.hidden)")
    # W of each class, (B, d, d) symmetric: y = <W, F(S)> + b
    weights = symmetric_gradient(head.classifier.weight[score.classes].double(), head.pooling.channels)
    read = head.pooling_input(score.features)
    eigenvalues, eigenvectors = symmetric_eigh(covariance(read))  # ascending, as `Eigenvalues` needs them
    features = centred(read, torch.float64)
    along, pulled = eigenvectors.mT @ features, eigenvectors.mT @ weights @ features  # (B, d, M) each
    maps = []
    for band in score.bands:
        # naming the whole spectrum turns a Newton-Schulz iteration into a map of eigenvalues
        keep = ALL if band is None and not isinstance(head.pooling, SpectralPooling) else band
        with restrict_spectrum(score.model, keep, gradient="exact"):
            pooling = head.pooling
        assert isinstance(pooling, SpectralPooling)
        spectrum = Eigenvalues(eigenvalues, pooling.layer.keep)
        gain = torch.where(spectrum.kept, pooling.layer.f.value(spectrum.clipped) / spectrum.clipped, 0)
        maps.append((gain[:, :, None] * along * pulled).sum(dim=1) / features.shape[-1])
    return score.upsample(torch.stack(maps).view(len(maps), len(read), *read.shape[2:]))


@dataclass(frozen=True)
class Method:
    """An attribution.

    Attributes:
        maps: Function of an `ExplainedScore` and options that returns maps (K, B, H, W).
        label: Name in figures.
        signed: Whether maps have negative values, for evidence against the class.
    """

    maps: Callable[..., Tensor]
    label: str
    signed: bool = False

    @property
    def options(self) -> dict[str, object]:
        """Names of the options and their defaults."""
        _, *options = inspect.signature(self.maps).parameters.values()
        return {option.name: option.default for option in options}


METHODS: dict[str, Method] = {
    "gradcam": Method(gradcam, "Grad-CAM"),
    "hirescam": Method(hirescam, "HiResCAM", signed=True),
    "integrated_gradients": Method(integrated_gradients, "Integrated gradients", signed=True),
    "guided_backprop": Method(guided_backprop, "Guided backpropagation"),
    "extremal": Method(extremal, "Extremal perturbation"),
    "rise": Method(rise, "RISE", signed=True),
    "occlusion": Method(occlusion, "Occlusion", signed=True),
    "decomposition": Method(decomposition, "Parts of the logit", signed=True),
}
"""Attributions by the name that `explain` takes."""


def require_methods(names: Sequence[str]) -> None:
    """Raise ConfigError where there is no name, or one that is not in `METHODS`."""
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        raise ConfigError(f"unknown attribution {', '.join(unknown) or 'none'}; choose from {', '.join(METHODS)}")
