"""Names and probabilities for new images by the model of a run; its dataset is not needed.

import fgvc
predictor = fgvc.load_run("results/cub80_frozen/tf_efficientnet_lite0/seb/seed0")
print(predictor.predict("bird.jpg").names)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

import torch
from PIL import Image
from torch import Tensor

from fgvc.data import TransformSpec, UnreadableImageError, copy_rgb, decode_rgb
from fgvc.errors import ConfigError, ImageError, RunError
from fgvc.models import FineGrainedModel
from fgvc.training.calibration import Calibration, read_calibration
from fgvc.training.model_of_run import load_model, read_classes
from fgvc.training.run_folder import RunFolder
from fgvc.training.setup import build_transform, fold_backbone
from fgvc.training.temperature import probabilities

ImageSource = Image.Image | str | Path
"""An image: open in Pillow, of any mode, or the path of its file."""


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image.

    Attributes:
        names: classes, the most probable first.
        probabilities: of each of `names`; those of all classes add up to one.
        calibrated: whether they were calibrated on images that the model was not trained on.
        logits: (num_classes,) float32 on the CPU, before the temperature, in the order of the run's classes.
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
        model: (B, 3, size, size) -> logits (B, K), in evaluation mode.
        transform: from an RGB image to what `model` reads.
        classes: K names.
        calibration: of the model; None leaves the probabilities as they are.
    """

    def __init__(
        self,
        model: FineGrainedModel,
        transform: TransformSpec,
        classes: Sequence[str],
        calibration: Calibration | None = None,
    ) -> None:
        self.model = model
        self.transform = transform
        self.classes = list(classes)
        self.calibration = calibration

    @property
    def calibrated(self) -> bool:
        """Whether a temperature was fitted on images that the model was not trained on."""
        return self.calibration is not None and self.calibration.temperature is not None

    @property
    def temperature(self) -> float:
        """Divides the logits; 1 where nothing is calibrated."""
        fitted = None if self.calibration is None else self.calibration.temperature
        return 1.0 if fitted is None else fitted

    @property
    def status(self) -> str:
        """Whether the probabilities are calibrated, and on what, in a line."""
        if self.calibration is None or self.calibration.temperature is None:
            return "probabilities are not calibrated"
        on = f"{self.calibration.images:,} {self.calibration.split} images"
        return f"probabilities are calibrated: temperature {self.temperature:.3f} from {on}"

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def batch_size(self) -> int:
        """Images that go through the network at a time."""
        return 4 if self.device.type == "cpu" else 64  # on a CPU more of them leave the processor's cache: slower

    @overload
    def predict(  # type: ignore[overload-overlap]  # a str is a Sequence[str] too; it is taken for a path
        self, images: ImageSource, top: int = ...
    ) -> Prediction: ...
    @overload
    def predict(self, images: Sequence[ImageSource], top: int = ...) -> list[Prediction]: ...
    def predict(self, images: ImageSource | Sequence[ImageSource], top: int = 5) -> Prediction | list[Prediction]:
        """The `top` most probable classes of an image, or of each of several.

        An image is read as in training, of any mode, and turned as its EXIF orientation says. Others in the call change
        a probability by rounding only, by less than 1e-4.

        Args:
            images: one image or several, see `ImageSource`.
            top: number of names, at most that of the classes.

        Raises:
            ImageError: an image is missing or cannot be decoded.
            ConfigError: `top` is below 1.
            RunError: the model gives logits that are not finite.
        """
        if isinstance(images, ImageSource):
            return self._predict([images], top)[0]
        size = self.batch_size
        batches = (images[start : start + size] for start in range(0, len(images), size))
        return [prediction for batch in batches for prediction in self._predict(batch, top)]

    def prepare(self, image: ImageSource) -> Tensor:
        """What the model reads of an image: (3, size, size) float32, normalised.

        Raises:
            ImageError: it is missing or cannot be decoded.
        """
        try:
            rgb = copy_rgb(image) if isinstance(image, Image.Image) else decode_rgb(Path(image), upright=True)
        except UnreadableImageError as error:
            name = "the image" if isinstance(image, Image.Image) else image
            raise ImageError(f"{name} cannot be read: {error}") from error
        return self.transform(rgb)

    @torch.inference_mode()
    def logits(self, batch: Tensor) -> Tensor:
        """Logits (B, K) float32 on the CPU of a batch of `prepare`d images (B, 3, size, size).

        Raises:
            RunError: they are not finite.
        """
        inputs = batch.to(self.device, memory_format=torch.channels_last)
        logits: Tensor = self.model(inputs).float().cpu()
        if not torch.isfinite(logits).all():
            raise RunError("the model gives logits that are not finite; train the run again")
        return logits

    def decide(self, logits: Tensor, top: int = 5) -> list[Prediction]:
        """The `top` most probable classes for each row of `logits` (B, K). Raises ConfigError where it is below 1."""
        if top < 1:
            raise ConfigError(f"top={top} must be at least 1")
        # ordered by the logits: far from the first class probabilities may round to zero alike
        order = logits.sort(dim=1, descending=True, stable=True).indices[:, :top]
        shares = probabilities(logits, self.temperature).gather(1, order)
        return [
            Prediction(tuple(self.classes[i] for i in indices), tuple(share), self.calibrated, row)
            for indices, share, row in zip(order.tolist(), shares.tolist(), logits, strict=True)
        ]

    def _predict(self, images: Sequence[ImageSource], top: int) -> list[Prediction]:
        return self.decide(self.logits(torch.stack([self.prepare(image) for image in images])), top)


def load_run(path: str | Path, checkpoint: str = "last", device: str | torch.device | None = None) -> Predictor:
    """The model of a run, ready to name what is on an image.

    Probabilities are calibrated where `scripts/calibrate.py`, or `fgvc.calibrate_run`, has fitted a temperature for
    these weights; see `Predictor.calibrated`.

    Args:
        path: the run folder; its dataset is not read.
        checkpoint: "last" or "best".
        device: where the model goes; None: to a GPU where there is one.

    Raises:
        RunError: not a run, its weights are missing, damaged or of another architecture, or the weights of the frozen
            backbone are not those its head was trained on.
        ConfigError, WeightsError: as in training.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder = RunFolder(Path(path))
    config = folder.read_config()
    model = load_model(folder.path, checkpoint).to(device).to(memory_format=torch.channels_last)
    transform = build_transform(config, model.backbone, training=False).deterministic()
    if config.backbone.frozen:  # folded, as the feature maps were computed that its head was trained on
        model = FineGrainedModel(fold_backbone(config, model.backbone, device), model.head).eval()
    return Predictor(model, transform, read_classes(folder), read_calibration(folder.path, checkpoint))
