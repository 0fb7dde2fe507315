"""What a run says when it cannot go on: no memory, losses that grow, NaN and infinity."""

import json
import math
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fgvc.models import PoolingHead
from fgvc.spectral import EigendecompositionError
from fgvc.training import processes
from fgvc.training.guard import Cause, LossWatch, find_cause, non_finite_entries
from fgvc.training.run import memory_advice

LEFT_OPEN = """
import runpy
import sys
from torch.utils.data import DataLoader
deaf = runpy.run_path(sys.argv[1])["leave_signals_to_the_main_process"]  # not the package, which imports for seconds
batches = iter(DataLoader(range(8), num_workers=1, worker_init_fn=deaf))
next(batches)
raise SystemExit(3)  # with the workers alive, as where an exception holds the loader's frames
"""


def test_workers_that_ignore_signals_do_not_outlive_the_run() -> None:
    command = [sys.executable, "-c", LEFT_OPEN, processes.__file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (3, "")


def test_memory_that_cannot_be_had_names_what_needs_less() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)  # 4 PiB
    message = memory_advice(caught.value, batch_size=32, accumulation=2)
    assert message is not None
    assert "4,294,967,296.0 MiB" in message and "trainer.accumulation=4" in message and "batch_size=32" in message
    with pytest.raises(MemoryError) as refused:
        np.empty(2**50)
    assert "8.00 PiB" in str(memory_advice(refused.value, batch_size=8, accumulation=1))


@pytest.mark.parametrize(
    ("error", "decomposes"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has 8 GiB"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8 GB). Tried to allocate 1.50 GiB."), False),
    ],
)
def test_memory_of_a_gpu(error: BaseException, decomposes: bool) -> None:
    advice = memory_advice(error, batch_size=12, accumulation=1)
    assert advice is not None
    assert all(part in advice for part in ("another 1.50 GiB", "trainer.accumulation=2", "trainer.batch_size=12"))
    assert all((part in advice) == decomposes for part in ("method.eigh_device=cpu", "method.solver=eigh"))


def test_one_image_at_a_time_cannot_be_halved_and_other_errors_are_left_alone() -> None:
    advice = memory_advice(MemoryError(), batch_size=8, accumulation=8)
    assert advice is not None and "trainer.accumulation=" not in advice and "dataset.transform.size" in advice
    odd = memory_advice(MemoryError(), batch_size=3, accumulation=2)
    assert odd is not None and "trainer.accumulation=3" in odd
    assert memory_advice(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 8, 1) is None


def watched_losses(losses: Iterable[float], **options: Any) -> list[tuple[int, str]]:
    watch = LossWatch(guessing=math.log(80), **options)
    return [(step, said) for step, loss in enumerate(losses) if (said := watch.update(loss)) is not None]


def test_a_loss_that_grows_and_stays_is_a_divergence() -> None:
    falling = [4.4 * 0.97**step for step in range(100)]
    alarms = watched_losses([*falling, *[60.0] * 150])
    # the median needs half a window of them, and has to stay a whole one
    assert [step for step, _ in alarms] == [99 + 25 + 49, 99 + 25 + 99]
    assert "above 5 times its lowest value, " in alarms[0][1] and "it is 60 now" in alarms[0][1]
    assert watched_losses([*falling, *[4.37] * 100])  # collapsed to guessing
    assert watched_losses([4.4 * 1.2**step for step in range(100)])  # from the first step on


NO_DIVERGENCE = {
    "bad batches": [0.1 if step % 9 else 1e6 for step in range(300)],
    "bursts": ([0.1] * 60 + [500.0] * 45) * 4,
    "a burst": [0.1] * 100 + [500.0] * 24 + [0.1] * 100,
    "a restart that stays below guessing": [0.01] * 100 + [3.9] * 200,
    "a slow start": [50.0] * 200 + [5.0] * 100,
    "never learns": [4.39] * 300,
    "a lucky first batch": [0.1, 0.2, *[50.0] * 200],
}


@pytest.mark.parametrize("kind", NO_DIVERGENCE)
def test_healthy_or_hopeless_losses_are_no_divergence(kind: str) -> None:
    assert watched_losses(NO_DIVERGENCE[kind]) == []


def test_a_watch_continues_where_its_state_ends() -> None:
    rng = np.random.default_rng(0)
    losses = [*rng.uniform(0.1, 0.3, 60).tolist(), *rng.uniform(10, 90, 60).tolist()]
    for cut in (3, 55, 75, 90):
        first, second = LossWatch(guessing=math.log(4), window=20), LossWatch(guessing=math.log(4), window=20)
        said = [first.update(loss) for loss in losses[:cut]]
        state = json.loads(json.dumps(first.state_dict()))
        second.load_state_dict(state)
        said += [second.update(loss) for loss in losses[cut:]]
        whole = LossWatch(guessing=math.log(4), window=20)
        assert said == [whole.update(loss) for loss in losses] and second.state_dict() == whole.state_dict()


def a_head(method: str = "mpn_cov") -> PoolingHead:
    torch.manual_seed(0)
    return PoolingHead(6, method=method, num_classes=3, reduction=4)


def a_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 6, 5, 5, generator=generator), torch.tensor([0, 1, 2, 0])


def look(module: nn.Module, inputs: Tensor, targets: Tensor) -> Cause:
    """The cause, which must leave the module and torch's random numbers as they were."""
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 7)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    modes, random = [part.training for part in module.modules()], torch.get_rng_state()
    cause = find_cause(module, inputs, targets, nn.functional.cross_entropy)
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0, equal_nan=True)
    assert all(bool((p.grad == 7).all()) for p in module.parameters() if p.grad is not None)
    assert modes == [part.training for part in module.modules()] and random.equal(torch.get_rng_state())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    return cause


def test_a_healthy_step_has_no_cause() -> None:
    assert look(a_head(), *a_batch()) == Cause(None, [])


def test_weights_that_are_not_finite_are_named() -> None:
    head = a_head("gap")
    with torch.no_grad():
        head.classifier.weight[0, :3] = torch.tensor([math.nan, math.inf, math.nan])
    assert look(head, *a_batch()) == Cause("the output of classifier", [0, 1, 2, 3])
    assert non_finite_entries(dict(head.named_parameters())) == ["classifier.weight (3 of 18 entries)"]


def test_an_activation_that_overflows_is_named_by_layer_and_sample() -> None:
    inputs, targets = a_batch()
    inputs[1] *= 1e38
    assert look(a_head(), inputs, targets) == Cause("the output of reduction.0", [1])


def test_an_eigendecomposition_that_fails_names_the_pooling(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Tensor:
        raise EigendecompositionError("no convergence in item 2", [2])

    head = a_head()
    monkeypatch.setattr(type(head.pooling), "forward", fail)
    assert look(head, *a_batch()) == Cause("the eigenvalues of pooling", [2])


class Energy(nn.Module):
    """Squares; in training each sample is given the mean of all of them, as batch normalisation would mix them."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (x * x).mean(dim=0) if self.training else x * x


def test_a_sample_that_is_spread_over_the_batch_is_found_alone() -> None:
    inputs, targets = a_batch()
    inputs[3] = 1e30
    # one sample is too few for batch normalisation in training
    model = nn.Sequential(Energy(), nn.Flatten(), nn.BatchNorm1d(150), nn.Linear(150, 3))
    assert look(model, inputs, targets) == Cause("the output of 0", [3])


class Root(nn.Module):
    """sqrt(|x|): of a zero, the gradient is infinite while the value is finite."""

    def forward(self, x: Tensor) -> Tensor:
        return x.abs().sqrt()


def test_a_gradient_that_is_not_finite_is_named_by_layer_sample_and_weights() -> None:
    inputs, targets = a_batch()
    inputs[2] = 0
    body = nn.Sequential(nn.Conv2d(6, 4, 1, bias=False), nn.Sequential(Root()))
    model = nn.Sequential(body, nn.Flatten(), nn.Dropout(0.1), nn.Linear(100, 3))
    assert look(model, inputs, targets) == Cause("the input gradient of 0.1.0", [2])
    model.zero_grad()
    nn.functional.cross_entropy(model(inputs), targets).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert [line.split(" (")[0] for line in non_finite_entries(gradients)] == ["0.0.weight"]


def test_a_gradient_that_no_layer_hands_back_is_named_by_its_weight() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) * self.scale.sqrt()

    inputs, targets = a_batch()
    assert look(Scale(), inputs[:, :3], targets).layer == "the gradient of scale"
