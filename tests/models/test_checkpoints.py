"""Whole published models: built here under their published names, saved as they are published, converted, compared."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from command_line import ROOT
from safetensors.torch import save_file
from spectral_contract import coupled_iteration
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from fgvc.errors import WeightsError
from fgvc.models import CheckpointReport, FineGrainedModel, create_model, load_checkpoint
from fgvc.models.formats import list_formats

State = dict[str, Tensor]
Change = Callable[[State], Any]
CLASSES = 5
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def eigen_root(cov: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(cov)
    return vectors @ torch.diag_embed(values.clamp(min=torch.finfo(cov.dtype).eps).sqrt()) @ vectors.mT


ROOTS: dict[str, Callable[[Tensor], Tensor]] = {"isqrt_cov": coupled_iteration, "mpn_cov": eigen_root}


def descriptor(maps: Tensor, method: str, *, whole: bool = False) -> Tensor:
    """What the published classifiers read: the mean, or the upper triangle (or the whole) of the root."""
    if method == "gap":
        return maps.mean(dim=(2, 3))
    x = maps.double().flatten(2)
    centred = x - x.mean(dim=2, keepdim=True)
    root = ROOTS[method](centred @ centred.mT / x.shape[2]).flatten(1)
    d = maps.shape[1]
    index = torch.arange(d * d) if whole else torch.ones(d, d).triu().reshape(-1).nonzero().flatten()
    return root[:, index].float()


def resnet(block: type[nn.Module], *, last_stride: int) -> ResNet:
    """A published ResNet with two blocks a stage."""
    net = ResNet(block, [2, 2, 2, 2], num_classes=CLASSES)  # type: ignore[arg-type]
    if last_stride == 1:
        first = net.layer4[0]
        for layer in (first.conv1 if block is BasicBlock else first.conv2, first.downsample[0]):
            layer.stride = (1, 1)
    return net


class OnePart(nn.Module):
    """`conv1 ... layer4 layer_reduce layer_reduce_bn fc`: the names of the released mpncovresnet50."""

    def __init__(
        self, block: type[nn.Module] = Bottleneck, method: str = "isqrt_cov", *, d: int = 6, whole: bool = False
    ):
        super().__init__()
        net = resnet(block, last_stride=1)
        for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            setattr(self, name, getattr(net, name))
        self.layer_reduce = nn.Conv2d(net.fc.in_features, d, 1, bias=False)
        self.layer_reduce_bn = nn.BatchNorm2d(d)
        self.layer_reduce_relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(d * d if whole else d * (d + 1) // 2, CLASSES)
        self.method, self.whole = method, whole

    def forward(self, x: Tensor) -> Tensor:
        *layers, fc = self.children()
        for layer in layers:
            x = layer(x)
        logits: Tensor = fc(descriptor(x, self.method, whole=self.whole))
        return logits


class ThreeParts(nn.Module):
    """`features.N`, `representation`, `classifier`: the names of the released three-part models."""

    def __init__(
        self, features: nn.Sequential, channels: int, classifier: list[int], method: str, d: int | None
    ) -> None:
        super().__init__()
        self.features = features
        self.representation = nn.Module()
        if d:
            self.representation.conv_dr_block = nn.Sequential(
                nn.Conv2d(channels, d, 1, bias=False), nn.BatchNorm2d(d), nn.ReLU(inplace=True)
            )
        width = (d or channels) if method == "gap" else (d or channels) * ((d or channels) + 1) // 2
        layers: list[nn.Module] = []
        for hidden in classifier:
            layers += [nn.Linear(width, hidden), nn.ReLU(inplace=True)]
            width = hidden
        last = nn.Linear(width, CLASSES)
        self.classifier = nn.Sequential(*layers, last) if layers else last
        self.method = method

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        for block in self.representation.children():
            x = block(x)
        logits: Tensor = self.classifier(descriptor(x, self.method))
        return logits


def three_parts(block: type[nn.Module], method: str, *, d: int | None, last_stride: int) -> ThreeParts:
    net = resnet(block, last_stride=last_stride)
    return ThreeParts(nn.Sequential(*list(net.children())[:-2]), net.fc.in_features, [], method, d)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights and batch statistics far from their initial values, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 1 and name.endswith(("weight", "running_var")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.is_floating_point():
            tensor.normal_(0, tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.1, generator=generator)
        else:
            tensor.fill_(7)
    return model.eval()


def training_checkpoint(state: State) -> Any:
    """As the released main.py saves it after training with one process a machine."""
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    about = {"epoch": 3, "arch": "resnet50", "best_prec1": torch.tensor(87.3), "optimizer": optimizer}
    return about | {"state_dict": OrderedDict(state)}


def bare(state: State) -> Any:
    return state


def all_wrapped(state: State) -> Any:
    return training_checkpoint({f"module.{name}": tensor for name, tensor in state.items()})


def features_wrapped(state: State) -> Any:
    return training_checkpoint({name.replace("features.", "features.module.", 1): t for name, t in state.items()})


def old(state: State) -> Any:
    return {name: tensor for name, tensor in state.items() if "num_batches" not in name}


def converted(
    published: nn.Module, path: Path, container: Change = bare, **ours: Any
) -> tuple[FineGrainedModel, CheckpointReport]:
    """Our model with the published one's weights, by way of a file; the logits of both are compared."""
    torch.save(container(dict(reversed(published.state_dict().items()))), path)
    model = create_model(num_classes=CLASSES, image_size=64, **ours)
    report = load_checkpoint(model, path)
    with torch.inference_mode():
        expected = published(IMAGES)
        difference = (model.eval()(IMAGES) - expected).abs().max()
    assert expected.std() > 1e-2
    assert difference < 1e-5 * expected.abs().max()
    return model, report


RESNET26 = {"name": "resnet26", "reduction": 6, "last_stride": 1}
RESNET18 = {"name": "resnet18", "reduction": 6, "last_stride": 1}


@pytest.mark.parametrize(
    ("method", "container"),
    [("mpn_cov", bare), *(("isqrt_cov", kind) for kind in (training_checkpoint, all_wrapped, old))],
)
def test_one_part(tmp_path: Path, method: str, container: Change) -> None:
    published = randomised(OnePart(method=method))
    model, report = converted(published, tmp_path / "w.pth.tar", container, method=method, **RESNET26)
    assert (report.format, report.folded, report.left_out) == ("MPN-COV ResNet in one part", False, ())
    counters = [name for name in model.state_dict() if "num_batches" in name]
    assert report.kept == (tuple(counters) if container is old else ())
    assert report.loaded + len(report.kept) == len(model.state_dict())
    assert int(model.state_dict()[counters[0]]) == (0 if container is old else 7)


@pytest.mark.parametrize(
    ("method", "container"), [("isqrt_cov", bare), ("mpn_cov", all_wrapped), ("isqrt_cov", features_wrapped)]
)
def test_three_parts(tmp_path: Path, method: str, container: Change) -> None:
    whole = OnePart(BasicBlock, method, whole=True)
    # everything of a pretrained one but its classifier is the features; the representation has no layers
    pretrained = ThreeParts(nn.Sequential(*list(OnePart(BasicBlock).children())[:-1]), 6, [], method, None)
    for published, title in (
        (three_parts(BasicBlock, method, d=6, last_stride=1), "ResNet in three parts"),
        (pretrained, "MPN-COV ResNet in three parts"),
        (whole, "MPN-COV ResNet in one part"),
    ):
        if published is whole and container is features_wrapped:
            continue
        _, report = converted(randomised(published), tmp_path / "w.pth", container, method=method, **RESNET18)
        assert (report.format, report.folded) == (title, published is whole)


def alexnet(method: str, hidden: list[int], d: int | None, *, batch_norm: bool) -> ThreeParts:
    """The released AlexNet: its layers without the last max-pooling, and a classifier with hidden layers."""
    layers: list[nn.Module] = []
    for layer in torchvision.models.alexnet().features[:-1]:
        layers += [layer]
        if batch_norm and isinstance(layer, nn.Conv2d):
            layers.append(nn.BatchNorm2d(layer.out_channels))
    return ThreeParts(nn.Sequential(*layers), 256, hidden, method, d)


@pytest.mark.parametrize(
    ("name", "method", "hidden", "d", "container"),
    [
        ("alexnet_bn", "isqrt_cov", [7, 9], 6, bare),  # as trained from scratch on ImageNet, but for the widths
        ("alexnet_bn", "mpn_cov", [7, 9], 6, features_wrapped),
        ("alexnet", "isqrt_cov", [], None, all_wrapped),  # as from a pretrained one
        ("alexnet", "gap", [], None, bare),
    ],
)
def test_alexnet(tmp_path: Path, name: str, method: str, hidden: list[int], d: int | None, container: Change) -> None:
    published = randomised(alexnet(method, hidden, d, batch_norm=name == "alexnet_bn"))
    ours = {"name": name, "method": method, "reduction": d, "hidden": hidden}
    _, report = converted(published, tmp_path / "w.pth", container, **ours)
    assert report.format == "AlexNet in three parts"


def test_a_classifier_of_other_classes_is_found_behind_many_layers(tmp_path: Path) -> None:
    layers = {"name": "test_resnet", "method": "gap", "hidden": [3, 4, 5, 6, 7]}
    save_file(create_model(**layers, num_classes=8).state_dict(), tmp_path / "w.safetensors")
    report = load_checkpoint(create_model(**layers, num_classes=9), tmp_path / "w.safetensors", classifier=None)
    assert "head.classifier.10.weight" in report.kept


def test_layers_of_a_classifier_are_counted_without_what_lies_between_them(tmp_path: Path) -> None:
    published = randomised(alexnet("isqrt_cov", [7, 9], 6, batch_norm=False))
    linear = [layer for layer in published.classifier if isinstance(layer, nn.Linear)]
    between = [nn.ReLU(), nn.Dropout()]
    published.classifier = nn.Sequential(linear[0], *between, linear[1], *between, linear[2]).eval()
    converted(published, tmp_path / "w.pth", name="alexnet", method="isqrt_cov", reduction=6, hidden=[7, 9])


@pytest.mark.parametrize("last_stride", [1, None])
def test_three_parts_with_global_average_pooling(tmp_path: Path, last_stride: int | None) -> None:
    published = randomised(three_parts(Bottleneck, "gap", d=None, last_stride=last_stride or 2))
    converted(published, tmp_path / "w.pth", name="resnet26", method="gap", last_stride=last_stride)


@pytest.mark.parametrize(
    ("published", "name"),
    [
        (torchvision.models.resnet18(num_classes=CLASSES), "resnet18"),
        (timm.create_model("resnet10t", num_classes=CLASSES), "resnet10t"),
        (timm.create_model("regnetx_002", num_classes=CLASSES), "regnetx_002"),  # its classifier is head.fc
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_whole_classifiers_of_timm_and_torchvision(tmp_path: Path, published: nn.Module, name: str) -> None:
    _, report = converted(randomised(published), tmp_path / "w.pth", name=name, method="gap")
    assert report.format == "timm or torchvision"


def test_a_backbone_alone_leaves_the_head_where_that_is_asked_for(tmp_path: Path) -> None:
    torch.save(timm.create_model("resnet10t", num_classes=0).state_dict(), tmp_path / "w.pth")
    model = create_model("resnet10t", method="seb", num_classes=CLASSES, reduction=6)
    head = {name: tensor.clone() for name, tensor in model.head.state_dict().items()}
    with pytest.raises(WeightsError, match=r"7 of the model are missing in the file \(head.reduction.0.weight"):
        load_checkpoint(model, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"2 of the model are missing in the file \(head.classifier.weight, head.cl"):
        load_checkpoint(model, tmp_path / "w.pth", reduction=False)
    report = load_checkpoint(model, tmp_path / "w.pth", reduction=False, classifier=False)
    assert report.kept == tuple(f"head.{name}" for name in head)
    assert all(torch.equal(tensor, head[name]) for name, tensor in model.head.state_dict().items())


@pytest.mark.parametrize("method", ["seb", "compact_bilinear", "gap"])
def test_weights_of_a_run(tmp_path: Path, method: str) -> None:
    options = {"out_features": 32, "seed": 1} if method == "compact_bilinear" else {}
    published = randomised(create_model("resnet10t", method=method, num_classes=CLASSES, reduction=6, **options))
    save_file(published.state_dict(), tmp_path / "whole.safetensors")
    save_file(published.head.state_dict(), tmp_path / "head.safetensors")
    options.pop("seed", None)  # the random numbers of the published one are in its file
    model = create_model("resnet10t", method=method, num_classes=CLASSES, reduction=6, **options)
    with pytest.raises(WeightsError, match=r"are missing in the file \(backbone.model.conv1.0.weight"):
        load_checkpoint(model, tmp_path / "head.safetensors")
    assert load_checkpoint(model, tmp_path / "head.safetensors", backbone=False).format == "fgvc, the head alone"
    maps = torch.rand(2, 512, 4, 4)
    torch.testing.assert_close(model.head.eval()(maps), published.head(maps))
    assert load_checkpoint(model, tmp_path / "whole.safetensors").format == "fgvc"
    torch.testing.assert_close(model.eval()(IMAGES), published(IMAGES))


def test_the_classifier_is_left_out_on_purpose(tmp_path: Path) -> None:
    published = randomised(OnePart(BasicBlock))
    torch.save(published.state_dict(), tmp_path / "w.pth")
    model = create_model(method="isqrt_cov", num_classes=3, **RESNET18)
    before = model.head.classifier.weight.detach().clone()
    with pytest.raises(WeightsError, match=r"2 are of another shape \(head.classifier.weight \(5, 21\) for \(3, 21\)"):
        load_checkpoint(model, tmp_path / "w.pth")
    for choice in (False, None):
        report = load_checkpoint(model, tmp_path / "w.pth", classifier=choice)
        assert report.left_out == ("fc.weight", "fc.bias")
        assert report.kept == ("head.classifier.weight", "head.classifier.bias")
        assert torch.equal(model.head.classifier.weight, before)
        assert torch.equal(model.head.reduction[0].weight, published.layer_reduce.weight)
    same = create_model(method="isqrt_cov", num_classes=CLASSES, **RESNET18)
    assert load_checkpoint(same, tmp_path / "w.pth", classifier=None).left_out == ()


def test_the_released_resnet50_has_a_place_for_every_tensor(tmp_path: Path) -> None:
    published = torchvision.models.resnet50()
    state = {name: t for name, t in published.state_dict().items() if not name.startswith("fc")}
    state |= {f"layer_reduce_bn.{name}": t for name, t in nn.BatchNorm2d(256).state_dict().items()}
    state |= {"layer_reduce.weight": torch.ones(256, 2048, 1, 1)}
    state |= {"fc.weight": torch.ones(10, 256 * 257 // 2), "fc.bias": torch.ones(10)}
    torch.save(state, tmp_path / "w.pth")
    model = create_model("resnet50", method="isqrt_cov", num_classes=10, last_stride=1, image_size=64)
    report = load_checkpoint(model, tmp_path / "w.pth")
    assert report.loaded == len(state) == len(model.state_dict())


def without(name: str) -> Change:
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            without("layer3.0.bn2.running_var"),
            ["1 of the model are missing", "backbone.model.layer3.0.bn2.running_var"],
        ),
        (without("layer_reduce_bn.bias"), ["1 of the model are missing", "head.reduction.1.bias"]),
        (lambda state: state | {"extra.bias": torch.ones(1)}, ["1 in the file have no place", "extra.bias"]),
        (lambda state: state | {"layer4.2.conv1.weight": torch.ones(1)}, ["no place", "layer4.2.conv1.weight"]),
        (lambda state: state | {"fc.bias": torch.ones(4)}, ["1 are of another shape", "(4,) for (5,)"]),
        (lambda state: state | {"fc.weight": torch.tensor(1.0)}, ["1 are of another shape", "() for (5, 21)"]),
        (
            lambda state: {f"trunk.{n}": t for n, t in state.items()},
            ["no known format", "trunk.conv1.weight", "torchvision"],
        ),
        (lambda _: timm.create_model("resnet10t").state_dict(), ["timm or torchvision", "no place", "are missing"]),
        (lambda _: {}, ["holds no named tensors"]),
    ],
)
def test_what_does_not_fit_is_listed_and_changes_nothing(tmp_path: Path, change: Change, parts: list[str]) -> None:
    path = tmp_path / "w.pth"
    torch.save(change(OnePart(BasicBlock).state_dict()), path)
    model = create_model(method="isqrt_cov", num_classes=CLASSES, **RESNET18)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load_checkpoint(model, path)
    assert [part for part in [str(path), *parts] if part not in str(caught.value)] == []
    with pytest.raises(WeightsError, match=r"initial_weights=.* does not exist"):
        load_checkpoint(model, tmp_path / "absent.pth")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_another_function_under_the_same_names_is_refused(tmp_path: Path) -> None:
    torch.save(OnePart(BasicBlock).state_dict(), tmp_path / "w.pth")
    strided = create_model("resnet18", method="isqrt_cov", num_classes=CLASSES, reduction=6)
    with pytest.raises(WeightsError, match=r"backbone\.last_stride=1"):
        load_checkpoint(strided, tmp_path / "w.pth")
    torch.save(alexnet("gap", [], None, batch_norm=False).state_dict(), tmp_path / "alexnet.pth")
    pooled = create_model("alexnet", method="gap", num_classes=CLASSES, image_size=64)
    pooled.backbone.model.features.append(nn.MaxPool2d(3, 2))  # as timm's VGG, under the names of the released one
    with pytest.raises(WeightsError, match="before its last max-pooling"):
        load_checkpoint(pooled, tmp_path / "alexnet.pth")
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES).state_dict(), tmp_path / "vit.pth")
    vit = create_model("vit_tiny_patch16_224", method="gap", num_classes=CLASSES)
    with pytest.raises(WeightsError, match="class token"):
        load_checkpoint(vit, tmp_path / "vit.pth")
    assert load_checkpoint(vit, tmp_path / "vit.pth", classifier=False).left_out == ("head.weight", "head.bias")


def test_the_page_on_weights_names_every_format() -> None:
    page = (ROOT / "docs" / "weights.md").read_text(encoding="utf-8")
    assert [title for title in list_formats() if f"| {title} | " not in page] == []
