"""Every YAML file in configs/ and every method composes and is accepted by the typed schema and the checks of a run."""

import copy
import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from fgvc.data import effective_options, list_datasets
from fgvc.errors import ConfigError
from fgvc.pooling import list_poolings
from fgvc.runs.config import RunConfig, check_config, to_run_config
from fgvc.runs.folder import fixed_settings
from fgvc.training import train_run
from fgvc.training.launch import register_choices
from fgvc.training.setup import build_backbone

CONFIGS = ROOT / "configs"
# a search needs a library of its own, see test_search.py
OPTIONS = sorted(
    path.relative_to(CONFIGS) for path in CONFIGS.rglob("*.yaml") if path.parent.name not in ("configs", "search")
)
FILLED = ["dataset.root=somewhere", "backbone.name=resnet18", "initial_weights=null"]


register_once = functools.cache(register_choices)


def composed(*overrides: str) -> RunConfig:
    register_once()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return to_run_config(compose("train", overrides=[*overrides, *FILLED]))


@pytest.mark.parametrize("path", OPTIONS, ids=str)
def test_every_option_composes(path: Path) -> None:
    own = ["dataset.options.path=somewhere"] if path.stem == "hf" else []
    config = composed(f"{path.parent}={path.stem}", *own)
    check_config(config)
    assert (config.dataset.adapter or config.dataset.name) in list_datasets()
    assert config.method.name in list_poolings()


GROUPS = [path.stem for path in OPTIONS if path.parent.name == "dataset"]


@pytest.mark.parametrize("group", GROUPS)
def test_a_dataset_may_have_any_name(group: str) -> None:
    own = ["dataset.options.path=somewhere"] if group == "hf" else []
    config, plain = composed(f"dataset={group}", "dataset.name=mine", *own), composed(f"dataset={group}", *own)
    assert (config.dataset.name, config.dataset.adapter) == ("mine", plain.dataset.adapter)
    assert config.dataset.adapter in list_datasets()
    # with the options of its adapter
    effective = effective_options(config.dataset.reader, config.dataset.options)
    assert set(config.dataset.options) <= {*effective, "crop"} and set(list_datasets()) <= set(GROUPS)
    # an earlier version left the adapter out where it was the name
    earlier = copy.deepcopy(plain)
    earlier.dataset.adapter = None if plain.dataset.name == plain.dataset.adapter else plain.dataset.adapter
    assert fixed_settings(earlier) == fixed_settings(plain)


EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").iterdir())
RECIPES = sorted(path.stem for path in (CONFIGS / "recipe").iterdir())
PUBLISHED = [name for name in EXPERIMENTS if "_resnet50" in name or "_alexnet" in name]

# the papers' numbers: epochs, batch, milestones, lr, weight decay, classifier factor, clip norm, transform of the data
SHARED: dict[str, object] = {"momentum": 0.9, "clip_norm": 5.0, "reduction": 256, "hidden": []}
FINE_TUNED = SHARED | {"lr": 3e-3, "last_stride": 1, "size": 448, "crop": "center"}
FROM_SCRATCH = SHARED | {"lr": 0.0794, "classifier_factor": 1, "size": 224, "crop": "random_resized"}
PROTOCOLS: dict[str, dict[str, object]] = {
    "cub_resnet50": FINE_TUNED
    | {"epochs": 200, "batch_size": 10, "milestones": [50, 100], "weight_decay": 1e-4, "classifier_factor": 20}
    | {"resize": "short", "resize_size": None},
    "cars_resnet50": FINE_TUNED
    | {"epochs": 200, "batch_size": 10, "milestones": [50, 100], "weight_decay": 1e-4, "classifier_factor": 10}
    | {"resize": "square", "resize_size": None},
    "aircraft_resnet50": FINE_TUNED
    | {"epochs": 50, "batch_size": 8, "milestones": [21, 40], "weight_decay": 1e-3, "classifier_factor": 5}
    | {"resize": "square", "resize_size": 512},
    "dogs_resnet50": FINE_TUNED
    | {"epochs": 200, "batch_size": 10, "milestones": [50, 100], "weight_decay": 1e-4, "classifier_factor": 20}
    | {"resize": "square", "resize_size": 512},
    "imagenet_alexnet": FROM_SCRATCH
    | {"epochs": 30, "batch_size": 128, "milestones": [10, 20], "weight_decay": 5e-4}
    | {"resize": "short", "resize_size": 256, "last_stride": None, "hidden": [4096, 4096]},
    "imagenet_resnet50": FROM_SCRATCH
    | {"epochs": 60, "batch_size": 256, "milestones": [30, 45], "weight_decay": 1e-4}
    | {"resize": "short", "resize_size": 256, "last_stride": 1},
}
# the released scripts as written
AS_WRITTEN: dict[str, object] = {"last_stride": None, "reduction": None}
PROTOCOLS |= {
    **{f"released_{data}_seb": PROTOCOLS[f"{data}_resnet50"] | AS_WRITTEN for data in ("cub", "cars", "aircraft")},
    "released_imagenet_svd_pade": PROTOCOLS["imagenet_resnet50"] | {"last_stride": None, "reduction": 256},
    "released_cub_isqrt_cov": PROTOCOLS["cub_resnet50"]
    | {"lr": 1.2e-3, "epochs": 100, "milestones": [], "classifier_factor": 5, "clip_norm": None},
}

PROTOCOLS["imagenet_alexnet_bn"] = PROTOCOLS["imagenet_alexnet"]


@pytest.mark.parametrize("name", PROTOCOLS)
def test_published_protocols(name: str) -> None:
    config = composed(f"experiment={name}")
    trainer, optimizer, transform = config.trainer, config.optimizer, config.dataset.transform
    places = (trainer, config.schedule, optimizer, config.backbone, config.method, transform)
    found = {key: value for place in places for key, value in vars(place).items() if key in PROTOCOLS[name]}
    assert found == PROTOCOLS[name]
    assert (optimizer.name, config.schedule.name, config.schedule.gamma, transform.hflip) == ("sgd", "step", 0.1, True)
    # nothing of a later recipe
    assert (trainer.mixup, trainer.cutmix, trainer.ema_decay, trainer.label_smoothing) == (0, 0, None, 0)
    assert (config.recipe, config.schedule.warmup_epochs, transform.randaugment) == (None, 0, None)
    assert config.backbone.pretrained == ("imagenet" not in name)
    assert name.endswith(("_resnet50", "alexnet", "_bn", f"_{config.method.name}"))


@pytest.mark.parametrize("name", ["imagenet_resnet50", "released_imagenet_svd_pade"])
def test_imagenet_from_scratch_starts_as_the_released_code(name: str) -> None:
    config = composed(f"experiment={name}")
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config.backbone.name = compose("train", overrides=[f"experiment={name}"]).backbone.name
    backbone = build_backbone(config)
    assert backbone.data_config["interpolation"] == "bilinear"
    norms = [module for module in backbone.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert len(norms) == 53 and all(bool((norm.weight == 1).all()) for norm in norms)


@pytest.mark.parametrize("name", sorted(set(PUBLISHED) - set(PROTOCOLS)))
def test_variants_of_a_protocol_differ_in_method_and_hybrid_alone(name: str) -> None:
    variant, plain = composed(f"experiment={name}"), composed(f"experiment={name.rpartition('_')[0]}")
    variant.method, variant.hybrid = plain.method, plain.hybrid
    assert variant == plain


def test_choosing_a_method_changes_its_name_alone() -> None:
    register_once()
    for method in list_poolings():
        assert ConfigStore.instance().load(f"method/{method}.yaml").node == {"name": method}
    configs = [composed("experiment=cub_resnet50", f"method={method}") for method in ("gap", "seb")]
    for config, method in zip(configs, ("gap", "seb"), strict=True):
        assert config.method.name == method
        config.method.name = "any"
        assert config == configs[0]
    for method in list_poolings():
        check_config(replace(configs[0], method=replace(configs[0].method, name=method)))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_changes_how_and_not_what_is_trained(recipe: str) -> None:
    plain, modern = composed("experiment=cars_resnet50"), composed("experiment=cars_resnet50", f"recipe={recipe}")
    check_config(modern)
    assert modern.recipe == recipe and modern.schedule.name == "cosine" and modern.schedule.warmup_epochs > 0
    assert modern.trainer.mixup > 0 and modern.trainer.ema_decay and modern.trainer.label_smoothing > 0
    assert modern.dataset.transform.randaugment is not None
    assert (modern.method, modern.backbone, modern.name) == (plain.method, plain.backbone, plain.name)
    assert (modern.dataset.transform.size, modern.dataset.transform.resize) == (448, "square")


def test_a_tilde_is_the_folder_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = composed("experiment=cub_resnet50", "run_dir='~/a'", "cache.dir='~/b'", "resume='~/c'")
    assert [config.run_dir, config.cache.dir, config.resume] == [str(tmp_path / name) for name in "abc"]
    with pytest.raises(ConfigError, match="~nouser/a: there is no such user"):
        composed("experiment=cub_resnet50", "run_dir='~nouser/a'")


def test_hybrid_switches_at_the_last_decay() -> None:
    config = composed("experiment=imagenet_resnet50_hybrid")
    assert (config.hybrid.method, config.method.name, config.switch_epoch) == ("isqrt_cov", "svd_pade", 45)
    assert composed("experiment=imagenet_resnet50").switch_epoch == 0
    cub = composed("experiment=cub_resnet50", "hybrid.method=isqrt_cov", "method=svd_taylor")
    check_config(cub)
    assert cub.switch_epoch == 100


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["schedule=cosine", "hybrid.method=isqrt_cov"], "hybrid.switch_epoch"),
        (["hybrid.method=isqrt_cov", "hybrid.switch_epoch=200"], "after epoch 200.*trainer.epochs=200"),
        (["hybrid.method=gap"], "hybrid.method=gap and method=seb must both normalise a covariance"),
        (["hybrid.method=isqrt_cov", "method=bilinear"], "method=bilinear must both normalise"),
        (["hybrid.method=newton"], "newton.*isqrt_cov"),
        (["hybrid.method=isqrt_cov", "+hybrid.options.steps=3"], "steps"),
        (["hybrid.switch_epoch=3"], "need hybrid.method"),
        (["trainer.mixup=0.2", "trainer.batch_size=9"], "must be even, got 9"),
        (["trainer.ema_decay=1"], "trainer.ema_decay"),
        (["optimizer.lr=inf"], "optimizer.lr must be a finite number, got inf"),
        (["schedule.gamma=nan"], "schedule.gamma must be a finite number, got nan"),
        (["seed=99999999999999999999999"], "seed must be below 2.63"),
        (["dataset.transform.resize_size=20000"], "dataset.transform.resize_size must be from 1 to 4096"),
    ],
)
def test_contradictions_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train_run(composed("experiment=cub_resnet50", *overrides))
