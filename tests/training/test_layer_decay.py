"""Learning rates of the parts of a model: backbone, its layers, head and classifier."""

from pathlib import Path

import pytest
from command_line import Train, refused, trainable
from torch import nn

from fgvc.errors import ConfigError
from fgvc.models import FineGrainedModel, create_model
from fgvc.runs.config import BackboneConfig, OptimizerConfig
from fgvc.runs.folder import RunFolder
from fgvc.training.optim import create_optimizer
from fgvc.training.run import train_run


def rates(model: nn.Module, **settings: float | str) -> dict[str, float]:
    """The rate of each trainable parameter, in units of that of the head."""
    optimizer = create_optimizer(model, OptimizerConfig(lr=0.01, **settings))  # type: ignore[arg-type]
    found = {id(p): group["base_lr"] / 0.01 for group in optimizer.param_groups for p in group["params"]}
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(found) == len(named) == sum(len(group["params"]) for group in optimizer.param_groups)
    return {name: found[id(parameter)] for name, parameter in named.items()}


def test_a_layer_learns_more_slowly_the_earlier_it_is() -> None:
    model = create_model("test_vit", method="mpn_cov", num_classes=3, reduction=4, image_size=64)
    depth = len(model.backbone.model.blocks)
    found = rates(model, layer_decay=0.5, backbone_factor=0.2, classifier_factor=7)
    assert found["head.classifier.weight"] == pytest.approx(7) and found["head.reduction.0.weight"] == 1
    for block in range(depth):
        rate = 0.2 * 0.5 ** (depth - block)
        for name in ("attn.qkv.weight", "mlp.fc2.bias"):
            assert found[f"backbone.model.blocks.{block}.{name}"] == pytest.approx(rate)
    assert found["backbone.model.norm.weight"] == pytest.approx(0.2 * 0.5)  # with the last block
    assert found["backbone.model.patch_embed.proj.weight"] == pytest.approx(0.2 * 0.5 ** (depth + 1))
    groups = create_optimizer(model, OptimizerConfig(layer_decay=0.5)).param_groups
    assert {group["weight_decay"] for group in groups} == {OptimizerConfig().weight_decay}  # norms and biases too


def test_backbone_and_head_have_two_rates_by_name() -> None:
    model = create_model("test_resnet", method="gap", num_classes=3)
    found = rates(model, backbone_factor=0.1)
    for name, rate in found.items():
        assert rate == pytest.approx(0.1 if name.startswith("backbone.") else 1)
    assert len(create_optimizer(model, OptimizerConfig()).param_groups) == 2  # as without these settings


def test_stages_that_are_frozen_do_not_count() -> None:
    model = create_model("test_resnet", method="isqrt_cov", num_classes=3, reduction=4, image_size=64)
    model.backbone.requires_grad_(False)
    last = FineGrainedModel(model.backbone.split(2)[1].requires_grad_(True), model.head)
    found = rates(last, layer_decay=0.5, reduction_gradient="olr")
    own = {name.split(".")[2]: rate for name, rate in found.items() if name.startswith("backbone.")}
    assert own == {"layer3": pytest.approx(0.25), "layer4": pytest.approx(0.5)}
    reduction = create_optimizer(last, OptimizerConfig(layer_decay=0.5, reduction_gradient="olr")).param_groups[-1]
    assert reduction["params"] == [last.head.reduction[0].weight]  # type: ignore[index]


def test_layers_that_nobody_orders_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer.layer_decay=0.5 needs a backbone that is trained"):
        create_optimizer(create_model("alexnet", method="gap", num_classes=3), OptimizerConfig(layer_decay=0.5))
    head = create_model("test_resnet", method="gap", num_classes=3).head
    with pytest.raises(ConfigError, match="layer_decay"):
        create_optimizer(head, OptimizerConfig(layer_decay=0.5))
    with pytest.raises(ConfigError, match=r"optimizer.backbone_factor=0.1 needs a backbone that is trained"):
        create_optimizer(head, OptimizerConfig(backbone_factor=0.1))


def test_partly_trained_networks_train_with_it(tmp_path: Path) -> None:
    config = trainable(tmp_path, backbone=BackboneConfig("test_resnet", frozen=True, trainable_stages=2))
    config.optimizer = OptimizerConfig(name="adamw", lr=1e-3, layer_decay=0.7, backbone_factor=0.1, classifier_factor=2)
    assert RunFolder(train_run(config)).read_summary()["status"] == "finished"


@pytest.mark.parametrize("value", ["0", "1.5"])
def test_other_factors_are_refused(tmp_path: Path, train_here: Train, value: str) -> None:
    refused(train_here(tmp_path, f"optimizer.layer_decay={value}"), "optimizer.layer_decay must be above 0")
