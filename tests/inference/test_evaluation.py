"""What an evaluation says of logits: ranks, calibration, rows by name, averages over views."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fgvc.inference.temperature import calibration_error, reliability_curve
from fgvc.runs import read_predictions
from fgvc.training.evaluation import Evaluation, ViewAverage, evaluate


def evaluation_of(logits: Tensor, targets: list[int]) -> Evaluation:
    loader = DataLoader(TensorDataset(logits, torch.tensor(targets)), batch_size=2)
    return evaluate(nn.Identity(), loader, logits.shape[1], Accelerator(cpu=True), "test")  # type: ignore[arg-type]


def test_rank_of_the_true_class() -> None:
    # the last two rows hold equal logits: as in argmax, the lower index comes first
    logits = torch.tensor([[3.0, 2, 1], [3, 2, 1], [3, 2, 1], [1, 1, 0], [1, 1, 0]])
    result = evaluation_of(logits, [0, 1, 2, 0, 1])
    assert result.rank.tolist() == [1, 2, 3, 1, 2]
    assert ((result.rank == 1) == (result.predicted == result.targets)).all()


def test_calibration_error_by_hand() -> None:
    """Four answers at confidence 0.9, three of them right; four at 0.6, one of them right."""
    high, low = (torch.tensor([[p, 1 - p]]).log() for p in (0.9, 0.6))
    result = evaluation_of(torch.cat([high] * 4 + [low] * 4), [0, 0, 0, 1, 0, 1, 1, 1])
    curve = reliability_curve(result.confidence, result.predicted == result.targets)
    assert calibration_error(curve) == pytest.approx(100 * (0.5 * (0.9 - 0.75) + 0.5 * (0.6 - 0.25)), abs=1e-3)


def test_predictions_name_the_classes(tmp_path: Path) -> None:
    table = evaluation_of(torch.tensor([[0.0, 2], [0, 2]]), [0, 1]).predictions(["a.jpg", "b, c.jpg"], ["auk", "tern"])
    assert list(table) == ["path", "target", "predicted", "target_class", "predicted_class", "confidence", "rank"]
    assert table["target_class"].tolist() == ["auk", "tern"] and table["predicted_class"].tolist() == ["tern", "tern"]
    table.to_csv(tmp_path / "predictions.csv", index=False)
    assert read_predictions(tmp_path / "predictions.csv")["path"].tolist() == ["a.jpg", "b, c.jpg"]


def test_view_average_is_the_mean_of_the_logits_of_each_view() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    views = torch.randn(6, 3, 3, 8, 8)  # (B, V, 3, H, W)
    expected = torch.stack([(model(v[0:1]) + model(v[1:2]) + model(v[2:3]))[0] / 3 for v in views])
    average = ViewAverage(model)
    torch.testing.assert_close(average(views), expected)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(average(views[order]), expected[order])  # of images
    torch.testing.assert_close(average(views[:, [2, 0, 1]]), expected)  # of views
    torch.testing.assert_close(average(views[:, :1]), model(views[:, 0]))
    torch.testing.assert_close(average(views[:, [0, 0]]), model(views[:, 0]))  # a symmetric image


def test_views_are_averaged_in_single_precision() -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x[:, 0, 0, :1] > 0, 1.0, 1.0078125).bfloat16()  # two neighbouring numbers

    views = torch.tensor([1.0, -1.0]).reshape(1, 2, 1, 1, 1)
    assert ViewAverage(Half())(views).item() == 1.00390625
