"""Parts of training by themselves: optimiser groups, schedules, seeds, metrics, views, run folders."""

import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from command_line import a_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics.functional import classification as metrics

from fgvc.data import FeatureSet
from fgvc.data.dataset import open_maps
from fgvc.errors import ConfigError, RunError
from fgvc.runs.config import OptimizerConfig, ScheduleConfig
from fgvc.runs.folder import RunFolder
from fgvc.runs.summary import Accuracy
from fgvc.training.batches import StepBatches, create_loader
from fgvc.training.evaluation import Evaluation, ViewAverage, evaluate
from fgvc.training.optim import create_optimizer, schedule_factor, set_learning_rate
from fgvc.training.run import find_source
from fgvc.training.seeds import SeededSamples, derived_seed
from fgvc.training.states import StateStore


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.classifier = nn.Linear(3, 2)


def test_classifier_learns_at_its_own_rate() -> None:
    optimizer = create_optimizer(Tiny(), OptimizerConfig(lr=0.01, classifier_factor=20))
    assert set_learning_rate(optimizer, 0.5) == pytest.approx(0.005)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.005, 0.1])
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]
    assert all(group["momentum"] == 0.9 for group in optimizer.param_groups)


def test_frozen_parameters_are_left_out() -> None:
    model = Tiny()
    model.body.requires_grad_(False)
    assert len(create_optimizer(model, OptimizerConfig()).param_groups) == 1
    model.classifier.requires_grad_(False)
    with pytest.raises(ConfigError, match="no trainable"):
        create_optimizer(model, OptimizerConfig())


def test_step_schedule_falls_at_its_milestones() -> None:
    step = ScheduleConfig(name="step", milestones=[2, 4])
    factors = [schedule_factor(step, epoch, 6) for epoch in (0, 1.9, 2, 3.9, 4, 5)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_cosine_schedule_with_warmup() -> None:
    cosine = ScheduleConfig(name="cosine", warmup_epochs=1)
    factors = [schedule_factor(cosine, epoch, 5) for epoch in (0, 0.5, 1, 2, 3, 5)]
    assert factors == pytest.approx([0, 0.5, 1, (1 + 0.5**0.5) / 2, 0.5, 0], abs=1e-12)  # not a line


def test_shuffle_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        batches = StepBatches(20, 6, seed)
        batches.start_epoch(epoch)
        torch.rand(3)  # the global state must not matter
        return [index for batch in batches for index in batch]

    assert order(0, 1) == order(0, 1)
    assert sorted(order(0, 1)) == list(range(20))
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (1, 2)}) == 4
    assert derived_seed(0, "a") != derived_seed(0, "b")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_cached_features_are_read_in_whole_batches(tmp_path: Path, dtype: str) -> None:
    stored = np.random.default_rng(0).standard_normal((2, 7, 3, 4, 4)).astype(dtype)
    files = [tmp_path / "first.npy", tmp_path / "second.npy"]
    for file, part in zip(files, np.split(stored, [5], axis=1), strict=True):
        np.save(file, part)
    maps_of = {file: open_maps(file) for file in files}
    features = FeatureSet(maps_of, list(range(7)), ["a"], seconds=0.0, from_cache=True)
    assert torch.equal(torch.stack([maps for maps, _ in features]), torch.from_numpy(stored[0]).float())
    features.start_epoch(3)
    order = StepBatches(7, 3, seed=0)
    loader = create_loader(features, 2, Accelerator(cpu=True), batch_sampler=order)
    found = list(loader)
    assert [targets.tolist() for _, targets in found] == list(order)
    for maps, targets in found:
        assert maps.dtype == torch.float32
        assert torch.equal(maps, torch.stack([features[index][0] for index in targets.tolist()]))
    in_order = torch.cat([maps for maps, _ in create_loader(features, 2, Accelerator(cpu=True), batch_size=4)])
    assert torch.equal(in_order, torch.stack([features[index][0] for index in range(7)]))


class Draws(Dataset[tuple[Tensor, int]]):
    """Items that are random numbers."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index >= len(self):
            raise IndexError
        return torch.rand(2), index


def test_loader_processes_that_stay_draw_what_their_epoch_asks_for() -> None:
    samples = SeededSamples(Draws())  # type: ignore[arg-type]
    loaders = [create_loader(samples, workers, Accelerator(cpu=True), batch_size=2) for workers in (0, 1)]
    epochs = []
    for seed in (1, 2):
        samples.start_epoch(seed)
        here, there = (torch.cat([numbers for numbers, _ in loader]) for loader in loaders)
        assert torch.equal(here, there)
        epochs.append(here)
    assert not torch.equal(*epochs)


def evaluated(logits: Tensor, targets: list[int], model: nn.Module | None = None) -> Evaluation:
    loader = DataLoader(TensorDataset(logits, torch.tensor(targets)), batch_size=2)
    return evaluate(model or nn.Identity(), loader, Accelerator(cpu=True), "test")  # type: ignore[arg-type]


def test_accuracies_by_hand() -> None:
    # class 0: 1 of 3 right, class 1: 1 of 1 right; every second guess is right
    logits = torch.tensor([[2.0, 1, 0], [1, 2, 0], [1, 2, 0], [0, 2, 1]])
    assert evaluated(logits, [0, 0, 0, 1]).accuracy == Accuracy(50, 100, 66.6667)
    sixth = torch.arange(6.0).flip(0).expand(2, -1)
    assert evaluated(sixth, [5, 4]).accuracy == Accuracy(0, 50, 0)


def test_a_class_without_images_is_left_out_of_the_mean_even_where_it_is_predicted() -> None:
    result = evaluated(torch.eye(3)[[0, 2, 1, 1]], [0, 0, 1, 1])  # nothing is of class 2
    assert result.accuracy.mean_class == 75


def test_accuracies_equal_those_of_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(99, 30, generator=generator), torch.randint(0, 30, (99,), generator=generator)
    expected = [
        round(100 * float(metrics.accuracy(logits, targets, "multiclass", num_classes=30, **options)), 4)
        for options in ({"top_k": 1}, {"top_k": 5}, {"average": "macro"})
    ]
    assert list(vars(evaluated(logits, targets.tolist()).accuracy).values()) == expected


def test_no_more_than_two_batches_of_logits_are_kept() -> None:
    """With 10,000 classes those of 100,000 images take 4 GB."""
    kept = list[weakref.ref[Tensor]]()

    def classify(_: object, __: object, logits: Tensor) -> None:
        assert sum(logits() is not None for logits in kept) <= 1  # the batch before this one
        kept.append(weakref.ref(logits))

    model = nn.Linear(2, 10_000)
    model.register_forward_hook(classify)
    result = evaluated(torch.rand(12, 2), list(range(12)), model)
    assert len(kept) == 6 and not any(logits() is not None for logits in kept)
    tensors = [value for value in vars(result).values() if isinstance(value, Tensor)]
    assert len(tensors) == 4 and all(tensor.untyped_storage().nbytes() <= 12 * 24 for tensor in tensors)


def test_rank_of_the_true_class() -> None:
    # the last two rows hold equal logits: as in argmax, the lower index comes first
    logits, targets = torch.tensor([[3.0, 2, 1], [3, 2, 1], [3, 2, 1], [1, 1, 0], [1, 1, 0]]), [0, 1, 2, 0, 1]
    result = evaluated(logits, targets)
    assert result.rank.tolist() == [1, 2, 3, 1, 2]
    assert ((result.rank == 1) == (result.predicted == result.targets)).all()


def test_views_are_averaged_in_single_precision() -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x[:, 0, 0, :1] > 0, 1.0, 1.0078125).bfloat16()  # two neighbouring numbers

    views = torch.tensor([1.0, -1.0]).reshape(1, 2, 1, 1, 1)
    assert ViewAverage(Half())(views).item() == 1.00390625


def test_a_folder_is_continued_where_it_holds_a_state(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    states = StateStore(folder.checkpoints)
    assert find_source(a_config(), folder, states) is None
    folder.begin(a_config(), {"status": "stopped"})
    assert find_source(a_config(run_dir="elsewhere"), folder, states) is None  # no state saved: nothing to continue
    states.write({"a": 1})
    assert find_source(a_config(), folder, states) == (folder, states)


def test_unknown_settings_of_a_finished_run_are_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = RunFolder(tmp_path)
    folder.begin(a_config(), {"status": "finished"})
    with folder.config_file.open("a") as file:
        file.write("colour: red\n")
    folder.config_file.write_text(folder.config_file.read_text().replace("trainer:", "trainer:\n  magic: 3"))
    with caplog.at_level("INFO"):
        assert folder.read_config() == a_config()
    assert "ignored trainer.magic, colour" in caplog.text
    folder.write_summary({"status": "stopped"})
    with pytest.raises(RunError, match=r"no setting trainer\.magic, colour, and the run is not finished"):
        folder.read_config()
