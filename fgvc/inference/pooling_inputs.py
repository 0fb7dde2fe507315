"""What a covariance pooling reads, from a finished run or from a file of feature maps, and the spectra of it."""

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from fgvc.errors import ConfigError, DatasetError, RunError
from fgvc.foreign import open_foreign
from fgvc.inference.restore import restore_run
from fgvc.models import FineGrainedModel, PoolingHead
from fgvc.pooling import CovariancePooling, pooling_spectrum
from fgvc.runs.spectra import Spectrum
from fgvc.runs.summary import Run, read_finished
from fgvc.spectral import covariance_eigenvalues
from fgvc.spectral.descriptor import null_as_zero
from fgvc.training.probe import SpectrumProbe, evenly_spaced


@dataclass(frozen=True)
class PoolingInputs:
    """Inputs of a covariance pooling.

    Attributes:
        features: Features (N, C, H, W).
        grad: Gradient (N, C (C + 1) / 2) float64 of each image's loss by its descriptor; None where there is no loss.
        source: What they are, for a caption.
        indices: Indices of the N images in the test split or the file.
    """

    features: Tensor
    grad: Tensor | None
    source: str
    indices: list[int]


def load_features(path: Path, images: int = 64, *, root: str | None = None, cache: str | None = None) -> PoolingInputs:
    """Features of up to `images` evenly spaced images.

    Args:
        path: a finished run with a covariance pooling: test images through its backbone and reduction, with the
            gradient of its cross-entropy. Or a .npy file of feature maps (N, C, H, W), or of a feature cache
            (views, N, C, H, W); the first view is read.
        images: how many; evenly spaced, as neighbours are of one class.
        root, cache: as in `restore_run`.

    Raises:
        ConfigError: `images` below 1.
        RunError: not a finished run, one without a covariance, or weights that do not fit.
        DatasetError: no such path; a file that does not hold finite features of that shape.
        WeightsError: as in training.
    """
    if images < 1:
        raise ConfigError(f"images must be at least 1, got {images}")
    if path.is_dir():
        return _from_run(path, images, root, cache)
    if path.exists():
        return _from_file(path, images)
    raise DatasetError(f"{path} does not exist; give the folder of a finished run, or a .npy file of feature maps")


def _from_file(path: Path, images: int) -> PoolingInputs:
    try:
        with open_foreign(path):
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # not .npy, damaged, or pickled objects: NumPy raises many types
        raise DatasetError(f"{path} is not a .npy file of numbers ({error}); write it with numpy.save") from error
    shape = getattr(array, "shape", ())  # an .npz archive has none
    if len(shape) not in (4, 5) or 0 in shape or array.dtype.kind != "f":
        found = f"{array.dtype} of shape {shape}" if shape else "an archive or a single value"
        raise DatasetError(
            f"{path} holds {found}, not feature maps: floating-point numbers of shape (N, C, H, W), or "
            "(views, N, C, H, W) as in a feature cache"
        )
    maps = array[0] if len(shape) == 5 else array
    indices = evenly_spaced(len(maps), images)
    features = torch.from_numpy(maps[indices].astype(np.float64))
    _require_finite(features, indices, str(path))
    return PoolingInputs(features, None, f"{len(indices)} of {len(maps)} images in {path.name}", indices)


def _require_finite(features: Tensor, indices: list[int], source: str) -> None:
    broken = [i for i, item in zip(indices, features, strict=True) if not item.isfinite().all()]
    if broken:
        raise DatasetError(f"{source}: NaN or infinity in the features of image {broken[0]}, {len(broken)} such in all")


def _from_run(path: Path, images: int, root: str | None, cache: str | None) -> PoolingInputs:
    run = read_finished(path)
    restored = restore_run(path, root=root, cache=cache)
    head = restored.head
    if not isinstance(head.pooling, CovariancePooling):
        raise RunError(f"{path}: {run.method} maps no covariance; give a run of another method, e.g. mpn_cov")
    total = len(restored.images)
    indices = evenly_spaced(total, images)
    batches = [
        (restored.pooling_input(inputs).cpu(), targets)  # (B, C, H, W), (B,)
        for inputs, targets in DataLoader(Subset(restored.inputs(), indices), batch_size=32)
    ]
    features, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    _require_finite(features, indices, str(path))
    source = f"{len(indices)} of {total} test images of {path}"
    return PoolingInputs(features, loss_gradient(head, features, targets), source, indices)


def loss_gradient(head: PoolingHead, features: Tensor, targets: Tensor) -> Tensor:
    """dLoss/dDescriptor (N, D) float64 of each image's cross-entropy, in float64.

    Args:
        head: its pooling and classifier are used, as they are.
        features: what the pooling reads, (N, C, H, W).
        targets: (N,) class indices.
    """
    classify = copy.deepcopy(head).cpu().double().classify
    with torch.no_grad():
        descriptor = head.pooling(features.double())
    descriptor.requires_grad_()
    loss = nn.functional.cross_entropy(classify(descriptor), targets, reduction="sum")
    gradient: Tensor = torch.autograd.grad(loss, descriptor)[0]
    return gradient


def look_again(path: Path, images: int, *, root: str | None = None, cache: str | None = None) -> Spectrum:
    """Spectra of up to `images` test images of a finished run, evenly spaced, under its last weights.

    Raises RunError, DatasetError, WeightsError as `restore_run`.
    """
    restored = restore_run(path, root=root, cache=cache)
    return SpectrumProbe(restored.inputs(), images).measure(restored.trained, restored.device)


def layer_spectra(run: Run, images: int, *, root: str | None = None, cache: str | None = None) -> dict[str, np.ndarray]:
    """Eigenvalues (N, d) of what enters the head, of what its pooling reads, and of the normalised matrix, by a label.

    The last is missing for a head that normalises no covariance. Raises RunError, DatasetError, WeightsError as
    `restore_run`.
    """
    restored = restore_run(run.path, root=root, cache=cache)
    samples = restored.inputs()
    chosen = Subset(samples, evenly_spaced(len(samples), images))
    found: dict[str, list[np.ndarray]] = {}
    with torch.inference_mode():
        for inputs, _ in DataLoader(chosen, batch_size=32):
            moved = inputs.to(restored.device)
            maps = restored.trained.backbone(moved) if isinstance(restored.trained, FineGrainedModel) else moved
            before, after = pooling_spectrum(restored.head.pooling, restored.head.pooling_input(maps))
            if after is not None:  # null eigenvalues, which the map puts at its floor, are none of its making
                after = torch.where(null_as_zero(before.flip(-1), before.shape[1]).flip(-1) > 0, after, 0)
            layers = {
                f"{run.backbone}'s output, {maps.shape[1]} channels": covariance_eigenvalues(maps),
                f"reduced, {before.shape[1]} channels": before,
                f"normalised by {run.label}": after,
            }
            for name, values in layers.items():
                if values is not None:
                    found.setdefault(name, []).append(values.cpu().numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}
