"""create_model: any backbone with any pooling, and the head by itself."""

import pytest
import torch
from torch import nn

from fgvc.errors import ConfigError, RunError
from fgvc.models import FineGrainedModel, PoolingHead, create_backbone, create_model
from fgvc.pooling import list_poolings

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", list_poolings())
def test_every_method_gives_logits_and_every_parameter_a_gradient(method: str) -> None:
    torch.manual_seed(0)
    options = {"keep": 3} if method == "svd_topn" else {}
    model = create_model("test_resnet", method=method, num_classes=5, reduction=6, **options)
    logits = model(IMAGES)
    assert logits.shape == (2, 5) and logits.dtype == torch.float32
    logits.pow(2).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(p.grad.abs().sum() > 0 for p in model.head.parameters() if p.grad is not None)


def test_reduction_is_for_second_order_methods() -> None:
    def head(method: str, reduction: int | None) -> PoolingHead:
        return PoolingHead(12, method=method, num_classes=3, reduction=reduction)

    assert head("seb", 4).pooling.out_features == 4 * 5 // 2
    assert head("seb", None).pooling.out_features == 12 * 13 // 2
    assert head("gap", 4).pooling.out_features == 12
    assert isinstance(head("gap", 4).reduction, nn.Identity)


def test_options_and_gradient_reach_the_pooling() -> None:
    x = torch.rand(2, 6, 5, 5)
    heads = [
        PoolingHead(6, method="isqrt_cov", num_classes=3, reduction=None, options={"iterations": n}) for n in (1, 9)
    ]
    assert not torch.allclose(heads[0].pooling(x), heads[1].pooling(x), atol=1e-3)
    with pytest.raises(ConfigError, match="exact"):
        create_model("test_resnet", method="seb", num_classes=3, gradient="magic")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_classes", 0, "num_classes must be at least 1"),
        ("reduction", 0, "reduction must be at least 1"),
        ("hidden", (8, 0), r"method\.hidden .* \[8, 0\]"),
    ],
)
def test_sizes_below_one_are_refused(key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PoolingHead(6, **{"method": "seb", "num_classes": 3, key: value})  # type: ignore[arg-type]


def test_a_classifier_with_hidden_layers_trains_and_is_reset() -> None:
    torch.manual_seed(0)
    model = create_model("test_resnet", method="isqrt_cov", num_classes=5, reduction=6, hidden=(8, 7))
    shapes = [tuple(layer.weight.shape) for layer in model.head.classifier if isinstance(layer, nn.Linear)]
    assert shapes == [(8, 21), (7, 8), (5, 7)]
    model(IMAGES).pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.head.classifier.parameters())
    assert any(isinstance(layer, nn.ReLU) for layer in model.head.classifier)
    layers = (model.head.classifier[2], model.head.reduction[0])
    before = [layer.weight.detach().clone() for layer in layers]
    model.head.reset(num_classes=4)
    layers = (model.head.classifier[2], model.head.reduction[0])
    assert model(IMAGES).shape == (2, 4)
    assert not any(torch.equal(layer.weight, old) for layer, old in zip(layers, before, strict=True))


def test_logits_of_the_class_token_are_added() -> None:
    torch.manual_seed(0)
    backbone = create_backbone("test_vit", image_size=64, options={"reg_tokens": 2})
    nn.init.normal_(backbone.model.norm.weight)  # else an omitted norm would go unnoticed
    head = PoolingHead(64, method="isqrt_cov", num_classes=5, reduction=6, class_token=True)
    model = FineGrainedModel(backbone, head).eval()
    tokens = backbone.model.forward_features(IMAGES)  # class, two registers, patches
    token, maps = tokens[:, 0], tokens[:, 3:].mT.unflatten(2, (4, 4))
    alone = model.head.classifier(model.head.descriptor(maps))
    assert model.head.token_classifier is not None
    torch.testing.assert_close(model(IMAGES), alone + model.head.token_classifier(token))
    torch.testing.assert_close(model.descriptor(IMAGES), model.head.descriptor(maps))
    model.train()(IMAGES).pow(2).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    model.head.reset(num_classes=4)
    assert model(IMAGES).shape == (2, 4)
    with pytest.raises(RunError, match=r"class token too \(method.class_token=true\), which no feature map holds"):
        model.head(maps)


def test_a_class_token_is_asked_of_networks_that_have_one() -> None:
    for name in ("test_resnet", "test_vit2"):  # the second has a register only
        with pytest.raises(ConfigError, match=f"needs a backbone with a class token.*{name} has none"):
            create_model(name, method="gap", num_classes=5, class_token=True)
