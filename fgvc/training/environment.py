"""Device, precision and processes of a run: from its configuration alone, whatever the environment says."""

import atexit
import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs

from fgvc.errors import ConfigError
from fgvc.provenance import PRECISION_VARIABLES
from fgvc.runs.config import RunConfig
from fgvc.training.seeds import set_deterministic

_PROCESS_TIMEOUT = timedelta(hours=6)


def create_accelerator(config: RunConfig, path: Path, *, training: bool = True) -> Accelerator:
    """Set up device, precision, processes and algorithms of a run with folder `path`.

    With `training=False`, a run trained in fp16 on a GPU may be evaluated in float32 on a CPU.

    Raises:
        ConfigError: there is no such device, it cannot train in `trainer.precision`, or an environment variable
            contradicts the configuration.
    """
    check_environment(config.trainer.precision, config.trainer.accumulation)
    set_deterministic(config.trainer.deterministic)  # before anything runs on a GPU
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    # one process may train several runs with different precisions and devices
    AcceleratorState._reset_state(reset_partial_state=alone)
    _choose_device(config.trainer.device, alone=alone)
    precision = config.trainer.precision
    # long, since the others wait while one process computes feature maps; an ended process closes its connection
    timeout = InitProcessGroupKwargs(timeout=_PROCESS_TIMEOUT)
    # batch normalisation over all processes (`synchronise_batch_norm`) gives each the same buffers
    parallel = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    try:
        accelerator = Accelerator(
            cpu=config.trainer.device == "cpu",
            mixed_precision=precision,
            dynamo_backend="no",
            # `Stepper` weighs the micro-batches itself; a plugin, since a plain number gives way to a variable
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            log_with=config.trainer.tracker,
            project_dir=path,
            kwargs_handlers=[timeout, parallel],
        )
    except ValueError as error:
        if "MASTER_ADDR" in str(error):  # of a launcher that started one process alone, e.g. PMI_SIZE
            raise ConfigError(
                f"this process is one of several by its environment variables, but {error}; start all by accelerate "
                "launch or torchrun, or unset WORLD_SIZE, LOCAL_RANK, PMI_SIZE and OMPI_COMM_WORLD_SIZE"
            ) from error
        # this version of accelerate or torch does not support it on this device
        raise ConfigError(f"trainer.precision={precision}: {error}; use trainer.precision=no") from error
    if training and precision == "fp16" and accelerator.device.type == "cpu":
        # without an error, accelerate would train in float32, without autocast and loss scaling
        raise ConfigError(
            "trainer.precision=fp16 needs a GPU, but this run would train on the cpu; use trainer.precision=bf16 or no"
        )
    return accelerator


@atexit.register
def _disconnect() -> None:
    """Close the connection to other processes at the end of this one, and not of a run: a sweep has several."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _choose_device(device: str, *, alone: bool) -> None:
    """Make one GPU the device of this process if `trainer.device` names one."""
    if not device.startswith("cuda"):
        return
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (AssertionError, RuntimeError) as error:  # torch without CUDA, no GPU or driver, a driver that is too old
        raise ConfigError(f"trainer.device={device}: {' '.join(str(error).split())}; choose auto or cpu") from error
    found, number = torch.cuda.device_count(), int(device.partition(":")[2] or 0)
    if number >= found:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        shown = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
        raise ConfigError(
            f"trainer.device={device}: the GPUs here are cuda:0 to cuda:{found - 1}{shown}; choose one, auto or cpu"
        )
    if not alone:
        raise ConfigError(f"trainer.device={device}: each of several processes has a GPU of its own; set it to auto")
    torch.cuda.set_device(number)


_OFF = ("", "0", "f", "false", "n", "no", "off")


_ARITHMETIC = {
    **dict.fromkeys(PRECISION_VARIABLES, ("", "strict")),  # what oneDNN calls its default
    "NVIDIA_TF32_OVERRIDE": ("",),
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": _OFF,
    "PYTORCH_MPS_FAST_MATH": _OFF,
    "TIMM_REENTRANT_CKPT": _OFF,  # checkpointing that gives no gradient to what follows a frozen input
    # timm builds other networks
    **dict.fromkeys(("TIMM_USE_NAFLEXVIT", "TIMM_USE_NAFLEX"), _OFF),
    "FORK_LAST3": ("",),
}


def check_environment(precision: str, accumulation: int) -> None:
    """Check that no environment variable asks accelerate, torch or oneDNN for other results than the configuration.

    What chooses a device passes, as does what `accelerate launch` sets unasked.

    Args:
        precision: `trainer.precision`.
        accumulation: `trainer.accumulation`.

    Raises:
        ConfigError: a variable contradicts the configuration.
    """
    allowed = {
        "ACCELERATE_MIXED_PRECISION": ("", "no", precision),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("", "1", str(accumulation)),
        "ACCELERATE_DYNAMO_BACKEND": ("", "no"),
        "ACCELERATE_FP8_BACKEND": ("", "no"),
        "ACCELERATE_DOWNCAST_BF16": _OFF,
        # DeepSpeed, FSDP, Megatron-LM, ...
        **{name: _OFF for name in os.environ if name.startswith("ACCELERATE_USE_") and name != "ACCELERATE_USE_CPU"},
        **_ARITHMETIC,
    }
    _require_values(allowed, f" (trainer.precision={precision}, trainer.accumulation={accumulation})")


def check_arithmetic() -> None:
    """Check that no environment variable changes the precision of float32 products; ConfigError if one does."""
    _require_values(_ARITHMETIC)


def _require_values(allowed: Mapping[str, tuple[str, ...]], configuration: str = "") -> None:
    for name, values in allowed.items():
        value = os.environ.get(name, "")
        if value.lower() not in values:
            fine = [allowed for allowed in dict.fromkeys(values) if allowed][:2]
            raise ConfigError(
                f"the environment variable {name}={value} would change the result, which comes from the configuration "
                f"alone{configuration}; unset it" + (f", or set it to {' or '.join(fine)}" if fine else "")
            )
