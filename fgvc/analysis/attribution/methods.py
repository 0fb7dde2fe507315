"""The table of attributions by name."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fgvc.analysis.attribution.cam import gradcam, hirescam


@dataclass(frozen=True)
class Method:
    """An attribution.

    Attributes:
        maps: `Question`, **options -> (K, B, H, W).
        label: its name in figures.
        signed: whether its maps have negative values, for evidence against the class.
    """

    maps: Callable[..., Tensor]
    label: str
    signed: bool = False

    @property
    def options(self) -> dict[str, object]:
        """Names of its options and their defaults."""
        parameters = list(inspect.signature(self.maps).parameters.values())
        return {parameter.name: parameter.default for parameter in parameters[1:]}


METHODS: dict[str, Method] = {
    "gradcam": Method(gradcam, "Grad-CAM"),
    "hirescam": Method(hirescam, "HiResCAM", signed=True),
}
"""Attributions by the name that `explain` takes."""
