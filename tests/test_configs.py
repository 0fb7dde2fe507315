"""Every YAML file in configs/ composes and is accepted by the typed schema and the checks of a run."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from fgvc.data import list_datasets
from fgvc.pooling import list_poolings
from fgvc.training.check import check
from fgvc.training.config import RunConfig, register_schema
from fgvc.training.launch import to_run_config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
OPTIONS = sorted(path.relative_to(CONFIGS) for path in CONFIGS.rglob("*.yaml") if path.parent != CONFIGS)
FILLED = ["dataset.root=somewhere", "backbone.name=resnet18"]


def composed(*overrides: str) -> RunConfig:
    register_schema()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return to_run_config(compose("train", overrides=[*overrides, *FILLED]))


@pytest.mark.parametrize("path", OPTIONS, ids=str)
def test_every_option_composes(path: Path) -> None:
    config = composed(f"{path.parent}={path.stem}")
    check(config)
    assert (config.dataset.adapter or config.dataset.name) in list_datasets()
    assert config.method.name in list_poolings()


def test_there_is_one_method_file_for_each_pooling() -> None:
    assert {path.stem for path in (CONFIGS / "method").iterdir()} == set(list_poolings())


def test_the_published_recipe_of_cub() -> None:
    config = composed("experiment=cub_resnet50_seb")
    assert (config.trainer.epochs, config.trainer.batch_size, config.trainer.clip_norm) == (200, 10, 5.0)
    assert (config.schedule.name, list(config.schedule.milestones), config.schedule.gamma) == ("step", [50, 100], 0.1)
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.momentum, optimizer.weight_decay) == ("sgd", 3e-3, 0.9, 1e-4)
    assert (optimizer.classifier_factor, config.method.reduction, config.backbone.last_stride) == (20, 256, 1)
    assert (config.dataset.transform.size, config.dataset.transform.resize) == (448, "short")


def test_methods_of_an_experiment_differ_in_the_method_alone() -> None:
    gap, seb = (composed("experiment=cub80_frozen", f"method={name}") for name in ("gap", "seb"))
    gap.method.name = seb.method.name
    assert gap == seb
