"""Layers that whiten feature maps: a decorrelated batch normalisation, and whitening and colouring for style transfer.

They map (B, C, H, W) to (B, C, H, W), so they are no poolings and have no name in the registry. They are here because
they are, as the poolings, modules on feature maps built from `fgvc.spectral`.
"""

import torch
from torch import Tensor, nn

from fgvc.spectral import covariance, matrix_inverse_sqrt, matrix_power
from fgvc.spectral.covariance import check_features
from fgvc.spectral.precision import result_dtype, without_autocast


class ZCAWhitening2d(nn.Module):
    """Decorrelated batch normalisation: y = (S + eps I)^{-1/2} (x - mean), without trained scale and offset.

    Huang, Yang, Lang, Deng, CVPR 2018. Mean and covariance S (divided by the number of values) are those of a group of
    channels over the batch and all locations; evaluation takes their running means. The gradient goes through mean,
    covariance and the inverse square root and is exact. With a channel a group it is batch normalisation.

    What is averaged over the steps is the covariance, as batch normalisation averages variances; the mean of the
    whitening matrices, which the released layers keep, is ruled by the batches with the smallest eigenvalues. So each
    call in evaluation decomposes one matrix a group. Statistics are those of one process, also where several train.

    Args:
        channels: C.
        groups: Number of groups; each has C / groups neighbouring channels.
        eps: Number added to the eigenvalues, above 0.
        momentum: Share of a batch in the running means.

    Raises:
        ValueError: `groups` does not divide `channels`, or `eps` or `momentum` is out of range; when called, another
            shape, or a single value of each channel in training.
        EigendecompositionError: when called with NaN or infinity; the running means stay as they are.
        TypeError: when called, features that are not floating point.
    """

    running_mean: Tensor
    running_cov: Tensor

    def __init__(self, channels: int, groups: int = 1, eps: float = 1e-2, momentum: float = 0.1) -> None:
        super().__init__()
        if groups < 1 or channels < 1 or channels % groups:
            raise ValueError(f"groups must divide channels={channels}, got groups={groups}")
        if not eps > 0 or not 0 <= momentum <= 1:
            raise ValueError(f"eps must be above 0 and momentum from 0 to 1, got eps={eps} and momentum={momentum}")
        self.channels, self.groups, self.eps, self.momentum = channels, groups, eps, momentum
        size = channels // groups
        self.register_buffer("running_mean", torch.zeros(groups, size))
        self.register_buffer("running_cov", torch.eye(size).repeat(groups, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape and dtype."""
        check_features(x)
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"expected features of shape (B, {self.channels}, H, W), got {tuple(x.shape)}")
        with without_autocast(x):
            # (groups, channels of a group, values)
            values = x.transpose(0, 1).reshape(*self.running_mean.shape, -1).to(result_dtype(x))
            if self.training:
                if values.shape[-1] < 2:
                    raise ValueError(f"expected more than 1 value per channel when training, got {tuple(x.shape)}")
                mean, cov = values.mean(dim=-1), covariance(values)
            else:
                mean, cov = self.running_mean.to(values), self.running_cov.double()
            white = matrix_inverse_sqrt(cov, ridge=self.eps).to(values) @ (values - mean[..., None])
            if self.training:  # after the decomposition, which refuses NaN
                with torch.no_grad():
                    self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
                    self.running_cov.lerp_(cov.to(self.running_cov), self.momentum)
            return white.view(self.channels, len(x), *x.shape[2:]).transpose(0, 1).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.channels}, groups={self.groups}, eps={self.eps}, momentum={self.momentum}"


def whiten_and_color(content: Tensor, style: Tensor, alpha: float = 0.6, eps: float = 1e-5) -> Tensor:
    """Give feature maps the mean and the covariance of others: S_s^{1/2} S_c^{-1/2} (c - mean_c) + mean_s, blended.

    Whitening and colouring (style transfer), Li, Fang, Yang, Wang, Lu, Yang, NeurIPS 2017, an image at a time. `eps` is
    added to the eigenvalues of both covariances, so that the style of the content itself changes nothing. The gradient
    is exact.

    Args:
        content: (B, C, H, W) or (C, H, W), any floating dtype.
        style: the same with any H and W; with B = 1 it is the style of the whole batch.
        alpha: share of the result in the blend with `content`, 0 to 1.
        eps: above 0.

    Returns:
        The shape of `content`; float64 for float64 content, else float32.

    Raises:
        ValueError: another shape, other numbers of channels or images, or `alpha` or `eps` out of range.
        TypeError: not floating point.
    """
    if content.dim() == 3:
        return whiten_and_color(content[None], style[None], alpha, eps)[0]
    check_features(content)
    check_features(style)
    if content.dim() != 4 or style.shape[:2] not in (content.shape[:2], (1, content.shape[1])):
        raise ValueError(f"content {tuple(content.shape)} and style {tuple(style.shape)} do not fit")
    if not (0 <= alpha <= 1 and eps > 0):
        raise ValueError(f"alpha must be from 0 to 1 and eps above 0, got alpha={alpha} and eps={eps}")
    with without_autocast(content):
        flat, colours = (x.flatten(2).to(result_dtype(content)) for x in (content, style))
        matrix = matrix_power(covariance(style), 0.5, ridge=eps) @ matrix_inverse_sqrt(covariance(content), ridge=eps)
        moved = matrix.to(flat) @ (flat - flat.mean(dim=-1, keepdim=True)) + colours.mean(dim=-1, keepdim=True)
        return torch.lerp(flat, moved, alpha).view(content.shape)
