"""Where a number that is not finite comes from: which weights, which samples, which layer.

Shapes: B samples in a batch of `inputs` (B, ...). "Not finite" is NaN or infinite.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fgvc.spectral import EigendecompositionError
from fgvc.training.untouched import untouched

LossOf = Callable[[Tensor, Tensor], Tensor]
"""Logits and targets -> the mean loss."""

_LISTED = 5  # names in a line


@dataclass(frozen=True)
class Diagnosis:
    """What a step finds when it is repeated.

    Attributes:
        what: what is not finite: the "eigenvalues" (they cannot be had), the "loss" or the "gradient"; empty where all
            of them are finite.
        loss: of the batch; None where the eigendecomposition ended the forward pass.
        gradient_norm: over all trained parameters; None without a finite loss.
        parameters: weights that are not finite, as `non_finite_parameters` names them.
        gradients: the same of gradients.
        inputs: samples whose input is not finite.
        samples: those that it comes from, as far as it can be told; all of them where it comes from the weights.
        first_module: the first layer, on the way forward or (of a gradient) backward, that hands on such a number.
        detail: the message of an eigendecomposition that failed.
        sizes: the largest entries of weights and inputs, which tell a cause in the one from a cause in the other.
    """

    what: str = ""
    loss: float | None = None
    gradient_norm: float | None = None
    parameters: list[str] = field(default_factory=list)
    gradients: list[str] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    first_module: str | None = None
    detail: str | None = None
    sizes: str = ""

    def lines(self, paths: Sequence[str] = ()) -> list[str]:
        """For a message, causes first; samples by their `paths` where these are given."""

        def named(samples: Sequence[int]) -> str:
            return _listed([paths[i] if i < len(paths) else f"sample {i}" for i in samples])

        lines = [f"inputs that are not finite: {named(self.inputs)}"] if self.inputs else []
        if self.parameters:
            lines.append(f"weights that are not finite: {_listed(self.parameters)}")
        if self.first_module is not None:
            way = "the gradient that leaves" if self.what == "gradient" else "the output of"
            lines.append(f"it begins in {way} {self.first_module}")
        if self.samples and not self.inputs:
            lines.append(f"it comes from {named(self.samples)}")
        if self.gradients:
            lines.append(f"gradients that are not finite: {_listed(self.gradients)}")
        elif self.what == "gradient":
            lines.append("each gradient is finite, their norm overflows")
        return [*lines, *(line for line in (self.what and self.sizes, self.detail) if line)]


def non_finite_parameters(module: nn.Module) -> list[str]:
    """Weights that are not finite, as "head.reduction.0.weight (3 of 512 entries, NaN)".

    Buffers count where the forward pass reads them: batch normalisation in training does not read its own.
    """
    weights: dict[str, Tensor] = dict(module.named_parameters())
    for prefix, part in module.named_modules():
        if not (part.training and isinstance(part, _BatchNorm)):
            weights |= dict(part.named_buffers(prefix, recurse=False))
    return _described(weights)


def non_finite_gradients(module: nn.Module) -> list[str]:
    """Parameters whose gradient is not finite, in the same form.

    To be asked before the gradient is clipped: clipping by a norm that is not finite spreads it to all of them.
    """
    return _described({name: p.grad for name, p in module.named_parameters() if p.grad is not None})


def non_finite_samples(inputs: Tensor) -> list[int]:
    """Indices of the samples of (B, ...) that are not finite."""
    indices: list[int] = (~inputs.isfinite().reshape(len(inputs), -1).all(dim=1)).nonzero().flatten().tolist()
    return indices


def diagnose(module: nn.Module, inputs: Tensor, targets: Tensor, loss_of: LossOf) -> Diagnosis:
    """Repeat the forward and the backward pass of a step and say where the first number that is not finite appears.

    The passes are repeated in the mode that the module is in. Where that blames every sample, as it does once batch
    normalisation in training has mixed them, each is looked at alone, in evaluation mode. Weights, buffers, gradients,
    modes and the random numbers of torch are left as they are; the autocast is the caller's.

    Args:
        module: inputs -> logits, not wrapped for several processes.
        inputs: (B, ...), as the step saw them.
        targets: (B,) classes or (B, num_classes) shares.
        loss_of: the mean loss of logits and targets.
    """
    weights, bad_inputs = non_finite_parameters(module), non_finite_samples(inputs)
    with untouched(module):
        found = _passes(module, inputs, targets, loss_of)
    found = replace(found, parameters=weights, inputs=bad_inputs, sizes=_sizes(module, inputs))
    if not found.what:
        return found
    samples = found.samples
    if weights:
        samples = list(range(len(inputs)))
    elif bad_inputs:
        samples = bad_inputs
    elif len(samples) in (0, len(inputs)):
        samples = _alone(module, inputs, targets, loss_of) or samples
    return replace(found, samples=samples)


def _alone(module: nn.Module, inputs: Tensor, targets: Tensor, loss_of: LossOf) -> list[int]:
    """The samples that are not finite by themselves, in evaluation mode."""
    with untouched(module):
        module.eval()
        return [i for i in range(len(inputs)) if _passes(module, inputs[i : i + 1], targets[i : i + 1], loss_of).what]


def _passes(module: nn.Module, inputs: Tensor, targets: Tensor, loss_of: LossOf) -> Diagnosis:
    """What the forward and the backward pass find; changes the buffers and the random numbers."""
    with _Trace(module, len(inputs)) as trace, torch.enable_grad():
        try:
            logits = module(inputs)
        except EigendecompositionError as error:
            first, samples = trace.forward or (trace.inside, error.items)
            return Diagnosis("eigenvalues", samples=samples, first_module=first, detail=str(error))
        loss = loss_of(logits, targets)
        value = float(loss.detach())
        if not loss.isfinite():
            first, samples = trace.forward or (None, _samples_of_loss(logits.detach(), targets, loss_of))
            return Diagnosis("loss", value, samples=samples, first_module=first)
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    gradients = {name: g for name, g in zip(trained, found, strict=True) if g is not None}
    norm = float(nn.utils.get_total_norm(gradients.values()))
    if torch.tensor(norm).isfinite():
        return Diagnosis("", value, norm)
    bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    # where no layer hands one back, it appears in the gradient of a weight itself
    first, samples = trace.backward or (bad[-1].rpartition(".")[0] if bad else None, [])
    return Diagnosis("gradient", value, norm, gradients=_described(gradients), samples=samples, first_module=first)


def _samples_of_loss(logits: Tensor, targets: Tensor, loss_of: LossOf) -> list[int]:
    return [i for i in range(len(logits)) if not loss_of(logits[i : i + 1], targets[i : i + 1]).isfinite()]


class _Trace:
    """Watches a module's layers in the two passes of a batch of `count` samples.

    Attributes:
        forward: name of the first layer whose output is not finite, and the samples of which it is not.
        backward: the same of the gradient that a layer hands back to the one before it.
        inside: name of the layer that was entered last and not left.
    """

    def __init__(self, module: nn.Module, count: int) -> None:
        self.forward: tuple[str, list[int]] | None = None
        self.backward: tuple[str, list[int]] | None = None
        self._count = count
        self._entered: list[str] = []
        self._handles = []
        for name, part in module.named_modules():
            self._handles += [
                part.register_forward_pre_hook(self._before(name or "the model")),
                part.register_forward_hook(self._after(name or "the model")),
            ]

    @property
    def inside(self) -> str | None:
        return self._entered[-1] if self._entered else None

    def __enter__(self) -> "_Trace":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, name: str) -> Callable[[nn.Module, tuple[object, ...]], None]:
        def backward(gradient: Tensor) -> None:
            if self.backward is None and not gradient.isfinite().all():
                self.backward = name, self._samples(gradient)

        def hook(part: nn.Module, arguments: tuple[object, ...]) -> None:
            self._entered.append(name)
            for argument in arguments:
                # of nested layers the innermost is to be named: it alone watches the tensor that all of them read
                if isinstance(argument, Tensor) and argument.requires_grad and not any(part.children()):
                    argument.register_hook(backward)  # type: ignore[no-untyped-call]  # not annotated

        return hook

    def _after(self, name: str) -> Callable[[nn.Module, tuple[object, ...], object], None]:
        def hook(_part: nn.Module, _arguments: tuple[object, ...], output: object) -> None:
            self._entered.pop()
            if self.forward is None and isinstance(output, Tensor) and not output.isfinite().all():
                self.forward = name, self._samples(output)

        return hook

    def _samples(self, tensor: Tensor) -> list[int]:
        """Samples of a tensor whose rows are the batch, or several rows a sample in turn (windows of a picture)."""
        rows, rest = divmod(len(tensor) if tensor.dim() else 0, self._count)
        return sorted({row // rows for row in non_finite_samples(tensor)}) if rows and not rest else []


def _described(tensors: Mapping[str, Tensor]) -> list[str]:
    """Those of the tensors that are not finite, with how many of their entries are not."""
    described = []
    for name, tensor in tensors.items():
        nans, infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())
        if nans or infinite:
            kind = " and ".join([*(["NaN"] if nans else []), *(["infinity"] if infinite else [])])
            described.append(f"{name} ({nans + infinite} of {tensor.numel()} entries, {kind})")
    return described


def _sizes(module: nn.Module, inputs: Tensor) -> str:
    weights = {name: _largest(parameter) for name, parameter in module.named_parameters()}
    where, most = max(weights.items(), key=lambda item: item[1], default=("none", 0.0))
    return f"largest finite entries: {most:.3g} of the weights ({where}), {_largest(inputs):.3g} of the inputs"


def _largest(tensor: Tensor) -> float:
    finite = tensor.detach()[tensor.detach().isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
