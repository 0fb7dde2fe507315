"""The files of a run's attribution: overlays, grids, the maps as numbers, and a record of them all."""

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from fgvc.io import atomic_path, write_json_atomic, write_npz
from fgvc.presentation.render import markdown_table
from fgvc.presentation.style import figure_style
from fgvc.provenance import source_state, versions
from fgvc.studies.attribution import METHODS
from fgvc.studies.attribution.explain import RunAttribution
from fgvc.studies.attribution.show import band_columns, eigenvector_columns, grid_figure, overlay

SCHEMA = 1
_RESOLUTION = 200  # dots an inch of a grid, whose pictures have a few hundred pixels each
_OWN_SCALE = "Each map is coloured up to its own largest values: colours compare places in one map, not maps."
_SIGNED = "Red speaks for the class, blue against it. "
_ENDS = {"largest": "largest eigenvalues", "smallest": "smallest non-zero eigenvalues"}


def write_attribution(found: RunAttribution, folder: Path) -> list[Path]:
    """Write maps/*.png, grid_METHOD.png, eigenvectors_*.png, maps.npz and attribution.json; returns their paths.

    attribution.json comes last, and names the others relative to `folder`.
    """
    items = list(_write_maps(found, folder))
    grids = [_write_png(figure, folder / f"{name}.png") for name, figure in figures(found).items()]
    write_npz(folder / "maps.npz", _arrays(found))
    record = {
        "schema": SCHEMA,
        "run": str(found.run),
        "checkpoint": found.checkpoint,
        "root": str(found.root),
        "bands": {text: list(band) for text, band in found.bands.items()},
        "seconds": {method: round(seconds, 3) for method, seconds in found.seconds.items()},
        "items": items,
        "grids": [path.name for path in grids],
        "versions": versions(),
        **source_state(),
    }
    write_json_atomic(folder / "attribution.json", record)
    overlays = [folder / item["file"] for item in items]
    return [*grids, *overlays, folder / "maps.npz", folder / "attribution.json"]


def _write_maps(found: RunAttribution, folder: Path) -> Iterator[dict[str, Any]]:
    """Write an overlay for every image, method and band; yields their records."""
    subjects, names = found.subjects, found.class_names
    for method, maps in found.maps.items():
        for k, band in enumerate(found.bands):
            for i, (name, target) in enumerate(zip(subjects.names, subjects.targets, strict=True)):
                file = Path("maps") / f"{i:03}_{method}_{band.replace(':', '-')}.png"
                with atomic_path(folder / file) as temporary:
                    pixels = overlay(subjects.pictures[i], maps[k, i], signed=METHODS[method].signed)
                    Image.fromarray(pixels).save(temporary)
                yield {
                    "image": name,
                    "class": None if target is None else names[target],
                    "predicted": names[found.predicted[i]],
                    "explained": names[found.explained[i]],
                    "method": method,
                    "band": band,
                    "score": round(float(found.scores[k, i]), 6),
                    "file": file.as_posix(),
                }


def figures(found: RunAttribution) -> dict[str, Figure]:
    """The grids by the names of their files: one a method, and two of eigenvectors where there are any."""
    subjects = found.subjects
    drawn = {}
    for method, maps in found.maps.items():
        signed = METHODS[method].signed
        columns = band_columns(subjects.pictures, maps, list(found.bands), found.scores, signed=signed)
        caption = (_SIGNED if signed else "") + _OWN_SCALE
        drawn[f"grid_{method}"] = grid_figure(columns, _labels(found), f"{METHODS[method].label}, {found.run}", caption)
    for end, of_end in found.eigenvectors.items():
        shown = (part.numpy() for part in (of_end.maps, of_end.places, of_end.shares))
        columns = eigenvector_columns(subjects.pictures, *shown)
        caption = f"Energy along the eigenvectors of the {_ENDS[end]}; λ: share of the trace. {_OWN_SCALE}"
        drawn[f"eigenvectors_{end}"] = grid_figure(columns, _labels(found), f"Eigenvectors, {found.run}", caption)
    return drawn


def _labels(found: RunAttribution) -> list[str]:
    labels = []
    for target, predicted, explained in zip(found.subjects.targets, found.predicted, found.explained, strict=True):
        facts: dict[int, list[str]] = {}
        for fact, index in (("true", target), ("predicted", predicted), ("explained", explained)):
            if index is not None:
                facts.setdefault(int(index), []).append(fact)
        lines = [f"{', '.join(of_class)}:\n{found.class_names[index]}" for index, of_class in facts.items()]
        labels.append("\n".join(textwrap.fill(line.replace("_", " "), 27) for line in "\n".join(lines).splitlines()))
    return labels


def _write_png(figure: Figure, path: Path) -> Path:
    with figure_style(), atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=_RESOLUTION)
    return path


def _arrays(found: RunAttribution) -> dict[str, np.ndarray]:
    """METHOD.BAND: maps (N, H, W); scores (K, N); eigenvalues and their maps."""
    arrays = {
        f"{method}.{band}": maps[k] for method, maps in found.maps.items() for k, band in enumerate(found.bands)
    } | {"scores": found.scores, "predicted": found.predicted, "explained": found.explained}
    for end, of_end in found.eigenvectors.items():
        arrays |= {f"{end}.{name}": part.numpy() for name, part in vars(of_end).items()}
    return arrays


def attribution_markdown(found: RunAttribution) -> str:
    """A row an image: true, predicted and explained class, and the score of each band."""
    rows = []
    for i, (name, target) in enumerate(zip(found.subjects.names, found.subjects.targets, strict=True)):
        names = [found.class_names[index] for index in (found.predicted[i], found.explained[i])]
        true = "not known" if target is None else found.class_names[target]
        rows.append([name, true, *names, *(f"{score:.2f}" for score in found.scores[:, i])])
    return markdown_table(["Image", "True", "Predicted", "Explained", *(f"score {band}" for band in found.bands)], rows)
