"""Class names and probabilities for new images from the model of a run; the run's dataset is not needed.

import fgvc
predictor = fgvc.load_run("results/cub80_frozen/tf_efficientnet_lite0/seb/seed0")
print(predictor.predict("bird.jpg").names)
"""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeVar, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from fgvc.data import TransformSpec, UnreadableImageError, copy_rgb, decode_rgb, image_files, normalization_from_timm
from fgvc.data.aircraft import BANNER
from fgvc.data.folder import require_unicode
from fgvc.data.registry import effective_options
from fgvc.errors import ConfigError, DatasetError, ImageError, RunError, UserError, one_line
from fgvc.inference.calibrate import Calibration, probabilities, read_calibration
from fgvc.inference.restore import load_model, read_classes
from fgvc.models import FineGrainedModel
from fgvc.models.hub import is_published
from fgvc.runs.folder import RunFolder
from fgvc.spectral import EigendecompositionError
from fgvc.training.environment import check_arithmetic
from fgvc.training.setup import build_transform, fold_backbone

ImageSource = Image.Image | str | os.PathLike[str] | bytes | BinaryIO | np.ndarray | Tensor
"""An image, one of:

- a Pillow image of any mode;
- the path of an image file, its bytes, or the file opened for reading;
- an array as Pillow gives it: uint8 of shape (H, W), (H, W, 3) or (H, W, 4);
- a tensor as torchvision gives it: (1, H, W) or (3, H, W), uint8 or floating-point numbers from 0 to 1.
"""


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image.

    Attributes:
        names: Names of the classes, most probable first.
        probabilities: Probabilities of `names`; those of all classes sum to one.
        calibrated: Whether the probabilities were calibrated on images that the model was not trained on.
        logits: Logits (num_classes,) float32 on the CPU, before the temperature, in the order of the run's classes.
    """

    names: tuple[str, ...]
    probabilities: tuple[float, ...]
    calibrated: bool
    logits: Tensor = field(repr=False)

    @property
    def name(self) -> str:
        """The most probable class."""
        return self.names[0]


class Predictor:
    """A trained model with its classes, its transform and its temperature; made by `load_run`.

    Args:
        model: model in evaluation mode, (B, 3, size, size) -> logits (B, K).
        transform: transform from an RGB image to the model's input.
        classes: K names.
        calibration: calibration of the model; None leaves the probabilities as they are.
        notes: sentences on what to do to images before they are given.
    """

    def __init__(
        self,
        model: FineGrainedModel,
        transform: TransformSpec,
        classes: Sequence[str],
        calibration: Calibration | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.model = model
        self.transform = transform
        self.classes = list(classes)
        self.calibration = calibration
        self.notes = tuple(notes)

    @property
    def calibrated(self) -> bool:
        """Whether a temperature was fitted on images that the model was not trained on."""
        return self.calibration is not None and self.calibration.temperature is not None

    @property
    def temperature(self) -> float:
        """The divisor of the logits; 1 without calibration."""
        fitted = None if self.calibration is None else self.calibration.temperature
        return 1.0 if fitted is None else fitted

    @property
    def status(self) -> str:
        """One line: whether the probabilities are calibrated, and on which images."""
        if self.calibration is None or self.calibration.temperature is None:
            return "probabilities are not calibrated"
        on = f"{self.calibration.images:,} {self.calibration.split} images"
        return f"probabilities are calibrated: temperature {self.temperature:.3f} from {on}"

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def batch_size(self) -> int:
        """Number of images per forward pass."""
        return 4 if self.device.type == "cpu" else 64  # larger batches do not fit the CPU's cache and are slower

    @overload
    def predict(  # type: ignore[overload-overlap]  # a str is a Sequence[str] too; here it is a path
        self, images: ImageSource, top: int = ...
    ) -> Prediction: ...
    @overload
    def predict(self, images: Sequence[ImageSource], top: int = ...) -> list[Prediction]: ...
    def predict(self, images: ImageSource | Sequence[ImageSource], top: int = 5) -> Prediction | list[Prediction]:
        """Return the `top` most probable classes of one image, or of each of several.

        Images of any mode are read as in training and turned by their EXIF orientation. (A Pillow image is scaled from
        its full size; of the file of a large JPEG training reads a smaller one, see `fgvc.data.decode_rgb`.) Other
        images in the same call change a probability by rounding only, by less than 1e-4.

        Args:
            images: one image or several, see `ImageSource`; several are a list, or an array or tensor of 4 dimensions.
            top: number of names; all classes if there are fewer.

        Raises:
            ImageError: an image is missing, cannot be decoded, or is of another type.
            ConfigError: `top` is below 1.
            RunError: the model gives logits that are not finite.
        """
        several = _several(images)
        if several is None:
            return self._predict([images], top)[0]  # type: ignore[list-item]  # one image
        return [prediction for batch in self._batches(several) for prediction in self._predict(batch, top)]

    def embed(self, images: ImageSource | Sequence[ImageSource]) -> Tensor:
        """Return the descriptor that goes into the classifier: (D,) float32 on the CPU, or (N, D) of several images.

        D is `model.head.pooling.out_features`. A descriptor is not normalised.

        Args:
            images: as in `predict`.

        Raises:
            ImageError: as `predict`.
            RunError: the model gives descriptors that are not finite.
        """
        several = _several(images)
        if several is None:
            return self._embed([images])[0]  # type: ignore[list-item]  # one image
        none = torch.empty(0, self.model.head.pooling.out_features)
        return torch.cat([none, *(self._embed(batch) for batch in self._batches(several))])

    def prepare(self, image: ImageSource) -> Tensor:
        """Return the model's input for an image: (3, size, size) float32, normalised.

        Raises ImageError: the image is missing, cannot be decoded, or is of another type.
        """
        try:
            return self.transform(_read_rgb(image, self.transform.shorter_side))
        except UnreadableImageError as error:
            name = image if isinstance(image, str | os.PathLike) else "the image"
            raise ImageError(f"{name} cannot be read: {error}") from error

    @torch.inference_mode()
    def logits(self, batch: Tensor) -> Tensor:
        """Return logits (B, K) float32 on the CPU for a batch of `prepare`d images (B, 3, size, size).

        Raises RunError: the logits are not finite.
        """
        return self._finite(self.model, batch, "logits")

    @torch.inference_mode()
    def descriptors(self, batch: Tensor) -> Tensor:
        """Return descriptors (B, D) float32 on the CPU, see `embed`, for a batch of `prepare`d images.

        Raises RunError: the descriptors are not finite.
        """
        return self._finite(self.model.descriptor, batch, "descriptors")

    def _finite(self, function: Callable[[Tensor], Tensor], batch: Tensor, name: str) -> Tensor:
        values = function(batch.to(self.device, memory_format=torch.channels_last)).float().cpu()
        if not torch.isfinite(values).all():
            raise RunError(f"the model gives {name} that are not finite; train the run again")
        return values

    def decide(self, logits: Tensor, top: int = 5) -> list[Prediction]:
        """Return the `top` most probable classes for each row of `logits` (B, K). Raises ConfigError if top < 1."""
        if top < 1:
            raise ConfigError(f"top={top} must be at least 1")
        # sorted by logits, since several small probabilities may round to zero
        order = logits.sort(dim=1, descending=True, stable=True).indices[:, :top]
        shares = probabilities(logits, self.temperature).gather(1, order)
        return [
            Prediction(tuple(self.classes[i] for i in indices), tuple(share), self.calibrated, row)
            for indices, share, row in zip(order.tolist(), shares.tolist(), logits, strict=True)
        ]

    def _batches(self, images: Sequence[ImageSource]) -> Iterator[Sequence[ImageSource]]:
        return (images[start : start + self.batch_size] for start in range(0, len(images), self.batch_size))

    def _predict(self, images: Sequence[ImageSource], top: int) -> list[Prediction]:
        return self.decide(self.logits(torch.stack([self.prepare(image) for image in images])), top)

    def _embed(self, images: Sequence[ImageSource]) -> Tensor:
        return self.descriptors(torch.stack([self.prepare(image) for image in images]))


def _several(images: ImageSource | Sequence[ImageSource]) -> Sequence[ImageSource] | None:
    """The images of a sequence or a batch; None if it is one image."""
    if isinstance(images, np.ndarray | Tensor) and images.ndim == 4:
        return list(images)
    one = not isinstance(images, Sequence) or isinstance(images, str | bytes | bytearray)
    return None if one else images  # type: ignore[return-value]  # a sequence here


def _read_rgb(image: ImageSource, side: int) -> Image.Image:
    """An upright RGB image; `side` as in `decode_rgb`. Raises UnreadableImageError."""
    if isinstance(image, Image.Image):
        return copy_rgb(image)
    if isinstance(image, np.ndarray | Tensor):
        return copy_rgb(Image.fromarray(_as_pillow(image)))
    if isinstance(image, bytes | bytearray):
        image = io.BytesIO(image)
    if isinstance(image, str | os.PathLike):
        image = Path(image)
    if isinstance(image, Path) or hasattr(image, "read"):
        return decode_rgb(image, upright=True, side=side)
    raise UnreadableImageError(f"{type(image).__name__}; {_TAKEN}")


_TAKEN = (
    "give a Pillow image, a path, the bytes of an image file, a uint8 array (H, W), (H, W, 3) or (H, W, 4), "
    "or a tensor (1, H, W) or (3, H, W) of uint8 or of numbers from 0 to 1"
)


def _as_pillow(image: np.ndarray | Tensor) -> np.ndarray:
    """An array or a tensor as the uint8 array that Pillow takes. Raises UnreadableImageError."""
    found = f"{image.dtype} of shape {tuple(image.shape)}"
    if isinstance(image, Tensor) and image.ndim == 3 and len(image) in (1, 3):
        if image.is_floating_point():
            if not ((image >= 0) & (image <= 1)).all():
                raise UnreadableImageError(
                    f"{found} with numbers below 0, above 1 or NaN; give those before normalising"
                )
            image = (image * 255).round().to(torch.uint8)
        array = image.detach().cpu().movedim(0, -1).squeeze(-1).numpy()
    else:
        array = np.empty(0) if isinstance(image, Tensor) else image
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise UnreadableImageError(f"{found}; {_TAKEN}")
    if not array.size:
        raise UnreadableImageError(f"{found}: it is empty")
    return np.ascontiguousarray(array)


def load_run(path: str | Path, checkpoint: str = "last", device: str | torch.device | None = None) -> Predictor:
    """Load the model of a run, or one that `fgvc export --to hub` has written, ready to classify images.

    Of a run, only weights, classes, transform and calibration are read, and the file of a frozen backbone's weights; of
    an export, see `FineGrainedModel.from_pretrained`. Nothing is written. Probabilities are calibrated if the end of
    the training, `fgvc calibrate` or `fgvc.calibrate_run` has fitted a temperature for these weights; see
    `Predictor.calibrated`.

    Args:
        path: the run folder, whose dataset is not read; the folder of an export; or hf://OWNER/NAME, with @REVISION
            for a branch, a tag or a commit.
        checkpoint: "last" or "best"; an export holds one of them, so leave it out.
        device: device of the model; None means the GPU if there is one.

    Raises:
        RunError: not a run, its weights are missing, damaged or of another architecture, or the frozen backbone has
            other weights than in training.
        ConfigError, WeightsError: as in training.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if is_published(path):
        if checkpoint != "last":
            raise ConfigError(f"checkpoint={checkpoint}: {path} holds one model; leave it out")
        return _load_published(path, device)
    folder = RunFolder(Path(path))
    config = folder.read_config()
    model = load_model(folder.path, checkpoint).to(device).to(memory_format=torch.channels_last)
    transform = build_transform(config, model.backbone, training=False).deterministic()
    if config.backbone.frozen:  # the head was trained on feature maps of the folded backbone
        model = FineGrainedModel(fold_backbone(config, model.backbone, device), model.head).eval()
    options = effective_options(config.dataset.reader, config.dataset.options)
    notes = _cuts(to_box=options.get("crop") == "bbox", banner=bool(options.get("remove_banner")))
    return Predictor(model, transform, read_classes(folder), read_calibration(folder.path, checkpoint), notes)


def _load_published(source: str | Path, device: torch.device) -> Predictor:
    """Load a model as the hub has it. Raises as `FineGrainedModel.from_pretrained`."""
    check_arithmetic()
    model = FineGrainedModel.from_pretrained(source).to(device).to(memory_format=torch.channels_last)
    config = model.config
    assert config is not None
    normalization = normalization_from_timm(model.backbone.data_config)
    transform = TransformSpec(**asdict(config.transform), **normalization, training=False).deterministic()
    fitted = config.calibration
    calibration = None if fitted is None else Calibration("last", **asdict(fitted), record={})
    notes = _cuts(to_box=config.cut_to_box, banner=config.banner_removed)
    return Predictor(model, transform, config.classes, calibration, notes)


def _cuts(*, to_box: bool, banner: bool) -> list[str]:
    """Notes on what was cut off the images of the training, which those of a user still have."""
    cuts = ["cut to the object's box"] if to_box else []
    cuts += [f"without the banner of {BANNER} rows at the bottom"] if banner else []
    return [f"the run read images {cut}; cut yours the same way" for cut in cuts]


_READERS = 4  # threads: decoding releases the interpreter's lock


def prediction_notes(path: str | Path, predictor: Predictor, checkpoint: str = "last") -> list[str]:
    """Return notes for the user of `load_run(path)`: on its calibration and on cut images."""
    notes = list(predictor.notes)
    if predictor.calibration is None and is_published(path):
        notes.append("probabilities are not calibrated; calibrate the run, and export it again")
    elif predictor.calibration is None:
        command = f"fgvc calibrate {path} --checkpoint {checkpoint}"
        notes.append(f"probabilities are not calibrated; on the machine with the run's images: {command}")
    elif not predictor.calibrated:
        notes.append(predictor.calibration.text)
    return notes


def find_images(source: Path) -> list[Path]:
    """Return `source` if it is a file, or the image files in that folder at any depth, sorted.

    Raises:
        ImageError: `source` does not exist.
        DatasetError: the folder has no image file or cannot be read, or a name is not Unicode.
    """
    if source.is_dir():
        return image_files(source)
    if not source.exists():
        raise ImageError(f"{source}: no such file or folder; give the path of an image")
    require_unicode(source.parent, source.name)
    return [source]


def find_all(sources: Sequence[Path]) -> list[Path]:
    """Return the images of all sources, each once; a source without any stays there, and reading it gives the reason.

    Raises ImageError, DatasetError as `find_images`, if no source has an image.
    """
    paths: dict[Path, None] = {}
    problems: list[UserError] = []
    for source in sources:
        try:
            paths |= dict.fromkeys(find_images(source))
        except (ImageError, DatasetError) as error:
            paths[source] = None
            problems.append(error)
    if len(problems) == len(sources):
        raise problems[0]
    return list(paths)


_Result = TypeVar("_Result")


def map_files(
    predictor: Predictor, paths: Sequence[Path], function: Callable[[Tensor], Sequence[_Result]]
) -> Iterator[tuple[Path, Tensor | None, _Result | str]]:
    """Yield for each file, in order: its path, the model's input (3, size, size), and what `function` makes of it.

    `function` takes a batch of `prepare`d images. A file that it fails on, or that cannot be read, yields the reason.
    Only one batch is in memory at a time. A progress bar is shown if stderr is a terminal.
    """
    with ThreadPoolExecutor(_READERS) as pool, tqdm(total=len(paths), unit="image", leave=False, disable=None) as bar:
        for start in range(0, len(paths), predictor.batch_size):
            batch = paths[start : start + predictor.batch_size]
            read = list(pool.map(lambda path: _read(predictor, path), batch))
            results = iter(_apply(function, [item for item in read if isinstance(item, Tensor)]))
            for path, item in zip(batch, read, strict=True):
                yield (path, item, next(results)) if isinstance(item, Tensor) else (path, None, item)
                bar.update()


def require_all(failed: Sequence[Path], total: int) -> None:
    """Raise ImageError if some of `total` images have failed, for reasons that the user has seen."""
    if failed:
        more = ", ..." if len(failed) > _SHOWN else ""
        raise ImageError(
            f"{len(failed)} of {total} images failed, for the reasons above: "
            f"{', '.join(map(one_line, failed[:_SHOWN]))}{more}; replace them or leave them out"
        )


_SHOWN = 5  # names in a message


def _read(predictor: Predictor, path: Path) -> Tensor | str:
    """Return the model's input for a file, or the reason why it cannot be read."""
    try:
        if path.is_dir() or not path.exists():
            find_images(path)  # raises
        return predictor.prepare(path)
    except (ImageError, DatasetError) as error:
        return str(error)
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        return f"{path} cannot be read: {error or type(error).__name__}"


def _apply(function: Callable[[Tensor], Sequence[_Result]], inputs: list[Tensor]) -> list[_Result | str]:
    """Return a result for each input, or the reason why it has none; one of them does not spoil the others."""
    if not inputs:
        return []
    try:
        return list(function(torch.stack(inputs)))
    except (RunError, EigendecompositionError, RuntimeError) as error:
        if len(inputs) == 1:
            return [str(error)]
    return [found for one in inputs for found in _apply(function, [one])]
