"""Poolings by name: widths, precision, labels, refusals, and agreement with the published layers."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from fgvc.errors import ConfigError
from fgvc.pooling import (
    CovariancePooling,
    Pooling,
    SpectralPooling,
    create_pooling,
    is_reduced,
    list_poolings,
    pooling_label,
    pooling_source,
    pooling_spectrum,
    published_gradient,
    register_pooling,
    register_spectral_pooling,
)
from fgvc.spectral import (
    SQRT,
    EigenvalueMap,
    GradientRule,
    LogCholesky,
    Power,
    covariance,
    matrix_map,
    trunc,
    upper_triangle,
)

PUBLISHED = {f"SVD_{name}": f"svd_{name.lower()}" for name in ("Pade", "Taylor", "Trunc", "TopN", "Newton", "PI")}
PUBLISHED |= {"SVD_Original": "mpn_cov", "SEB": "seb", "MPNCOV": "isqrt_cov"}
OPTIONS = {"svd_topn": {"keep": 2}, "compact_bilinear": {"out_features": 64}}
OPTIONS |= {"hbp": {"width": 4}, "mgcrp": {"heads": 2, "width": 3}}
"""For few channels."""
each_method = pytest.mark.parametrize("name", list_poolings())


def small(name: str, channels: int) -> Pooling:
    return create_pooling(name, channels=channels, **OPTIONS.get(name, {})).eval()


def features(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


@each_method
@pytest.mark.parametrize("channels", [1, 6])
def test_descriptor_has_the_stated_width_whatever_the_input(name: str, channels: int) -> None:
    channels = max(channels, 3) if name == "svd_topn" else channels  # of one eigenvalue none can be dropped
    pool = small(name, channels)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = features(3, channels, 4, 5).to(dtype)
        descriptor = pool(x)
        assert descriptor.shape == (3, pool.out_features)
        assert descriptor.dtype == torch.float32 and descriptor.isfinite().all()
        torch.testing.assert_close(pool(x.contiguous(memory_format=torch.channels_last)), descriptor)
        assert pool(x[..., :1, :1]).isfinite().all()


@each_method
@pytest.mark.parametrize("locations", [2, 3])  # fewer locations than channels, and more
def test_gradient_of_the_whole_layer(name: str, locations: int) -> None:
    x = features(2, 5, locations, locations, dtype=torch.float64).requires_grad_()
    # the published gradient of these is not the derivative
    gradient = "exact" if name in ("svd_topn", "svd_pi", "mpa_lya", "mtp_lya") else None
    assert gradcheck(create_pooling(name, channels=5, gradient=gradient, **OPTIONS.get(name, {})).eval(), x)


@each_method
def test_features_that_do_not_fit_are_refused(name: str) -> None:
    pool = small(name, 4)
    with pytest.raises(ValueError, match=r"built for 4 channels, got features of shape \(2, 3, 5, 5\)"):
        pool(features(2, 3, 5, 5))
    for shape in ((2, 4, 0, 5), (2, 4), (1, 2, 4, 3, 3)):
        with pytest.raises(ValueError, match=r"no locations|expected features of shape"):
            pool(features(*shape))
    for dtype in (torch.uint8, torch.int64, torch.complex64):
        with pytest.raises(TypeError, match="floating-point"):
            pool(torch.ones(2, 4, 3, 3, dtype=dtype))


@each_method
@pytest.mark.parametrize("channels", [0, -1, 2.0, True, None])
def test_channels_that_are_no_number_of_channels_are_refused(name: str, channels: int) -> None:
    with pytest.raises(ConfigError, match="channels must be a whole number of at least 1"):
        create_pooling(name, channels=channels)


def relative(ours: Tensor, theirs: np.ndarray) -> float:
    reference = torch.from_numpy(theirs)
    return float((ours - reference).norm() / reference.norm())


@pytest.mark.parametrize("case", ["full_rank", "rank_deficient"])
@pytest.mark.parametrize("layer", PUBLISHED)
def test_agrees_with_the_published_layer(golden_file: object, case: str, layer: str) -> None:
    golden = np.load(str(golden_file))
    x = torch.from_numpy(golden[f"{case}/x"]).requires_grad_()
    out = create_pooling(PUBLISHED[layer], channels=x.shape[1])(x)
    (grad,) = torch.autograd.grad((out * torch.from_numpy(golden[f"{case}/grad_out"])).sum(), x)
    # the released code centres with a float32 matrix; it moves eigenvalues below 1e-7, and the directions between
    # which SVD-TopN cuts, by which its gradient is amplified
    tolerance = 5e-4 if case == "rank_deficient" else 5e-6 if layer == "SVD_TopN" else 1e-6
    assert relative(out.detach(), golden[f"{case}/{layer}/out"]) < tolerance
    if layer != "SVD_PI":  # deflates by all eigenvectors at once: its released gradient is numerically zero
        assert relative(grad, golden[f"{case}/{layer}/grad_x"]) < tolerance


def their_covariance(x: Tensor) -> Tensor:
    flat, locations = x.flatten(2).double(), x.shape[2:].numel()
    centring = (torch.eye(locations) - torch.ones(locations, locations) / locations) / locations
    return flat @ centring.double() @ flat.mT


@pytest.mark.parametrize("layer", [layer for layer in PUBLISHED if layer != "MPNCOV"])
def test_agrees_with_the_published_layer_under_its_own_centring(golden_file: object, layer: str) -> None:
    """With their float32 centring matrix in place of ours, every layer agrees to the rounding of their output."""
    case = "full_rank"
    golden = np.load(str(golden_file))
    x = torch.from_numpy(golden[f"{case}/x"]).requires_grad_()
    pool = create_pooling(PUBLISHED[layer], channels=x.shape[1])
    assert isinstance(pool, CovariancePooling)
    out = upper_triangle(pool.normalise(their_covariance(x)))
    (grad,) = torch.autograd.grad((out * torch.from_numpy(golden[f"{case}/grad_out"])).sum(), x)
    assert relative(out.detach(), golden[f"{case}/{layer}/out"]) < 1e-6
    if layer != "SVD_PI":
        assert relative(grad, golden[f"{case}/{layer}/grad_x"]) < 1e-6


@pytest.mark.parametrize("case", ["full_rank", "rank_deficient"])
@pytest.mark.parametrize("layer", ["MPA_Lya", "MTP_Lya"])
def test_agrees_with_the_published_function_of_a_matrix(golden_since_2022: object, case: str, layer: str) -> None:
    golden = np.load(str(golden_since_2022))
    cov = torch.from_numpy(golden[f"{case}/cov"]).requires_grad_()
    pool = create_pooling(layer.lower(), channels=cov.shape[-1])
    assert isinstance(pool, CovariancePooling)
    out = pool.normalise(cov)
    (grad,) = torch.autograd.grad((out * torch.from_numpy(golden[f"{case}/grad_matrix"])).sum(), cov)
    # the kept results of MPA have a rounding error of float32: they are symmetric to 7e-6 only. The released formula in
    # float64 is compared in tests/tools/test_benchmarks.py
    tolerance = 5e-5 if layer == "MPA_Lya" else 1e-6
    assert relative(out.detach(), golden[f"{case}/{layer}/out"]) < tolerance
    assert relative(grad, golden[f"{case}/{layer}/grad_cov"]) < tolerance


@pytest.mark.parametrize("case", ["full_rank", "rank_deficient"])
@pytest.mark.parametrize("layer", ["Cho_TMLR", "iSICE"])
def test_agrees_with_the_published_normalisation(golden_since_2022: object, case: str, layer: str) -> None:
    golden = np.load(str(golden_since_2022))
    x = torch.from_numpy(golden[f"{case}/x"]).requires_grad_()
    out = create_pooling({"Cho_TMLR": "chol_cov", "iSICE": "isice"}[layer], channels=x.shape[1])(x)
    (grad,) = torch.autograd.grad((out * torch.from_numpy(golden[f"{case}/grad_out"])).sum(), x)
    # Cho-TMLR centres with a float32 matrix, iSICE adds random numbers up to 1e-9 to what it inverts
    tolerance = 5e-4 if (case, layer) == ("rank_deficient", "Cho_TMLR") else 1e-6
    assert relative(out.detach(), golden[f"{case}/{layer}/out"]) < tolerance
    assert relative(grad, golden[f"{case}/{layer}/grad_x"]) < tolerance
    if layer == "Cho_TMLR":
        theirs = upper_triangle(matrix_map(their_covariance(x), LogCholesky()))
        (grad,) = torch.autograd.grad((theirs * torch.from_numpy(golden[f"{case}/grad_out"])).sum(), x)
        assert relative(theirs.detach(), golden[f"{case}/{layer}/out"]) < 1e-7
        assert relative(grad, golden[f"{case}/{layer}/grad_x"]) < 1e-8


@pytest.mark.parametrize("case", ["full_rank", "rank_deficient"])
@pytest.mark.parametrize(("name", "shift"), [("pow_tmlr", -2.0), ("scale_pow", 0.0)])
def test_affine_forms_of_the_published_square_root(golden_file: object, case: str, name: str, shift: float) -> None:
    golden = np.load(str(golden_file))
    x = torch.from_numpy(golden[f"{case}/x"]).requires_grad_()
    out = create_pooling(name, channels=x.shape[1], gradient="ordinary")(x)
    (grad,) = torch.autograd.grad((out * torch.from_numpy(golden[f"{case}/grad_out"])).sum(), x)
    tolerance = 5e-4 if case == "rank_deficient" else 1e-6
    identity = upper_triangle(torch.eye(x.shape[1]))
    assert relative(out.detach() - shift * identity, 2 * golden[f"{case}/SVD_Original/out"]) < tolerance
    assert relative(grad, 2 * golden[f"{case}/SVD_Original/grad_x"]) < tolerance


def test_inverse_covariance_is_the_inverse_on_both_paths() -> None:
    for locations in (3, 5):
        x = features(2, 6, locations, locations, dtype=torch.float64)[:, :, : 1 if locations == 3 else None]
        s = covariance(x) + 1e-2 * torch.eye(6, dtype=torch.float64)
        found = create_pooling("inverse_cov", channels=6, ridge=1e-2)(x)
        torch.testing.assert_close(found, upper_triangle(torch.linalg.inv(s)))


def test_labels_name_a_changed_gradient_and_options() -> None:
    assert (pooling_label("isqrt_cov"), pooling_label("seb", "ordinary")) == ("iSQRT-COV", "SEB")
    assert pooling_label("seb", "exact") == "SEB (exact)"
    assert pooling_label("mpn_cov", None, {"scale": 2.0, "alpha": 0.25}) == "MPN-COV [alpha=0.25, scale=2.0]"
    assert pooling_label("svd_topn", "exact", {"keep": [16, None]}) == "SVD-TopN (exact) [keep=16:]"


def test_the_smallest_eigenvalues_alone_and_a_constant_scale() -> None:
    x = features(2, 4, 6, 6)
    before, after = pooling_spectrum(create_pooling("svd_topn", channels=4, keep=[2, None]), x)
    assert after is not None
    torch.testing.assert_close(after[:, :2] ** 2, before[:, 2:])
    scaled, root = (create_pooling("mpn_cov", channels=4, **options) for options in ({"scale": 2.5}, {}))
    torch.testing.assert_close(scaled(x), 2.5 * root(x))


PRODUCTS = {"solver": "products", "gradient": "exact"}
BANDS = [
    (2.5, "whole number"),
    (0, "at least 1"),
    ("many", "svd_topn"),
    ([-1, 3], "start of keep"),
    ([1, 2, 3], "pair"),
]
BANDS += [([3, 3], "stop of keep must be a whole number of at least 4, got 3"), ([4, None], "drops all 4 eigenvalues")]
BANDS += [(keep, "drops none of 4 eigenvalues; use mpn_cov") for keep in (4, 7, [0, None], [0, 4])]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sebb", {}, "gap, bilinear, .*, seb"),
        ("seb", {"gradient": "magic"}, "exact, ordinary"),
        ("gap", {"gradient": "exact"}, "no choice of gradient"),
        ("isqrt_cov", {"iteration": 3}, "iterations"),
        *(("isqrt_cov", {"iterations": 0}, "at least 1"), ("isqrt_cov", {"iterations": 2.5}, "whole number")),
        ("svd_taylor", {"gradient": "exact", "degree": 5}, "takes none"),
        ("svd_taylor", {"degree": -1}, "at least 0"),
        ("svd_topn", {}, "give keep=N"),
        *(("svd_topn", {"keep": keep}, words) for keep, words in BANDS),
        *(("seb", {"gradient": name}, "square root of all eigenvalues") for name in ("newton", "lyapunov")),
        ("mpa_lya", {"iterations": 0}, "at least 1"),
        *((name, {"iterations": 101}, "iterations must be at most 100, ") for name in ("isqrt_cov", "svd_newton")),
        ("mpn_cov", {"gradient": "topn_published"}, "give keep=N"),
        *(("mpn_cov", {"alpha": alpha}, "from -10 to 10") for alpha in (10**30, 10**400, 1e308, -11, True, "1")),
        *(("mpn_cov", {"scale": scale}, "above 0") for scale in (10**400, 1e308, True)),
        *(("seb_spectral", {"amplification": 1e308}, "at least 0"), ("log_cov", {"ridge": True}, "at least 0")),
        *(("svd_trunc", {"limit": 10**400}, "above 0"), ("compact_bilinear", {"out_features": 10**20}, "below")),
        *(("mpn_cov", {"alpha": 0}, "other than 0"), ("log_cov", {"ridge": -1.0}, "at least 0")),
        *(("inverse_cov", {"ridge": -1.0}, "at least 0"), ("chol_cov", {"ridge": 0.0}, "above 0")),
        *(("isice", {"steps": 1}, "at least 2"), ("isice", {"sparsity": -0.1}, "at least 0")),
        *(("isice", {"rate": 0.0}, "above 0"), ("chol_cov", {"gradient": "exact"}, "no choice of gradient")),
        *(("gap", {"solver": "products"}, "no choice of solver"), ("seb", {"solver": "qr"}, "eigh, products")),
        *(("seb", {"solver": "products"}, "exact gradient only"), ("mpn_cov", {**PRODUCTS, "alpha": 0.3}, "root")),
        *(
            ("svd_topn", {**PRODUCTS, "keep": 2}, "all eigen"),
            ("seb", {**PRODUCTS, "dtype": "float32"}, "float64 only"),
        ),
        *(("seb", {"eigh_device": "gpu"}, "auto, "), ("seb", {"channels": 0}, "at least 1")),
        ("seb", {"dtype": "float16"}, "'seb': unknown dtype 'float16' of a spectral layer; .* float64, float32"),
    ],
)
def test_refusals_list_what_is_valid(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_pooling(name, **{"channels": 4, **options})


def test_spectrum_before_and_after_the_square_root() -> None:
    x = features(2, 5, 4, 4)
    before, after = pooling_spectrum(create_pooling("mpn_cov", channels=5), x)
    assert after is not None and (before.diff(dim=-1) <= 0).all()
    torch.testing.assert_close(before.sum(-1), covariance(x).diagonal(dim1=1, dim2=2).sum(-1))
    torch.testing.assert_close(after**2, before)
    assert pooling_spectrum(create_pooling("gap", channels=5), x)[1] is None


def test_the_order_of_the_tables() -> None:
    first = ["gap", "bilinear", "compact_bilinear", "isqrt_cov", "mpn_cov", "svd_pade", "svd_taylor", "svd_pi"]
    assert list_poolings()[:14] == [*first, "svd_newton", "svd_trunc", "svd_topn", "seb", "seb_spectral", "log_cov"]
    later = ["mpa_lya", "mtp_lya", "pow_tmlr", "scale_pow", "inverse_cov", "chol_cov", "isice"]
    assert list_poolings()[14 : 14 + len(later)] == later


@pytest.mark.usefixtures("scratch_registry")
def test_a_class_with_a_choice_of_gradient_registers_itself() -> None:
    @register_pooling("toy", "Toy", source="ours", gradients=("lyapunov", "autograd"))
    class Toy(Pooling):
        def __init__(self, channels: int, *, gradient: str, dtype: torch.dtype, degree: int = 3) -> None:
            super().__init__(channels, channels)
            self.given = (gradient, dtype, degree)

    assert list_poolings()[-1] == "toy" and create_pooling("toy", channels=2).given == ("lyapunov", torch.float64, 3)
    other = create_pooling("toy", channels=2, gradient="autograd", dtype="float32", eigh_device="cpu", degree=5)
    assert isinstance(other, Toy) and other.given == ("autograd", torch.float32, 5)
    assert pooling_label("toy", "autograd", {"degree": 5}) == "Toy (autograd) [degree=5]"
    assert pooling_source("toy") == "ours" and is_reduced("toy") and published_gradient("toy") == "lyapunov"
    with pytest.raises(ConfigError, match="unknown gradient 'exact'; choose one of lyapunov, autograd"):
        create_pooling("toy", channels=2, gradient="exact")
    with pytest.raises(ConfigError, match="unknown option dtypes of method 'toy'; it takes degree"):
        create_pooling("toy", channels=2, dtypes="float32")
    with pytest.raises(ValueError, match="a pooling method 'toy' already"):
        register_pooling("toy", "Toy", source="ours")(Toy)


@pytest.mark.usefixtures("scratch_registry")
def test_a_map_of_the_eigenvalues_with_a_rule_of_its_own_registers_itself() -> None:
    def capped(cap: float = 10.0) -> GradientRule:
        return trunc(cap)

    @register_spectral_pooling("toy", "Toy", source="ours", gradient=capped)
    def toy(channels: int, power: float = 0.5) -> tuple[EigenvalueMap, int]:
        return SQRT if power == 0.5 else Power(power), channels - 1

    plain, other = create_pooling("toy", channels=4), create_pooling("toy", channels=4, cap=2.0, power=0.3)
    assert isinstance(plain, SpectralPooling) and isinstance(other, SpectralPooling)
    assert (plain.layer.f, plain.layer.keep, other.layer.f) == (SQRT, (0, 3), Power(0.3))
    assert published_gradient("toy") == "capped"
    x = features(2, 4, 3, 3)
    torch.testing.assert_close(create_pooling("seb", channels=4, gradient="capped")(x), small("seb", 4)(x))
    exact = create_pooling("toy", channels=4, gradient="exact", power=0.3)
    torch.testing.assert_close(exact(x), other(x))
    with pytest.raises(ConfigError, match="unknown option cap of method 'toy'; with this gradient it takes power"):
        create_pooling("toy", channels=4, gradient="exact", cap=2.0)
    with pytest.raises(ConfigError, match="with this gradient it takes power, cap"):
        create_pooling("toy", channels=4, channel=2)
