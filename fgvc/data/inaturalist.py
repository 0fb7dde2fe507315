"""iNaturalist 2017, 2018, 2019 and 2021 in their official layout [Van Horn et al., CVPR 2018 and CVPR 2021].

Annotations are JSON as of COCO: images (id, file_name), annotations (image_id, category_id), categories (id, name, and
the taxonomy). See <https://github.com/visipedia/inat_comp>.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fgvc.data.dataset import Samples
from fgvc.data.layout import find_folder, image_paths, listing, reachable, unique_names
from fgvc.errors import ConfigError, DatasetError, is_unicode
from fgvc.foreign import read_foreign_text

_YEARS = {
    "2017": (("train2017.json",), "val2017.json"),
    "2018": (("train2018.json",), "val2018.json"),
    "2019": (("train2019.json",), "val2019.json"),
    "2021": (("train.json", "train_mini.json"), "val.json"),
}
"""Files of the training splits and of the validation split, by year."""
_NAMES = "categories.json"
_LEVELS = ("genus", "family", "order", "class", "phylum", "kingdom", "supercategory")
_MAX_JSON = 1 << 32  # bytes; the training file of 2021 is the largest


def read_inaturalist(root: Path, split: str, *, year: str | int | None = None, train_split: str = "train") -> Samples:
    """Read one split, in the order of the annotations; classes are in the order of their ids, with their names.

    The files of 2018 and 2019 hide the names of the species; categories.json in `root`, which was published later,
    gives them. Coarser labels: the ranks that the file names, from genus to kingdom, and the supercategory.

    Args:
        root: folder with the JSON files of a year and the images at the paths that they name.
        split: "train", or "test" for the official validation split; the labels of the test images are not public.
        year: 2017, 2018, 2019 or 2021; None takes the one that is there.
        train_split: "train", or "train_mini" of 2021.

    Raises:
        ConfigError: unknown year or split, or one that the year does not have.
        DatasetError: files of no year or of several, a file is damaged or contradicts itself, or images are missing.
    """
    with reachable():
        years = find_years(root)
    if year is not None and str(year) not in _YEARS:
        raise ConfigError(f"inaturalist: year={year!r} is unknown; choose one of {', '.join(_YEARS)}")
    if len(years) > 1 and year is None:
        raise DatasetError(f"{root}: holds files of {', '.join(years)}; set dataset.options.year to one of them")
    chosen = str(year or next(iter(years), "2021"))
    training, test = _YEARS[chosen]
    if f"{train_split}.json" not in training and not (train_split == "train" and len(training) == 1):
        known = ", ".join(dict.fromkeys(name.split("20")[0].removesuffix(".json") for name in training))
        raise ConfigError(f"inaturalist: train_split={train_split!r} is unknown in {chosen}; choose one of {known}")
    name = test if split == "test" else f"{train_split}.json" if len(training) > 1 else training[0]
    folder = find_folder("inaturalist", root, (name,))
    path = folder / name
    content = _read(path)
    ids, names, coarse = _categories(folder, path, content)
    index = {number: target for target, number in enumerate(ids)}
    files = {row["id"]: row["file_name"] for row in _rows(path, content, "images", id=int, file_name=str)}
    annotations = _rows(path, content, "annotations", image_id=int, category_id=int)
    unknown = sorted({row["category_id"] for row in annotations} - set(index))
    absent = sorted({row["image_id"] for row in annotations} - set(files))
    if unknown or absent:
        what, found = ("category", unknown) if unknown else ("image", absent)
        raise DatasetError(f"{path}: annotations of {len(found)} unknown {what} ids, first {found[0]}; unpack it again")
    if not annotations:
        raise DatasetError(f"{path}: no annotations; the labels of the official test images are not public")
    return Samples(
        classes=names,
        paths=image_paths(folder, [files[row["image_id"]] for row in annotations], path),
        targets=[index[row["category_id"]] for row in annotations],
        coarse=coarse,
    )


def find_years(root: Path) -> list[str]:
    """The years that have a training and a validation file in a folder. Raises OSError."""
    return [
        year
        for year, (training, test) in _YEARS.items()
        if (root / test).is_file() and any((root / name).is_file() for name in training)
    ]


def _read(path: Path) -> Any:
    try:
        return json.loads(read_foreign_text(path, _MAX_JSON))  # its coordinates may be NaN, which other JSON must not
    except RecursionError as error:
        raise DatasetError(f"{path}: nested too deeply; unpack the archive again") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DatasetError(f"{path}: not readable as JSON ({reason}); unpack the archive again") from error


def _rows(path: Path, content: Any, key: str | None, **kinds: type) -> list[Mapping[str, Any]]:
    """The list of objects under a key, or the content itself, with values of these types; the first is unique."""
    rows = content.get(key) if isinstance(content, dict) and key else content
    if not isinstance(rows, list):
        raise DatasetError(f"{path}: no list {key!r} in it; is it an annotation file of iNaturalist?")
    for row in rows:
        for name, kind in kinds.items():
            value = row.get(name) if isinstance(row, dict) else None
            if type(value) is not kind or (isinstance(value, str) and not is_unicode(value)):
                found = str(row)[:80]
                raise DatasetError(f"{path}: {key or 'an entry'} without a {name} ({kind.__name__}): {found}")
    own = next(iter(kinds))
    value, count = Counter(row[own] for row in rows).most_common(1)[0] if rows else (None, 0)
    if count > 1:
        raise DatasetError(f"{path}: {key or 'its entries'} have the {own} {value} twice; unpack the archive again")
    return rows


def _categories(folder: Path, path: Path, content: Any) -> tuple[list[int], list[str], dict[str, list[str]]]:
    """Ids, names and coarser labels of the classes."""
    rows = _rows(path, content, "categories", id=int, name=str)
    published = folder / _NAMES
    if published.is_file():
        listed = {row["id"]: row for row in _rows(published, _read(published), None, id=int, name=str)}
        missing = [row["id"] for row in rows if row["id"] not in listed]
        if missing:
            raise DatasetError(
                f"{published}: no entry of {len(missing)} categories of {path.name}, first {missing[0]}; is it of the "
                "same year?"
            )
        # what the later file lacks, such as the supercategory, stays
        rows = [{**row, **listed[row["id"]]} for row in rows]
    rows = sorted(rows, key=lambda row: row["id"])
    ids = [row["id"] for row in rows]
    if not ids:
        raise DatasetError(f"{path}: no categories; unpack the archive again")
    names = unique_names({str(row["id"]): row["name"] for row in rows})
    coarse = {}
    for level in _LEVELS:
        labels = [str(row[level]) if isinstance(row.get(level), str | int) else "" for row in rows]
        odd = [label for label in labels if not is_unicode(label)]
        if odd:
            raise DatasetError(f"{path}: {level} {listing(map(repr, odd))} is no Unicode; unpack the archive again")
        if len(set(labels)) > 1:  # one label for all says nothing
            coarse[level] = labels
    return ids, list(names.values()), coarse
