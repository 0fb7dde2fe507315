"""What learns: a module with its optimiser and the moving average of its weights, over all processes."""

from typing import Any

from accelerate import Accelerator
from timm.data.mixup import Mixup, mixup_target
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from fgvc.models import FineGrainedModel, PoolingHead
from fgvc.runs.config import RunConfig, TrainerConfig
from fgvc.training.optim import create_optimizer
from fgvc.training.processes import synchronise_batch_norm


class Learner:
    """A module, its optimiser and, where `trainer.ema_decay` asks for one, the moving average of its weights.

    Args:
        config: the run.
        module: inputs -> logits; a whole model, or a head on feature maps.
        accelerator: device, precision and processes; with several of them batch normalisation is over all.

    Raises:
        ConfigError: unknown optimiser or rate.
    """

    def __init__(self, config: RunConfig, module: FineGrainedModel | PoolingHead, accelerator: Accelerator) -> None:
        synchronised = synchronise_batch_norm(module, accelerator)
        self.accelerator = accelerator
        self.average = _moving_average(synchronised, config.trainer.ema_decay, accelerator)
        optimizer = create_optimizer(synchronised, config.optimizer)
        self.module: nn.Module = accelerator.prepare(synchronised)
        self.optimizer: Optimizer = accelerator.prepare(optimizer)

    @property
    def plain(self) -> nn.Module:
        """The module without what distributes it."""
        module: nn.Module = self.accelerator.unwrap_model(self.module)
        return module

    @property
    def evaluated(self) -> nn.Module:
        """What is evaluated and saved: the moving average of the weights where there is one."""
        return self.module if self.average is None else self.average.module

    @property
    def plain_evaluated(self) -> FineGrainedModel | PoolingHead:
        """`evaluated` without what distributes it."""
        module = self.accelerator.unwrap_model(self.evaluated)
        assert isinstance(module, FineGrainedModel | PoolingHead)
        return module

    @property
    def heads(self) -> list[PoolingHead]:
        """Of the module, and of the average of it."""
        return [head_of(self.plain), head_of(self.plain_evaluated)]

    def weights(self) -> dict[str, Tensor]:
        """Of `evaluated`, by name; not copied."""
        return dict(self.plain_evaluated.state_dict())

    def finish(self) -> None:
        """Give the module the weights of `evaluated`."""
        self.plain.load_state_dict(self.weights())

    def average_in(self, step: int) -> None:
        """Bring the average forward after a step, counted from 1."""
        if self.average is not None:
            self.average.update(self.plain, step=step)

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on; not copied."""
        scaler = self.accelerator.scaler
        return {
            "model": dict(self.plain.state_dict()),
            "average": None if self.average is None else self.weights(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.plain.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])


def head_of(module: nn.Module) -> PoolingHead:
    """The head of a model, or the one that `module` is."""
    head = module.head if isinstance(module, FineGrainedModel) else module
    assert isinstance(head, PoolingHead)
    return head


def _moving_average(module: nn.Module, decay: float | None, accelerator: Accelerator) -> ModelEmaV3 | None:
    """timm's average, with its warm-up, without which a run of a few thousand steps would keep its first weights."""
    if decay is None:
        return None
    average = ModelEmaV3(module, decay=decay, use_warmup=True)
    accelerator.prepare_model(average.module, evaluation_mode=True)
    return average


class Objective:
    """Mixes the inputs of a step where that is asked for, and compares logits with the targets that belong to them.

    Mixup [Zhang, Cisse, Dauphin, Lopez-Paz, 2018] and CutMix [Yun et al., 2019] are timm's, which draw from NumPy's
    generator: one mixture a step, each input with the one at the other end of the batch.
    """

    def __init__(self, config: TrainerConfig, num_classes: int) -> None:
        self.num_classes = num_classes
        self._smoothing = config.label_smoothing
        self._mixup: Mixup | None = None
        if config.mixup or config.cutmix:
            self._mixup = Mixup(config.mixup, config.cutmix, label_smoothing=self._smoothing, num_classes=num_classes)
        self._cross_entropy = nn.CrossEntropyLoss(
            label_smoothing=0.0 if self._mixup else self._smoothing, reduction="sum"
        )

    def mix(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs (B, C, H, W), changed in place, and what they are to be: (B,) classes, or (B, num_classes) shares.

        A batch of odd size, as an epoch may end with, stays unmixed.
        """
        if self._mixup is None:
            return inputs, targets
        if len(inputs) % 2:
            return inputs, mixup_target(targets, self.num_classes, 1.0, self._smoothing)
        mixed, shares = self._mixup(inputs, targets)
        return mixed, shares

    def total(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of logits (B, num_classes) in float32 with targets as `mix` returns them, summed over B."""
        value: Tensor = self._cross_entropy(logits.float(), targets)
        return value

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean of `total` over B."""
        return self.total(logits, targets) / len(logits)
