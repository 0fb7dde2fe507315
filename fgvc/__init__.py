"""Fine-grained visual recognition with second-order statistics."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fgvc.inference.calibrate import Calibration, calibrate_run
    from fgvc.inference.predict import Prediction, Predictor, load_run

__version__ = "0.1.0"

__all__ = ["Calibration", "Prediction", "Predictor", "__version__", "calibrate_run", "load_run"]

_HOMES = {
    **dict.fromkeys(("Calibration", "calibrate_run"), "fgvc.inference.calibrate"),
    **dict.fromkeys(("Prediction", "Predictor", "load_run"), "fgvc.inference.predict"),
}


def __getattr__(name: str) -> Any:
    """Import what is asked for: `import fgvc` alone must not take the seconds that torch does."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
