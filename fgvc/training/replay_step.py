"""Repeating a step that a run has kept, and saying what is found."""

import copy
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from fgvc.errors import ConfigError, RunError
from fgvc.models import FineGrainedModel, PoolingHead
from fgvc.spectral import EigendecompositionError, covariance_eigenvalues
from fgvc.spectrum_measures import condition_number, nonzero_condition_number, numerical_rank, smallest_gap
from fgvc.training.config import RunConfig
from fgvc.training.diagnosis import Diagnosis, diagnose
from fgvc.training.hybrid import Stages, switch_epoch
from fgvc.training.model_of_run import restore_backbone
from fgvc.training.objective import Objective
from fgvc.training.replay import Replay, load_replay
from fgvc.training.seeding import seeded
from fgvc.training.setup import build_head, build_model, trained_part
from fgvc.training.untouched import untouched

PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Choices of `trainer.precision`, and what autocast computes in."""

_SPECTRA = 10  # samples in the table


@dataclass(frozen=True)
class Replayed:
    """A step and what its repetition found.

    Attributes:
        replay: the step, with the configuration that it was repeated with.
        diagnosis: of the repetition.
        spectra: one row a sample (those it comes from, else all; the first 10): path, largest eigenvalue of the
            covariance that the pooling reads, numerical rank, condition number, that of the non-zero eigenvalues, and
            smallest gap in units of the largest; NaN where the covariance is not finite.
        changes: settings other than the run's, as KEY=VALUE.
        anomaly: what torch's anomaly detection said, if it was asked for and said something.
    """

    replay: Replay
    diagnosis: Diagnosis
    spectra: pd.DataFrame
    changes: list[str]
    anomaly: str | None = None

    @property
    def reproduced(self) -> bool:
        """Whether the same is not finite as in training."""
        return self.diagnosis.what == self.replay.what

    def text(self) -> str:
        """For a terminal."""
        step, found = self.replay, self.diagnosis
        outcome = "reproduced" if self.reproduced else "not reproduced"
        what = f"not finite: the {found.what}" if found.what else "everything is finite"
        changed = f" with {', '.join(self.changes)}" if self.changes else ""
        loss = "none" if found.loss is None else f"{found.loss:.6g}"
        norm = "none" if found.gradient_norm is None else f"{found.gradient_norm:.6g}"
        lines = [
            f"step {step.step}, epoch {step.epoch}, learning rate {step.learning_rate:g}, {len(step.inputs)} samples",
            f"training: {step.reason}",
            f"{outcome}{changed}: {what}; loss {loss}, norm of the gradient {norm}",
            *(f"- {line}" for line in found.lines(step.paths)),
            *([] if self.anomaly is None else [f"anomaly detection: {self.anomaly}"]),
            "",
            "covariance that the pooling reads:",
            self.spectra.to_string(index=False, float_format="{:.3g}".format),
        ]
        return "\n".join(lines)


def replay_step(
    source: Path | Replay,
    device: torch.device | None = None,
    *,
    gradient: str | None = None,
    precision: str | None = None,
    anomaly: bool = False,
) -> Replayed:
    """Repeat the forward and the backward pass of a kept step.

    It needs neither the dataset nor weights from elsewhere. What several processes or parts of a batch add up to is not
    repeated: only the part in which the number that is not finite was met.

    Args:
        source: a file, or what `load_replay` made of it.
        device: None: a GPU where there is one.
        gradient: rule of the spectral layer in place of the run's.
        precision: "no", "bf16" or "fp16" in place of the run's.
        anomaly: repeat it once more under torch's anomaly detection, which names the operation of a NaN gradient.

    Raises:
        RunError: the file is missing, damaged or of another version, or its weights do not fit its configuration.
        ConfigError: the pooling of the step has no such gradient, or the precision is unknown.
    """
    step = load_replay(source) if isinstance(source, Path) else source
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config, changes = _changed(step, gradient, precision)
    step = replace(step, config=config)
    try:
        with seeded(0):  # what is drawn here is replaced by the weights
            module = _module(step).to(device).train()
    except RuntimeError as error:  # of load_state_dict
        file = source if isinstance(source, Path) else "the step"
        raise RunError(f"{file}: its weights do not fit its configuration: {error}") from error
    inputs, targets = step.inputs.to(device), step.targets.to(device)
    objective = Objective(config.trainer, step.num_classes)
    dtype = PRECISIONS[config.trainer.precision]
    with torch.random.fork_rng(), torch.autocast(device.type, dtype, enabled=dtype is not None):
        torch.set_rng_state(step.random_state)
        diagnosis = diagnose(module, inputs, targets, objective.loss)
        said = _anomaly(module, inputs, targets, objective) if anomaly else None
        spectra = _spectra(module, inputs, diagnosis.samples, step.paths)
    return Replayed(step, diagnosis, spectra, changes, said)


def _changed(step: Replay, gradient: str | None, precision: str | None) -> tuple[RunConfig, list[str]]:
    """A copy of the configuration to repeat a step with, and what is not as in the run."""
    config = copy.deepcopy(step.config)
    if gradient is not None:
        if step.epoch <= switch_epoch(config):
            raise ConfigError(
                f"epoch {step.epoch} trains with {config.hybrid.method}, the first stage of the hybrid protocol, which "
                "method.gradient does not change; leave the gradient out"
            )
        config.method.gradient = gradient
    if precision is not None:
        config.trainer.precision = precision
    if config.trainer.precision not in PRECISIONS:
        raise ConfigError(f"precision={precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")
    given = {"method.gradient": gradient, "trainer.precision": precision}
    return config, [f"{key}={value}" for key, value in given.items() if value is not None]


def _module(step: Replay) -> FineGrainedModel | PoolingHead:
    """The trained module with the weights and the pooling of the step."""
    config = step.config
    module: FineGrainedModel | PoolingHead
    if config.backbone.frozen:
        module = head = build_head(config, step.inputs.shape[1], step.num_classes)
    else:
        model = build_model(config, restore_backbone(config), step.num_classes)
        module, head = trained_part(config, model), model.head
    Stages(config, head).enter(head, step.epoch)
    module.load_state_dict(step.weights)
    return module


def _anomaly(module: nn.Module, inputs: Tensor, targets: Tensor, objective: Objective) -> str | None:
    """What torch's anomaly detection says of the passes, with the line of the forward pass that it blames."""
    with warnings.catch_warnings(record=True) as caught, torch.autograd.set_detect_anomaly(True):
        warnings.simplefilter("always")
        try:
            diagnose(module, inputs, targets, objective.loss)
        except RuntimeError as error:
            # the traceback of the forward pass comes as a warning, the last one before the error
            return "\n".join([str(error), *(str(warning.message) for warning in caught[-1:])])
    return None


def _spectra(
    module: FineGrainedModel | PoolingHead, inputs: Tensor, samples: list[int], paths: list[str]
) -> pd.DataFrame:
    """The table of `Replayed`, of what the pooling reads in the mode that the module is in."""
    chosen = (samples or list(range(len(inputs))))[:_SPECTRA]
    with untouched(module), torch.no_grad():
        features = module.pooling_input(inputs)[chosen]
    eigenvalues = np.stack([_eigenvalues(image) for image in features])
    measures = {
        "largest": eigenvalues[:, 0],
        "rank": numerical_rank(eigenvalues),
        "condition": condition_number(eigenvalues),
        "nonzero_condition": nonzero_condition_number(eigenvalues),
        "smallest_gap": smallest_gap(eigenvalues),
    }
    known = np.isfinite(eigenvalues).all(axis=1)
    columns = {"sample": chosen, "path": [paths[i] if i < len(paths) else "" for i in chosen]}
    table: pd.DataFrame = pd.DataFrame(columns | {k: np.where(known, v, np.nan) for k, v in measures.items()})
    return table


def _eigenvalues(image: Tensor) -> np.ndarray:
    """Of the covariance of (C, H, W): (C,) float64, descending; NaN where there are none."""
    try:
        values: np.ndarray = covariance_eigenvalues(image[None])[0].cpu().numpy()
    except EigendecompositionError:
        values = np.full(len(image), np.nan)
    return values
