"""The gradient audit: values by hand where the spectrum is known, the published layers, and the command line."""

import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from command_line import Train, refused, run, succeeded, train
from matplotlib.image import imread
from run_folders import change_summary
from safetensors.torch import load_file
from torch import Tensor

from fgvc.errors import ConfigError, DatasetError
from fgvc.inference.pooling_inputs import load_features
from fgvc.models import PoolingHead
from fgvc.studies.gradients.loewner import AUDITED, load_picture, loewner_picture, released_power_iteration
from fgvc.studies.gradients.measure import BANDS, audit_gradients, summarise_gradients
from fgvc.studies.gradients.show import loewner_figure, relative_error

EPS = 2.0**-52


def features(*shape: int, seed: int = 0) -> Tensor:
    """Correlated ReLU features, as a reduction layer gives them."""
    rng = np.random.default_rng(seed)
    batch, channels, *place = shape
    mixing = rng.normal(size=(channels, channels)) * np.arange(1, channels + 1) ** -0.7
    x = mixing @ rng.normal(size=(batch, channels, math.prod(place)))
    return torch.from_numpy(np.maximum(x, 0)).view(shape)


def diagonal(*variances: float) -> Tensor:
    """x (1, d, 1, 2 d) whose covariance is diagonal with these variances."""
    d = len(variances)
    x = torch.zeros(1, d, 1, 2 * d, dtype=torch.float64)
    for i, variance in enumerate(variances):
        x[0, i, 0, 2 * i] = math.sqrt(d * variance)
        x[0, i, 0, 2 * i + 1] = -math.sqrt(d * variance)
    return x


def triangle(*rows: list[float]) -> Tensor:
    return torch.tensor([[value for row in rows for value in row]], dtype=torch.float64)


def audit_one(x: Tensor, method: str, grad: Tensor | None = None, keep: int | None = None) -> pd.Series:
    return audit_gradients(x, [method], grad, keep=keep).iloc[0]


@pytest.mark.parametrize(("method", "terms"), [("svd_taylor", 101), ("svd_pi", 20)])
def test_a_series_errs_by_the_terms_it_leaves_out(method: str, terms: int) -> None:
    # 1 / (1 - r) less the first terms of its series is r^terms / (1 - r): relative to L_12, r^terms
    row = audit_one(diagonal(2.0, 1.98), method, triangle([0, 1], [0]))
    assert row["relative_error"] == pytest.approx(0.99**terms, rel=1e-9)
    assert row["norm_ratio"] == pytest.approx(1 - 0.99**terms, rel=1e-9)
    assert row["cosine"] == pytest.approx(1)
    assert row["mixed"] == pytest.approx(1) and row["diagonal"] == pytest.approx(0)


def test_published_topn_lets_the_slope_at_the_floor_through() -> None:
    # G = I: the exact derivative has 1 / (2 sqrt 3) at the kept eigenvalue, the published one 0.5 eps^(-1/2) beside it
    row = audit_one(diagonal(3.0, 1.0), "svd_topn", triangle([1, 0], [1]), keep=1)
    assert row["norm_ratio"] == pytest.approx(math.sqrt(1 + 1 / EPS))
    assert row["relative_error"] == pytest.approx(math.sqrt(1 / EPS))
    assert row["cosine"] == pytest.approx(1 / math.sqrt(1 + 1 / EPS))
    assert row["diagonal"] == pytest.approx(1)
    assert (row["kept"], row["channels"], row["rank"]) == (1, 2, 2)
    assert row["reaching"] == row["largest"] == pytest.approx(0.5 / math.sqrt(EPS))
    assert row["largest_high"] == row["largest_low"] == pytest.approx(1)


@pytest.mark.parametrize("shape", [(2, 12, 6, 6), (2, 12, 2, 4)], ids=["full rank", "rank deficient"])
def test_an_exact_gradient_has_no_error(shape: tuple[int, ...]) -> None:
    table = audit_gradients(features(*shape), ["mpn_cov-exact", "seb-exact", "svd_topn-exact", "seb_spectral"], keep=5)
    assert (table["relative_error"] == 0).all()
    np.testing.assert_allclose(table[["norm_ratio", "cosine"]], 1)
    assert table[list(BANDS)].isna().all(axis=None)
    # the same derivative by another chain of operations
    ordinary = audit_gradients(features(*shape), ["mpn_cov", "seb", "svd_pade"])
    assert ordinary["relative_error"].between(0, 1e-9, inclusive="neither").all()


@pytest.mark.parametrize("shape", [(3, 16, 6, 6), (3, 16, 3, 3)], ids=["full rank", "rank deficient"])
def test_shares_account_for_the_error_of_the_features_gradient(shape: tuple[int, ...]) -> None:
    """The loss of the diagonal of P alone errs by the share that the diagonal has in the whole error."""
    x, methods = features(*shape), ["svd_taylor", "svd_pi", "svd_pi-released", "svd_newton", "svd_topn"]
    grad = torch.randn(3, 136, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    table = audit_gradients(x, methods, grad, keep=4)
    meaningful = table[table["relative_error"] > 1e-9]
    assert len(meaningful) >= 12
    np.testing.assert_allclose(meaningful[list(BANDS)].sum(axis=1), 1, rtol=1e-12)
    assert (meaningful[meaningful["rank"] == 16]["null"] == 0).all()

    xc = x[:1].flatten(2) - x[:1].flatten(2).mean(-1, keepdim=True)
    _, u = torch.linalg.eigh(xc @ xc.mT / xc.shape[-1])
    rows, columns = torch.triu_indices(16, 16)
    g = torch.zeros(16, 16, dtype=torch.float64)
    g[rows, columns] = grad[0]
    p = u[0].mT @ ((g + g.mT) / 2) @ u[0]
    for method in ("svd_pi", "svd_newton", "svd_topn"):
        whole = table[table["method"] == method].iloc[0]
        own = u[0] @ torch.diag(p.diagonal()) @ u[0].mT
        own = own * 2 - torch.diag(own.diagonal())
        part = audit_one(x[:1], method, own[rows, columns][None], keep=4)
        share = (part["relative_error"] * part["exact_norm"] / (whole["relative_error"] * whole["exact_norm"])) ** 2
        assert share == pytest.approx(whole["diagonal"], rel=1e-5, abs=1e-9)


def test_bands_of_a_spectrum_with_a_null_eigenvalue() -> None:
    # the released SVD-PI errs by the whole gradient, so that the error sits where the loss pulls
    x, places = diagonal(8.0, 4.0, 1.0, 0.5, 0.0), {}
    for i, j in ((0, 1), (0, 2), (2, 3), (1, 4), (3, 3)):
        grad = torch.zeros(5, 5, dtype=torch.float64)
        grad[i, j] = 1
        row = audit_one(x, "svd_pi-released", grad[torch.triu_indices(5, 5).unbind()][None])
        assert row["rank"] == 4
        places[i, j] = [band for band in BANDS if row[band] > 1e-9]
        assert row[places[i, j][0]] == pytest.approx(1)
    found = {pair: bands for pair, (bands,) in places.items()}
    assert found == {(0, 1): "both_large", (0, 2): "mixed", (2, 3): "both_small", (1, 4): "null", (3, 3): "diagonal"}
    # of three, the middle one belongs to the larger half
    assert audit_one(diagonal(8.0, 4.0, 1.0), "svd_pi-released", triangle([0, 1, 0], [0, 0], [0]))["both_large"] > 0.99


def test_largest_entry_and_its_eigenvalues() -> None:
    x = diagonal(4.0, 1.0, 0.0)
    published, exact = audit_one(x, "mpn_cov"), audit_one(x, "mpn_cov-exact")
    # the slope of sqrt at the floor stands at the null eigenvalue and reaches nothing; 1 / (sqrt 1 + sqrt eps) does
    assert published["largest"] == pytest.approx(0.5 / math.sqrt(EPS))
    assert published["largest_high"] == published["largest_low"] == 0
    for row in (published, exact):
        assert row["reaching"] == pytest.approx(1, rel=1e-7)
        assert (row["reaching_high"], row["reaching_low"]) == (pytest.approx(1), 0)
    assert exact["largest"] == pytest.approx(1, rel=1e-7)


def test_released_power_iteration_vanishes_as_the_released_layer_does(golden_file: Path) -> None:
    golden = np.load(golden_file)
    for case in ("full_rank", "rank_deficient"):
        x, grad = (torch.from_numpy(golden[f"{case}/{name}"]).double() for name in ("x", "grad_out"))
        published = np.linalg.norm(golden[f"{case}/SVD_PI/grad_x"]) / np.linalg.norm(golden[f"{case}/SVD_Pade/grad_x"])
        ours = audit_gradients(x, ["svd_pi-released", "svd_pi"], grad)
        released, described = (part["norm_ratio"] for _, part in ours.groupby("method", sort=False))
        assert published < 1e-14
        assert (released < 1e-12).all() and (released > 0).all() and (abs(described - 1) < 0.1).all()


def test_released_power_iteration_does_not_vanish_with_a_projector_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parts, seen where eigenvectors are missing: U of the three largest eigenvalues leaves a projector."""
    x, grad = diagonal(4.0, 3.0, 2.0), torch.ones(1, 6, dtype=torch.float64)
    lam, u = torch.tensor([[2.0, 3.0, 4.0]]).double(), torch.eye(3, dtype=torch.float64).flip(0)[None]
    assert released_power_iteration(x, grad).norm() < 1e-14
    u[..., 0] = 0  # the eigenvector of 2 is lost: I - U U^T keeps its direction
    monkeypatch.setattr("fgvc.studies.gradients.loewner.symmetric_eigh", lambda _: (lam, u))
    ratio = 2 / 5  # 2 / ||diag(4, 3, 0)||_F, summed over 21 powers
    series = (1 - ratio**21) / (1 - ratio) / 5
    expected = torch.zeros(3, 3, dtype=torch.float64)
    # dLoss/dU = 2 G U sqrt(l), G_ij = 1/2
    expected[2, 0], expected[2, 1] = series * math.sqrt(4), series * math.sqrt(3)
    torch.testing.assert_close(released_power_iteration(x, grad)[0], expected, rtol=1e-12, atol=1e-12)


def test_loss_is_given_or_drawn_from_the_seed() -> None:
    x = features(2, 6, 4, 4)
    drawn = torch.randn(2, 21, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    tables = [audit_gradients(x, ["svd_pi"], seed=3), audit_gradients(x, ["svd_pi"], drawn, seed=0)]
    pd.testing.assert_frame_equal(*tables)
    assert not tables[0]["exact_norm"].equals(audit_gradients(x, ["svd_pi"])["exact_norm"])
    before = torch.get_rng_state()
    audit_gradients(x, ["svd_pi"])
    assert torch.get_rng_state().equal(before)


def test_a_constant_image_counts_in_no_median() -> None:
    x = features(4, 6, 4, 4)
    x[1] = 2.0
    table = audit_gradients(x, ["svd_pi", "mpn_cov"])
    (row, _) = (row for _, row in summarise_gradients(table).iterrows())
    expected = table[(table["method"] == "svd_pi") & (table["image"] != 1)]["relative_error"].sort_values().tolist()
    assert row["images"] == 3
    found = [row[f"relative_error{part}"] for part in ("_lower", "", "_upper")]
    assert found == expected
    assert sum(row[band] for band in BANDS) == pytest.approx(1)
    assert loewner_picture(x, ["svd_pi"]).image != 1
    with pytest.raises(DatasetError, match="exact gradient of all 1 images is zero"):
        audit_gradients(x[1:2], ["svd_pi"])
    with pytest.raises(DatasetError, match="every image"):
        loewner_picture(x[1:2], ["svd_pi"])


def test_what_cannot_be_audited_is_refused() -> None:
    x = features(1, 6, 3, 3)
    for method in ("gap", "isqrt_cov", "svd_pi-magic", "svd_py"):
        with pytest.raises(ConfigError, match=method.split("-")[-1]):
            audit_gradients(x, [method])
    with pytest.raises(ConfigError, match="keep"):
        audit_gradients(x)
    with pytest.raises(ConfigError, match="keep must be a whole number of at least 1, got 0"):
        audit_gradients(x, keep=0)
    with pytest.raises(DatasetError, match="image 0"):
        audit_gradients(x * 1e200, ["svd_pi"])


def test_picture_shows_the_image_of_median_condition_with_its_matrices() -> None:
    x = torch.cat([diagonal(9.0, 1.0, 1e-3), diagonal(4.0, 1.0, 0.0), diagonal(9.0, 1.0, 0.1)])
    picture = loewner_picture(x, ["mpn_cov-exact", "svd_pi", "svd_topn"], keep=1)
    assert (picture.image, picture.rank, picture.condition) == (2, 3, pytest.approx(90))
    np.testing.assert_allclose(picture.eigenvalues, [9, 1, 0.1])
    exact, pi, topn = picture.matrices
    np.testing.assert_allclose(exact.matrix[0], [1 / 6, 1 / 4, 1 / (3 + math.sqrt(0.1))])
    assert relative_error(exact).max() == 0
    assert relative_error(pi)[0, 1] == pytest.approx(9.0**-20, rel=1e-2)
    assert topn.exact[1, 1] == 0 and np.isinf(relative_error(topn)[1, 1]) and relative_error(topn)[1, 2] == 0


def test_figure_has_a_panel_a_matrix_and_shows_an_endless_error() -> None:
    picture = loewner_picture(features(3, 12, 3, 3), keep=5)
    figure = loewner_figure(picture, "title")
    figure.draw_without_rendering()
    titles = [axes.get_title() for axes in figure.axes]
    assert [title for title in titles if title and title != "eigenvalues"] == [m.label for m in picture.matrices]
    upper = [axes.images[0] for axes in figure.axes if axes.get_title() and axes.images]
    assert len(upper) == 12 and len({(image.norm.vmin, image.norm.vmax) for image in upper}) == 1
    lower = [axes for axes in figure.axes if axes.images and not axes.get_title()]
    assert len(lower) == 10  # two of the twelve are exact
    leak = lower[-1].images[0]
    assert leak.get_array()[6, 6] > leak.norm.vmax and not np.ma.getmaskarray(leak.get_array())[6, 6]
    assert np.ma.getmaskarray(leak.get_array())[6, 7]  # between dropped eigenvalues both are zero


def test_many_null_eigenvalues_do_not_fill_the_panels() -> None:
    picture = loewner_picture(features(1, 60, 3, 3), ["svd_pi"])
    figure = loewner_figure(picture, "title")
    assert picture.rank == 8 and figure.axes[0].images[0].get_array().shape == (10, 10)


def test_file_of_a_cache_gives_evenly_spaced_images_of_its_first_view(tmp_path: Path) -> None:
    maps = np.arange(2 * 9 * 4 * 2 * 3, dtype=np.float32).reshape(2, 9, 4, 2, 3)
    np.save(tmp_path / "cache.npy", maps)
    np.save(tmp_path / "maps.npy", maps[0].astype(np.float16))
    inputs = load_features(tmp_path / "cache.npy", 3)
    assert inputs.indices == [0, 4, 8] and inputs.grad is None
    np.testing.assert_array_equal(inputs.features, maps[0][[0, 4, 8]])
    np.testing.assert_array_equal(load_features(tmp_path / "maps.npy", 3).features, inputs.features)
    assert load_features(tmp_path / "maps.npy", 100).indices == list(range(9))


# --- the command line ---


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Working folder of finished runs: `seb` with its backbone trained, `topn` and `gap` with a frozen one."""
    cwd = tmp_path_factory.mktemp("runs")
    frozen = ["backbone.frozen=true", "cache.dir=cache"]
    for name, overrides in {
        "seb": [],
        "topn": ["method=svd_topn", "+method.options.keep=4", *frozen],
        "gap": ["method=gap", *frozen],
    }.items():
        succeeded(train(cwd, *overrides, "trainer.epochs=1", f"run_dir={name}"))
    return cwd


@pytest.mark.slow
def test_script_audits_a_file(tmp_path: Path) -> None:
    np.save(tmp_path / "maps.npy", features(5, 12, 4, 4).numpy())
    done = run("audit_gradients.py", "maps.npy", "--keep", 5, "--images", 3, "--seed", 7, cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "| SVD-TopN, 5 of 12 kept" in done.stdout and "3 of 5 images in maps.npy" in done.stdout
    assert "standard normal, seed 7" in done.stdout
    folder = tmp_path / "figures"
    assert imread(folder / "loewner.png").shape[1] == round(6.9 * 300)
    assert (folder / "loewner.pdf").read_bytes().startswith(b"%PDF")
    again = load_picture(folder / "loewner.csv")
    assert again.image == 2 and again.keep == 5
    drawn = loewner_picture(features(5, 12, 4, 4)[[0, 2, 4]], keep=5)
    for ours, saved in zip(drawn.matrices, again.matrices, strict=True):
        np.testing.assert_array_equal(ours.matrix, saved.matrix)
    summary, images = pd.read_csv(folder / "gradients.csv"), pd.read_csv(folder / "gradients_images.csv")
    assert summary["method"].tolist() == list(AUDITED)
    assert sorted(set(images["image"])) == [0, 2, 4] and len(images) == 3 * len(AUDITED)
    expected = audit_gradients(features(5, 12, 4, 4)[[0, 2, 4]], ["svd_pi"], keep=5, seed=7)["relative_error"]
    np.testing.assert_allclose(images[images["method"] == "svd_pi"]["relative_error"], expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["seb", "topn"])
def test_script_audits_a_run(runs: Path, name: str, here: Train) -> None:
    done = succeeded(here("audit_gradients.py", name, "--keep", 2, "--images", 4, cwd=runs))
    assert "4 of 9 test images of " + name in done.stdout and "cross-entropy" in done.stdout
    folder = runs / name / "figures"
    assert {file.suffix for file in folder.glob("[!.]*")} == {".csv", ".pdf", ".png"}
    images = pd.read_csv(folder / "gradients_images.csv")
    assert sorted(set(images["image"])) == [0, 3, 5, 8] and (images["channels"] == 8).all()
    leak = images[(images["method"] == "svd_topn") & (images["rank"] > 2)]
    assert len(leak) and (leak["norm_ratio"] > 1e4).all()


def test_features_of_a_run_lead_to_its_predictions(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs)
    inputs = load_features(Path("seb"), 100)
    assert inputs.indices == list(range(9)) and inputs.features.shape[1] == 8 and inputs.grad is not None
    head = PoolingHead(8, method="seb", num_classes=3, reduction=None).eval()
    state = load_file("seb/checkpoints/last.safetensors")
    head.classifier.load_state_dict({key: state[f"head.classifier.{key}"] for key in ("weight", "bias")})
    predictions = pd.read_csv("seb/predictions.csv")
    probabilities = head(inputs.features).softmax(dim=1).detach()
    np.testing.assert_allclose(probabilities.max(dim=1).values, predictions["confidence"], rtol=1e-3)
    # dLoss/dDescriptor = W^T (p - y)
    residual = probabilities - torch.eye(3)[predictions["target"].tolist()]
    expected = (residual @ head.classifier.weight).detach().double()
    torch.testing.assert_close(inputs.grad, expected, rtol=1e-3, atol=1e-6)


def test_mistakes_exit_with_2(runs: Path, tmp_path: Path, here: Train) -> None:
    good = features(2, 6, 3, 3).numpy()
    broken = good.copy()
    broken[1, 0, 0, 0] = np.nan
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "flat.npy", good[0])
    np.save(tmp_path / "whole.npy", good.astype(np.int64))
    np.save(tmp_path / "nan.npy", broken)
    np.save(tmp_path / "constant.npy", np.ones((2, 60, 3, 3)))
    (tmp_path / "text.npy").write_text("not numbers")
    np.save(tmp_path / "good.npy", good)
    change_summary(shutil.copytree(runs / "gap", tmp_path / "unfinished"), status="stopped")
    for arguments, parts in {
        ("none.npy",): ["none.npy", "does not exist"],
        ("objects.npy",): ["objects.npy", "numpy.save"],
        ("flat.npy",): ["flat.npy", "(6, 3, 3)", "(N, C, H, W)"],
        ("whole.npy",): ["whole.npy", "int64"],
        ("nan.npy",): ["nan.npy", "image 1"],
        ("constant.npy",): ["exact gradient", "2 images"],
        ("text.npy",): ["text.npy"],
        ("good.npy",): ["keep=N", "6"],
        ("good.npy", "--keep", 0): ["keep", "0"],
        ("good.npy", "--images", 0): ["images", "0"],
        (str(tmp_path),): ["config.yaml"],
        ("unfinished",): ["stopped", "finish"],
        (str(runs / "gap"), "--root", str(runs / "datasets" / "synthetic")): ["gap", "covariance"],
    }.items():
        refused(here("audit_gradients.py", *arguments, "--output", "out", cwd=tmp_path), *parts)
    assert not (tmp_path / "out").exists()
