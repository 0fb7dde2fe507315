"""Extremal perturbations: the part of an image, of given area, that keeps the score highest."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fgvc.errors import ConfigError
from fgvc.spectral import Band
from fgvc.studies.attribution.masks import blend, grid_shape, reference_images, require_share, smooth_masks
from fgvc.studies.attribution.question import Question, require_finite

_SIGMA = 3 / 32  # width of the smooth maximum's kernel in sides of the image: 21 of 224 pixels, as in the paper
_RATE, _MOMENTUM = 2.0, 0.9
_WEIGHTS = (1.0, 300.0)  # of the area, at the first and the last step


def extremal(
    question: Question, area: float = 0.2, steps: int = 100, cells: int = 32, reference: str = "blur"
) -> Tensor:
    """Extremal perturbation, preservation game [Fong, Patrick, Vedaldi, ICCV 2019].

    The mask m of the given area that maximises y(m x + (1 - m) r) / |y(x) - y(r)| - w_t R(m), r the image blurred, m a
    smooth maximum of parameters on a grid (`smooth_masks`), and R(m) the mean square of sort(m) - v with v = 1 for the
    share `area` of the mask's values and 0 for the others. Gradient ascent with momentum, the parameters cut to [0, 1];
    w_t grows geometrically from 1 to 300. As in the released code R counts a margin around the image, so that a spot at
    the border is no cheaper than one inside.

    Ours differs from the paper's: the reward is in units of what the image has over the blurred one, so that one w_t
    serves heads and bands whose logits differ in size; one blurred image in place of a pyramid of them; a mask on the
    grid, upsampled bilinearly; fewer steps (100 for 800), no mirroring between them.

    Args:
        question: each band is a search of its own.
        area: share of the image that is kept, in (0, 1).
        steps: of ascent, each one pass forward and back through the whole model.
        cells: of the parameters' grid, along the shorter side.
        reference: see `reference_images`.

    Returns:
        (K, B, H, W) masks from 0 to 1.

    Raises:
        ConfigError: an option out of its range.
        RunError: a gradient that is not finite.
    """
    require_share("area", area)
    if steps < 1 or cells < 2:
        raise ConfigError(f"extremal needs steps of at least 1 and cells of at least 2, got {steps} and {cells}")
    hidden = reference_images(question.images, reference)
    masks = [_search(question, hidden, band, area, steps, cells) for band in question.bands]
    return question.upsample(torch.stack(masks))


def _search(question: Question, hidden: Tensor, band: Band | None, area: float, steps: int, cells: int) -> Tensor:
    """The masks of one band on their grid, (B, rows, columns)."""
    images, backbone = question.images, question.model.backbone
    shape = grid_shape(images.shape[-2], images.shape[-1], cells)
    margin = max(round(_SIGMA * cells), 1)
    parameters = images.new_full((len(images), *shape), 0.5).requires_grad_()
    with torch.no_grad():
        unit = question.scores(question.features, band) - question.scores(backbone(hidden), band)
        unit = unit.abs().clamp(min=torch.finfo(unit.dtype).tiny)
    ascent = torch.optim.SGD([parameters], lr=_RATE, momentum=_MOMENTUM, dampening=_MOMENTUM, maximize=True)
    first, last = _WEIGHTS
    for step in range(steps):
        weight = first * (last / first) ** (step / max(steps - 1, 1))
        whole = smooth_masks(F.pad(parameters, [margin] * 4), _SIGMA * cells)
        masks = whole[:, margin:-margin, margin:-margin]
        seen = blend(images, hidden, question.upsample(masks))
        reward = question.scores(backbone(seen), band) / unit
        objective = reward - weight * _area_miss(whole, round(area * masks[0].numel()))
        (parameters.grad,) = torch.autograd.grad(objective.sum(), parameters)
        require_finite(parameters.grad, f"gradients by the mask (band {band}, step {step + 1})")
        ascent.step()
        parameters.data.clamp_(0, 1)
    return masks.detach()


def _area_miss(masks: Tensor, kept: int) -> Tensor:
    """Mean square of the sorted values of (B, h, w) minus those of a mask of `kept` ones and else zeros: (B,)."""
    values = masks.flatten(1).sort(dim=1, descending=True).values
    binary = torch.zeros_like(values)
    binary[:, :kept] = 1
    return (values - binary).square().mean(dim=1)
