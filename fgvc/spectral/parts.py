"""Handling a batch in parts on a CPU: temporaries stay in the cache, and only one part's exist at a time."""

from collections.abc import Iterator

import torch

_CACHE_NUMBERS = 1 << 17
"""Numbers (1 MB of float64) that one temporary of a part may hold."""


def batch_parts(items: int, numbers_per_item: int, device: torch.device) -> Iterator[slice]:
    """Slices that cover a batch, each within the cache on a CPU; one slice for all on other devices.

    One slice for all also in `torch.export`, whose graph must hold for a batch of any size; there `items` has to be
    `x.shape[0]`, as len(x) would fix it.
    """
    if torch.compiler.is_exporting():
        return iter((slice(None),))
    size = items if device.type != "cpu" else _CACHE_NUMBERS // max(numbers_per_item, 1)
    size = max(size, 1)
    return (slice(start, start + size) for start in range(0, items, size))
