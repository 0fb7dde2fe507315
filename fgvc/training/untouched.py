"""Looking at a module without leaving a trace in it."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


def copy_buffers(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the buffers, as of the running statistics of batch normalisation, which a forward pass changes."""
    return {name: buffer.detach().clone() for name, buffer in module.named_buffers()}


@torch.no_grad()
def restore_buffers(module: nn.Module, buffers: dict[str, Tensor]) -> None:
    """Put back what `copy_buffers` took: the batch of a step that failed must not stay in the running statistics."""
    for name, buffer in module.named_buffers():
        buffer.copy_(buffers[name])


@contextlib.contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """When the block ends, give a module back its buffers and modes, and torch its random numbers."""
    buffers, modes = copy_buffers(module), [(part, part.training) for part in module.modules()]
    devices = {parameter.device for parameter in module.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            restore_buffers(module, buffers)
            for part, training in modes:
                part.training = training
