"""Backbones: feature maps of timm models, their size, stride, folded normalisations and errors."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from fgvc.errors import ConfigError, WeightsError
from fgvc.models.backbone import Backbone, create_backbone, fold_batch_norm

# name, image size, channels, side of the map
FAMILIES = [
    *(("resnet18", 64, 512, 2), ("resnet50", 64, 2048, 2), ("resnet50d", 64, 2048, 2), ("regnetx_002", 64, 368, 2)),
    *(("tf_efficientnet_lite0", 64, 320, 2), ("efficientnet_b0", 64, 320, 2), ("mobilenetv3_small_050", 64, 288, 2)),
    *(("convnext_atto", 64, 320, 2), ("convnextv2_atto", 64, 320, 2), ("mambaout_femto", 64, 288, 2)),
    *(("densenet121", 64, 1024, 2), ("vgg11", 64, 512, 2)),
    *(("swin_tiny_patch4_window7_224", 224, 768, 7), ("swin_s3_tiny_224", 224, 768, 7)),
    *(("vit_tiny_patch16_224", 96, 192, 6), ("deit_tiny_distilled_patch16_224", 96, 192, 6)),
    *(("vit_small_patch14_dinov2", 56, 384, 4), ("vit_small_patch14_reg4_dinov2", 56, 384, 4)),
    *(("vit_small_patch16_dinov3", 64, 384, 4), ("eva02_tiny_patch14_224", 56, 192, 4)),
    ("maxvit_pico_rw_256", 128, 256, 4),
]


def images(size: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "size", "channels", "side"), FAMILIES)
def test_family_gives_a_map_and_every_parameter_a_gradient(name: str, size: int, channels: int, side: int) -> None:
    torch.manual_seed(0)
    backbone = create_backbone(name, image_size=size)
    features = backbone(images(size, 1))
    assert features.shape == (1, channels, side, side)
    assert features.dtype == torch.float32
    assert backbone.out_channels == channels
    assert backbone.name == name
    assert backbone.data_config["input_size"] == (3, size, size)
    assert {"mean", "std", "interpolation"} <= backbone.data_config.keys()
    features.square().sum().backward()
    assert [key for key, parameter in backbone.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "regnetx_002", "convnext_atto", "mobilenetv3_small_050"])
def test_map_of_a_cnn_is_timms_unpooled_feature_map(name: str) -> None:
    full = timm.create_model(name).eval()
    backbone = Backbone(copy.deepcopy(full), name=name).eval()
    with torch.inference_mode():
        torch.testing.assert_close(backbone(images(64)), full.forward_features(images(64)), rtol=0, atol=0)


def test_map_of_an_efficientnet_is_what_its_head_convolution_reads() -> None:
    full = timm.create_model("tf_efficientnet_lite0").eval()
    backbone = Backbone(copy.deepcopy(full), name="lite0").eval()
    assert not [key for key in backbone.state_dict() if "conv_head" in key or "bn2" in key.split(".")[1]]
    with torch.inference_mode():
        expected = full.forward_features(images(64))
        torch.testing.assert_close(full.bn2(full.conv_head(backbone(images(64)))), expected, rtol=0, atol=0)


def test_maps_of_several_layers_are_averaged_down_to_the_grid_of_the_last() -> None:
    full = timm.create_model("resnet18").eval()
    backbone = Backbone(copy.deepcopy(full), name="resnet18", maps=3).eval()
    assert backbone.map_channels == (128, 256, 512) and backbone.out_shape == (896, 7, 7)
    with torch.inference_mode():
        early, middle, last = full.forward_intermediates(images(64), intermediates_only=True)[2:]
        found = backbone(images(64)).split(backbone.map_channels, dim=1)
    torch.testing.assert_close(found[0], early.unflatten(2, (2, 4)).unflatten(4, (2, 4)).mean(dim=(3, 5)))
    torch.testing.assert_close(found[1], middle.unflatten(2, (2, 2)).unflatten(4, (2, 2)).mean(dim=(3, 5)))
    torch.testing.assert_close(found[2], last)


def test_several_maps_of_a_network_whose_last_stages_are_trained() -> None:
    backbone = create_backbone("resnet18", image_size=64, maps=2).eval()
    for trainable in (1, 2):  # the first of the two maps is what the frozen part gives, or of a trained stage
        first, second = backbone.split(trainable)
        with torch.inference_mode():
            torch.testing.assert_close(second(first(images(64))), backbone(images(64)))
    with pytest.raises(ConfigError, match="trainable_stages=1 is impossible"):
        create_backbone("resnet18", image_size=64, maps=3).split(1)  # the first map is of a frozen stage


def test_map_of_a_swin_is_channels_first_and_normalised() -> None:
    full = timm.create_model("swin_tiny_patch4_window7_224", img_size=96).eval()
    nn.init.normal_(full.norm.weight)  # else an omitted second norm would go unnoticed
    backbone = Backbone(copy.deepcopy(full), name="swin", image_size=96).eval()
    with torch.inference_mode():
        expected = full.forward_features(images(96)).permute(0, 3, 1, 2)
        torch.testing.assert_close(backbone(images(96)), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "size", "prefix"),
    [
        ("vit_tiny_patch16_224", 64, 1),  # class
        ("deit_tiny_distilled_patch16_224", 64, 2),  # class, distillation
        ("vit_small_patch14_dinov2", 56, 1),
        ("vit_small_patch14_reg4_dinov2", 56, 5),  # class, 4 registers
        ("vit_small_patch16_dinov3", 64, 5),
    ],
)
def test_map_of_a_vit_is_its_normalised_patch_tokens(name: str, size: int, prefix: int) -> None:
    full = timm.create_model(name, img_size=size).eval()
    nn.init.normal_(full.norm.weight)
    backbone = Backbone(copy.deepcopy(full), name=name, image_size=size).eval()
    with torch.inference_mode():
        tokens = full.forward_features(images(size))[:, prefix:]  # (B, h * w, C)
        features = backbone(images(size))
    torch.testing.assert_close(features.flatten(2).transpose(1, 2), tokens, rtol=0, atol=0)


def test_cnn_takes_images_of_other_sizes() -> None:
    backbone = create_backbone("resnet18", image_size=64).eval()
    with torch.inference_mode():
        assert backbone(torch.zeros(1, 3, 96, 160)).shape == (1, 512, 3, 5)


def test_published_preparation_of_the_architecture_is_known() -> None:
    with pytest.raises(ConfigError, match=r"cannot be built with backbone.options={'zero': 1}.*zero"):
        create_backbone("resnet18", options={"zero": 1})
    assert create_backbone("vit_tiny_patch16_224").data_config["input_size"] == (3, 224, 224)  # native
    config = create_backbone("tf_efficientnet_lite0").data_config
    assert config["mean"] == config["std"] == (0.5, 0.5, 0.5)
    assert config["interpolation"] == "bicubic"


def test_building_leaves_training_mode_and_batch_statistics_alone() -> None:
    backbone = create_backbone("resnet18", image_size=64)
    assert all(module.training for module in backbone.modules())
    assert backbone.state_dict()["model.bn1.num_batches_tracked"] == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "resnet5O"}, ["resnet5O", str(len(timm.list_models())), "resnet50", "timm.list_models()"]),
        ({"name": "resnet18.nonsense"}, ["nonsense", "a1_in1k"]),
        ({"name": "timm/resnet18"}, ["hf-hub:timm/resnet18"]),
        ({"name": "nowhere:resnet18"}, ["nowhere", "hf-hub"]),
        ({"name": "resnet18", "pretrained": True, "weights": "w.pth"}, ["pretrained", "backbone.weights=w.pth"]),
        ({"name": "resnet18", "last_stride": 2}, ["last_stride=2", "1"]),
        ({"name": "resnet18", "maps": 0}, ["maps must be at least 1"]),
        ({"name": "resnet18", "maps": 9}, ["maps=9", "resnet18", "fewer layers"]),
        ({"name": "alexnet", "maps": 3, "image_size": 96}, ["maps=3", "maps of 1 layers only"]),
        ({"name": "vgg11", "last_stride": 1}, ["vgg11", "layer4"]),
        ({"name": "resnet18", "image_size": 0}, ["image_size=0"]),
        ({"name": "vit_tiny_patch16_224", "image_size": 100}, ["100", "16 pixels", "96 or 112"]),
        ({"name": "vit_small_patch14_dinov2", "image_size": 8}, ["8", "14 pixels", "example 14"]),
        ({"name": "maxvit_pico_rw_256", "image_size": 200}, ["200 x 200", "native size is 256"]),
        ({"name": "inception_v3", "image_size": 32}, ["32 x 32", "native size is 299"]),
        (
            {"name": "resnet18", "options": {"checkpoint_path": "w.pth"}},
            ["options={checkpoint_path}", "backbone.weights"],
        ),
        ({"name": "resnet18", "options": {"pretrained_cfg": {}}}, ["options={pretrained_cfg}", "backbone.pretrained"]),
        ({"name": "resnet18", "options": {"act_layer": "nothing"}}, ["resnet18", "act_layer", "nothing"]),
        ({"name": "hiera_tiny_224"}, ["hiera_tiny_224", "no feature map", "choose another"]),
    ],
)
def test_impossible_setting_names_value_and_fix(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        create_backbone(**settings)
    assert [word for word in words if word not in str(caught.value)] == []


def test_model_without_intermediate_features_is_refused() -> None:
    with pytest.raises(ConfigError, match="plain: timm gives no feature map"):
        Backbone(nn.Conv2d(3, 8, 3), name="plain")


def test_model_whose_features_are_no_map_is_refused() -> None:
    class Tokens(nn.Module):
        pretrained_cfg = {"input_size": (3, 32, 32)}  # noqa: RUF012

        def prune_intermediate_layers(self, *_: Any, **__: Any) -> None: ...

        def forward_intermediates(self, images: torch.Tensor, **_: Any) -> list[torch.Tensor]:
            return [images.flatten(2)]

    with pytest.raises(ConfigError, match=r"tokens: .*\(1, 3, 1024\), not a map"):
        Backbone(Tokens(), name="tokens")


@pytest.mark.parametrize("name", ["resnet18", "hf-hub:timm/resnet18.a1_in1k"])
def test_published_weights_without_a_network_point_to_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # the variables HF_HUB_OFFLINE and HF_HOME are read at the import
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match=rf"of {name} could.*Without a network.*backbone\.weights=/path/to/file"):
        create_backbone(name, pretrained=True)


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet26", "resnet26d", "seresnext26d_32x4d", "resnetblur50", "resnest14d"]
)
def test_last_stride_doubles_the_map_and_keeps_the_weights(name: str) -> None:
    strided, unstrided = (create_backbone(name, last_stride=stride, image_size=64).eval() for stride in (None, 1))
    shapes = [{key: tensor.shape for key, tensor in model.state_dict().items()} for model in (strided, unstrided)]
    assert list(shapes[0].items()) == list(shapes[1].items())
    with torch.inference_mode():
        assert strided(images(64)).shape[2:] == (2, 2)
        assert unstrided(images(64)).shape[2:] == (4, 4)


@pytest.mark.parametrize(
    ("name", "layer"),
    [("resnet26", "layer4.0.conv2"), ("resnet26", "layer4.0.downsample"), ("resnet26d", "layer4.0.downsample")],
)
@pytest.mark.parametrize("side", [4, 5])
def test_unstrided_layer_agrees_with_the_strided_one_at_even_positions(name: str, layer: str, side: int) -> None:
    strided = create_backbone(name, image_size=64).eval()
    unstrided = create_backbone(name, last_stride=1, image_size=64).eval()
    unstrided.load_state_dict(strided.state_dict())
    layers = [model.model.get_submodule(layer) for model in (strided, unstrided)]
    convolution = next(module for module in layers[0].modules() if isinstance(module, nn.Conv2d))
    x = torch.randn(2, convolution.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, full = layers[0](x), layers[1](x)
    assert full.shape[2:] == (side, side)
    torch.testing.assert_close(full[..., ::2, ::2], expected)


def trained_looking(model: nn.Module) -> nn.Module:
    """Statistics and scales as training leaves them: fresh ones are the identity and would hide a mistake."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def normalisations(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "mobilenetv3_small_050", "densenet121"])
@torch.no_grad()
def test_folded_features_are_the_same_with_fewer_normalisations(name: str) -> None:
    model = trained_looking(create_backbone(name))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    folded = fold_batch_norm(model, images(64))
    assert all(tensor.equal(before[key]) for key, tensor in model.state_dict().items())
    assert normalisations(folded) < normalisations(model)
    other = images(64).flip(0) * 0.7
    torch.testing.assert_close(folded(other), model(other), rtol=1e-3, atol=1e-4 * float(model(other).abs().max()))


class UsedTwice(nn.Module):
    """The convolution's output is read by the normalisation and by another layer: folding would be wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.norm(y) + y


def test_a_network_that_folding_would_change_is_left_alone_and_one_in_training_refused() -> None:
    model = trained_looking(UsedTwice())
    assert fold_batch_norm(model, images(64)) is model
    with pytest.raises(ValueError, match="eval"):
        fold_batch_norm(UsedTwice(), images(64))


@pytest.mark.parametrize(
    ("name", "stages", "shape"),
    [("test_resnet", 1, (192, 4, 4)), ("mobilenetv2_100", 2, (32, 8, 8)), ("convnext_atto", 1, (160, 4, 4))],
)
def test_stages_one_after_the_other_give_the_map(name: str, stages: int, shape: tuple[int, ...]) -> None:
    backbone = create_backbone(name, image_size=64).eval()
    first, last = backbone.split(stages)
    assert first.out_shape == shape
    batch = images(64)
    with torch.no_grad():
        maps = first(batch)
        assert maps.shape[1:] == shape and torch.equal(last(maps), backbone(batch))
        folded = fold_batch_norm(first, batch)
    torch.testing.assert_close(folded(batch), maps, rtol=1e-3, atol=1e-4)
    shared = [{id(p) for p in part.parameters()} for part in (first, last, backbone)]
    assert not shared[0] & shared[1] and shared[0] | shared[1] == shared[2]


def test_the_map_of_an_nfnet_is_behind_its_last_activation() -> None:
    backbone = create_backbone("nfnet_l0", image_size=64).eval()
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(backbone(image), backbone.model.forward_features(image))


def test_stages_that_do_not_give_the_map_are_refused() -> None:
    backbone, left = create_backbone("test_resnet", image_size=64), list[torch.Tensor]()

    def looks_at_the_first_stage(_: nn.Module, __: object, maps: torch.Tensor) -> torch.Tensor:
        more = left[-1].mean() if left else 0
        left.clear()
        return maps + more

    backbone.model.get_submodule("layer1").register_forward_hook(lambda _, __, maps: left.append(maps + 1))
    backbone.model.get_submodule("layer4").register_forward_hook(looks_at_the_first_stage)
    with pytest.raises(ConfigError, match=r"impossible for test_resnet; choose 4 \(all after act1\), 0 to"):
        backbone.split(1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "test_resnet",
            r"=5 is impossible for test_resnet; choose 1 \(all after layer3\), .*4 \(all after act1\), 0 to",
        ),
        ("test_vit", "cannot be run one by one"),
        ("alexnet", "cannot be run one by one"),
    ],
)
def test_stages_that_cannot_be_told_apart_are_named(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_backbone(name).split(5)
