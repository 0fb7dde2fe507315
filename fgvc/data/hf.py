"""Any image classification dataset of the Hugging Face `datasets` library, written once as class folders."""

import contextlib
import importlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from fgvc.data.dataset import Samples
from fgvc.data.folder import is_litter
from fgvc.data.image_file import MAX_BYTES, image_formats
from fgvc.data.layout import require_inside, write_once
from fgvc.errors import ConfigError, DatasetError
from fgvc.foreign import open_foreign, read_json
from fgvc.io import expanded, write_json_atomic

_RECORD, _CLASSES = "hf.json", "classes.json"
_LABEL_TYPES = re.compile(r"u?int\d+|(large_)?string")


@dataclass(frozen=True)
class _Source:
    """The source of the folder; stored in hf.json."""

    path: str
    config_name: str | None
    revision: str | None
    image_column: str | None
    label_column: str | None
    train_split: str
    test_split: str | None


@dataclass(frozen=True)
class _Columns:
    """The two columns that are read, the class names, and the class index of each value of the label column."""

    image: str
    label: str
    names: list[str]
    targets: Mapping[Any, int]


def read_hf(
    root: Path,
    split: str,
    *,
    path: str,
    config_name: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    train_split: str = "train",
    test_split: str | None = None,
) -> Samples:
    """Write the dataset to `root` where it is missing, then read one split of it from there.

    The images keep their encoded bytes: <root>/<split>/<number>_<class>/<row>.<extension>; classes.json has the real
    class names. Code that comes with a dataset is never run: since version 4 the library cannot. If the source
    changes, delete `root`: this is not noticed.

    Args:
        root: folder to make; it must not exist, or be empty, or be made from the same source by the same options.
        split: "train" or "test".
        path: name on the hub, or a folder: of `save_to_disk`, of parquet or arrow files, or an image folder.
        config_name: configuration of the dataset, where it has several.
        revision: branch, tag or commit on the hub.
        image_column: None finds the one column of images.
        label_column: None finds the one column of class labels. A column of strings or whole numbers has to be named;
            its classes are the sorted values.
        train_split: name of the split to train on.
        test_split: name of the split to test on; None takes "test", or else "validation".

    Raises:
        ConfigError: the library is missing, or an option names a split or column that is not there or does not fit.
        DatasetError: the source cannot be loaded, has rows without image or label, or `root` holds something else.
    """
    source = _Source(path, config_name, revision, image_column, label_column, train_split, test_split)
    write_once(root, _RECORD, asdict(source), lambda folder: _export(folder, source))
    return _read(root, split)


def _read(root: Path, split: str) -> Samples:
    try:
        classes = read_json(root / _CLASSES)
        folders = {entry["folder"]: entry["name"] for entry in classes}
        places = [require_inside(root / split, folder, root / _CLASSES) for folder in folders]
        # every file, whatever its extension: the check of the images has to find what is not an image
        found = [sorted(path for path in place.iterdir() if not is_litter(path.name)) for place in places]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"{root}: damaged ({error}); delete it, it will be made again") from error
    return Samples(
        classes=list(folders.values()),
        paths=[path for paths in found for path in paths],
        targets=[target for target, paths in enumerate(found) for _ in paths],
        upright=True,  # as the library itself decodes them
    )


def _export(root: Path, source: _Source) -> None:
    library = _library()
    splits = _load(library, source)
    default_test = "test" if "test" in splits else "validation"
    chosen = {"train": source.train_split, "test": source.test_split or default_test}
    if chosen["train"] == chosen["test"]:
        raise ConfigError(f"hf: train_split and test_split are both {chosen['train']!r}; they must differ")
    absent = [name for name in chosen.values() if name not in splits]
    if absent:
        raise ConfigError(
            f"hf: {source.path} has no split {absent[0]!r} but {', '.join(splits)}; set train_split and test_split"
        )
    parts = {split: splits[name] for split, name in chosen.items()}
    columns = _find_columns(library, source, parts)
    # folder names that any system allows; the number in front makes them unique
    safe = [re.sub(r"[^A-Za-z0-9-]+", "_", name)[:40].strip("_") for name in columns.names]
    folders = [f"{target:04d}_{name}" for target, name in enumerate(safe)]
    for split, rows in parts.items():
        for folder in folders:
            (root / split / folder).mkdir(parents=True)
        encoded = rows.cast_column(columns.image, library.Image(decode=False))
        where = f"hf: {source.path}: split {chosen[split]!r}"
        for number, target, content in _images(where, encoded, columns, _places(library, source)):
            (root / split / folders[target] / f"{number:07d}{_extension(content)}").write_bytes(content)
    classes = [{"name": name, "folder": folder} for name, folder in zip(columns.names, folders, strict=True)]
    write_json_atomic(root / _CLASSES, classes)


def _library() -> Any:
    with contextlib.suppress(ImportError):
        library = importlib.import_module("datasets")
        if hasattr(library, "load_dataset"):  # a folder "datasets" in the working folder can be imported as well
            return library
    raise ConfigError("dataset 'hf' needs the library datasets: pip install 'fgvc[hf]'")


def _load(library: Any, source: _Source) -> Mapping[str, Any]:
    """Splits by name."""
    local = expanded(source.path)
    path = str(local) if local.exists() else source.path
    try:
        if any((local / name).is_file() for name in ("dataset_dict.json", "state.json")):
            found = library.load_from_disk(path)
        else:
            found = library.load_dataset(path, source.config_name, revision=source.revision)
    except Exception as error:  # the library raises many types, for example without a network
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DatasetError(
            f"hf: {source.path}: cannot be loaded ({reason}); set path to a name on the hub or to a folder that "
            "load_dataset of the library datasets can read, and config_name where it has several configurations"
        ) from error
    if not isinstance(found, Mapping):
        raise DatasetError(f"hf: {source.path}: a single split; save a DatasetDict with a training and a test split")
    return found


def _places(library: Any, source: _Source) -> list[Path]:
    """Folders that may hold the files of a source: its own, or of one on the hub the caches of the libraries."""
    local = expanded(source.path)
    caches = [library.config.HF_DATASETS_CACHE, importlib.import_module("huggingface_hub.constants").HF_HUB_CACHE]
    return [Path(place).resolve() for place in ([local] if local.exists() else caches)]


def _find_columns(library: Any, source: _Source, parts: Mapping[str, Any]) -> _Columns:
    features, label = parts["train"].features, source.label_column
    if parts["test"].features != features:
        raise DatasetError(f"hf: {source.path}: training and test split differ in their columns or classes")
    image = _column(features, "image_column", source.image_column, library.Image)
    feature = features.get(label)
    if label is not None and isinstance(feature, library.Value) and _LABEL_TYPES.fullmatch(feature.dtype):
        values = sorted({value for rows in parts.values() for value in rows[label]} - {None})
        return _Columns(image, label, [str(value) for value in values], {v: i for i, v in enumerate(values)})
    label = _column(features, "label_column", label, library.ClassLabel)
    names = list(features[label].names)
    return _Columns(image, label, names, {index: index for index in range(len(names))})


def _column(features: Mapping[str, Any], option: str, given: str | None, kind: type) -> str:
    """The column of a type; ConfigError where it is not exactly one, or the given one does not fit."""
    fitting = [name for name, feature in features.items() if isinstance(feature, kind)]
    if given in fitting or (given is None and len(fitting) == 1):
        return fitting[0] if given is None else given
    columns = ", ".join(f"{name} ({getattr(f, '_type', None) or type(f).__name__})" for name, f in features.items())
    problem = f"{len(fitting)} columns are" if given is None else f"column {given!r} is missing or not"
    raise ConfigError(f"hf: {problem} of type {kind.__name__}; set {option} to one of the columns: {columns}")


def _images(where: str, rows: Any, columns: _Columns, places: Sequence[Path]) -> Iterator[tuple[int, int, bytes]]:
    """Row number, class index and encoded image of each row."""
    for number, row in enumerate(rows.select_columns([columns.image, columns.label])):
        target, content = columns.targets.get(row[columns.label]), _content(where, row[columns.image], places)
        if target is None or content is None:
            what = f"the label {row[columns.label]!r}" if target is None else "no image"
            raise DatasetError(f"{where}: row {number} has {what}; choose another split or column")
        yield number, target, content


def _content(where: str, image: Mapping[str, Any] | None, places: Sequence[Path]) -> bytes | None:
    """Encoded bytes: in the row itself, or in the file that it names, which must be in one of the `places`."""
    if image is None or (image["bytes"] is None and image["path"] is None):
        return None
    try:
        if image["bytes"] is not None:
            return bytes(image["bytes"])
        file_path = Path(image["path"]).resolve()
        if not any(file_path.is_relative_to(place) for place in places):
            raise ValueError("outside of the dataset's folder")
        with open_foreign(file_path, MAX_BYTES) as file:
            return file.read()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise DatasetError(f"{where}: {image['path']}: {reason}; restore the file") from error


def _extension(content: bytes) -> str:
    try:
        with Image.open(io.BytesIO(content), formats=image_formats()) as image:
            kind = str(image.format).lower()
    except Exception:  # Pillow raises many types; the check of the images reports the file
        return ".bin"
    return ".jpg" if kind == "jpeg" else f".{kind}"
