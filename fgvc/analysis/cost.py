"""What a run cost, from what it saved."""

import math

from safetensors import SafetensorError, safe_open

from fgvc.runs.summary import Run

COLUMNS = ("head_parameters", "descriptor", "train_ms", "eval_ms", "peak_memory_mb")

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def run_cost(run: Run) -> dict[str, float]:
    """`COLUMNS`: parameters of the head, descriptor size, milliseconds an image in training and in evaluation, MiB.

    NaN for what the run did not keep. An evaluation reads the test split, and one of held-out images is not counted.
    """
    seconds, epochs = run.seconds or {}, run.epochs
    return {
        "head_parameters": _head_parameters(run),
        "descriptor": math.nan if run.out_features is None else run.out_features,
        "train_ms": _milliseconds(seconds.get("train"), epochs, run.train_images),
        "eval_ms": _milliseconds(seconds.get("eval"), epochs, run.test_images),
        "peak_memory_mb": math.nan if run.peak_memory_mb is None else run.peak_memory_mb,
    }


def _milliseconds(seconds: float | None, epochs: int, images: int | None) -> float:
    return 1000 * seconds / (epochs * images) if seconds is not None and epochs and images else math.nan


def _head_parameters(run: Run) -> float:
    """From the header of the saved weights; NaN without them. Of a frozen backbone the head alone is saved."""
    path = run.path / "checkpoints" / "last.safetensors"
    try:
        with safe_open(path, framework="np") as file:
            names = [name for name in file.keys() if run.frozen or name.startswith("head.")]  # noqa: SIM118
            shapes = [file.get_slice(name).get_shape() for name in names if not name.endswith(_BUFFERS)]
    except (OSError, SafetensorError):
        return math.nan
    return float(sum(math.prod(shape) for shape in shapes))
