"""What a user of the installed package may write: runs, and mypy --strict accepts it by the types the package carries.

tools/check_package.py has it do both, in an environment that holds the wheel.
"""

from pathlib import Path

import torch
from torch import Tensor

import fgvc
from fgvc import Prediction, Predictor, load_run
from fgvc.data import ImageDataset, create_dataset, list_datasets
from fgvc.errors import RunError
from fgvc.models import FineGrainedModel, create_model
from fgvc.pooling import Pooling, create_pooling, list_poolings
from fgvc.runs import Run, find_finished
from fgvc.spectral import GRADIENTS, covariance, matrix_sqrt, newton_schulz_sqrt, scaling_eigen_branch


def descriptors(features: Tensor) -> dict[str, Tensor]:
    """Of (B, C, H, W), by every pooling: (B, out_features) each."""
    poolings: dict[str, Pooling] = {name: create_pooling(name, channels=features.shape[1]) for name in list_poolings()}
    return {name: pooling(features) for name, pooling in poolings.items()}


def roots(features: Tensor) -> list[Tensor]:
    matrices: Tensor = covariance(features)
    exact = matrix_sqrt(matrices, gradient="exact")
    return [exact, newton_schulz_sqrt(matrices, iterations=5), scaling_eigen_branch(matrices)]


def logits(images: Tensor) -> Tensor:
    model: FineGrainedModel = create_model("test_resnet", method="seb", num_classes=3, reduction=8)
    result: Tensor = model(images)
    return result


def named(run: Path, photographs: list[Path]) -> dict[str, float]:
    predictor: Predictor = load_run(run)
    one: Prediction = predictor.predict(photographs[0])
    predictions: list[Prediction] = predictor.predict(photographs, top=1)
    return {found.name: found.probabilities[0] for found in [one, *predictions]}


def class_names(root: Path) -> list[str]:
    dataset: ImageDataset = create_dataset("folder", root=root, split="train")
    return list(dataset.classes)


def labels(folder: Path) -> list[str]:
    try:
        runs: list[Run] = find_finished([folder])[0]
    except RunError as error:
        return [str(error)]
    return [run.label for run in runs]


def main() -> None:
    version: str = fgvc.__version__
    names: list[str] = [*list_datasets(), *GRADIENTS]
    features = torch.randn(2, 64, 3, 3)
    print(version, names, len(descriptors(features)), len(roots(features)), logits(torch.randn(2, 3, 64, 64)).shape)


if __name__ == "__main__":
    main()
