"""The layers without data: on pretended CUDA tensors, by number of operators, and in one graph of torch.compile."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode

from fgvc.models import create_model
from fgvc.pooling import create_pooling, list_poolings
from fgvc.spectral import GRADIENTS, SQRT, EigendecompositionError, spectral_descriptor, spectral_map

OPTIONS: dict[str, dict[str, Any]] = {"svd_topn": {"keep": 2}, "compact_bilinear": {"out_features": 64}}
MOST_OPERATORS = 250
"""Dispatched by a pooling forward and backward; each costs a GPU a launch."""
MORE_OPERATORS = {"isice": 1350}  # ten inverses of seven steps each, and the gradients of five


class Operators(TorchDispatchMode):
    """Counts what reaches the dispatcher, but for questions after a tensor's device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is not torch.ops.prim.device.default
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def fake_backward(output: Tensor, grad: Tensor) -> dict[Tensor, Tensor]:
    """Gradients of the leaves. The engine of autograd asks CUDA for its streams, and so needs a real GPU."""
    order: dict[Any, None] = {}  # consumers last

    def visit(node: Any) -> None:
        if node is not None and node not in order:
            for below, _ in node.next_functions:
                visit(below)
            order[node] = None

    visit(output.grad_fn)
    arrived: dict[Any, dict[int, Tensor]] = {output.grad_fn: {output.output_nr: grad}}
    leaves = {}
    for node in reversed(order):
        grads = arrived.pop(node, {})
        if hasattr(node, "variable"):
            leaves[node.variable] = grads[0]
            continue
        function = node.apply if isinstance(node, BackwardCFunction) else node
        found = function(*(grads.get(i) for i in range(len(node._input_metadata))))
        results = found if isinstance(found, tuple) else (found,)
        for (below, i), result in zip(node.next_functions, results, strict=False):
            if below is not None and result is not None:
                sums = arrived.setdefault(below, {})
                # a node leaves the sum over what was broadcast to the engine
                result = result.sum_to_size(below._input_metadata[i].shape)
                sums[i] = sums[i] + result if i in sums else result
    return leaves


@pytest.mark.parametrize("method", list_poolings())
def test_pooling_of_cuda_tensors_stays_there_in_few_operators(method: str) -> None:
    with FakeTensorMode():
        with torch.device("cuda"):
            pool = create_pooling(method, channels=256)
        if not list(pool.parameters()):  # pretended parameters cannot be moved, and these are there
            pool.cuda()
        for side in (28, 7):  # more locations than channels, and fewer
            x = torch.empty(10, 256, side, side, device="cuda", requires_grad=True)
            with Operators() as operators:
                descriptor = pool(x)
                gradient = fake_backward(descriptor, torch.ones_like(descriptor))[x]
            assert descriptor.device == gradient.device == x.device and gradient.shape == x.shape
            assert descriptor.shape == (10, pool.out_features) and descriptor.dtype == torch.float32
            assert side == 7 or operators.count <= MORE_OPERATORS.get(method, MOST_OPERATORS)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_no_gradient_rule_looks_at_the_data(gradient: str) -> None:
    keep = (1, 4) if gradient == "topn_published" else None
    with FakeTensorMode():
        for side in (2, 4):
            x = torch.empty(3, 6, side, side, device="cuda", requires_grad=True)
            s = torch.empty(3, 6, 6, device="cuda", dtype=torch.float64, requires_grad=True)
            descriptor = spectral_descriptor(x, SQRT, gradient, keep=keep, dtype="float32")
            matrix = spectral_map(s, SQRT, gradient, keep=keep)
            for result, leaf in ((descriptor, x), (matrix, s)):
                of_leaf = fake_backward(result, torch.ones_like(result))[leaf]
                assert (of_leaf.device, of_leaf.dtype, of_leaf.shape) == (leaf.device, leaf.dtype, leaf.shape)


@pytest.mark.parametrize("method", ["isqrt_cov", "seb_spectral"])
def test_model_of_cuda_tensors(method: str) -> None:
    with FakeTensorMode(), torch.device("cuda"):
        model = create_model("resnet10t", method=method, num_classes=5, reduction=16)
        logits = model(torch.empty(2, 3, 64, 64))
        gradients = fake_backward(logits, torch.ones_like(logits))
    assert logits.device.type == "cuda" and logits.shape == (2, 5)
    assert all(gradients[weight].shape == weight.shape for weight in model.parameters())


def test_compiled_layer_refuses_what_the_layer_refuses() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(create_pooling("seb_spectral", channels=6), fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 6, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with pytest.raises(RuntimeError, match=r"create_graph=False|double backward"):
        torch.autograd.grad(compiled(x).norm(), x, create_graph=True)[0].norm().backward()
    with pytest.raises(EigendecompositionError, match=r"1 of 3 .* \[1\]"):
        compiled(x.detach().index_fill(0, torch.tensor([1]), torch.nan).requires_grad_())


@pytest.mark.parametrize(("method", "solver"), [("isqrt_cov", "eigh"), ("seb", "eigh"), ("seb", "products")])
@pytest.mark.parametrize("size", [2, 4])
def test_gradient_lies_in_memory_as_the_features_do(method: str, solver: str, size: int) -> None:
    layer = create_pooling(method, channels=6, solver=solver, gradient=None if solver == "eigh" else "exact")
    x = torch.randn(3, 6, size, size, generator=torch.Generator().manual_seed(0))
    gradients = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        leaf = x.contiguous(memory_format=memory_format).requires_grad_()
        gradients.append(torch.autograd.grad(layer(leaf).square().sum(), leaf)[0])
        assert gradients[-1].stride() == leaf.stride()
    torch.testing.assert_close(*gradients)
