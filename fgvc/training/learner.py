"""The learner: a module with its loss, its optimiser and the moving average of its weights, over all processes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from timm.data.mixup import Mixup, mixup_target
from timm.layers.norm_act import convert_sync_batchnorm
from timm.loss.binary_cross_entropy import BinaryCrossEntropy
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from fgvc.data import ImageDataset
from fgvc.errors import ConfigError
from fgvc.models import FineGrainedModel, PoolingHead
from fgvc.models.lora import merged_weights
from fgvc.runs.config import TrainerConfig
from fgvc.runs.statistics import tree_distance


class Objective:
    """The loss: (binary) cross-entropy with smoothed labels, of unmixed inputs or of inputs mixed in pairs.

    Mixup [Zhang, Cisse, Dauphin, Lopez-Paz, 2018] and CutMix [Yun et al., 2019] are timm's. They draw one mixture per
    step from NumPy's generator and mix each input with the one at the mirrored position in the batch.

    Attributes:
        guessing: Loss of probability 1 / num_classes for each class.
        num_classes, adjustment, soft: as given.

    Args:
        num_classes: width of the logits.
        loss: "cross_entropy", or "bce", the mean over the classes of the binary cross-entropies, timm's.
        label_smoothing: share of the probability spread over all classes, 0 to 1.
        mixup: alpha of mixup, 0 for none.
        cutmix: alpha of CutMix, 0 for none.
        adjustment: (num_classes,) float32 on the logits' device, added to the logits, see `logit_adjustment`; None
            adds nothing.
        soft: (num_classes, num_classes) float32 on the logits' device: target of each class, see `soft_labels`; None
            for the class alone.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        loss: str = "cross_entropy",
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        adjustment: Tensor | None = None,
        soft: Tensor | None = None,
    ) -> None:
        self.num_classes = num_classes
        self.adjustment, self.soft = adjustment, soft
        self._smoothing = label_smoothing
        self._mixup: Mixup | None = None
        if mixup or cutmix:
            self._mixup = Mixup(mixup, cutmix, label_smoothing=label_smoothing, num_classes=num_classes)
        # Mixup smooths the targets it mixes; do not smooth twice
        smoothing = 0.0 if self._mixup else label_smoothing
        share = 1 / num_classes
        self._loss: nn.Module
        if loss == "bce":
            self._loss, self._scale = BinaryCrossEntropy(smoothing, reduction="sum"), share
            self.guessing = -share * math.log(share) - (1 - share) * math.log1p(-share)
        else:
            self._loss, self._scale = nn.CrossEntropyLoss(label_smoothing=smoothing, reduction="sum"), 1.0
            self.guessing = -math.log(share)

    def mix(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mix inputs (B, C, H, W) in place; return them and their targets: (B,) classes, or (B, num_classes) shares.

        A batch of odd size, e.g. the last one of an epoch, stays unmixed.
        """
        if self._mixup is None:
            return inputs, targets
        if len(inputs) % 2:
            return inputs, mixup_target(targets, self.num_classes, 1.0, self._smoothing)
        mixed, shares = self._mixup(inputs, targets)
        return mixed, shares

    def total(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the float32 loss of logits (B, num_classes) and targets from `mix`, summed over B."""
        logits = logits.float()
        if self.adjustment is not None:
            logits = logits + self.adjustment
        if self.soft is not None:
            targets = targets @ self.soft if targets.is_floating_point() else self.soft[targets]
        value: Tensor = self._scale * self._loss(logits, targets)
        return value

    def mean(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean of `total` over B."""
        return self.total(logits, targets) / len(logits)


def logit_adjustment(class_sizes: Sequence[int], tau: float) -> Tensor:
    """Return tau log(share of the training images) of each class, (num_classes,) float32.

    Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, eq. 10: the softmax cross-entropy of the
    adjusted logits is consistent for the balanced error at tau = 1. A class without images counts as having one.
    """
    sizes = torch.tensor(class_sizes, dtype=torch.float64).clamp(min=1)
    return (tau * (sizes / sizes.sum()).log()).float()


def require_coarse(coarse: Mapping[str, Sequence[str]]) -> None:
    """Raise ConfigError if there are no coarser labels, or a class has none at a level."""
    if not coarse:
        raise ConfigError("trainer.hierarchy needs coarser labels; add coarse.csv to the dataset, or set null")
    for level, names in coarse.items():
        if missing := list(names).count(""):
            raise ConfigError(
                f"trainer.hierarchy needs labels: {missing} of {len(names)} classes have none at the level "
                f"{level!r}; add them"
            )


def soft_labels(coarse: Mapping[str, Sequence[str]], beta: float) -> Tensor:
    """Return the target of each class, (K, K) float32: softmax over j of -beta d(i, j) / (number of levels + 1).

    Bertinetto et al., "Making better mistakes", CVPR 2020, section 3.2; d is `tree_distance`.

    Raises ConfigError as `require_coarse`.
    """
    require_coarse(coarse)
    classes = np.arange(len(next(iter(coarse.values()))))
    distance = torch.from_numpy(tree_distance(classes[:, None], classes, coarse))
    return (-beta * distance / (len(coarse) + 1)).softmax(dim=1).float()


def create_objective(settings: TrainerConfig, images: ImageDataset, device: torch.device) -> Objective:
    """Return the loss that a run's settings ask for.

    Args:
        settings: settings of the run.
        images: training images, for their number in each class and the coarser labels.
        device: device of the logits.

    Raises ConfigError: coarser labels are asked for and missing.
    """
    tau, beta = settings.logit_adjustment, settings.hierarchy
    return Objective(
        len(images.classes),
        loss=settings.loss,
        label_smoothing=settings.label_smoothing,
        mixup=settings.mixup,
        cutmix=settings.cutmix,
        adjustment=logit_adjustment(images.class_sizes, tau).to(device) if tau else None,
        soft=None if beta is None else soft_labels(images.coarse, beta).to(device),
    )


class Learner:
    """A module with its loss, its optimiser and, optionally, the moving average of its weights.

    Args:
        module: inputs -> logits; a whole model, or a head on feature maps.
        optimizer: optimiser of the module's parameters.
        objective: loss of the logits.
        accelerator: device, precision and processes.
        ema_decay: decay of the moving average per step; None for no average.
    """

    def __init__(
        self,
        module: FineGrainedModel | PoolingHead,
        optimizer: Optimizer,
        objective: Objective,
        accelerator: Accelerator,
        *,
        ema_decay: float | None = None,
    ) -> None:
        self.objective = objective
        self.accelerator = accelerator
        self.average: ModelEmaV3 | None = None
        if ema_decay is not None:
            # without the warm-up, the average of a run of a few thousand steps would stay near the first weights
            self.average = ModelEmaV3(module, decay=ema_decay, use_warmup=True)
            accelerator.prepare_model(self.average.module, evaluation_mode=True)
        self.module: nn.Module = accelerator.prepare(module)
        self.optimizer: Optimizer = accelerator.prepare(optimizer)

    @property
    def plain(self) -> FineGrainedModel | PoolingHead:
        """The module without the wrapper for several processes."""
        module: FineGrainedModel | PoolingHead = self.accelerator.unwrap_model(self.module)
        return module

    @property
    def evaluated(self) -> nn.Module:
        """The module to evaluate and save: the average if there is one, otherwise the module."""
        return self.module if self.average is None else self.average.module

    @property
    def plain_evaluated(self) -> FineGrainedModel | PoolingHead:
        """`evaluated` without the wrapper for several processes."""
        module: FineGrainedModel | PoolingHead = self.accelerator.unwrap_model(self.evaluated)
        return module

    @property
    def heads(self) -> list[PoolingHead]:
        """The heads of the module and of its average."""
        return [head_of(self.plain), head_of(self.plain_evaluated)]

    def weights(self) -> dict[str, Tensor]:
        """Return the weights of `evaluated` by name, not copied, those of adapters merged."""
        return merged_weights(self.plain_evaluated)

    def finish(self) -> None:
        """Give the module the weights of `evaluated`."""
        self.plain.load_state_dict(self.plain_evaluated.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to continue, not copied."""
        scaler = self.accelerator.scaler
        return {
            "model": dict(self.plain.state_dict()),
            "average": None if self.average is None else dict(self.plain_evaluated.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of `state_dict`."""
        self.plain.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])


def head_of(module: FineGrainedModel | PoolingHead) -> PoolingHead:
    """Return the head of a model, or `module` if it is a head."""
    return module.head if isinstance(module, FineGrainedModel) else module


def synchronise_batch_norm(
    module: FineGrainedModel | PoolingHead, accelerator: Accelerator
) -> FineGrainedModel | PoolingHead:
    """Return the module with batch normalisation over the images of all processes.

    Raises:
        ConfigError: the module has batch normalisation and runs on CPUs; torch synchronises it on GPUs only.
    """
    layers = [name for name, layer in module.named_modules() if isinstance(layer, _BatchNorm)]
    if layers and accelerator.device.type == "cpu":
        raise ConfigError(
            f"{accelerator.num_processes} processes on CPUs cannot train {layers[0]}: torch synchronises batch "
            "normalisation on GPUs only, so each would use only its own images; train in one process, or on GPUs"
        )
    converted: FineGrainedModel | PoolingHead = convert_sync_batchnorm(module)
    return converted
