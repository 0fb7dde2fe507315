"""Pictures of attributions: a map over its image, and grids of them. Arrays in, pixels and figures out."""

import matplotlib as mpl
import numpy as np

_STRENGTH = 0.65  # opacity of the strongest value


def overlay(image: np.ndarray, heat: np.ndarray, *, signed: bool = False) -> np.ndarray:
    """An image in grey with a map over it in colour, stronger values more opaque.

    Args:
        image: (H, W, 3), numbers from 0 to 1.
        heat: (H, W), any numbers; colours end at its largest absolute value.
        signed: red for positive and blue for negative values; else negative ones count as 0, and colours go from dark
            to bright.

    Returns:
        (H, W, 3) uint8.
    """
    largest = float(np.abs(heat).max()) if signed else float(heat.max(initial=0))
    scaled = heat / largest if largest > 0 else np.zeros_like(heat)
    values = (scaled + 1) / 2 if signed else np.clip(scaled, 0, 1)
    colours = mpl.colormaps["RdBu_r" if signed else "inferno"](values)[..., :3]
    grey = np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2)
    opacity = _STRENGTH * np.abs(scaled if signed else values)[..., None]
    mixed = (1 - opacity) * grey + opacity * colours
    pixels: np.ndarray = np.clip(255 * mixed + 0.5, 0, 255).astype(np.uint8)
    return pixels
