"""Predictions for image files: which files, and what a model says of each, broken ones included."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fgvc.data import image_files
from fgvc.data.folder import require_unicode
from fgvc.errors import ImageError, UserError
from fgvc.training.calibration import fit_calibration, keep_calibration
from fgvc.training.prediction import Prediction, Predictor, load_run
from fgvc.training.run_folder import RunFolder

_READERS = 4  # threads: decoding releases the interpreter's lock


@dataclass(frozen=True)
class FilePrediction:
    """What a model says of one file.

    Attributes:
        path: of the file.
        inputs: (3, size, size) as the model read it; None where the file cannot be read.
        prediction: None where the file cannot be read.
        error: why it cannot be; else None.
    """

    path: Path
    inputs: Tensor | None
    prediction: Prediction | None
    error: str | None


def open_calibrated(path: Path, checkpoint: str = "last", *, calibrate: bool = True) -> tuple[Predictor, list[str]]:
    """The model of a run, calibrated first where it is not yet and its images are on this machine.

    Args:
        path: the run folder.
        checkpoint: "last" or "best".
        calibrate: False leaves a run that is not calibrated as it is.

    Returns:
        The model, and what a user has to know: whether its probabilities are uncalibrated and why.

    Raises:
        RunError, ConfigError, WeightsError: as `load_run`.
    """
    predictor, notes, reason = load_run(path, checkpoint), [], "as asked for"
    if predictor.calibration is None and calibrate:
        try:
            predictor.calibration = fit_calibration(path, checkpoint=checkpoint)
            keep_calibration(path, predictor.calibration)
        except UserError as error:  # mostly its images are elsewhere
            reason = str(error).splitlines()[0]
        except OSError as error:
            notes.append(f"the calibration holds for this call only: {path} cannot be written to ({error.strerror})")
    if predictor.calibration is None:
        command = f"fgvc calibrate {path} --checkpoint {checkpoint} --root PATH"
        notes.append(f"probabilities are not calibrated ({reason}); where the run's images are: {command}")
    elif not predictor.calibrated:
        notes.append(predictor.calibration.text)
    if RunFolder(path).read_config().dataset.options.get("crop") == "bbox":
        notes.append("the run was trained on images cut to the object's box; cut yours likewise")
    return predictor, notes


def find_images(source: Path) -> list[Path]:
    """The file that `source` is, or the image files in that folder at any depth, sorted.

    Raises:
        ImageError: nothing is there, or no image file in the folder.
        DatasetError: a folder cannot be read, or a name is not Unicode.
    """
    if source.is_dir():
        found = image_files(source)
        if not found:
            raise ImageError(
                f"{source}: no image files (known by extension, such as .jpg or .png); give another folder"
            )
        return found
    if not source.exists():
        raise ImageError(f"{source}: no such file or folder; give the path of an image")
    require_unicode(source.parent, source.name)
    return [source]


def predict_files(predictor: Predictor, paths: Sequence[Path], top: int = 5) -> Iterator[FilePrediction]:
    """Predictions of files in their order; one that cannot be read is told with the reason.

    Only one batch is in memory at a time. There is a progress bar where stderr is a terminal.

    Raises:
        ConfigError, RunError: as `Predictor.predict`.
    """
    with ThreadPoolExecutor(_READERS) as pool, tqdm(total=len(paths), unit="image", leave=False, disable=None) as bar:
        for start in range(0, len(paths), predictor.batch_size):
            batch = paths[start : start + predictor.batch_size]
            read = list(pool.map(lambda path: _read(predictor, path), batch))
            inputs = [item for item in read if isinstance(item, Tensor)]
            decided = iter(predictor.decide(predictor.logits(torch.stack(inputs)), top) if inputs else [])
            for path, item in zip(batch, read, strict=True):
                if isinstance(item, Tensor):
                    yield FilePrediction(path, item, next(decided), None)
                else:
                    yield FilePrediction(path, None, None, item)
                bar.update()


def _read(predictor: Predictor, path: Path) -> Tensor | str:
    """What the model reads of a file, or why it cannot be read."""
    try:
        return predictor.prepare(path)
    except ImageError as error:
        return str(error)
