"""What a step minimises: cross-entropy with smoothed labels, on inputs as they are or mixed in pairs."""

from timm.data.mixup import Mixup, mixup_target
from torch import Tensor, nn

from fgvc.training.config import TrainerConfig


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
