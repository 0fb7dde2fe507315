"""What leaves PyTorch's eager mode: ONNX export, torch.compile, inference mode before training."""

import copy
import pickle
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from fgvc.models import create_model
from fgvc.pooling import create_pooling, list_poolings
from fgvc.spectral import covariance, upper_triangle

OPTIONS = {"svd_topn": {"keep": 2}, "compact_bilinear": {"out_features": 64}, "hbp": {"width": 16}}


def images(batch: int) -> Tensor:
    return torch.rand(batch, 3, 64, 64, generator=torch.Generator().manual_seed(batch))


# isqrt_cov is exported by the command in test_export_cli.py
@pytest.mark.parametrize(
    "method",
    ["dropcov", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gap", "hbp", "mgcrp", "isqrt_cov"))],
)
def test_onnx_model_gives_the_same_logits(method: str, tmp_path: Path) -> None:
    model = create_model("test_resnet", method=method, num_classes=5, reduction=16).eval()
    path = tmp_path / f"{method}.onnx"
    batch = torch.export.Dim("batch", min=1, max=64)
    torch.onnx.export(model, (images(2),), path, dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in (1, 3):
        (logits,) = session.run(None, {session.get_inputs()[0].name: images(size).numpy()})
        with torch.no_grad():
            expected = model(images(size)).numpy()
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(logits, expected, atol=1e-5)
    # tracing must leave nothing behind: the model still trains
    model.train()(images(2)).sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"), [("mpn_cov", {"gradient": "exact", "solver": "products"}), ("isice", {})]
)
def test_onnx_layer_by_products_gives_the_same_descriptors(method: str, options: dict[str, str]) -> None:
    pool = create_pooling(method, channels=6, **options)
    batch = torch.export.Dim("batch")
    program = torch.onnx.export(
        pool, (torch.rand(2, 6, 4, 4),), dynamo=True, dynamic_shapes=({0: batch},), verbose=False
    )
    assert program is not None
    x = torch.rand(3, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(program(x)[0], pool(x))


# of 2 x 2 locations there are fewer than channels: another way, which the layers share
@pytest.mark.parametrize(
    ("method", "side"),
    [*((name, 5) for name in list_poolings()), *((name, 2) for name in ("seb", "mpn_cov", "isqrt_cov", "svd_topn"))],
)
def test_exported_program_gives_the_same_descriptors(method: str, side: int, tmp_path: Path) -> None:
    pool = create_pooling(method, channels=6, **OPTIONS.get(method, {})).eval()
    example = torch.rand(2, 6, side, side)
    with torch.no_grad():
        program = torch.export.export(pool, (example,), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},))
    torch.export.save(program, tmp_path / "pool.pt2")
    loaded = torch.export.load(tmp_path / "pool.pt2").module()
    for batch in (1, 3):
        x = torch.rand(batch, 6, side, side, generator=torch.Generator().manual_seed(batch))
        torch.testing.assert_close(loaded(x), pool(x))


@pytest.mark.parametrize(
    "method", ["gap", "compact_bilinear", "isqrt_cov", "seb", "chol_cov", pytest.param("isice", marks=pytest.mark.slow)]
)
def test_compiled_model_gives_the_same_values_and_gradients(method: str) -> None:
    torch._dynamo.reset()
    pool = create_pooling(method, channels=6, **OPTIONS.get(method, {}))
    model = nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU(), pool, nn.Linear(pool.out_features, 3))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    results = []
    for function in (model, compiled):
        logits = function(x)
        results.append((logits, *torch.autograd.grad(logits.pow(2).sum(), list(model.parameters()))))
    for eager, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.filterwarnings("ignore:Dynamo does not know")  # the switches of TF32, at which the graph breaks
@pytest.mark.parametrize("method", ["isqrt_cov", "seb"])
def test_layers_in_float32_leave_eager_mode_too(method: str) -> None:
    torch._dynamo.reset()
    pool = create_pooling(method, channels=6, dtype="float32")
    x = torch.rand(2, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        program = torch.export.export(pool, (x,))
        for other in (program.module(), torch.compile(pool, backend="aot_eager")):
            torch.testing.assert_close(other(x), pool(x))


@pytest.mark.parametrize("method", list_poolings())
def test_a_whole_model_can_be_pickled_and_copied(method: str) -> None:
    pool = create_pooling(method, channels=6, **OPTIONS.get(method, {})).eval()
    x = torch.rand(2, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    for other in (copy.deepcopy(pool), pickle.loads(pickle.dumps(pool))):
        torch.testing.assert_close(other(x), pool(x), rtol=0, atol=0)


def test_vmap_is_refused_by_the_layers_and_taken_by_gap() -> None:
    x = torch.rand(3, 6, 4, 4, generator=torch.Generator().manual_seed(0))

    def gradients(method: str) -> Tensor:
        pool = create_pooling(method, channels=6)
        return torch.func.vmap(torch.func.grad(lambda item: pool(item[None]).sum()))(x)

    torch.testing.assert_close(gradients("gap"), torch.full_like(x, 1 / 16))
    for method in ("isqrt_cov", "seb"):
        with pytest.raises(RuntimeError, match="vmap support"):
            gradients(method)


def test_training_after_inference_mode() -> None:
    x = torch.rand(2, 23, 5, 5, generator=torch.Generator().manual_seed(0))  # 23 channels: in no other test
    with torch.inference_mode():
        upper_triangle(covariance(x))
    x.requires_grad_()
    upper_triangle(covariance(x)).sum().backward()
    assert x.grad is not None
