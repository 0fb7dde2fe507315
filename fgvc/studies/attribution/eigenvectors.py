"""What each eigenvector of an image's covariance sees, without a gradient or a perturbation.

With Xc (d, M) the centred features that the pooling reads, S = Xc Xc^T / M = sum_i l_i u_i u_i^T, x_p a column of Xc:

    (u_i^T x_p)^2                energy of location p along u_i; its sum over the M locations is M l_i
    f(l_i) / l_i (u_i^T x_p) (u_i^T W x_p) / M      what location p adds to the logit through eigenvalue i

for a linear classifier y = <W, F(S)> + b, F(S) = sum_i f(l_i) u_i u_i^T: since u_i = sum_p (u_i^T x_p) x_p / (M l_i),
the second sums over locations to f(l_i) u_i^T W u_i and over eigenvalues as well to y - b.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fgvc.errors import ConfigError, RunError
from fgvc.models import FineGrainedModel, PoolingHead
from fgvc.pooling import CovariancePooling, SpectralPooling
from fgvc.runs.spectra import numerical_rank
from fgvc.spectral import Band
from fgvc.spectral.covariance import centred, covariance
from fgvc.spectral.descriptor import symmetric_gradient
from fgvc.spectral.eigen import symmetric_eigh
from fgvc.spectral.maps import Eigenvalues as Spectrum
from fgvc.studies.attribution.question import BandLike, Question, as_found, prepare_images, resolve_bands
from fgvc.studies.truncation.bands import ALL, restrict_spectrum


@dataclass(frozen=True)
class EigenvectorMaps:
    """Energies along eigenvectors at each location, float64.

    Attributes:
        eigenvalues: (B, n), descending.
        maps: (B, n, h, w), (u_i^T x_p)^2; each sums to h w times its eigenvalue.
        places: (B, n), of the eigenvalues in the spectrum of their image, 0 for the largest.
        shares: (B, n), of the trace.
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

    Args:
        model: left as it was found.
        images: (B, 3, H, W), normalised.
        count: eigenvectors of each image.
        smallest: the last ones of the image's numerically non-zero eigenvalues in place of the first.

    Raises:
        ConfigError: images that are none, or more eigenvectors than channels.
    """
    with as_found(model):
        read = model.pooling_input(prepare_images(model, images))
    if not 1 <= count <= read.shape[1]:
        raise ConfigError(
            f"count must lie between 1 and {read.shape[1]}, the channels that the pooling reads; got {count}"
        )
    eigenvalues, projections = _decompose(read)
    if smallest:
        first = torch.as_tensor(numerical_rank(eigenvalues.cpu().numpy()), device=read.device).clamp(min=count) - count
    else:
        first = torch.zeros(len(read), dtype=torch.int64, device=read.device)
    places = first[:, None] + torch.arange(count, device=read.device)  # (B, n)
    chosen = torch.take_along_dim(projections, places[:, :, None], dim=1)
    maps = chosen.square().view(*chosen.shape[:2], *read.shape[2:])  # (B, n, M) -> (B, n, h, w)
    found, trace = eigenvalues.gather(1, places), eigenvalues.sum(dim=1, keepdim=True)
    return EigenvectorMaps(found, maps, places, found / trace.clamp(min=torch.finfo(trace.dtype).tiny))


@torch.no_grad()
def band_energy(model: FineGrainedModel, images: Tensor, band: BandLike) -> Tensor:
    """Share of each location's centred energy that lies along the eigenvectors of a band: (B, h, w), from 0 to 1.

    0 where a location has no energy. Arguments and errors as `explain`.
    """
    with as_found(model):
        prepared = prepare_images(model, images)
        features = model.backbone(prepared)
        read = model.head.pooling_input(features)
        (found,) = resolve_bands(model, features, [band])
    energies = _decompose(read)[1].square()  # (B, d, M)
    inside = energies if found is None else energies[:, found.start : found.stop]
    total = energies.sum(dim=1)
    share = torch.where(total > 0, inside.sum(dim=1) / torch.where(total > 0, total, 1), 0)
    return share.view(len(share), *read.shape[2:])


def _decompose(read: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (B, d), descending, and u_i^T x_p (B, d, M), float64, of what a pooling reads (B, d, h, w)."""
    eigenvalues, eigenvectors = symmetric_eigh(covariance(read))
    return eigenvalues.flip(-1), eigenvectors.flip(-1).mT @ centred(read, torch.float64)


def decomposition(question: Question) -> Tensor:
    """What each location adds to the logit through the eigenvalues of a band, signed (ours; see the module).

    An exact part of the logit, not an estimate of an effect: with all eigenvalues the maps sum to y - b over the
    locations, and those of disjoint bands add up where f maps each eigenvalue by itself. What a map gives dropped and
    null eigenvalues (nothing that counts for a root, log(ridge) for Log-COV) is of no location and left out.

    Returns:
        (K, B, H, W), upsampled without scaling: their mean is the locations' mean.

    Raises:
        RunError: no linear classifier on a covariance.
    """
    return question.upsample(torch.stack([logit_parts(question, band) for band in question.bands]))


@torch.no_grad()
def logit_parts(question: Question, band: Band | None) -> Tensor:
    """`decomposition` at the pooling's locations, (B, h, w) float64: sums to the logit without its bias."""
    head = question.model.head
    if not isinstance(head.pooling, CovariancePooling):
        raise RunError(
            f"decomposition needs eigenvalues, and {type(head.pooling).__name__} normalises no covariance; "
            "use method=hirescam"
        )
    # all of the spectrum by name brings the eigenvalues of a Newton-Schulz iteration to light
    keep = ALL if band is None and not isinstance(head.pooling, SpectralPooling) else band
    with restrict_spectrum(question.model, keep, gradient="exact"):
        pooling = head.pooling
    assert isinstance(pooling, SpectralPooling)
    weights = _class_matrices(head, question.classes)
    read = head.pooling_input(question.features)
    eigenvalues, eigenvectors = symmetric_eigh(covariance(read))  # ascending, as `Spectrum` has them
    spectrum = Spectrum(eigenvalues, pooling.layer.keep)
    gain = torch.where(spectrum.kept, pooling.layer.f.value(spectrum.clipped) / spectrum.clipped, 0)
    features = centred(read, torch.float64)
    along, pulled = eigenvectors.mT @ features, eigenvectors.mT @ weights @ features  # (B, d, M) each
    parts = (gain[:, :, None] * along * pulled).sum(dim=1) / features.shape[-1]
    return parts.view(len(parts), *read.shape[2:])


def _class_matrices(head: PoolingHead, classes: Tensor) -> Tensor:
    """W of each class, (B, d, d) float64 symmetric: y = <W, F(S)> + b."""
    if not isinstance(head.classifier, nn.Linear):
        raise RunError("decomposition needs a linear classifier; this one has hidden layers (method.hidden)")
    return symmetric_gradient(head.classifier.weight[classes].double(), head.pooling.channels)
