"""Formats of published models: a table of rules from the tensor names in their state dicts to our names.

Our names are those of `FineGrainedModel`: `backbone.model.*`, `head.reduction.*`, `head.classifier.*`. The formats:

- fast MPN-COV (Li, Xie, Wang, Gao, CVPR 2018) in one part: `conv1 bn1 layer1..4 layer_reduce layer_reduce_bn fc`;
- the same, and the code of Song, Sebe, Wang (ICCV 2021, T-PAMI 2022), in three parts: `features`, an nn.Sequential over
  the network's layers, `representation` with the channel reduction, `classifier`;
- timm and torchvision: a backbone, with or without a linear classifier for global average pooling;
- fgvc: the weights of a run, of the whole model or only of the head.

The MPN-COV bottleneck has its stride in the 3x3 convolution, as in torchvision and timm. The classifiers read the upper
triangle row by row with the diagonal, as ours do, or in some versions the whole matrix.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

Rule = tuple[str, str]


@dataclass(frozen=True)
class CheckpointFormat:
    """The tensor names of one code base.

    Attributes:
        title: Name in reports and messages.
        mark: Regular expression of a whole tensor name that identifies the format.
        rules: Pairs (regular expression of a whole name, our name); the first match counts.
        last_stride: Stride of the last stage of the ResNet in that code; None if the names do not determine it.
        unpooled: Whether the backbone ends before its last max-pooling in that code.
    """

    title: str
    mark: str
    rules: tuple[Rule, ...]
    last_stride: int | None = None
    unpooled: bool = False


TIMM = "timm or torchvision"

_RESNET = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
_RESNET_RULES: tuple[Rule, ...] = tuple(
    (rf"features\.{index}\.(.+)", rf"backbone.model.{name}.\1") for index, name in enumerate(_RESNET)
)
_BLOCK: Rule = (r"representation\.conv_dr_block\.([01]\..+)", r"head.reduction.\1")
_CLASSIFIER: Rule = (r"classifier\.((?:\d+\.)?(?:weight|bias))", r"head.classifier.\1")

# tried in this order
_FORMATS = (
    CheckpointFormat("fgvc", r"backbone\.model\..+", ((r"(?:backbone\.model|head)\..+", r"\g<0>"),)),
    CheckpointFormat(
        "MPN-COV ResNet in one part",
        r"layer_reduce\.weight",
        (
            (r"(?:conv1|bn1|layer[1-4])\..+", r"backbone.model.\g<0>"),
            (r"layer_reduce\.(.+)", r"head.reduction.0.\1"),
            (r"layer_reduce_bn\.(.+)", r"head.reduction.1.\1"),
            (r"fc\.(.+)", r"head.classifier.\1"),
        ),
        last_stride=1,
    ),
    CheckpointFormat(
        "AlexNet in three parts",  # unlike those of a ResNet, its convolutions have a bias
        r"features\.0\.bias",
        ((r"features\.\d+\.\w+", r"backbone.model.\g<0>"), _BLOCK, _CLASSIFIER),
        unpooled=True,
    ),
    CheckpointFormat(
        "MPN-COV ResNet in three parts",  # built from a pretrained one, so the reduction is at the end of the features
        r"features\.8\.weight",
        (
            *_RESNET_RULES,
            (r"features\.8\.(.+)", r"head.reduction.0.\1"),
            (r"features\.9\.(.+)", r"head.reduction.1.\1"),
            _CLASSIFIER,
        ),
        last_stride=1,
    ),
    CheckpointFormat("ResNet in three parts", r"features\.[4-7]\.\d+\..+", (*_RESNET_RULES, _BLOCK, _CLASSIFIER)),
)
_HEAD = CheckpointFormat(
    "fgvc, the head alone",
    r"(?:reduction|pooling|classifier)\..+",
    ((r"(?:reduction|pooling|classifier)\..+", r"head.\g<0>"),),
)


def recognise(names: Iterable[str], model: nn.Module) -> CheckpointFormat | None:
    """Return the format of a file with these names for `model`, a timm model without its head; None if unknown."""
    names = list(names)
    for form in _FORMATS:
        if any(re.fullmatch(form.mark, name) for name in names):
            return form
    if set(names) & set(model.state_dict()):
        return _timm_format(model)
    return _HEAD if all(re.fullmatch(_HEAD.mark, name) for name in names) else None


def list_formats() -> list[str]:
    """Return the titles of all formats."""
    return [*(form.title for form in _FORMATS), TIMM, _HEAD.title]


def translate(names: Iterable[str], form: CheckpointFormat) -> dict[str, str | None]:
    """Return our name for each name; None if no rule matches or the place is taken.

    The layers of a multi-layer classifier are renumbered, since some codes have dropout between them.
    """
    translated: dict[str, str | None] = {}
    for name in names:
        matches = ((re.fullmatch(pattern, name), ours) for pattern, ours in form.rules)
        ours = next((match.expand(ours) for match, ours in matches if match), None)
        translated[name] = None if ours in translated.values() else ours
    layer = re.compile(r"(head\.classifier\.)(\d+)(\..+)")
    numbers = sorted({int(match[2]) for ours in translated.values() if ours and (match := layer.fullmatch(ours))})
    return {
        name: ours and layer.sub(lambda match: f"{match[1]}{2 * numbers.index(int(match[2]))}{match[3]}", ours)
        for name, ours in translated.items()
    }


def _timm_format(model: nn.Module) -> CheckpointFormat:
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier")
    own = (rf"{re.escape(classifier)}\.(.+)", r"head.classifier.\1") if isinstance(classifier, str) else None
    return CheckpointFormat(TIMM, "", tuple(rule for rule in (own, (r".+", r"backbone.model.\g<0>")) if rule))
