"""Folded batch normalisation computes the same features, or is left alone."""

import pytest
import torch
from torch import Tensor, nn

from fgvc.models import create_backbone, fold_batch_norm

IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


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


def count(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "mobilenetv3_small_050", "densenet121"])
@torch.no_grad()
def test_same_features_with_fewer_normalisations(name: str) -> None:
    model = trained_looking(create_backbone(name))
    folded = fold_batch_norm(model, IMAGE)
    assert count(folded) < count(model)
    other = IMAGE.flip(0) * 0.7
    torch.testing.assert_close(folded(other), model(other), rtol=1e-3, atol=1e-4 * float(model(other).abs().max()))


def test_the_original_is_untouched() -> None:
    model = trained_looking(create_backbone("resnet18"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fold_batch_norm(model, IMAGE)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


class UsedTwice(nn.Module):
    """The convolution's output is read by the normalisation and by another layer: folding would be wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


def test_a_network_it_would_change_is_left_alone() -> None:
    model = trained_looking(UsedTwice())
    assert fold_batch_norm(model, IMAGE) is model


def test_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="eval"):
        fold_batch_norm(UsedTwice(), IMAGE)
