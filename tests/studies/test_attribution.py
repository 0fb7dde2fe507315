"""Attributions: what every method of the table owes, and what each promises of its own."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captum.attr import GuidedBackprop
from torch import Tensor, nn

from fgvc.errors import ConfigError, RunError
from fgvc.models import FineGrainedModel, PoolingHead
from fgvc.spectral import SQRT, Band, spectral_descriptor
from fgvc.studies.attribution import (
    METHODS,
    band_energy,
    eigenvector_maps,
    explain,
    explain_bands,
    parse_band,
    restrict_spectrum,
)
from fgvc.studies.attribution.perturbation import blend, reference_images, smooth_masks
from fgvc.studies.truncation.bands import ALL, band_predictions

QUICK: dict[str, dict[str, Any]] = {
    "integrated_gradients": {"steps": 2},
    "extremal": {"steps": 2, "cells": 8},
    "rise": {"masks": 6, "grid": 3},
    "occlusion": {"window": 0.5, "stride": 0.4},
}
BANDS = [None, "top2", "bottom2"]


class Window(nn.Module):
    """The middle of an image, the rest black: what a model on it answers rests on nothing else."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.first, self.last = first, last

    def forward(self, images: Tensor) -> Tensor:
        mask = torch.zeros_like(images[:, :1])
        mask[:, :, self.first : self.last, self.first : self.last] = 1
        return images * mask


def a_model(
    method: str = "mpn_cov", *layers: nn.Module, activation: nn.Module | None = None, **options: Any
) -> FineGrainedModel:
    """A convolution of stride 4 to 8 channels and a head on 6, in training mode, weights by a seed."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 8, 5, stride=4, padding=2, bias=False)
    backbone = nn.Sequential(*layers, convolution, activation or nn.ReLU())
    head = PoolingHead(8, method=method, num_classes=4, reduction=6, **options)
    nn.init.normal_(head.classifier.weight)  # type: ignore[arg-type]
    return FineGrainedModel(backbone, head)  # type: ignore[arg-type]  # as good as a backbone


def some_images(count: int = 2, height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def state_of(model: FineGrainedModel) -> list[Any]:
    parameters = [
        (name, p.detach().clone(), p.requires_grad, p.grad, p.stride()) for name, p in model.named_parameters()
    ]
    modules = [
        (name, m.training, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
        for name, m in model.named_modules()
    ]
    buffers = [buffer.clone() for buffer in model.buffers()]
    return [parameters, modules, buffers, model.head.pooling, torch.get_rng_state(), torch.is_grad_enabled()]


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    else:
        assert found is expected or found == expected


def awkward() -> FineGrainedModel:
    """A model in a state of its own: parts in evaluation mode, without gradients, with gradients, channels last."""
    model = a_model().to(memory_format=torch.channels_last)
    model.head.reduction.eval()
    model.head.classifier.requires_grad_(False)
    for parameter in model.backbone.parameters():
        parameter.grad = torch.ones_like(parameter)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_every_method_for_every_band_leaves_the_model_as_found(method: str) -> None:
    model, images = awkward(), some_images()
    before = state_of(model)
    with torch.inference_mode():
        found = explain_bands(model, images, BANDS, method=method, **QUICK.get(method, {}))
    assert_same(state_of(model), before)
    for attribution, band in zip(found, [None, Band(0, 2), Band(4, None)], strict=True):
        maps = attribution.maps
        assert maps.shape == (2, 32, 32) and maps.dtype == torch.float32 and not maps.requires_grad
        assert maps.isfinite().all() and maps.any()
        assert METHODS[method].signed or maps.min() >= 0
        assert attribution.band == band and attribution.method == method
        assert torch.equal(attribution.classes, found[0].predicted)
    assert all((one.maps - other.maps).abs().max() > 1e-4 for one, other in itertools.pairwise(found))


class Fails(nn.Module):
    """Passes on what it gets, `calls` times."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.left = calls

    def forward(self, images: Tensor) -> Tensor:
        if self.left == 0:
            raise ZeroDivisionError
        self.left -= 1
        return images


@pytest.mark.parametrize("method", ["guided_backprop", "extremal", "rise", "integrated_gradients"])
def test_the_model_is_as_found_after_an_exception(method: str) -> None:
    model = a_model("mpn_cov", Fails(1))  # the first call makes the features
    before = state_of(model)
    with pytest.raises(ZeroDivisionError):
        explain(model, some_images(), method=method)
    assert_same(state_of(model), before)


class Cusp(nn.Module):
    """Passes on what it gets; its slope is 0 times infinity."""

    def forward(self, features: Tensor) -> Tensor:
        return features + (0 * features).sqrt()


@pytest.mark.parametrize("method", ["gradcam", "guided_backprop", "integrated_gradients", "extremal"])
def test_gradients_that_are_not_finite_are_refused_by_name(method: str) -> None:
    model = a_model()
    model.head.reduction = nn.Sequential(Cusp(), *model.head.reduction)  # type: ignore[misc]
    before = state_of(model)
    with pytest.raises(RunError, match=r"gradients .* not finite for images \[0, 1\]"):
        explain(model, some_images(), method=method)
    assert_same(state_of(model), before)


def test_gradcam_and_hirescam_by_hand() -> None:
    model, images = a_model().eval(), some_images(2, 40, 24)
    features = model.backbone(images).detach().requires_grad_()
    read = model.head.reduction(features)
    logits = model.head.classifier(spectral_descriptor(read, SQRT, "exact", keep=(1, 3)))
    classes = model(images).argmax(dim=1)
    score = logits[torch.arange(2), classes]
    (gradient,) = torch.autograd.grad(score.sum(), features)
    expected = {
        "gradcam": torch.relu((gradient.mean(dim=(2, 3), keepdim=True) * features).sum(dim=1)),
        "hirescam": (gradient * features).sum(dim=1),
    }
    for method, maps in expected.items():
        found = explain(model, images, method=method, band=(1, 3))
        large = F.interpolate(maps[:, None], (40, 24), mode="bilinear", align_corners=False)[:, 0]
        torch.testing.assert_close(found.maps, large.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.scores, score.detach())


def test_gradcam_of_a_covariance_without_a_reduction_is_refused() -> None:
    model = a_model()
    model.head = PoolingHead(8, method="mpn_cov", num_classes=4, reduction=None)
    features = model.backbone(some_images()).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model.head(features).sum(), features)
    assert gradient.mean(dim=(2, 3)).abs().max() < 1e-6 * gradient.abs().max()  # why
    with pytest.raises(RunError, match="use method=hirescam"):
        explain(model, some_images())


@pytest.mark.parametrize(
    ("method", "options"), [("svd_taylor", {"degree": 2}), ("svd_topn", {"keep": 3}), ("svd_newton", {"iterations": 5})]
)
def test_the_gradient_is_exact_whatever_rule_the_head_was_trained_with(method: str, options: dict[str, Any]) -> None:
    published, images = a_model(method, options=options).eval(), some_images()
    found = explain(published, images, method="hirescam", classes=1)
    kept = {"keep": 3} if "keep" in options else {}
    exact = explain(a_model(method, gradient="exact", options=kept), images, method="hirescam", classes=1)
    torch.testing.assert_close(found.maps, exact.maps)
    features = published.backbone(images).detach().requires_grad_()
    (own,) = torch.autograd.grad(published.head(features)[:, 1].sum(), features)
    with restrict_spectrum(published, None, gradient="exact"):
        (true,) = torch.autograd.grad(published.head(features)[:, 1].sum(), features)
    assert (own - true).abs().max() > 1e-3 * true.abs().max()  # the rule would have made another map


@pytest.mark.parametrize("method", ["gap", "bilinear"])
def test_heads_without_a_spectrum_have_one_band(method: str) -> None:
    model = a_model(method)
    assert explain(model, some_images(), band="all", method="hirescam").maps.any()
    with pytest.raises(RunError, match="normalises no covariance; give a head that does"):
        explain(model, some_images(), band=2)
    with pytest.raises(RunError, match=r"decomposition needs eigenvalues.* use method=hirescam"):
        explain(model, some_images(), method="decomposition")


def test_scores_are_those_of_the_restricted_head() -> None:
    model, images = a_model("seb").eval(), some_images(5)
    bands = [ALL, Band(0, 2), Band(2, None)]
    scores = torch.stack(
        [torch.stack([a.scores for a in explain_bands(model, images, bands, classes=c)]) for c in range(4)], dim=-1
    )  # (bands, images, classes)
    with torch.no_grad():
        features = model.pooling_input(images)
    assert torch.equal(scores.argmax(dim=-1), band_predictions(model.head, features, bands))
    torch.testing.assert_close(scores[0], model(images).detach())


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_and_its_images_alone_of_any_size_and_layout(method: str) -> None:
    model = a_model()
    images = some_images(3, 44, 30).transpose(2, 3)  # not contiguous, 30 x 44
    options = QUICK.get(method, {})
    together = explain(model, images, method=method, band=3, classes=[0, 1, 2], **options)
    assert together.maps.shape == (3, 30, 44)
    for i in range(3):
        alone = explain(model, images[i : i + 1], method=method, band=3, classes=i, **options)
        torch.testing.assert_close(alone.maps[0], together.maps[i], rtol=1e-3, atol=1e-4)


def inside(maps: Tensor, first: int, last: int) -> float:
    """Share of the strongest thirtieth of each map's pixels that lies in the middle square."""
    size = maps.shape[-1]
    strongest = maps.flatten(1).topk(size * size // 30).indices
    rows, columns = strongest // size, strongest % size
    return float(((rows >= first) & (rows < last) & (columns >= first) & (columns < last)).float().mean())


@pytest.mark.parametrize("method", METHODS)
def test_a_planted_object_is_found(method: str) -> None:
    """The model sees nothing but a square of a seventh of the image; chance is 0.19."""
    model = a_model("mpn_cov", Window(20, 44)).eval()
    images = some_images(2, 64, 64) * torch.linspace(0.5, 1.5, 64)
    options: dict[str, dict[str, Any]] = {
        "extremal": {"steps": 30, "cells": 16, "area": 0.1},
        "rise": {"masks": 120, "grid": 5},
        "occlusion": {"window": 0.1, "stride": 0.05},
    }
    best = model(images).argmax(dim=1)
    found = explain(model, images, method=method, classes=best, **options.get(method, {}))
    assert inside(found.maps, 18, 46) > 0.9


def test_an_extremal_mask_has_the_asked_area_and_keeps_the_score() -> None:
    model, images = a_model("mpn_cov", Window(20, 44)).eval(), some_images(2, 64, 64)
    for area in (0.1, 0.3):
        found = explain(model, images, method="extremal", area=area, steps=40, cells=16)
        assert found.maps.mean(dim=(1, 2)).sub(area).abs().max() < 0.04
        assert found.maps.min() >= 0 and found.maps.max() <= 1
    hidden = reference_images(images, "blur")
    with torch.no_grad():
        classes = found.classes[:, None]
        kept, whole, blurred = (
            model(x).gather(1, classes)[:, 0] for x in (blend(images, hidden, found.maps), images, hidden)
        )
    assert ((kept - blurred) / (whole - blurred) > 0.5).all()


def test_smooth_masks_are_no_sharper_than_their_kernel() -> None:
    cells = torch.zeros(1, 21, 21)
    cells[0, 10, 10] = 1
    spot = smooth_masks(cells, sigma=3.0)[0]
    assert spot[10, 10] > 0.99 and spot[10, 11] > 0.99  # a plateau of half a sigma
    assert (spot[10, 10:-1] >= spot[10, 11:]).all() and spot[10, 17] == 0
    assert torch.equal(smooth_masks(torch.zeros(1, 5, 5), 3.0), torch.zeros(1, 5, 5))


@pytest.mark.parametrize("reference", ["mean", "blur"])
def test_integrated_gradients_add_up_to_the_score(reference: str) -> None:
    model, images = a_model("seb").eval(), some_images()
    for band in (None, 3):
        found = explain(model, images, method="integrated_gradients", band=band, steps=100, reference=reference)
        start = explain(model, reference_images(images, reference), band=band, classes=found.classes)
        torch.testing.assert_close(found.maps.sum(dim=(1, 2)), found.scores - start.scores, rtol=0.02, atol=0.02)


def test_guided_backpropagation_is_captums_where_captum_has_it() -> None:
    model, images = a_model().eval(), some_images()
    found = explain(model, images, method="guided_backprop", classes=2)
    with pytest.warns(UserWarning, match="backward hooks"):
        expected = GuidedBackprop(model).attribute(images, target=2)
    torch.testing.assert_close(found.maps, expected.abs().sum(dim=1), rtol=1e-4, atol=1e-5)


def test_guided_backpropagation_knows_relu6_and_refuses_what_it_does_not_know() -> None:
    images = some_images().requires_grad_()
    found = explain(a_model(activation=nn.ReLU6(inplace=True)), images, method="guided_backprop", classes=2)
    torch.testing.assert_close(found.maps, explain(a_model(), images, method="guided_backprop", classes=2).maps)
    (plain,) = torch.autograd.grad(a_model().eval()(images)[:, 2].sum(), images)
    assert (found.maps - plain.abs().sum(dim=1)).abs().max() > 0.1 * found.maps.max()
    for activation, name in ((nn.SiLU(), "SiLU"), (nn.Identity(), "no module of either")):
        with pytest.raises(RunError, match=name):
            explain(a_model(activation=activation), images, method="guided_backprop")


@pytest.mark.parametrize(
    ("method", "options"), [("mpn_cov", {}), ("isqrt_cov", {}), ("seb", {}), ("svd_topn", {"keep": 3})]
)
def test_parts_of_the_logit_add_up_to_it(method: str, options: dict[str, Any]) -> None:
    model, images = a_model(method, options=options).eval(), some_images()
    found = explain(model, images, method="decomposition")
    bias = model.head.classifier.bias.detach()[found.classes]  # type: ignore[index,operator,union-attr]
    # bilinear upsampling by a whole number keeps the mean
    torch.testing.assert_close(64 * found.maps.mean(dim=(1, 2)), found.scores - bias, rtol=1e-4, atol=1e-4)


def test_parts_of_disjoint_bands_add_up() -> None:
    whole, large, small = explain_bands(a_model(), some_images(), [None, (0, 2), (2, None)], method="decomposition")
    torch.testing.assert_close(large.maps + small.maps, whole.maps, rtol=1e-4, atol=1e-5)
    hidden = a_model()
    hidden.head.classifier = nn.Sequential(nn.Linear(21, 5), nn.ReLU(), nn.Linear(5, 4))
    with pytest.raises(RunError, match="linear classifier"):
        explain(hidden, some_images(), method="decomposition")


def test_energies_along_eigenvectors() -> None:
    model, images = awkward(), some_images()
    before = state_of(model)
    every = eigenvector_maps(model, images, 6)
    assert_same(state_of(model), before)
    torch.testing.assert_close(every.maps.sum(dim=(2, 3)), 64 * every.eigenvalues)  # 8 x 8 locations
    read = model.eval().pooling_input(images).detach().double().flatten(2)
    centred = read - read.mean(dim=2, keepdim=True)
    torch.testing.assert_close(every.maps.sum(dim=1).flatten(1), centred.square().sum(dim=1))
    torch.testing.assert_close(every.shares.sum(dim=1), torch.ones(2).double())
    last = eigenvector_maps(model, images, 2, smallest=True)
    torch.testing.assert_close(last.maps, every.maps[:, 4:])
    assert last.places.tolist() == [[4, 5], [4, 5]]
    with pytest.raises(ConfigError, match="between 1 and 6"):
        eigenvector_maps(model, images, 7)


def test_shares_of_energy_in_a_band() -> None:
    model, images = awkward(), some_images()
    before = state_of(model)
    large, small = band_energy(model, images, "top2"), band_energy(model, images, (2, None))
    assert_same(state_of(model), before)
    assert large.shape == (2, 8, 8) and large.min() >= 0 and large.max() <= 1
    torch.testing.assert_close(large + small, band_energy(model, images, "all"))
    every = eigenvector_maps(model, images, 6).maps
    torch.testing.assert_close(large, every[:, :2].sum(dim=1) / every.sum(dim=1))


def test_rise_sees_the_same_masks_for_every_image_and_band() -> None:
    model, image = a_model(), some_images(1)
    twice = explain_bands(model, torch.cat([image, image]), [None, None], method="rise", masks=9, grid=3)
    torch.testing.assert_close(twice[0].maps[0], twice[1].maps[1])
    other = explain(model, image, method="rise", masks=9, grid=3, seed=1)
    assert (other.maps[0] - twice[0].maps[0]).abs().max() > 1e-3
    nn.init.constant_(model.head.classifier.bias, 50.0)  # type: ignore[arg-type]  # logits have no zero
    shifted = explain(model, image, method="rise", masks=9, grid=3, classes=twice[0].classes[0].item())
    model.head.classifier.bias.data.zero_()  # type: ignore[operator,union-attr]
    plain = explain(model, image, method="rise", masks=9, grid=3, classes=twice[0].classes[0].item())
    torch.testing.assert_close(shifted.maps, plain.maps, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("text", "band"),
    [
        *(("all", (0, None)), ("top16", (0, 16)), ("bottom16", (32, None)), ("bottom48", (0, None))),
        *(("8:24", (8, 24)), ("8:", (8, None)), (":24", (0, 24))),
    ],
)
def test_bands_by_name(text: str, band: tuple[int, int | None]) -> None:
    assert parse_band(text, 48) == band


@pytest.mark.parametrize("text", ["top0", "bottom49", "top", "8:8", "48:", "-1:3", "largest", ""])
def test_bands_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"48|top16"):
        parse_band(text, 48)


def call(**changes: Any) -> Callable[[], Any]:
    arguments = {"model": a_model(), "images": some_images()} | changes
    return lambda: explain(**arguments)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (call(method="gradcan"), "gradcan; choose from gradcam"),
        (call(steps=3), "unknown option steps of gradcam; it takes none"),
        (call(method="rise", steps=3), "it takes masks, grid, keep, seed, reference"),
        (call(method="rise", masks=1), "masks of at least 2"),
        (call(method="rise", keep=0.0), "keep must lie between"),
        (call(method="extremal", area=1.0), "area must lie between"),
        (call(method="extremal", steps=0), "steps of at least 1"),
        (call(method="extremal", reference="grey"), "choose blur or mean"),
        (call(method="occlusion", stride=0.3), "uncovered"),
        (call(method="integrated_gradients", steps=0), "steps of at least 1"),
        (call(band="top7"), "7 of 6"),
        (call(band=(3, 2)), "band: the stop of keep"),
        (call(classes=4), "one index of 4 classes"),
        (call(classes=[0, 1, 2]), "one for each of 2 images"),
        (call(images=torch.zeros(3, 32, 32)), r"shape \(B, 3, H, W\)"),
        (call(images=torch.zeros(1, 3, 32, 32, dtype=torch.uint8)), "floating-point"),
        (call(images=torch.full((2, 3, 32, 32), torch.nan)), r"images \[0, 1\]"),
    ],
)
def test_what_cannot_be_explained_is_refused(wrong: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        wrong()


def test_logits_that_are_not_finite_are_refused() -> None:
    model = a_model()
    with torch.no_grad():
        model.head.classifier.weight.fill_(torch.inf)  # type: ignore[operator,union-attr]
    with pytest.raises(RunError, match="logits are not finite"):
        explain(model, some_images())
