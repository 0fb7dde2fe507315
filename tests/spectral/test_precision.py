"""In which precision the spectral layers compute, whatever surrounds them, and what follows that precision."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Train, a_config, refused, succeeded
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fgvc.errors import ConfigError
from fgvc.models import PoolingHead
from fgvc.pooling import CovariancePooling, Pooling, create_pooling, is_reduced, list_poolings
from fgvc.provenance import tf32_allowed
from fgvc.runs.config import HybridConfig, MethodConfig, RunConfig, TrainerConfig, check_config
from fgvc.spectral import (
    EIGENVALUE_FLOOR,
    GRADIENTS,
    SQRT,
    covariance,
    covariance_eigenvalues,
    newton_schulz_sqrt,
    spectral_descriptor,
)
from fgvc.spectral.precision import SPECTRAL_DTYPES
from fgvc.training.environment import create_accelerator
from fgvc.training.hybrid import Stages
from fgvc.training.run import default_run_dir

OPTIONS: dict[str, dict[str, Any]] = {"svd_topn": {"keep": 4}, "compact_bilinear": {"out_features": 32}}
PRODUCTS = ("bmm", "mm", "baddbmm", "addmm", "linalg_eigh", "_linalg_eigh")
each_spectral_dtype = pytest.mark.parametrize("name_of_dtype", SPECTRAL_DTYPES)


def narrow_products() -> set[str]:
    """What the program allows in place of products of float32, on a GPU or a CPU; "ieee" stands for nothing."""
    if not hasattr(torch.backends.mkldnn, "matmul"):  # torch before 2.9
        return {{"highest": "ieee"}.get(torch.get_float32_matmul_precision(), "tf32")}
    return {backend.fp32_precision for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)}


class Products(TorchDispatchMode):
    """Remembers of every product and eigendecomposition its precision, and what products of float32 may be."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.dtype, set[str]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            self.seen.append((name, args[0].dtype, narrow_products()))
        return func(*args, **(kwargs or {}))

    @property
    def dtypes(self) -> set[torch.dtype]:
        return {dtype for _, dtype, _ in self.seen}


def features(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def pooling(name: str, dtype: str = "float64", gradient: str | None = None) -> Pooling:
    return create_pooling(name, channels=6, dtype=dtype, gradient=gradient, **OPTIONS.get(name, {}))


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@each_spectral_dtype
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list_poolings())
def test_no_product_leaves_the_working_precision(name: str, autocast: torch.dtype, name_of_dtype: str) -> None:
    # its published gradient, 1e6 times the exact one, does not fit into float16
    gradient = "exact" if (name, autocast) == ("svd_topn", torch.float16) else None
    pool = pooling(name, name_of_dtype, gradient=gradient)
    working = SPECTRAL_DTYPES[name_of_dtype] if isinstance(pool, CovariancePooling) else torch.float32
    for size in (2, 3):  # fewer locations than channels, and more
        x = features(2, 6, size, size, dtype=autocast).requires_grad_()
        with torch.autocast("cpu", dtype=autocast), Products() as products:
            descriptor = pool(x)
            if isinstance(pool, CovariancePooling):  # started under autocast, a backward pass runs under it
                (under,) = torch.autograd.grad(descriptor.sum(), x, retain_graph=True)
                assert under.isfinite().all()
        with products:
            (of_features,) = torch.autograd.grad(descriptor.sum(), x)
        assert products.dtypes <= {working} and (products.seen or not is_reduced(name))
        assert descriptor.dtype == torch.float32 and of_features.dtype == autocast
        assert descriptor.isfinite().all() and of_features.isfinite().all()


def both(x: Tensor, gradient: str, dtype: str) -> tuple[Tensor, Tensor]:
    """Descriptor of the square root and gradient of a fixed sum of it."""
    leaf = x.double().requires_grad_()
    keep = 4 if gradient == "topn_published" else None
    descriptor = spectral_descriptor(leaf, SQRT, gradient, keep=keep, dtype=dtype)
    weights = torch.linspace(-1, 2, descriptor.shape[1], dtype=torch.float64)
    return descriptor.detach(), torch.autograd.grad((descriptor * weights).sum(), leaf)[0]


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("locations", [5, 40])
def test_float32_is_float64_but_for_rounding(gradient: str, locations: int) -> None:
    x = features(3, 8, locations)
    for wide, narrow in zip(both(x, gradient, "float64"), both(x, gradient, "float32"), strict=True):
        assert 1e-9 < relative(narrow, wide) < 1e-4


@pytest.mark.parametrize("gradient", [name for name in GRADIENTS if name != "topn_published"])
def test_rounding_noise_of_null_eigenvalues_gets_no_slope_of_float64(gradient: str) -> None:
    # 4 locations, ten times each: at most 3 non-zero eigenvalues of 8 on the path that sees the null ones as noise
    x = 30 * features(3, 8, 4).repeat(1, 1, 10)
    (wide, of_wide), (narrow, of_narrow) = both(x, gradient, "float64"), both(x, gradient, "float32")
    assert relative(narrow, wide) < 2e-3
    assert relative(of_narrow, of_wide) < 5e-2  # with the floor of float64 it is above 10


def test_null_eigenvalues_that_are_known_keep_the_floor_of_float64() -> None:
    constant = torch.ones(1, 8, 5)
    descriptor = spectral_descriptor(constant, SQRT, dtype="float32")
    assert descriptor.max() == pytest.approx(EIGENVALUE_FLOOR**0.5)
    assert both(features(2, 8, 5), "exact", "float32")[1].isfinite().all()


@each_spectral_dtype
def test_eigenvalues_just_above_the_noise_are_no_null_ones(name_of_dtype: str) -> None:
    # 11 eps is the smallest non-zero eigenvalue that features of real images had, of the largest; d eps is 64 eps
    eps = torch.finfo(SPECTRAL_DTYPES[name_of_dtype]).eps
    left, right = (torch.linalg.qr(features(n, 5, dtype=torch.float64) - shift).Q for n, shift in ((64, 0), (12, 1)))
    right = torch.linalg.qr(right - right.mean(dim=0)).Q[:, :4]
    for smallest, rank in ((20 if name_of_dtype == "float32" else 200, 4), (2, 3)):
        sizes = torch.tensor([1.0, 0.3, 0.1, smallest * eps], dtype=torch.float64)
        x = (left[:, :4] * sizes.sqrt() @ right.mT)[None]
        assert (covariance_eigenvalues(x, name_of_dtype) > 0).sum() == rank


@pytest.mark.usefixtures("allow_narrow")
@pytest.mark.parametrize("name", ["isqrt_cov", "mpn_cov"])
def test_float32_products_are_not_rounded_further(name: str) -> None:
    pool = pooling(name, "float32")
    assert isinstance(pool, CovariancePooling)
    x = features(2, 6, 3, 3).requires_grad_()
    with Products() as products:
        pool(x).sum().backward()
        pool.normalise(covariance(x.detach(), torch.float32).requires_grad_()).sum().backward()
    assert len(products.seen) > 5 and all(narrow == {"ieee"} for *_, narrow in products.seen)
    assert "tf32" in narrow_products()


@pytest.fixture
def allow_narrow() -> Iterator[None]:
    """The program allows TF32 on a GPU and bfloat16 on a CPU in place of float32."""
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


def test_tf32_is_stated_where_a_gpu_could_use_it() -> None:
    assert tf32_allowed() == {"matmul": False, "convolution": True}


def test_another_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="float64, float32"):
        newton_schulz_sqrt(torch.eye(3)[None], dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match=r"method\.spectral_dtype 'bf16'; choose one of float64, float32"):
        check_config(in_precision(spectral_dtype="bf16"))
    assert create_pooling("seb", channels=4, dtype=torch.float32).layer.dtype == torch.float32  # type: ignore[union-attr]


def in_precision(**method: Any) -> RunConfig:
    return a_config(method=MethodConfig(name="mpn_cov", reduction=8, **method))


def test_float32_has_a_run_folder_of_its_own() -> None:
    assert default_run_dir(in_precision()) == Path("results/t/resnet18/mpn_cov/seed0")
    assert default_run_dir(in_precision(spectral_dtype="float32")).parent.name == "mpn_cov-dtypefloat32"


def test_both_stages_of_a_hybrid_run_have_the_precision() -> None:
    config = in_precision(spectral_dtype="float32")
    config.hybrid = HybridConfig(method="isqrt_cov", switch_epoch=1)
    config.trainer = TrainerConfig(epochs=2)
    head = PoolingHead(4, method="mpn_cov", num_classes=2, reduction=8, spectral_dtype="float32")
    stages = Stages(head, config.method, config.hybrid, config.switch_epoch)
    for epoch in (1, 2):
        stages.enter(head, epoch)
        with Products() as products:
            head.pooling(features(2, 8, 3, 3))
        assert products.dtypes == {torch.float32}


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_run_in_float32_says_so_and_stays_in_it(tmp_path: Path, train_here: Train, precision: str) -> None:
    narrow = [f"trainer.precision={precision}", "method.spectral_dtype=float32"]
    succeeded(train_here(tmp_path, "run_dir=run", *narrow, "trainer.epochs=1"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["label"], summary["spectral_dtype"]) == ("SEB [dtype=float32]", "float32")
    again = train_here(tmp_path, "run_dir=run", "trainer.epochs=1")
    refused(again, "method.spectral_dtype was float32, now float64")


def test_fp16_needs_a_gpu_to_train_and_none_to_evaluate(tmp_path: Path, train_here: Train) -> None:
    refused(train_here(tmp_path, "run_dir=run", "trainer.precision=fp16"), "trainer.precision=fp16", "cpu", "bf16")
    assert not (tmp_path / "run").exists()
    config = in_precision()
    config.trainer.precision = "fp16"
    assert create_accelerator(config, tmp_path, training=False).device.type == "cpu"
