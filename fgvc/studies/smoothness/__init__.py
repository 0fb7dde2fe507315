"""How smooth the loss is along its gradient."""

from fgvc.studies.smoothness.measure import load_smoothness, summarise_smoothness
from fgvc.studies.smoothness.show import plot_smoothness, smoothness_figure, smoothness_markdown, write_smoothness

__all__ = [
    "load_smoothness",
    "plot_smoothness",
    "smoothness_figure",
    "smoothness_markdown",
    "summarise_smoothness",
    "write_smoothness",
]
