"""The hybrid protocol: Newton-Schulz for most of a run, an eigendecomposition for its last stage.

[Song, Sebe, Wang, ICCV 2021]
"""

from fgvc.errors import ConfigError
from fgvc.models import PoolingHead
from fgvc.pooling import CovariancePooling, create_pooling
from fgvc.runs.config import HybridConfig, MethodConfig, RunConfig, check_switch


def check_hybrid(config: RunConfig) -> None:
    """Raise ConfigError if the switch between the stages is undefined or outside the run."""
    hybrid, method = config.hybrid, config.method
    if hybrid.method is None:
        raise ConfigError("hybrid.switch_epoch and hybrid.options need hybrid.method, the pooling of the first stage")
    channels = method.reduction or 2048  # without a reduction it depends on the backbone; any large number works
    first = create_pooling(hybrid.method, channels=channels, **hybrid.options)
    last = create_pooling(method.name, channels=channels, gradient=method.gradient, **method.options)
    if not (isinstance(first, CovariancePooling) and isinstance(last, CovariancePooling)):
        raise ConfigError(
            f"hybrid.method={hybrid.method} and method={method.name} must both normalise a covariance, "
            "otherwise the weights cannot carry over"
        )
    check_switch(config)
    switch = config.switch_epoch
    if not 1 <= switch < config.trainer.epochs:
        raise ConfigError(
            f"the hybrid protocol switches after epoch {switch}; it must be at least 1 and less than "
            f"trainer.epochs={config.trainer.epochs}; set hybrid.switch_epoch"
        )


class Stages:
    """Puts the pooling of an epoch's stage into a head. It depends only on the epoch, so a run can be resumed.

    Args:
        head: head with the pooling of the last stage.
        method: settings of the last stage.
        hybrid: settings of the first stage.
        switch: number of epochs of the first stage.
    """

    def __init__(self, head: PoolingHead, method: MethodConfig, hybrid: HybridConfig, switch: int) -> None:
        assert hybrid.method is not None
        first = create_pooling(
            hybrid.method,
            channels=head.pooling.channels,
            eigh_device=method.eigh_device,
            dtype=method.spectral_dtype,
            **hybrid.options,
        )
        self.switch = switch
        self._first = (hybrid.method, first)
        self._last = (method.name, head.pooling)

    def method(self, epoch: int) -> str:
        """Return the name of the pooling in an epoch, counted from 1."""
        return (self._first if epoch <= self.switch else self._last)[0]

    def enter(self, head: PoolingHead, epoch: int) -> None:
        """Give `head` the pooling of that epoch."""
        head.pooling = (self._first if epoch <= self.switch else self._last)[1]
