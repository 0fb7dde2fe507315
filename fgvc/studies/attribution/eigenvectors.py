"""What each eigenvector of an image's covariance sees, without a gradient or a perturbation.

With Xc (d, M) the centred features that the pooling reads, S = Xc Xc^T / M = sum_i l_i u_i u_i^T, x_p a column of Xc:

    (u_i^T x_p)^2                energy of location p along u_i; its sum over the M locations is M l_i
    f(l_i) / l_i (u_i^T x_p) (u_i^T W x_p) / M      what location p adds to the logit through eigenvalue i

for a linear classifier y = <W, F(S)> + b, F(S) = sum_i f(l_i) u_i u_i^T. Since u_i = sum_p (u_i^T x_p) x_p / (M l_i),
the second sums to f(l_i) u_i^T W u_i over the locations, and to y - b over locations and eigenvalues.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fgvc.errors import ConfigError, RunError
from fgvc.models import FineGrainedModel
from fgvc.pooling import CovariancePooling, SpectralPooling
from fgvc.runs.spectra import numerical_rank
from fgvc.spectral.covariance import centred, covariance
from fgvc.spectral.descriptor import symmetric_gradient
from fgvc.spectral.eigen import symmetric_eigh
from fgvc.spectral.maps import Eigenvalues
from fgvc.studies.attribution.score import BandLike, ExplainedScore, frozen_evaluation, prepare_images, resolve_bands
from fgvc.studies.truncation.bands import ALL, restrict_spectrum


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
