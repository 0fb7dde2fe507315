"""The eigendecomposition under the spectral layers: edge cases, repairs after injected faults, devices, threads."""

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.torch_version import TorchVersion

from fgvc.spectral import EigendecompositionError, eigen, matrix_sqrt
from fgvc.spectral.eigen import EigendecompositionWarning, symmetric_eigh

EIGH = torch.linalg.eigh
LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError


def gram(count: int, d: int, rank: int | None = None, seed: int = 0) -> Tensor:
    """Positive semi-definite matrices (count, d, d) in float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, d, 2 * d if rank is None else rank, dtype=torch.float64, generator=generator)
    return x @ x.mT / d


def with_spectrum(*eigenvalues: float) -> Tensor:
    """One symmetric matrix (1, d, d) with these eigenvalues and random eigenvectors."""
    u = torch.linalg.qr(gram(1, len(eigenvalues))).Q
    return u * torch.tensor(eigenvalues, dtype=torch.float64) @ u.mT


def check_decomposition(matrix: Tensor, result: tuple[Tensor, Tensor], tolerance: float = 1e-13) -> None:
    """U diag(l) U^T is the symmetric part of (B, d, d) relative to its largest entry, U orthogonal, l ascending."""
    eigenvalues, u = result
    d = matrix.shape[-1]
    assert eigenvalues.shape == matrix.shape[:-1] and u.shape == matrix.shape
    assert eigenvalues.dtype == u.dtype == matrix.dtype and eigenvalues.device == u.device == matrix.device
    symmetric = (matrix + matrix.mT) / 2
    scale = symmetric.abs().amax() if matrix.numel() else 1
    assert ((u * eigenvalues[:, None, :] @ u.mT - symmetric).abs() <= tolerance * d * scale).all()
    assert ((u.mT @ u - torch.eye(d, dtype=u.dtype)).abs() <= tolerance * d).all()
    assert (eigenvalues.diff(dim=-1) >= 0).all()


# ---- values and edge cases


EDGE_CASES = {
    "full_rank": gram(3, 7),
    "rank_deficient": gram(3, 7, rank=2),
    "zero": torch.zeros(2, 5, 5, dtype=torch.float64),
    "identity": torch.eye(5, dtype=torch.float64).expand(3, 5, 5),
    "ties": with_spectrum(2.0, 2.0, 2.0, 0.5, 0.5),
    "condition_1e16": with_spectrum(*torch.logspace(-16, 0, 6).tolist()),
    "indefinite": with_spectrum(-3.0, -1.0, 2.0),
    "d_1": torch.tensor([[[-4.0]], [[0.0]], [[9.0]]], dtype=torch.float64),
    "B_0": torch.zeros(0, 3, 3, dtype=torch.float64),
    "d_0": torch.zeros(3, 0, 0, dtype=torch.float64),
    "strided": torch.stack([gram(3, 4), gram(3, 4)], dim=-1)[..., 0],
    "denormal": gram(2, 4) * 1e-310,
    "one_triangle_tilted": gram(2, 5) + torch.ones(5, 5, dtype=torch.float64).triu(1),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", EDGE_CASES)
def test_decomposition_of_edge_cases(name: str) -> None:
    check_decomposition(EDGE_CASES[name], symmetric_eigh(EDGE_CASES[name]))


def test_huge_finite_entries_are_not_taken_for_infinity() -> None:
    matrix = torch.full((2, 6, 6), 2.0**1020, dtype=torch.float64)
    assert not matrix.sum(dim=(1, 2)).isfinite().any()
    torch.testing.assert_close(symmetric_eigh(matrix)[0][:, -1] / 2.0**1020, torch.full((2,), 6.0).double())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_matrix_never_reaches_lapack(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = gram(4, 3)
    matrix[1, 2, 0] = matrix[1, 0, 2] = value
    matrix[3, 0, 0] = 1.7e308  # the sum of what follows overflows, but it is finite
    matrix[3, 1, 1] = 1.7e308
    monkeypatch.setattr(torch.linalg, "eigh", pytest.fail)
    with pytest.raises(EigendecompositionError, match=r"1 of 4 .* NaN or infinity \(batch items \[1\]\)") as caught:
        symmetric_eigh(matrix)
    assert caught.value.items == [1]


# ---- faults


class Faulty:
    """torch.linalg.eigh that fails where `fails` is true of a matrix: by an error, NaN, or one eigenvector twice."""

    def __init__(self, fails: Callable[[Tensor], bool], returns_nan: bool = False, repeats: bool = False) -> None:
        self.fails, self.returns_nan, self.repeats = fails, returns_nan, repeats

    def __call__(self, matrix: Tensor, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        eigenvalues, u = EIGH(matrix) if out is None else EIGH(matrix, out=out)
        batch = matrix if matrix.dim() == 3 else matrix[None]
        failed = torch.tensor([self.fails(item) for item in batch]).reshape(matrix.shape[:-2])
        if self.repeats:
            u[..., 0] = torch.where(failed[..., None], u[..., 1], u[..., 0])
            return eigenvalues, u
        if failed.any() and not self.returns_nan:
            raise LinAlgError("injected")
        # in place: also where the results were asked for with out=
        u[..., 0].masked_fill_(failed[..., None], float("nan"))
        return eigenvalues, u


Inject = Callable[..., None]


@pytest.fixture
def inject(monkeypatch: pytest.MonkeyPatch) -> Inject:
    return lambda fails, **options: monkeypatch.setattr(torch.linalg, "eigh", Faulty(fails, **options))


def until_jitter(original: Tensor, jitter: float) -> Callable[[Tensor], bool]:
    """True of `original` (d, d) until its diagonal is raised by this part of its largest entry; false of others."""
    needed = original.double().diagonal() + 0.99 * jitter * original.double().abs().max()
    off_diagonal = original.double().triu(1)

    def fails(item: Tensor) -> bool:
        same = torch.allclose(item.double().triu(1), off_diagonal, rtol=1e-6)
        return same and not bool((item.double().diagonal() >= needed).all())

    return fails


@pytest.mark.parametrize("returns_nan", [False, True])
@pytest.mark.parametrize("jitter", [1e-14, 1e-12, 1e-8])
def test_only_the_failing_item_is_repaired(jitter: float, returns_nan: bool, inject: Inject) -> None:
    matrix = gram(4, 5)
    before = symmetric_eigh(matrix)
    inject(until_jitter(matrix[2], jitter), returns_nan=returns_nan)
    with pytest.warns(EigendecompositionWarning) as caught:
        after = symmetric_eigh(matrix)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert "1 of 4 matrices" in str(caught[0].message)
    assert f"eigenvalues: item 2 with {jitter:g} on cpu" in str(caught[0].message)
    for i in (0, 1, 3):
        assert after[0][i].equal(before[0][i]) and after[1][i].equal(before[1][i])
    # the jitter is taken off again: what is left is the rounding of adding it
    check_decomposition(matrix, after)
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=1e-14 * matrix.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("d", [2, 5, 96])
def test_eigenvectors_that_are_not_orthogonal_are_repaired(d: int, dtype: torch.dtype, inject: Inject) -> None:
    matrix = gram(3, d).to(dtype)
    inject(until_jitter(matrix[1], 1e-14), repeats=True)
    with pytest.warns(EigendecompositionWarning, match="item 1 with 1e-14"):
        check_decomposition(matrix, symmetric_eigh(matrix), tolerance=1e-13 if dtype == torch.float64 else 1e-6)


def test_repair_in_float32_has_room_for_the_jitter(inject: Inject) -> None:
    matrix = gram(2, 5).float()
    inject(until_jitter(matrix[1], 1e-12))
    with pytest.warns(EigendecompositionWarning, match="item 1 with 1e-12 on cpu"):
        check_decomposition(matrix, symmetric_eigh(matrix), tolerance=1e-6)


def test_warning_lists_ten_items_and_counts_the_rest(inject: Inject) -> None:
    matrix = gram(1, 3).expand(14, 3, 3)
    inject(until_jitter(matrix[0], 1e-14))
    with pytest.warns(EigendecompositionWarning, match=r"14 of 14 .*; item 9 with 1e-14 on cpu; and 4 more$"):
        symmetric_eigh(matrix)


def is_rank_two(item: Tensor) -> bool:
    return bool(torch.linalg.matrix_rank(item, rtol=1e-6) == 2)


@pytest.mark.parametrize("returns_nan", [False, True])
def test_hopeless_items_are_named_with_what_is_wrong_with_them(returns_nan: bool, inject: Inject) -> None:
    hopeless = torch.diag(torch.tensor([4.0, 2.0, 2e-60], dtype=torch.float64))
    matrix = torch.stack([*gram(1, 3), hopeless, *gram(1, 3), 10 * hopeless])
    inject(is_rank_two, returns_nan=returns_nan)
    with pytest.raises(EigendecompositionError) as caught:
        symmetric_eigh(matrix)
    assert str(caught.value) == (
        "no convergence for 2 of 4 matrices, not even with 1e-08 of the largest entry added to the diagonal: "
        "item 1 (trace 6.000e+00, rank 2 of 3, condition number 2.0e+60); "
        "item 3 (trace 6.000e+01, rank 2 of 3, condition number 2.0e+60)"
    )
    assert caught.value.items == [1, 3]
    assert isinstance(caught.value.__cause__, LinAlgError) is not returns_nan


def test_error_lists_ten_items_and_counts_the_rest(inject: Inject) -> None:
    inject(lambda _: True)
    message = r"12 of 12 .*; item 9 \(trace 0.000e\+00, rank 0 of 2, condition number inf\); and 2 more$"
    with pytest.raises(EigendecompositionError, match=message) as caught:
        symmetric_eigh(torch.zeros(12, 2, 2))
    assert caught.value.items == list(range(12))  # the message names ten of them


@pytest.mark.parametrize("returns_nan", [False, True])
def test_unknown_rank_is_said_to_be_unknown(returns_nan: bool, inject: Inject, monkeypatch: pytest.MonkeyPatch) -> None:
    def eigvalsh(matrix: Tensor) -> Tensor:
        if returns_nan:
            return torch.full(matrix.shape[:-1], float("nan"))
        raise LinAlgError("injected")

    inject(lambda _: True)
    monkeypatch.setattr(torch.linalg, "eigvalsh", eigvalsh)
    with pytest.raises(EigendecompositionError, match="rank unknown of 3, condition number unknown"):
        symmetric_eigh(torch.eye(3)[None])


def test_other_errors_are_not_repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    def eigh(matrix: Tensor) -> Any:
        if matrix.dim() == 3:
            raise torch.OutOfMemoryError("injected")
        return EIGH(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    with pytest.raises(torch.OutOfMemoryError):
        symmetric_eigh(gram(2, 3))


def test_layer_and_its_gradient_survive_a_fault(inject: Inject) -> None:
    cov, weights = gram(3, 4), gram(3, 4, seed=1)

    def value_and_gradient() -> tuple[Tensor, Tensor]:
        leaf = cov.clone().requires_grad_()
        root = matrix_sqrt(leaf)
        return root, torch.autograd.grad((root * weights).sum(), leaf)[0]

    expected = value_and_gradient()
    inject(until_jitter(cov[1], 1e-10))
    with pytest.warns(EigendecompositionWarning, match="item 1 with 1e-10"):
        torch.testing.assert_close(value_and_gradient(), expected)


# ---- devices


class Far(Tensor):
    """A CPU tensor that says it is on an accelerator and refuses to be mixed with tensors that do not."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device(Accelerator.name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if Tensor in types and func is not Tensor.__setitem__:
            raise RuntimeError("expected all tensors to be on the same device")
        if func is Tensor.cpu:
            return args[0].as_subclass(Tensor)
        return super().__torch_function__(func, types, args, kwargs or {})


class Accelerator(TorchFunctionMode):
    """Makes tensor.to(device) move between the CPU and the pretended accelerator `name`."""

    name = "cuda"

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.to:
            return args[0].as_subclass(Tensor if torch.device(args[1]).type == "cpu" else Far)
        return func(*args, **(kwargs or {}))


def far(matrix: Tensor) -> Tensor:
    return matrix.as_subclass(Far)


@pytest.mark.parametrize(
    ("choice", "accelerator", "computed_on"),
    [
        *(("auto", "cuda", "cuda"), ("cpu", "cuda", "cpu"), ("same", "cuda", "cuda")),
        *(("auto", "mps", "cpu"), ("same", "mps", "mps")),
    ],
)
def test_choice_of_the_device(choice: str, accelerator: str, computed_on: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr(Accelerator, "name", accelerator)
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: (used.append(matrix.device.type), EIGH(matrix))[1])
    with Accelerator():
        eigenvalues, u = symmetric_eigh(far(gram(2, 3)), device=choice)
    assert used == [computed_on]
    assert eigenvalues.device.type == u.device.type == accelerator
    torch.testing.assert_close(eigenvalues.as_subclass(Tensor), EIGH(gram(2, 3))[0])


@pytest.mark.parametrize(("cpu_needs", "amount"), [(0.0, "0"), (1e-12, "1e-12")])
def test_items_that_an_accelerator_cannot_do_go_to_the_cpu(cpu_needs: float, amount: str, inject: Inject) -> None:
    matrix = gram(3, 4)
    fails_on_cpu = until_jitter(matrix[1], cpu_needs)
    fails_anywhere = until_jitter(matrix[1], 1.0)
    inject(lambda item: fails_on_cpu(item) if item.device.type == "cpu" else fails_anywhere(item.as_subclass(Tensor)))
    with Accelerator(), pytest.warns(EigendecompositionWarning, match=rf"1 of 3 .* item 1 with {amount} on cpu$"):
        eigenvalues, u = symmetric_eigh(far(matrix))
    assert isinstance(eigenvalues, Far) and isinstance(u, Far)
    check_decomposition(matrix, (eigenvalues.as_subclass(Tensor), u.as_subclass(Tensor)))


@pytest.mark.parametrize(("version", "computed_on"), [("2.11.0", "cpu"), ("2.12.0", "cuda")])
def test_cuda_that_would_loop_over_matrices_leaves_them_to_the_cpu(
    version: str, computed_on: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    used = []
    eigen._say_cpu_once.cache_clear()
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: (used.append(matrix.device.type), EIGH(matrix))[1])
    with Accelerator():
        for choice, d in (("auto", 33), ("auto", 33), ("auto", 32), ("same", 33)):
            symmetric_eigh(far(gram(2, d)), device=choice)
    assert used == [computed_on, computed_on, "cuda", "cuda"]
    lines = [line.message for line in caplog.records if line.name == eigen.__name__]
    assert len(lines) == (computed_on == "cpu") and all("eigh_device=same" in line for line in lines)


class Readings(Accelerator):
    """Counts the values that are read back from the pretended accelerator."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = {Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.item, Tensor.tolist, Tensor.nonzero}
        self.count += func in read
        return super().__torch_function__(func, types, args, kwargs)


def test_an_accelerator_is_asked_once_and_names_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: (seen.append(matrix), EIGH(matrix))[1])
    matrix = gram(3, 4)
    with Readings() as readings:
        symmetric_eigh(far(matrix))
    assert readings.count == 1
    matrix[1, 2, 2] = torch.nan
    with Accelerator(), pytest.raises(EigendecompositionError, match=r"1 of 3 .* NaN or infinity .* \[1\]"):
        symmetric_eigh(far(matrix))
    assert all(batch.isfinite().all() for batch in seen)


def test_unknown_device_lists_the_choices() -> None:
    with pytest.raises(ValueError, match=r"'gpu'.* auto, cpu, same"):
        symmetric_eigh(gram(1, 2), device="gpu")


# ---- threads

LARGE = gram(5, 64)  # B d^3 = 1.3e6: shared out among threads


def in_fresh_thread(function: Callable[..., Any], *args: Any) -> Any:
    results = []
    thread = threading.Thread(target=lambda: results.append(function(*args)))
    thread.start()
    thread.join()
    return results[0]


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two intra-op threads here, three by default in other threads, and no pool from an earlier test."""
    before, default = torch.get_num_threads(), in_fresh_thread(torch.get_num_threads)
    pools: dict[int, Any] = {}
    monkeypatch.setattr(eigen, "_pools", pools)
    torch.set_num_threads(2)
    in_fresh_thread(torch.set_num_threads, 3)
    yield
    for pool in pools.values():
        pool.shutdown()
    torch.set_num_threads(before)
    in_fresh_thread(torch.set_num_threads, default)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """(thread, its intra-op thread count, number of matrices) of each call of torch.linalg.eigh."""
    seen: list[tuple[int, int, int]] = []

    def eigh(matrix: Tensor, **out: Any) -> Any:
        seen.append((threading.get_ident(), torch.get_num_threads(), len(matrix)))
        return EIGH(matrix, **out)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    return seen


@pytest.mark.usefixtures("two_threads")
def test_batch_is_shared_out_among_workers_of_one_thread_each(calls: list[tuple[int, int, int]]) -> None:
    for _ in range(2):
        symmetric_eigh(LARGE)
    assert sorted(size for _, _, size in calls) == [2, 2, 3, 3]
    assert {count for _, count, _ in calls} == {1}
    assert threading.get_ident() not in {thread for thread, _, _ in calls}
    # the counts of other threads are left alone
    assert torch.get_num_threads() == 2 and in_fresh_thread(torch.get_num_threads) == 3


@pytest.mark.usefixtures("two_threads")
def test_more_threads_make_a_larger_pool(calls: list[tuple[int, int, int]]) -> None:
    torch.set_num_threads(4)
    symmetric_eigh(LARGE)
    assert sorted(size for _, _, size in calls) == [1, 1, 1, 2]
    torch.set_num_threads(16)
    symmetric_eigh(LARGE)
    assert [size for _, _, size in calls[4:]] == [1] * 5


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("reason", ["one thread", "one matrix", "little work"])
def test_plain_call_where_threads_do_not_pay(reason: str, calls: list[tuple[int, int, int]]) -> None:
    if reason == "one thread":
        torch.set_num_threads(1)
    symmetric_eigh({"one thread": LARGE, "one matrix": LARGE[:1], "little work": LARGE[:, :16, :16]}[reason])
    assert [thread for thread, _, _ in calls] == [threading.get_ident()]
    assert not eigen._pools


@pytest.mark.usefixtures("two_threads")
def test_threads_change_no_bit() -> None:
    shared = symmetric_eigh(LARGE)
    torch.set_num_threads(1)
    for i in range(len(LARGE)):
        eigenvalues, u = symmetric_eigh(LARGE[i : i + 1])
        assert shared[0][i].equal(eigenvalues[0]) and shared[1][i].equal(u[0])
    check_decomposition(LARGE, shared)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("returns_nan", [False, True])
def test_fault_in_a_worker_is_repaired(returns_nan: bool, inject: Inject) -> None:
    inject(until_jitter(LARGE[4], 1e-14), returns_nan=returns_nan)
    with pytest.warns(EigendecompositionWarning, match=r"1 of 5 .* item 4 with 1e-14"):
        check_decomposition(LARGE, symmetric_eigh(LARGE))
    inject(until_jitter(LARGE[4], 1.0), returns_nan=returns_nan)
    with pytest.raises(EigendecompositionError, match=r"1 of 5 .* item 4 .*rank 64 of 64"):
        symmetric_eigh(LARGE)


@pytest.mark.usefixtures("two_threads")
def test_repair_waits_for_the_other_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    events = []

    def eigh(matrix: Tensor, **out: Any) -> Any:
        if matrix.dim() == 2:
            events.append("repair")
        elif len(matrix) == 3:  # the first part of five
            raise LinAlgError("injected")
        else:
            time.sleep(0.1)
            events.append("other worker")
        return EIGH(matrix, **out)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    check_decomposition(LARGE, symmetric_eigh(LARGE))
    assert events == ["other worker"] + ["repair"] * 5


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_threads_in_every_grad_mode(context: Callable[[], Any]) -> None:
    with context():
        matrix = LARGE.clone().requires_grad_(context is torch.enable_grad)
        check_decomposition(matrix.detach(), symmetric_eigh(matrix))
        root = matrix_sqrt(matrix)  # inside autograd.Function.forward
        torch.testing.assert_close(root @ root, matrix)
    if context is torch.enable_grad:
        (gradient,) = torch.autograd.grad(root.diagonal(dim1=1, dim2=2).sum(), matrix)
        # d tr(S^{1/2}) = tr(S^{-1/2} dS) / 2
        torch.testing.assert_close(2 * gradient @ root.detach(), torch.eye(64).double().expand(5, 64, 64))


@pytest.mark.usefixtures("two_threads")
def test_several_callers_share_a_pool() -> None:
    results: dict[int, tuple[Tensor, Tensor]] = {}

    def call(seed: int) -> None:
        torch.set_num_threads(2)
        results[seed] = symmetric_eigh(gram(5, 64, seed=seed))

    callers = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for seed, result in results.items():
        check_decomposition(gram(5, 64, seed=seed), result)
    assert len(results) == 4 and len(eigen._pools) == 1


@pytest.mark.usefixtures("two_threads")
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="the system cannot fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_forked_child_makes_its_own_pool() -> None:
    expected = symmetric_eigh(LARGE)
    assert len(eigen._pools) == 1
    receive, send = multiprocessing.Pipe(duplex=False)

    def child() -> None:
        eigenvalues, u = symmetric_eigh(LARGE)
        same = eigenvalues.equal(expected[0]) and u.equal(expected[1])
        send.send((same, torch.get_num_threads(), len(eigen._pools)))

    # a lock that another thread of the parent holds at the fork stays held in the child for ever
    with eigen._lock:
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
    process.join(20)
    if process.is_alive():
        process.kill()
        pytest.fail("the forked child hangs")
    assert process.exitcode == 0 and receive.poll() and receive.recv() == (True, 2, 1)
    check_decomposition(LARGE, symmetric_eigh(LARGE))  # the parent's pool still works
