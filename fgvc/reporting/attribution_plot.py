"""Pictures of attributions: a map over its image, and grids of them. Arrays in, pixels and figures out."""

import matplotlib as mpl
import numpy as np

_STRENGTH = 0.75  # opacity of the strongest value
_CLIPPED = 0.995  # maps of single pixels have a few values far above the others, which alone would show


def overlay(image: np.ndarray, heat: np.ndarray, *, signed: bool = False, limit: float | None = None) -> np.ndarray:
    """An image in grey with a map over it in colour, stronger values more opaque.

    Args:
        image: (H, W, 3), numbers from 0 to 1.
        heat: (H, W), any numbers.
        signed: red for positive and blue for negative values; else negative ones count as 0, and colours go from dark
            to bright.
        limit: value that the colours end at; None: see `colour_limit`.

    Returns:
        (H, W, 3) uint8.
    """
    end = colour_limit(heat) if limit is None else limit
    scaled = np.clip(heat / end, -1 if signed else 0, 1) if end > 0 else np.zeros_like(heat)
    colours = mpl.colormaps["RdBu_r" if signed else "inferno"]((0.5 + 0.42 * scaled) if signed else scaled)[..., :3]
    grey = np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2)
    opacity = _STRENGTH * np.abs(scaled)[..., None] ** 0.7
    pixels: np.ndarray = np.clip(255 * ((1 - opacity) * grey + opacity * colours) + 0.5, 0, 255).astype(np.uint8)
    return pixels


def colour_limit(heat: np.ndarray) -> float:
    """Value that the colours of a map end at: that which 0.5 % of its absolute values exceed, or else the largest."""
    sizes = np.abs(heat)
    return float(np.quantile(sizes, _CLIPPED)) or float(sizes.max())
