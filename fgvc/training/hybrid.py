"""The hybrid protocol: Newton-Schulz for most of a run, an eigendecomposition for its last stage [ICCV 2021]."""

from fgvc.errors import ConfigError
from fgvc.models import PoolingHead
from fgvc.pooling import CovariancePooling, Pooling, create_pooling
from fgvc.runs.config import RunConfig


def check_hybrid(config: RunConfig) -> None:
    """Raise ConfigError where the switch between the stages is undefined, or outside the run."""
    hybrid = config.hybrid
    if hybrid.method is None:
        if hybrid.switch_epoch is not None or hybrid.options:
            raise ConfigError(
                "hybrid.switch_epoch and hybrid.options need hybrid.method, the pooling of the first stage"
            )
        return
    _check_poolings(config)
    if hybrid.switch_epoch is None and not (config.schedule.name == "step" and config.schedule.milestones):
        raise ConfigError(
            f"hybrid.method={hybrid.method} switches at the last learning-rate decay, of which "
            f"schedule={config.schedule.name} with milestones {list(config.schedule.milestones)} has none; "
            "set hybrid.switch_epoch"
        )
    switch = switch_epoch(config)
    if not 1 <= switch < config.trainer.epochs:
        raise ConfigError(
            f"the hybrid protocol switches after epoch {switch}, which must be at least 1 and before the last of "
            f"trainer.epochs={config.trainer.epochs}; set hybrid.switch_epoch"
        )


def _check_poolings(config: RunConfig) -> None:
    method, hybrid = config.method, config.hybrid
    assert hybrid.method is not None
    channels = method.reduction or 2048  # without a reduction it depends on the backbone; any large number will do
    first = create_pooling(hybrid.method, channels=channels, **hybrid.options)
    last = create_pooling(method.name, channels=channels, gradient=method.gradient, **method.options)
    if not (isinstance(first, CovariancePooling) and isinstance(last, CovariancePooling)):
        raise ConfigError(
            f"hybrid.method={hybrid.method} and method={method.name} must both normalise a covariance, "
            "so that the weights carry over"
        )


def switch_epoch(config: RunConfig) -> int:
    """Epochs of the first stage; 0 for a run of one stage."""
    if config.hybrid.method is None:
        return 0
    if config.hybrid.switch_epoch is not None:
        return config.hybrid.switch_epoch
    return int(config.schedule.milestones[-1])


class Stages:
    """Puts the pooling of an epoch's stage into a head; a function of the epoch alone, so that a run can be continued.

    Args:
        config: the run, as `check_hybrid` accepts it.
        head: with the pooling of the last stage.
    """

    def __init__(self, config: RunConfig, head: PoolingHead) -> None:
        hybrid = config.hybrid
        self.switch = switch_epoch(config)
        self._last = (config.method.name, head.pooling)
        self._first = self._last
        if hybrid.method is not None:
            first = create_pooling(
                hybrid.method,
                channels=head.pooling.channels,
                eigh_device=config.method.eigh_device,
                dtype=config.method.spectral_dtype,
                **hybrid.options,
            )
            self._first = (hybrid.method, first)

    def method(self, epoch: int) -> str:
        """Name of the pooling that an epoch, counted from 1, trains with."""
        return self._stage(epoch)[0]

    def enter(self, head: PoolingHead, epoch: int) -> None:
        """Give `head` the pooling of that epoch."""
        head.pooling = self._stage(epoch)[1]

    def _stage(self, epoch: int) -> tuple[str, Pooling]:
        return self._first if epoch <= self.switch else self._last
