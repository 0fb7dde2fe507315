"""The tables that hold a study of attributions, and their files."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from fgvc.csv_files import read_csv, to_csv
from fgvc.studies.attribution.curves import KINDS
from fgvc.studies.attribution.measured import MapOf

_MAP = ("label", "band", "method")
_JUDGE = ("judge", "judge_band")
_SIZE = ("seeds", "images")
_AREAS = tuple(f"{kind}{end}" for kind in KINDS for end in ("", "_low", "_high"))
COLUMNS: dict[str, tuple[str, ...]] = {
    "heads": ("label", "seed", "band", "top1", "above", "margin", "images", "whole", "reference"),
    "areas": (*_MAP, *_JUDGE, *_AREAS, *_SIZE),
    "differences": (*_MAP, "other", "other_band", "other_method", *_JUDGE, *_AREAS, *_SIZE),
    "curves": (*_MAP, *_JUDGE, "share", *KINDS),
    "agreement": ("between", *_MAP, "other", "mean", "low", "high", *_SIZE),
    "extents": (*_MAP, "empty", "half_area", "low", "high", "inside", "inside_low", "inside_high", "box_area", *_SIZE),
    "mean_maps": (*_MAP, "row"),
}
_NAMES = (*_MAP, "other", "other_band", "other_method", *_JUDGE, "between")


class AttributionStudy(NamedTuple):
    """The tables of a study, with the columns of `COLUMNS`.

    Attributes:
        heads: top1 on the test split in per cent; of the classes, per cent that the true one lies above on average (50
            where nothing is known); mean of its logit minus those of the others, which adds up over bands of a map that
            takes each eigenvalue by itself; its mean probability on the images studied and on their references.
        areas: mean area under the curves of each map and the ends of its interval, judged by the heads of its label and
            the whole ones of the others.
        differences: of a map's areas and another one's, paired by image: of two bands of a label, of two whole heads,
            and to the maps that know nothing; judged by the whole head of its label.
        curves: mean over images and seeds, of maps judged by the whole head of their label, of `RANDOM` and `CENTRE` by
            that of every label.
        agreement: mean Spearman's correlation of two maps of an image, cell by cell: between bands, seeds, methods,
            heads (labels), or a map and the centre.
        extents: share of images whose map is empty (nothing positive), `half_mass_area`, `share_inside` and the boxes'
            own share.
        mean_maps: mean over images and seeds, each map's positive values in units of their mean, which an even map has
            everywhere; a row a row of cells, columns c0, c1, ...
    """

    heads: pd.DataFrame
    areas: pd.DataFrame
    differences: pd.DataFrame
    curves: pd.DataFrame
    agreement: pd.DataFrame
    extents: pd.DataFrame
    mean_maps: pd.DataFrame


def mean_map(study: AttributionStudy, of: MapOf) -> np.ndarray:
    """One of `mean_maps` as an array (h, w). Raises KeyError where there is none."""
    table = study.mean_maps.set_index(list(_MAP)).loc[[tuple(of)]].sort_values("row")
    cells: np.ndarray = table.drop(columns="row").to_numpy(dtype=float)
    return cells


def save_attribution_study(study: AttributionStudy, folder: Path) -> dict[Path, str]:
    """The text of each file of a study, NAME.csv for each table."""
    digits = {name: "%.3g" if name == "mean_maps" else "%.4g" for name in COLUMNS}
    return {folder / f"{name}.csv": to_csv(table, digits[name]) for name, table in study._asdict().items()}


def load_attribution_study(folder: Path) -> AttributionStudy:
    """Read the files that `save_attribution_study` names. Raises RunError where one is missing or damaged."""
    return AttributionStudy(*(read_study_table(folder / f"{name}.csv") for name in COLUMNS))


def read_study_table(path: Path) -> pd.DataFrame:
    """One table of a study, which its file is named after. Raises RunError where it is missing or damaged."""
    return read_csv(path, COLUMNS[path.stem], names=_NAMES)
