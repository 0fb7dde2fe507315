"""How smooth the loss of a batch is along its gradient.

Three measures of Santurkar, Tsipras, Ilyas, Madry (How does batch normalization help optimization?, NeurIPS 2018), with
which Song, Sebe, Wang (ICCV 2021) compare gradients of covariance pooling. With the weights x, the loss L of one batch,
g = grad L(x) and step sizes s, over all s:

- variation of the loss: the smallest and the largest L(x - s g);
- gradient predictiveness: the smallest and the largest ||grad L(x - s g) - g||;
- effective beta-smoothness: the largest ||grad L(x - s g) - g|| / (s ||g||).

Lower is smoother. The step goes against the gradient, as that of an optimiser does: where training is about to be. With
an approximate gradient rule "grad" is what the rule returns, in both places.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fgvc.errors import ConfigError
from fgvc.spectral import EigendecompositionError

Weights = Literal["all", "features"]
"""Which weights are moved and whose gradients are compared: all that are trained, or those in front of the classifier,
the only ones whose gradient comes through the pooling."""


@dataclass(frozen=True)
class Smoothness:
    """The measures at one point, each a number a step size, in their order; infinite where there is no finite loss.

    Attributes:
        loss: L(x).
        gradient_norm: ||g||.
        step_sizes: s.
        losses: L(x - s g).
        gradient_changes: ||grad L(x - s g) - g||.
    """

    loss: float
    gradient_norm: float
    step_sizes: tuple[float, ...]
    losses: tuple[float, ...]
    gradient_changes: tuple[float, ...]

    @property
    def finite(self) -> bool:
        """Whether there is a loss and a gradient to start from."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)

    @property
    def beta(self) -> float:
        """Effective beta-smoothness; NaN where the gradient is zero, as nothing moves."""
        if self.gradient_norm == 0:
            return math.nan
        return max(
            change / (s * self.gradient_norm) for change, s in zip(self.gradient_changes, self.step_sizes, strict=True)
        )

    def measures(self) -> dict[str, float]:
        """The numbers of a row of a table, see `fgvc.studies.smoothness.table`."""
        ranges = {"step_size": self.step_sizes, "loss": self.losses, "gradient_change": self.gradient_changes}
        row = {"loss": self.loss, "gradient_norm": self.gradient_norm}
        row |= {f"{name}_{end.__name__}": end(values) for name, values in ranges.items() for end in (min, max)}
        return row | {"beta": self.beta}


def smoothness_along_gradient(
    module: nn.Module,
    inputs: Tensor,
    loss: Callable[[Tensor], Tensor],
    step_sizes: Sequence[float],
    *,
    weights: Weights = "all",
    clip_norm: float | None = None,
) -> Smoothness:
    """Measure the loss and its gradient along the gradient, on one batch.

    The module is called in the mode it is in, every time with the same random numbers (dropout) and the same buffers.
    Weights, gradients, buffers (running statistics of batch normalisation) and generators are left as found: what moves
    is a copy.

    Args:
        module: inputs -> what `loss` reads; its parameters that require a gradient are the trained ones.
        inputs: the batch.
        loss: output of the module -> scalar.
        step_sizes: s, positive.
        weights: what is moved and measured, see `Weights`.
        clip_norm: norm to which the optimiser clips the gradient of all trained weights: a longer gradient is walked
            along by s clip_norm / ||g||, which is then the step size.

    Raises:
        ConfigError: no step sizes, or one that is not positive and finite; nothing to train.
        EigendecompositionError: L(x) itself has none.
    """
    if not step_sizes or not all(0 < s < math.inf for s in step_sizes):
        raise ConfigError(f"step sizes must be positive, got {list(step_sizes)}; give some, e.g. 0.5,1,2")
    trained = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    moved = [name for name in trained if weights == "all" or "classifier" not in name.split(".")]
    if not moved:
        raise ConfigError(f"the model has no trained weights of the kind {weights!r}; measure weights=all")
    at = partial(_loss_and_gradient, module, inputs, loss)
    value, gradient = at(trained)
    step = 1.0
    if clip_norm is not None and (norm := _norm(gradient.values())) > clip_norm:
        step = clip_norm / norm
    scaled = tuple(s * step for s in step_sizes)
    losses, changes = [], []
    for s in scaled:
        there = trained | {name: trained[name] - s * gradient[name] for name in moved}
        try:
            there_value, there_gradient = at(there)
        except EigendecompositionError:
            there_value, there_gradient = math.inf, gradient
        change = _norm([there_gradient[name] - gradient[name] for name in moved])
        finite = math.isfinite(there_value) and math.isfinite(change)
        losses.append(there_value if finite else math.inf)
        changes.append(change if finite else math.inf)
    return Smoothness(value, _norm([gradient[name] for name in moved]), scaled, tuple(losses), tuple(changes))


def _loss_and_gradient(
    module: nn.Module, inputs: Tensor, loss: Callable[[Tensor], Tensor], weights: dict[str, Tensor]
) -> tuple[float, dict[str, Tensor]]:
    """The loss with these weights in place of the module's, and its gradient."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in weights.items()}
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}  # batch normalisation updates them
    devices = [inputs.device] if inputs.is_cuda else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        value = loss(functional_call(module, leaves | buffers, (inputs,)))
        gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return float(value.detach()), dict(zip(leaves, gradients, strict=True))


def _norm(tensors: Iterable[Tensor]) -> float:
    """Euclidean norm of all tensors together."""
    return math.hypot(*(float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) for tensor in tensors))
