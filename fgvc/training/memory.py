"""What to do where memory runs out."""

import re

import torch

from fgvc.errors import OutOfMemoryError

# how PyTorch on a CPU and on MPS, cuDNN and cuBLAS say it, all of them as RuntimeError
_SAID = re.compile(r"can't allocate memory|out of memory|(CUDNN|CUBLAS)_STATUS_(INTERNAL_ERROR_HOST_)?ALLOC", re.I)
_ASKED = re.compile(r"(?:tried to allocate|unable to allocate) (?:(\d+) bytes|([\d.]+ [KMGTPE]i?B))", re.I)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, of the machine (PyTorch, NumPy, Python) or of a GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _SAID.search(str(error)) is not None


def memory_advice(error: BaseException, *, batch_size: int, accumulation: int, processes: int = 1) -> str | None:
    """What ran out, and which settings need less; None where the exception is another one.

    Args:
        error: what a step raised.
        batch_size: `trainer.batch_size`, images per optimiser step.
        accumulation: `trainer.accumulation`, parts that a step's images are taken in.
        processes: that share a step's images.
    """
    if not is_out_of_memory(error):
        return None
    room = "not enough memory" if (asked := _asked(error)) is None else f"no room for another {asked} in memory"
    if "in DataLoader worker process" in str(error):
        return f"{room} for a process that loads images; lower trainer.workers"
    at_once = -(-batch_size // (accumulation * processes))  # rounded up
    last = "choose a smaller dataset.transform.size, or method.reduction, which change the result"
    if at_once == 1:
        return f"{room} for a step with 1 image at a time, the least there is; {last}"
    parts = min(2 * accumulation, accumulation * at_once)
    fewer = -(-batch_size // (parts * processes))
    return (
        f"{room} for a step with {at_once} images at a time; set trainer.accumulation={parts}: {fewer} at a time in "
        f"{parts} parts, with trainer.batch_size={batch_size} images a step as before, so that the result stays "
        "comparable (but for batch normalisation in training, which sees the images of a part). "
        f"If that is still too much, {last}"
    )


def out_of_memory(
    error: BaseException, *, batch_size: int, accumulation: int, processes: int = 1
) -> OutOfMemoryError | None:
    """`memory_advice` as the exception to raise from `error`."""
    advice = memory_advice(error, batch_size=batch_size, accumulation=accumulation, processes=processes)
    return None if advice is None else OutOfMemoryError(advice)


def _asked(error: BaseException) -> str | None:
    """The amount that could not be had, as the message names it."""
    found = _ASKED.search(str(error))
    if found is None:
        return None
    if found[1] is None:
        return found[2]
    return f"{int(found[1]) / 2**20:,.1f} MiB"
