"""Whatever bytes a file holds: it is read, or refused by an error of ours, and never takes long.

A short run is part of the suite, always with the same examples. A long one with new examples:

FGVC_FUZZ_EXAMPLES=2000 python -m pytest tests/test_fuzz.py -m slow
"""

import contextlib
import csv
import io
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from command_line import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from miniature import write_imagenet_kit, write_miniature
from PIL import Image
from run_folders import write_config, write_metrics, write_run, write_spectrum
from safetensors.torch import save_file
from scipy.io import loadmat, savemat
from scipy.sparse import csc_matrix
from torch import nn

from fgvc.data import TransformSpec, cached_features, create_dataset
from fgvc.data.cards import load_card
from fgvc.data.imagenet import sort_validation
from fgvc.data.verify import verified_split
from fgvc.errors import UserError
from fgvc.inference.restore import read_weights
from fgvc.models.weights import load_backbone_weights
from fgvc.runs.folder import RunFolder
from fgvc.runs.spectra import Spectrum, SpectrumHistory
from fgvc.runs.summary import read_predictions, read_run
from fgvc.studies.confusion.measure import confusion_matrix

KIT = "ILSVRC2012_devkit_t12/data"
SECONDS = 10  # for one file of a few kilobytes, with room for a busy machine
CARDS = ROOT / "datasets"
SHORT = settings(max_examples=12, derandomize=True, database=None, deadline=None)
LONG = settings(max_examples=int(os.environ.get("FGVC_FUZZ_EXAMPLES", "300")), deadline=None)
each_length = pytest.mark.parametrize(
    "length", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)], ids=["short", "long"]
)


@dataclass(frozen=True)
class Target:
    """A file, and who reads it.

    Attributes:
        make: writes whole files to a folder.
        file: the one that is damaged, below the folder.
        read: given the folder.
    """

    make: Callable[[Path], object]
    file: str
    read: Callable[[Path], object]


def dataset(name: str, file: str, layout: str | None = None) -> Target:
    def make(root: Path) -> object:
        root.rmdir()
        return write_miniature(layout or name, root, train_per_class=1, test_per_class=1, size=(48, 48))

    def read(root: Path) -> object:
        options = {} if name in ("imagenet", "folder") else {"boxes": True}
        return [create_dataset(name, root=root, split=split, **options) for split in ("train", "test")]

    return Target(make, file, read)


def make_devkit(root: Path) -> None:
    write_imagenet_kit(root, [1, 3], [(number, f"n{number:08}", 0) for number in (1, 2, 3)])
    (root / "val").mkdir()


def read_devkit(root: Path) -> None:
    for name in ("a.JPEG", "b.JPEG"):
        (root / "val" / name).touch()
    outside = sorted(path.name for path in root.parent.iterdir())
    try:
        sort_validation(root)
    finally:
        assert sorted(path.name for path in root.parent.iterdir()) == outside  # nothing is moved out
        shutil.rmtree(root / "val")
        (root / "val").mkdir()


def make_run(root: Path) -> None:
    root.rmdir()
    write_run(root)
    parts = {"dataset": {"name": "cub", "root": "data"}, "backbone": {"name": "resnet18"}, "method": {"name": "seb"}}
    write_config(root, name="x", seed=1, **parts)
    write_spectrum(root, images=3, channels=4)
    write_metrics(root, epochs=2)
    (root / "predictions.csv").write_text(
        'path,target,predicted,confidence,target_class\ntest/a.jpg,0,1,0.5,auk\n"test/b, c.jpg",1,1,1e-3,"a ""tern"""\n'
    )
    rows = np.sort(np.random.default_rng(0).random((3, 4)))[:, ::-1]
    spectrum = Spectrum(rows, rows, np.arange(3), np.arange(3))
    SpectrumHistory([0, 1], [spectrum] * 2).write(root / "spectrum_history.npz")


def make_image(root: Path, name: str, mode: str = "RGB", **options: Any) -> None:
    for split in ("train", "test"):
        path = root / split / "auk" / name
        path.parent.mkdir(parents=True)
        exif = Image.Exif()
        exif[0x0112] = 6
        kept = {} if path.suffix == ".gif" else {"exif": exif.tobytes()}
        Image.effect_noise((9, 7), 60).convert(mode).save(path, **kept, **options)


def image(name: str, mode: str = "RGB", **options: Any) -> Target:
    return Target(
        lambda root: make_image(root, name, mode, **options),
        f"train/auk/{name}",
        lambda root: create_dataset("folder", root=root)[0],
    )


SPEC = TransformSpec(size=4, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", training=False)


def read_cache(root: Path) -> object:
    images = create_dataset("folder", root=root / "images")
    return cached_features(
        [images.with_transform(SPEC)], lambda x: x, map_shape=(3, 4, 4), key_parts={}, cache_dir=root / "cache"
    )[0][0]


def cache(ending: str) -> Target:
    def make(root: Path) -> None:
        make_image(root / "images", "0.png")
        read_cache(root)
        for path in (root / "cache").iterdir():
            (root / "cache" / f"damaged{path.suffix}").symlink_to(path)

    return Target(make, f"cache/damaged{ending}", read_cache)


def weights(name: str, save: Callable[[Any, Path], object]) -> Target:
    return Target(
        lambda root: save(nn.Linear(2, 3).state_dict(), root / name),
        name,
        lambda root: load_backbone_weights(nn.Linear(2, 3), root / name),
    )


def make_weights_of_run(root: Path) -> None:
    (root / "checkpoints").mkdir()
    save_file({"weight": torch.ones(3)}, root / "checkpoints" / "last.safetensors")


def make_fingerprint(root: Path) -> None:
    make_image(root, "0.png")
    (root / "fingerprint.json").write_text(json.dumps({"splits": {"train": {"state": "0", "images": 1}}}))


def make_exported(root: Path) -> None:
    """As the adapter `hf` leaves it."""
    for split in ("train", "test"):
        make_image(root / split, "0.png")
        (root / split / "train" / "auk").rename(root / split / "0000_auk")
    (root / "classes.json").write_text(json.dumps([{"name": "auk", "folder": "0000_auk"}]))
    options = ("config_name", "revision", "image_column", "label_column", "test_split")
    source = {"path": "x", **dict.fromkeys(options), "train_split": "train"}
    (root / "hf.json").write_text(json.dumps(source))


def exported(file: str) -> Target:
    return Target(make_exported, file, lambda root: create_dataset("hf", root=root, path="x"))


def read_predicted(root: Path) -> object:
    return confusion_matrix(read_predictions(root / "predictions.csv"), ["auk", "tern"])


CUB = ("images", "image_class_labels", "train_test_split", "classes", "bounding_boxes")
AIRCRAFT = ("variants", "images_variant_trainval", "images_box")
TARGETS = {
    **{f"cub {name}": dataset("cub", f"{name}.txt") for name in CUB},
    **{f"nabirds {name}": dataset("nabirds", f"{name}.txt") for name in ("images", "image_class_labels", "classes")},
    "cars joint": dataset("cars", "cars_annos.mat"),
    "cars train": dataset("cars", "devkit/cars_train_annos.mat", "cars_devkit"),
    "cars meta": dataset("cars", "devkit/cars_meta.mat", "cars_devkit"),
    **{f"aircraft {name}": dataset("aircraft", f"data/{name}.txt") for name in AIRCRAFT},
    "dogs list": dataset("dogs", "train_list.mat"),
    "dogs box": dataset("dogs", "Annotation/n02085620-Chihuahua/n02085620_1"),
    "imagenet names": dataset("imagenet", "LOC_synset_mapping.txt"),
    "devkit meta": Target(make_devkit, f"{KIT}/meta.mat", read_devkit),
    "devkit labels": Target(make_devkit, f"{KIT}/ILSVRC2012_validation_ground_truth.txt", read_devkit),
    "jpeg": image("0.jpg"),
    "png": image("0.png", "P"),
    "gif": image("0.gif", "P"),
    "tiff": image("0.tif", "CMYK"),
    "webp": image("0.webp", "RGBA"),
    "card": Target(
        lambda root: shutil.copy(CARDS / "cars.yaml", root), "cars.yaml", lambda root: load_card(root, "cars")
    ),
    "summary": Target(make_run, "summary.json", lambda root: (read_run(root), RunFolder(root).read_summary())),
    "config of a run": Target(make_run, "config.yaml", lambda root: read_run(root).settings()),
    "config to go on": Target(make_run, "config.yaml", lambda root: RunFolder(root).read_config()),
    "metrics": Target(make_run, "metrics.csv", lambda root: read_run(root).metrics()),
    "predictions": Target(make_run, "predictions.csv", read_predicted),
    "spectrum": Target(make_run, "spectrum.npz", lambda root: read_run(root).spectrum()),
    "history": Target(make_run, "spectrum_history.npz", lambda root: read_run(root).history()),
    "history to go on": Target(
        make_run, "spectrum_history.npz", lambda root: SpectrumHistory.read(root / "spectrum_history.npz", 1)
    ),
    "feature cache": cache(".npy"),
    "card of the feature cache": cache(".json"),
    "safetensors": weights("w.safetensors", save_file),
    "pth": weights("w.pth", torch.save),
    "old pth": weights("w.pth", lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False)),
    "weights of a run": Target(
        make_weights_of_run, "checkpoints/last.safetensors", lambda root: read_weights(RunFolder(root), "last")
    ),
    "classes of hf": exported("classes.json"),
    "record of hf": exported("hf.json"),
    "fingerprint": Target(
        make_fingerprint, "fingerprint.json", lambda root: verified_split(create_dataset("folder", root=root))
    ),
}
WORDS = [
    *(b"\0", b"\xff", b"\n", b"\r", b'"', b",", b"/", b"../", b" ", b"a" * 300, b"\xe2\x80\xa8", b"\xc3\xa9"),
    *(b"9" * 5000, b"0x" + b"f" * 5000, b"-1", b"nan", b"inf", b"1e400", b"0", b"1", b"true", b"null", b"2020-99-99"),
    *(b"[" * 3000, b"{" * 3000, b'{"a":' * 3000, b"- " * 300, b"[]", b"{}", b": ", b"&a ", b"*a", b"${a}", b"? "),
    *(b"!!bool x", b"\xef\xbb\xbf"),
    *(b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", b"\x0e\0\0\0", b"\x0f\0\0\0", b"\x05\0\0\0", b"\x01\0\0\0"),
]  # fmt: skip
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["replace", "insert", "delete", "cut", "repeat"]),
        st.floats(0, 1),
        st.one_of(st.sampled_from(WORDS), st.binary(min_size=1, max_size=8)),
    ),
    min_size=1,
    max_size=4,
)
Edits = list[tuple[str, float, bytes]]


def edited(content: bytes, edits: Edits) -> bytes:
    for kind, place, word in edits:
        at = int(place * len(content))
        head, tail = content[:at], content[at:]
        content = {
            "replace": head + word + tail[len(word) :],
            "insert": head + word + tail,
            "delete": head + tail[len(word) :],
            "cut": head,
            "repeat": head + tail[:50] * 3 + tail,
        }[kind]
    return content


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """What runs for long is taken for what never ends."""

    def stop(*_: object) -> None:
        raise AssertionError(f"still reading after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


Place = Callable[[str], tuple[Target, Path]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A target and its folder of whole files, made once."""
    folders: dict[str, Path] = {}

    def find(name: str) -> tuple[Target, Path]:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("fuzz") / "root"
            folders[name].mkdir()
            TARGETS[name].make(folders[name])
            TARGETS[name].read(folders[name])
        return TARGETS[name], folders[name]

    return find


def attempt(target: Target, root: Path, content: bytes) -> None:
    """Read the file with this content; every error but ours, and every warning of NumPy's, comes through."""
    path = root / target.file
    whole = path.read_bytes()
    path.write_bytes(content)
    try:
        with limited(), contextlib.suppress(UserError):
            target.read(root)
    finally:
        path.write_bytes(whole)


VALUES = st.recursive(
    st.one_of(
        *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9)),
        st.sampled_from(["../x", "a" * 300, "${a}", "1" * 5000, "", "\ud800", 10**400, -1, 0, 2**63]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=5,
)
DOCUMENTS = ["classes of hf", "record of hf", "summary", "config of a run", "config to go on"]
DOCUMENTS += ["card", "fingerprint", "card of the feature cache"]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested lists and dicts."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(copy[path[0]], path[1:], new)
    return copy


def check_values(name: str, place: Place, data: st.DataObject) -> None:
    """Another value in one place of a document that is JSON, and so YAML."""
    target, root = place(name)
    whole = yaml.safe_load((root / target.file).read_text())
    path = data.draw(st.sampled_from(places(whole)))
    attempt(target, root, json.dumps(replaced(whole, path, data.draw(VALUES))).encode())


CELLS = st.one_of(
    st.text(max_size=9),
    st.integers(-3, 300),
    st.floats(),
    st.lists(st.integers(0, 9), max_size=3).map(np.array),
    st.sampled_from([np.array([["a", "bc"]]), csc_matrix(np.eye(2)), np.empty((0, 0)), 1j, {"a": 1}]),
)
MATS = ["cars joint", "dogs list", "devkit meta"]


def check_mat(name: str, place: Place, data: st.DataObject) -> None:
    """Another value in one cell, or in place of one variable, of a MATLAB file."""
    target, root = place(name)
    content = {key: value for key, value in loadmat(root / target.file).items() if not key.startswith("__")}
    key, value = data.draw(st.sampled_from(sorted(content))), data.draw(CELLS)
    if content[key].dtype.names and data.draw(st.booleans()):
        content[key][data.draw(st.sampled_from(content[key].dtype.names))].flat[0] = value
    elif content[key].dtype == object and data.draw(st.booleans()):
        content[key].flat[0] = value
    else:
        content[key] = value
    file = io.BytesIO()
    savemat(file, content, do_compression=data.draw(st.booleans()))
    attempt(target, root, file.getvalue())


ARCHIVES = ["spectrum", "history", "history to go on"]
SHAPES = st.lists(st.integers(0, 3), max_size=4).map(tuple)
TYPES = st.sampled_from(["f2", "f8", ">f4", "i1", "i8", "u8", "c16", "?", "U3", "S2", "M8[s]", "V3", "f8,i4"])


def check_arrays(name: str, place: Place, data: st.DataObject) -> None:
    """Other arrays under the names of an archive, or under none of them."""
    target, root = place(name)
    with np.load(root / target.file) as archive:
        arrays = dict(archive)
    key = data.draw(st.sampled_from([*arrays, "other"]))
    arrays[key] = np.zeros(data.draw(SHAPES), data.draw(TYPES))
    if data.draw(st.booleans()):
        del arrays[data.draw(st.sampled_from(sorted(arrays)))]
    file = io.BytesIO()
    np.savez(file, **arrays)
    attempt(target, root, file.getvalue())


ROWS = st.lists(
    st.lists(st.one_of(st.text(max_size=5), st.integers().map(str), st.floats().map(str)), max_size=6), max_size=4
)


def check_rows(name: str, place: Place, data: st.DataObject) -> None:
    """Other cells below the header, or another header."""
    target, root = place(name)
    header = (root / target.file).read_text().splitlines()[0].split(",")
    rows = data.draw(ROWS)
    if data.draw(st.booleans()):
        rows = [[*row, *[row[0] if row else "0"] * len(header)][: len(header)] for row in rows]
    file = io.StringIO()
    csv.writer(file).writerows([header, *rows] if data.draw(st.booleans()) else rows)
    attempt(target, root, file.getvalue().encode("utf-8", "surrogatepass"))


CHECKS = [
    *((check_values, name) for name in DOCUMENTS),
    *((check_mat, name) for name in MATS),
    *((check_arrays, name) for name in ARCHIVES),
    *((check_rows, name) for name in ("metrics", "predictions")),
]
Check = Callable[[str, Place, st.DataObject], None]
ALONE = st.one_of(st.none(), st.none(), st.none(), st.binary(max_size=200))


def of_length(length: settings, name: str) -> settings:
    """Few of the short examples where each starts a process."""
    few = length is SHORT and TARGETS[name].file.endswith(".mat")
    return settings(length, max_examples=3 if few else length.max_examples, suppress_health_check=list(HealthCheck))


@pytest.mark.filterwarnings("ignore")
@each_length
@pytest.mark.parametrize("name", TARGETS)
def test_bytes(name: str, place: Place, length: settings) -> None:
    @of_length(length, name)
    @given(edits=EDITS, alone=ALONE)
    def damaged(edits: Edits, alone: bytes | None) -> None:
        target, root = place(name)
        attempt(target, root, edited((root / target.file).read_bytes(), edits) if alone is None else alone)

    damaged()


@pytest.mark.filterwarnings("ignore")
@each_length
@pytest.mark.parametrize(("check", "name"), CHECKS)
def test_content(check: Check, name: str, place: Place, length: settings) -> None:
    @of_length(length, name)
    @given(data=st.data())
    def changed(data: st.DataObject) -> None:
        check(name, place, data)

    changed()
