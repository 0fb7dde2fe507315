"""The table of attributions by name."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from fgvc.errors import ConfigError
from fgvc.studies.attribution.backprop import guided_backprop, integrated_gradients
from fgvc.studies.attribution.cam import gradcam, hirescam
from fgvc.studies.attribution.eigenvectors import decomposition
from fgvc.studies.attribution.extremal import extremal
from fgvc.studies.attribution.sampling import occlusion, rise


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
    "integrated_gradients": Method(integrated_gradients, "Integrated gradients", signed=True),
    "guided_backprop": Method(guided_backprop, "Guided backpropagation"),
    "extremal": Method(extremal, "Extremal perturbation"),
    "rise": Method(rise, "RISE", signed=True),
    "occlusion": Method(occlusion, "Occlusion", signed=True),
    "decomposition": Method(decomposition, "Parts of the logit", signed=True),
}
"""Attributions by the name that `explain` takes."""


def require_methods(names: Sequence[str]) -> None:
    """Raise ConfigError where there is no name, or one that is not in `METHODS`."""
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        raise ConfigError(f"unknown attribution {', '.join(unknown) or 'none'}; choose from {', '.join(METHODS)}")
