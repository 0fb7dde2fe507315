"""AlexNet, which timm lacks: torchvision's and the one with batch normalisation."""

from pathlib import Path

import pytest
import timm
import torch
import torchvision

from fgvc.models import create_backbone, create_model

IMAGES = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))


def test_alexnet_is_torchvisions_without_its_last_pooling(tmp_path: Path) -> None:
    model, path = torchvision.models.alexnet(num_classes=3).eval(), tmp_path / "alexnet.pth"
    torch.save(model.state_dict(), path)
    backbone = create_backbone("alexnet", weights=path, image_size=96).eval()
    with torch.inference_mode():
        assert torch.equal(backbone(IMAGES), model.features[:-1](IMAGES))
    downloaded = timm.create_model("alexnet", pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    assert torch.equal(downloaded.features[0].weight, model.features[0].weight)


@pytest.mark.parametrize("name", ["alexnet", "alexnet_bn"])
def test_map_and_published_preparation(name: str) -> None:
    backbone = create_backbone(name)
    assert backbone(torch.zeros(1, 3, 224, 224)).shape == (1, 256, 13, 13)
    assert backbone.out_channels == 256
    config = backbone.data_config
    assert (config["input_size"], config["interpolation"]) == ((3, 224, 224), "bilinear")
    assert (config["mean"], config["std"]) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    model = create_model(name, method="isqrt_cov", num_classes=3, reduction=None, hidden=(4,), image_size=96)
    model(IMAGES).pow(2).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
