"""A step kept on the disk, to be repeated: the weights before it and the batch that it saw.

Of a run that meets NaN or infinity, RUN/replay/step-NNNNNN.pt holds the trained module's weights and buffers (those of
the head alone where the backbone is frozen), the batch's inputs and targets as they were mixed, and what is needed to
rebuild the module without the dataset and without the weights that training started from. Only the first `LIMIT` such
steps of a run are kept: what comes later is a consequence more often than a cause.
"""

import logging
import zipfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from fgvc.errors import RunError
from fgvc.io import atomic_path, load_pytorch
from fgvc.runs.config import RunConfig, to_run_config

_log = logging.getLogger(__name__)

LIMIT = 3
"""Files that a process of a run keeps at most."""

_FORMAT = 1


@dataclass(frozen=True)
class Replay:
    """A step as the loop saw it, B samples of this process.

    Attributes:
        what: what was not finite, as in `fgvc.training.diagnosis.Diagnosis`: "eigenvalues", "loss" or "gradient".
        reason: the loop's message.
        config: the run's.
        weights: of the trained module before the step, buffers included.
        inputs: (B, ...) float, as mixed.
        targets: (B,) classes or (B, num_classes) shares.
        num_classes: width of the logits.
        paths: what each input was made of: a file, or two of them joined by " + " where it was mixed.
        epoch: from 1; it decides the pooling of a hybrid run.
        step: from 1.
        learning_rate: of the step.
        random_state: `torch.get_rng_state()` before the forward pass.
        process: rank of the process.
    """

    what: str
    reason: str
    config: RunConfig
    weights: dict[str, Tensor]
    inputs: Tensor
    targets: Tensor
    num_classes: int
    paths: list[str]
    epoch: int
    step: int
    learning_rate: float
    random_state: Tensor
    process: int = 0


def keep_replay(run: Path, replay: Replay) -> Path | None:
    """Write the step to the run's folder; None where `LIMIT` of them are kept there already, or it cannot be written.

    What made the step worth keeping is more important than that it is not kept: of the latter there is a warning.
    """
    whose = f"-process{replay.process}" if replay.process else ""
    own = [file for file in _files(run) if file.stem.partition("-")[2].lstrip("0123456789") == whose]
    if len(own) >= LIMIT:
        return None
    file = run / "replay" / f"step-{replay.step:06d}{whose}.pt"
    try:
        save_replay(file, replay)
    except OSError as error:
        _log.warning("step %d could not be kept to be repeated: %s", replay.step, error)
        return None
    return file


def find_replays(path: Path) -> list[Path]:
    """The file itself, or the steps that a run has kept, the earliest first. Raises RunError where there are none."""
    if not path.is_dir():
        return [path]
    files = _files(path)
    if not files:
        raise RunError(f"{path} keeps no step to repeat: a run writes one when it meets NaN or infinity")
    return files


def save_replay(file: Path, replay: Replay) -> None:
    """Write one file, whole or not at all."""
    content = {field.name: getattr(replay, field.name) for field in fields(replay)}
    content |= {
        "format": _FORMAT,
        "config": OmegaConf.to_yaml(OmegaConf.create(asdict(replay.config))),
        "weights": {name: _plain(tensor) for name, tensor in replay.weights.items()},
    }
    plain = {key: _plain(value) if isinstance(value, Tensor) else value for key, value in content.items()}
    # opened here: of a file that torch opens, it does not say that the disk is full
    with atomic_path(file) as temporary, temporary.open("wb") as opened:
        torch.save(plain, opened)


def load_replay(file: Path) -> Replay:
    """Read what `save_replay` wrote; nothing in it is executed.

    Raises:
        RunError: the file is missing, damaged, something else, or of another version.
    """
    if not file.is_file():
        raise RunError(f"{file} is missing; give a run folder, or a file of its folder replay/")
    try:
        with zipfile.ZipFile(file) as archive:
            if (damaged := archive.testzip()) is not None:  # torch.load does not look at the checksums
                raise ValueError(f"the checksum of {damaged} is wrong")
        content = load_pytorch(file)
    except Exception as error:  # zip, pickle and OS errors alike: the file cannot be used
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunError(f"{file} is damaged, or no step of a run: {reason}") from error
    version = content.get("format") if isinstance(content, dict) else None
    if version != _FORMAT:
        raise RunError(f"{file} is of format {version}, this version reads {_FORMAT}; use the version that wrote it")
    return Replay(**_checked(file, content))


def _checked(file: Path, content: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `Replay`. Raises RunError where one is missing, of another type, or cannot be understood."""
    kinds: dict[str, type] = {
        **dict.fromkeys(("what", "reason", "config"), str),
        **dict.fromkeys(("num_classes", "epoch", "step", "process"), int),
        **dict.fromkeys(("inputs", "targets", "random_state"), Tensor),
        "weights": dict,
        "paths": list,
        "learning_rate": float,
    }
    wrong = [name for name, kind in kinds.items() if not isinstance(content.get(name), kind)]
    if wrong:
        raise RunError(f"{file} is damaged: {', '.join(wrong)} missing or of another type")
    try:
        config = to_run_config(OmegaConf.create(content["config"]))
    except Exception as error:  # omegaconf and yaml raise many kinds
        raise RunError(f"{file} holds a configuration that this version does not know: {error}") from error
    return {name: content[name] for name in kinds} | {"config": config}


def _files(run: Path) -> list[Path]:
    return sorted((run / "replay").glob("step-*.pt"))


def _plain(tensor: Tensor) -> Tensor:
    """A copy on the CPU that carries no more than its own numbers, in their memory format."""
    return tensor.detach().cpu().clone()
