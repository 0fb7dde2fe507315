"""Hostile and broken input, a row a fault: what survives, and what is refused with which words.

Archives, downloads, split files and weights that do not fit have tests of their own; damage at random is in test_fuzz.
"""

import contextlib
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from command_line import ROOT, SMALL, Train, refused, run, succeeded
from damage import replace_text
from miniature import write_imagenet_kit, write_miniature
from PIL import EpsImagePlugin, Image
from run_folders import find_runs, write_config, write_run
from safetensors.torch import save_file
from scipy.io import savemat
from torch import nn

from fgvc.data import (
    ImageDataset,
    Samples,
    TransformSpec,
    cached_features,
    copy_rgb,
    create_dataset,
    decode_rgb,
    fingerprint,
    image_files,
    prepare_dataset,
)
from fgvc.data.cards import load_card
from fgvc.data.extract import extract
from fgvc.data.imagenet import sort_validation
from fgvc.data.layout import read_lines
from fgvc.data.mat import read_mat
from fgvc.data.verify import examine_images
from fgvc.errors import ConfigError, DatasetError, RunError, UserError, WeightsError
from fgvc.inference.pooling_inputs import load_features
from fgvc.inference.restore import read_weights
from fgvc.io import read_csv, to_csv
from fgvc.models.weights import load_backbone_weights
from fgvc.runs.folder import RunFolder
from fgvc.runs.spectra import SpectrumHistory
from fgvc.runs.summary import read_predictions, read_run

ORIENTATION = 0x0112
RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def folder_of(tmp_path: Path, name: str, content: bytes = b"") -> Path:
    """A dataset of one class; the training image has this name and content."""
    for split, file in (("train", name), ("test", "0.png")):
        path = tmp_path / split / "auk" / file
        path.parent.mkdir(parents=True)
        path.write_bytes(content or encoded(Image.new("RGB", (4, 4))))
    return tmp_path


def small_cub(folder: Path) -> Path:
    return write_miniature("cub", folder / "cub", train_per_class=1, test_per_class=1, size=(48, 48))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def half_clear(mode: str) -> Image.Image:
    """Red on the left; on the right clear, above green."""
    image = Image.new("RGBA", (8, 4), (*GREEN, 0))
    image.paste((*RED, 255), (0, 0, 4, 4))
    return image.convert(mode)


def clear_palette() -> bytes:
    image = Image.new("P", (8, 4), 1)
    image.putpalette([*RED, *GREEN])
    image.paste(0, (0, 0, 4, 4))
    return encoded(image, transparency=1)


def frames(kind: str) -> bytes:
    first, second = (Image.new("RGB", (8, 4), colour) for colour in (RED, GREEN))
    return encoded(first, kind, save_all=True, append_images=[second], **({} if kind == "TIFF" else {"duration": 50}))


GREY = np.array([[0, 255, 256, 0x1234, 0x80FF, 0xFFFF]], dtype=np.uint16)
AS_GREY = [(int(value) >> 8,) * 3 for value in GREY[0]]
PGM = b"P5 6 1 65535\n" + GREY.astype(">u2").tobytes()
# left and right end of the first row


def png(depth: int, colour: int, row: bytes, clear: bytes) -> bytes:
    """A PNG of 4 x 1 pixels with a transparent colour; Pillow writes none of these."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 4, 1, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), (b"tRNS", clear), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def greys(*values: int) -> list[tuple[int, int, int]]:
    return [(value,) * 3 for value in values]


DEEP = (0, 0x1234, 0x80FF, 0xFFFF)
IMAGES: dict[str, tuple[str, bytes, Any]] = {
    "1 bit with a clear colour": ("0.png", png(1, 0, b"\x50", b"\0\0"), greys(255, 255, 255, 255)),
    "2 bits with a clear colour": ("0.png", png(2, 0, b"\x1b", b"\0\1"), greys(0, 255, 170, 255)),
    "4 bits with a clear colour": ("0.png", png(4, 0, b"\x05\x5f", b"\0\5"), greys(0, 255, 255, 255)),
    "8 bits with a clear colour": ("0.png", png(8, 0, b"\0\5\6\xff", b"\0\5"), greys(0, 255, 6, 255)),
    "16 bits with a clear colour": (
        "0.png",
        png(16, 0, struct.pack(">4H", *DEEP), struct.pack(">H", 0)),
        greys(255, 0x12, 0x80, 255),
    ),
    "16 bits of colour with a clear one": (
        "0.png",
        png(16, 2, struct.pack(">12H", *(v for v in DEEP for _ in range(3))), struct.pack(">3H", *[0x1234] * 3)),
        greys(0, 255, 0x80, 255),
    ),
    "a PNG named .jpg": ("0.jpg", encoded(Image.new("RGB", (8, 4), RED)), [RED, RED]),
    "a JPEG named .png": ("0.png", encoded(Image.new("RGB", (8, 4), RED), "JPEG"), [(254, 0, 0), (254, 0, 0)]),
    "CMYK": ("0.tif", encoded(Image.new("CMYK", (8, 4), (0, 255, 255, 0)), "TIFF"), [RED, RED]),
    "CMYK JPEG": ("0.jpg", encoded(Image.new("CMYK", (8, 4), (0, 255, 255, 0)), "JPEG"), [(254, 0, 0), (254, 0, 0)]),
    "grey": ("0.png", encoded(Image.new("L", (8, 4), 7)), [(7, 7, 7)] * 2),
    "grey of 16 bits": ("0.png", encoded(Image.fromarray(GREY)), AS_GREY),
    "grey of 16 bits as TIFF": ("0.tif", encoded(Image.fromarray(GREY), "TIFF"), AS_GREY),
    "grey of 16 bits as PGM": ("0.pgm", PGM, AS_GREY),
    "black and white": ("0.png", encoded(Image.new("1", (8, 4), 1)), [WHITE, WHITE]),
    "palette": ("0.png", encoded(Image.new("RGB", (8, 4), RED).quantize(4)), [RED, RED]),
    "palette with a clear colour": ("0.png", clear_palette(), [RED, WHITE]),
    "alpha": ("0.png", encoded(half_clear("RGBA")), [RED, WHITE]),
    "alpha as WebP": ("0.webp", encoded(half_clear("RGBA"), "WEBP", lossless=True), [RED, WHITE]),
    "grey with alpha": ("0.png", encoded(half_clear("LA")), [(76, 76, 76), WHITE]),
    "animated GIF": ("0.gif", frames("GIF"), [RED, RED]),
    "animated PNG": ("0.png", frames("PNG"), [RED, RED]),
    "animated WebP": ("0.webp", frames("WEBP"), [(254, 0, 0)] * 2),
    "TIFF of two pages": ("0.tif", frames("TIFF"), [RED, RED]),
}


@pytest.mark.parametrize("fault", IMAGES)
def test_images_of_any_kind_are_what_a_viewer_shows(tmp_path: Path, fault: str) -> None:
    name, content, expected = IMAGES[fault]
    image, _ = create_dataset("folder", root=folder_of(tmp_path, name, content))[0]
    row = [image.getpixel((x, 0)) for x in range(image.width)]
    assert np.array_equal(image, copy_rgb(Image.open(io.BytesIO(content))))
    found = row if len(expected) > 2 else [row[0], row[-1]]
    assert image.mode == "RGB"
    assert np.abs(np.array(found, dtype=int) - np.array(expected)).max() <= 2  # JPEG and WebP round


def many_scans() -> bytes:
    """A progressive JPEG whose last scan comes 200 times."""
    content = encoded(Image.new("RGB", (64, 64), RED), "JPEG", progressive=True)
    last = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + 200 * last + content[-2:]


def large_jpeg_2000() -> bytes:
    """A small codestream that says it has 9400 x 9400 pixels."""
    content = encoded(Image.new("RGB", (64, 64), RED), "JPEG2000", no_jp2=True)
    return content.replace(struct.pack(">II", 64, 64), struct.pack(">II", 9400, 9400))


def iptc(content: bytes) -> bytes:
    """A file of IPTC that Pillow would unpack and open as whatever it is."""
    fields = ((3, 60, b"\3\1"), (3, 20, b"\0\4"), (3, 30, b"\0\4"), (3, 120, b"\5"), (8, 10, content), (9, 10, b"\0"))
    return b"".join(struct.pack(">BBBH", 0x1C, part, tag, len(data)) + data for part, tag, data in fields)


def tiff_of_one_tile(side: int) -> bytes:
    """A TIFF of 16 x 16 pixels whose only tile has side x side."""
    data = zlib.compress(bytes(256))
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 8, 325: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def bmp_of_empty_rows(side: int) -> bytes:
    """A compressed BMP in which two bytes stand for a row."""
    rows = b"\0\0" * side + b"\0\1"
    header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(rows), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + len(rows), 0, 0, 1078) + header + bytes(1024) + rows


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n"
NO_IMAGES: dict[str, tuple[bytes, str]] = {
    "PostScript in IPTC": (iptc(POSTSCRIPT), "not an image"),
    "an icon": (encoded(Image.new("RGBA", (16, 16)), "ICO"), "not an image in a format that fgvc reads"),
    "a tile of 1.6 billion pixels": (tiff_of_one_tile(40_000), "16 x 16 pixels in tiles of 40000 x 40000"),
    "81 million pixels for Python to decode": (bmp_of_empty_rows(9000), "of this kind of BMP, more than 20000000"),
    "numbers of 32 bits": (encoded(Image.new("I", (4, 4), 70_000), "TIFF"), "32-bit numbers"),
    "fractions": (encoded(Image.new("F", (4, 4), 0.5), "TIFF"), "32-bit numbers"),
    "PostScript": (POSTSCRIPT, "not an image"),
    "a JPEG of many scans": (many_scans(), "a JPEG of more than 100 scans"),
    "many scans behind what looks like an end": (
        b"\xff\xd8\xff\xe1\0\x06\xff\xd9\xff\xd9" + many_scans()[2:],
        "a JPEG of more than 100 scans",
    ),
    "a JPEG 2000 of 88 million pixels": (large_jpeg_2000(), "9400 x 9400 pixels of JPEG 2000, more than 20000000"),
    "text that unpacks to 60 MB in a PNG": (
        encoded(Image.new("L", (4, 4)))[:33]
        + (lambda data: struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data)))(
            b"a\0\0" + zlib.compress(bytes(60_000_000), 9)
        )
        + encoded(Image.new("L", (4, 4)))[33:],
        "Decompressed data too large",
    ),
}


def test_a_photograph_with_a_video_behind_it_is_read() -> None:
    content = encoded(Image.new("RGB", (64, 64), RED), "JPEG")
    video = b"\0\2" + 200 * b"\xff\xda\0\2"  # what would be scans if the picture had no end
    assert np.array_equal(decode_rgb(io.BytesIO(content + video)), decode_rgb(io.BytesIO(content)))


@pytest.mark.parametrize("fault", NO_IMAGES)
def test_images_that_are_refused(tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[object] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *rest: called.append(rest))
    content, reason = NO_IMAGES[fault]
    (bad,) = examine_images(create_dataset("folder", root=folder_of(tmp_path, "0.jpg", content)))[0]
    assert reason in bad.reason and not called


def turned(orientation: int | bytes) -> bytes:
    """An image of 3 x 2 pixels, red at the upper left as it is stored."""
    image = Image.new("RGB", (3, 2), WHITE)
    image.putpixel((0, 0), RED)
    exif = Image.Exif()
    if isinstance(orientation, bytes):
        return encoded(image, exif=orientation)
    exif[ORIENTATION] = orientation
    return encoded(image, exif=exif.tobytes())


@pytest.mark.parametrize(
    ("orientation", "size", "red"),
    [
        *((1, (3, 2), (0, 0)), (2, (3, 2), (2, 0)), (3, (3, 2), (2, 1)), (4, (3, 2), (0, 1))),
        *((5, (2, 3), (0, 0)), (6, (2, 3), (1, 0)), (7, (2, 3), (1, 2)), (8, (2, 3), (0, 2))),
        *((9, (3, 2), (0, 0)), (b"Exif\0\0MM\0*\0\0\xff\xff", (3, 2), (0, 0)), (b"\xff" * 40, (3, 2), (0, 0))),
    ],
)
def test_own_photographs_are_upright(
    tmp_path: Path, orientation: int | bytes, size: tuple[int, int], red: tuple[int, int]
) -> None:
    image, _ = create_dataset("folder", root=folder_of(tmp_path, "0.png", turned(orientation)))[0]
    assert (image.size, image.getpixel(red)) == (size, RED)


def test_a_fingerprint_tells_upright_images_from_stored_ones_as_official_datasets_have_them(tmp_path: Path) -> None:
    path = tmp_path / "0.png"
    path.write_bytes(turned(6))
    both = (ImageDataset(Samples(["a"], [path], [0], upright=upright), tmp_path) for upright in (True, False))
    upright, stored = both
    assert fingerprint(upright) != fingerprint(stored)
    assert (upright.decode(0).size, stored.decode(0).size) == ((2, 3), (3, 2))
    assert upright.subset([0]).decode(0).size == (2, 3)
    official = create_dataset("cub", root=small_cub(tmp_path))
    official.paths[0].write_bytes(turned(6))
    assert official[0][0].size == (3, 2)  # as its boxes count


def read_images(root: Path) -> object:
    bad = examine_images(create_dataset("folder", root=root))[0]
    raise DatasetError("; ".join(f"{image.path}: {image.reason}" for image in bad))


@contextlib.contextmanager
def in_seconds(seconds: int) -> Iterator[None]:
    """What waits for ever is ended."""

    def end(*_: object) -> None:
        raise KeyboardInterrupt("it waits")  # no reader catches it

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
STAND_INS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipe": (os.mkfifo, "not a regular file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "a file without an end": (lambda path: path.symlink_to("/proc/self/pagemap"), "not a regular file"),
    "a Git LFS pointer": (lambda path: path.write_bytes(LFS), "Git LFS pointer"),
    "a web page": (lambda path: path.write_bytes(b"\n<!DOCTYPE html><html>404</html>"), "a web page"),
}
FOREIGN: dict[str, tuple[str, Callable[[Path], object]]] = {
    "image": ("a.jpg", lambda path: decoded(path)),
    "weights": ("w.safetensors", lambda path: load_weights(path)),
    "weights of PyTorch": ("w.pth", lambda path: load_weights(path)),
    "weights of a run": ("checkpoints/last.safetensors", lambda path: read_weights(RunFolder(path.parents[1]), "last")),
    "feature maps": ("a.npy", lambda path: load_features(path)),
    "summary": ("summary.json", lambda path: read_run(path.parent)),
    "configuration": ("config.yaml", lambda path: RunFolder(path.parent).read_config()),
    "predictions": ("predictions.csv", lambda path: read_predictions(path)),
    "spectrum": ("spectrum.npz", lambda path: SpectrumHistory.read(path)),
    "card": ("cub.yaml", lambda path: load_card(path.parent, "cub")),
    "archive": ("a.tar.gz", lambda path: extract(path, path.parent / "out")),
    "zip": ("a.zip", lambda path: extract(path, path.parent / "out")),
    "file that is no archive": ("a.txt", lambda path: extract(path, path.parent / "out")),
    "MATLAB file": ("a.mat", lambda path: read_mat(path, "a")),
    "list": ("a.txt", lambda path: read_lines(path)),
}


def decoded(path: Path) -> object:
    (bad,) = examine_images(ImageDataset(Samples(["a"], [path], [0]), path.parent))[0]
    raise DatasetError(f"{bad.path}: {bad.reason}")


@pytest.mark.parametrize("stand_in", STAND_INS)
@pytest.mark.parametrize("foreign", FOREIGN)
def test_what_is_no_file_or_another_one_is_named_at_once(tmp_path: Path, foreign: str, stand_in: str) -> None:
    name, read = FOREIGN[foreign]
    place, words = STAND_INS[stand_in]
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    place(path)
    # a link out of a run folder is refused for being one
    with bounded(), in_seconds(20), pytest.raises(UserError, match=f"{words}|a link out of the run folder") as caught:
        read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("foreign", ["summary", "configuration", "predictions", "card", "list", "image"])
def test_files_of_an_absurd_size_are_not_read(tmp_path: Path, foreign: str) -> None:
    name, read = FOREIGN[foreign]
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse: it takes no place on the disk
    with bounded(), pytest.raises(UserError, match=r"longer than \d+ bytes \(1099511627776\)") as caught:
        read(path)
    assert str(path) in str(caught.value)


# in a new interpreter, with the peak of its own memory: ru_maxrss begins with that of the process that started it
MEASURE = """
import re, sys
from pathlib import Path
from fgvc.data import TransformSpec, UnreadableImageError, decode_rgb
spec = TransformSpec(size=448, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", training=False)
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
for path in sys.argv[1:]:
    try:
        print(*spec(decode_rgb(Path(path))).shape)
    except UnreadableImageError as error:
        print(error)
print((peak() - before) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read as Linux shows it")
def test_an_image_takes_memory_in_proportion_to_its_pixels(tmp_path: Path) -> None:
    kinds = {"tall": ("RGB", (1, 6000)), "wide": ("L", (60_000, 1)), "long": ("RGB", (10, 1000))}
    for name, (mode, size) in (kinds | {"large": ("RGBA", (4700, 4700)), "largest": ("1", (9400, 9400))}).items():
        Image.new(mode, size).save(tmp_path / f"{name}.png", compress_level=1)
    files = [str(tmp_path / f"{name}.png") for name in ("tall", "wide", "long", "large")]
    done = subprocess.run([sys.executable, "-c", MEASURE, *files], capture_output=True, text=True, check=True, cwd=ROOT)
    tall, wide, long, large, megabytes = done.stdout.splitlines()
    assert tall == "1 x 6000 pixels, one side more than 100 times the other; cut it"
    assert wide.startswith("60000 x 1 pixels")
    assert (long, large) == ("3 448 448", "3 448 448")
    assert 100 < int(megabytes) < 237  # 22 million pixels as the file has them, and as RGB: 177
    assert decode_rgb(tmp_path / "largest.png").size == (9400, 9400)


def linked(root: Path) -> None:
    (root / "hidden").mkdir()
    shutil.copy(root / "test" / "auk" / "0.png", root / "hidden")
    (root / "train" / "auk" / "link.png").symlink_to(root / "hidden" / "0.png")


def whole_run(root: Path) -> None:
    write_run(root / "run")
    write_config(root / "run", name="x")


def text_file(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).write_text("a: 1")


FORBIDDEN: dict[str, tuple[Callable[[Path], object], str, Callable[[Path], object]]] = {
    "an image": (lambda root: folder_of(root, "0.png"), "train/auk/0.png", read_images),
    "a class": (lambda root: folder_of(root, "0.png"), "train/auk", read_images),
    "a split": (lambda root: folder_of(root, "0.png"), "train", read_images),
    "the target of a link": (lambda root: linked(folder_of(root, "0.png")), "hidden", read_images),
    "a split file": (small_cub, "cub/classes.txt", lambda root: create_dataset("cub", root=root / "cub")),
    "the images of a split file": (small_cub, "cub/images", lambda root: create_dataset("cub", root=root / "cub")),
    "a MATLAB file": (text_file("a.mat"), "a.mat", lambda root: read_mat(root / "a.mat", "a")),
    "a card": (text_file("cub.yaml"), "cub.yaml", lambda root: load_card(root, "cub")),
    "a configuration": (whole_run, "run/config.yaml", lambda root: read_run(root / "run").settings()),
    "a summary": (whole_run, "run/summary.json", lambda root: find_runs([root])),
    "weights": (text_file("w.safetensors"), "w.safetensors", lambda root: load_weights(root / "w.safetensors")),
}


@pytest.mark.parametrize("fault", FORBIDDEN)
def test_what_may_not_be_read_is_named(unprivileged: Path, fault: str) -> None:
    make, closed, read = FORBIDDEN[fault]
    make(unprivileged)
    (unprivileged / closed).chmod(0)
    with pytest.raises(UserError, match=r"(?i)permission denied") as caught:
        read(unprivileged)
    assert str(unprivileged) in str(caught.value)


def test_links_in_a_circle(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "data", "0.png")
    (root / "train" / "circle").symlink_to(root / "train" / "circle")
    assert create_dataset("folder", root=root).paths == [root / "train" / "auk" / "0.png"]
    run = write_run(tmp_path / "runs" / "a")
    (run / "itself").symlink_to(run)
    (run / "inside").mkdir()
    (run / "inside" / "up").symlink_to(run / "inside")
    assert [found.path for found in find_runs([tmp_path / "runs"])] == [run]


def test_names_of_files_are_taken_letter_for_letter(tmp_path: Path) -> None:
    for name in ("a b.png", "zwei\nZeilen.png", "žluťoučký 鳥 🐦.png", "'\"`$(x);.png", "a\u2028\x85b.png"):
        dataset = create_dataset("folder", root=folder_of(tmp_path / f"before {name}", name))
        assert (dataset.relative_paths()[0], dataset[0][0].size) == (f"train/auk/{name}", (4, 4))


def test_line_separators_of_unicode_are_part_of_a_name(tmp_path: Path) -> None:
    root = small_cub(tmp_path)
    path = create_dataset("cub", root=root).paths[0]
    path.rename(path.with_name("a\u2028b\x85.jpg"))
    replace_text("images.txt", path.name, "a\u2028b\x85.jpg")(root)
    assert create_dataset("cub", root=root).paths[0].name == "a\u2028b\x85.jpg"


@pytest.mark.parametrize("place", ["class", "file"])
def test_names_in_another_encoding_are_refused_at_once(tmp_path: Path, place: str) -> None:
    old = folder_of(tmp_path, "0.png") / "train" / ("auk" if place == "class" else "auk/0.png")
    try:
        old.rename(old.with_name(os.fsdecode(b"\xe4.png")))
    except OSError:
        pytest.skip("this file system keeps no such names")
    with pytest.raises(DatasetError, match=r"udce4.* is not Unicode \(UTF-8\); rename it"):
        create_dataset("folder", root=tmp_path)


@pytest.mark.parametrize("name", ["n" * 5000 + ".jpg", "a/" * 3000 + "0.jpg"])
def test_names_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    root = small_cub(tmp_path)
    path = create_dataset("cub", root=root).paths[0]
    replace_text("images.txt", f"{path.parent.name}/{path.name}", name)(root)
    with pytest.raises(DatasetError, match=r"(?i)name too long"):
        create_dataset("cub", root=root)


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is not here")
def test_a_fingerprint_of_names_with_line_ends(tmp_path: Path) -> None:
    root = write_miniature("imagenet", tmp_path / "root", classes=2, train_per_class=1, test_per_class=1, size=(48, 48))
    path = create_dataset("imagenet", root=root).paths[0]
    path.rename(path.with_name("a\nb\rc\\d.JPEG"))
    card = yaml.safe_load((ROOT / "datasets" / "imagenet.yaml").read_text())
    card |= {"classes": 2, "splits": {"train": 2, "test": 2}, "images_per_class": {}}
    (tmp_path / "imagenet.yaml").write_text(yaml.safe_dump(card))
    for _ in range(2):  # the second call compares with what the first has written
        prepare_dataset("imagenet", cards=tmp_path, root=root)
        os.utime(root / "train" / path.parent.name / "a\nb\rc\\d.JPEG", ns=(0, 1))
    subprocess.run(["sha256sum", "--quiet", "-c", "fingerprint.sha256"], cwd=root, check=True)


class Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def save_npz(canary: Canary, path: Path) -> None:
    np.savez(path, before=np.array([canary], dtype=object))


def save_pickle(canary: Canary, path: Path) -> None:
    path.write_bytes(pickle.dumps(canary))


def save_torch(canary: Canary, path: Path, new: bool = True) -> None:
    torch.save({"weight": torch.ones(3, 2), "bias": canary}, path, _use_new_zipfile_serialization=new)


def load_weights(path: Path) -> object:
    return load_backbone_weights(nn.Linear(2, 3), path)


def read_arrays(name: str) -> Callable[[Path], object]:
    def read(path: Path) -> object:
        run = write_run(path.parent / "run")
        shutil.copy(path, run / name)
        return read_run(run).spectrum() if name == "spectrum.npz" else read_run(run).history()

    return read


def read_weights_of_run(path: Path) -> object:
    (path.parent / "checkpoints").mkdir()
    shutil.copy(path, path.parent / "checkpoints" / "last.safetensors")
    return read_weights(RunFolder(path.parent), "last")


PICKLES = {
    "backbone.weights": (save_torch, "w.pth", load_weights),
    "backbone.weights, old format": (partial(save_torch, new=False), "w.pth", load_weights),
    "backbone.weights, bare": (save_pickle, "w.bin", load_weights),
    "weights of a run": (save_torch, "last.safetensors", read_weights_of_run),
    "spectrum": (save_npz, "s.npz", read_arrays("spectrum.npz")),
    "spectrum, bare": (save_pickle, "s.npz", read_arrays("spectrum.npz")),
    "history": (save_npz, "s.npz", read_arrays("spectrum_history.npz")),
    "MATLAB file": (save_pickle, "a.mat", lambda path: read_mat(path, "a")),
}


@pytest.mark.parametrize("fault", PICKLES)
def test_a_pickle_is_never_executed(tmp_path: Path, fault: str) -> None:
    save, name, read = PICKLES[fault]
    canary = tmp_path / "executed"
    save(Canary(canary), tmp_path / name)
    with pytest.raises(UserError, match=name.partition(".")[0] if "spectrum" not in fault else "spectrum"):
        read(tmp_path / name)
    assert not canary.exists()


SPEC = TransformSpec(size=4, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", training=False)


@pytest.mark.parametrize("save", [save_npz, save_pickle])
def test_a_pickle_in_the_feature_cache_is_computed_again(tmp_path: Path, save: Callable[[Canary, Path], None]) -> None:
    images = create_dataset("folder", root=folder_of(tmp_path / "images", "0.png"))

    def features() -> Any:
        shown = [images.with_transform(SPEC)]
        return cached_features(shown, lambda x: x, map_shape=(3, 4, 4), key_parts={}, cache_dir=tmp_path / "cache")[0]

    first = features()
    expected = first[0][0].clone()
    shape, size = list(first.shape), first.paths[0].stat().st_size
    other = tmp_path / ("other.npz" if save is save_npz else "other.npy")
    save(Canary(tmp_path / "executed"), other)
    shutil.move(other, first.paths[0])
    card = json.loads(first.paths[0].with_suffix(".json").read_text())
    first.paths[0].with_suffix(".json").write_text(json.dumps(card | {"bytes": first.paths[0].stat().st_size}))
    again = features()
    assert not again.from_cache and again[0][0].equal(expected)
    assert (list(again.shape), again.paths[0].stat().st_size) == (shape, size)
    assert not (tmp_path / "executed").exists()


def test_a_pickled_state_does_not_run_when_training_goes_on(tmp_path: Path, train_here: Train) -> None:
    once = ["run_dir=run", "trainer.max_steps=1"]
    assert train_here(tmp_path, *once).returncode == 0
    summary = tmp_path / "run" / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"status": "stopped"}))
    states = sorted((tmp_path / "run" / "checkpoints").glob("state*.pt"))
    assert states
    for state in states:
        torch.save({"progress": {"epoch": 1}, "evil": Canary(tmp_path / "executed")}, state)
        if (card := state.with_suffix(".json")).is_file():  # with a checksum that agrees
            content = state.read_bytes()
            about = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            card.write_text(json.dumps(json.loads(card.read_text()) | about))
    refused(train_here(tmp_path, *once), "state", "damaged")
    assert not (tmp_path / "executed").exists()


Header = dict[str, Any]


def safetensors(header: Header | bytes, data: bytes = bytes(36), length: int | None = None) -> bytes:
    """A file whose header may say anything of `data`."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> Header:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


GOOD = {"weight": entry(0, 24, [3, 2]), "bias": entry(24, 36, [3])}
LIES: dict[str, tuple[bytes, str]] = {
    "no header": (b"", "cannot be read"),
    "a header of 2^62 bytes": (safetensors(GOOD, length=1 << 62), "cannot be read"),
    "no JSON": (safetensors(b"{" * 50), "cannot be read"),
    "offsets beyond the end": (safetensors(GOOD | {"bias": entry(24, 1 << 40, [1 << 38])}), "cannot be read"),
    "a shape whose size overflows": (safetensors(GOOD | {"bias": entry(24, 36, [1 << 63, 1 << 63])}), "cannot be read"),
    "wrong shapes": (safetensors(GOOD | {"weight": entry(0, 24, [2, 3])}), r"shape .*\(2, 3\) for \(3, 2\)"),
    "no tensors": (safetensors({}, b""), "holds no named tensors"),
}


@pytest.mark.parametrize("fault", LIES)
def test_safetensors_that_lie(tmp_path: Path, fault: str) -> None:
    content, words = LIES[fault]
    path = tmp_path / "w.safetensors"
    path.write_bytes(safetensors(GOOD))
    load_weights(path)
    path.write_bytes(content)
    with bounded(), pytest.raises(WeightsError, match=words) as caught:
        load_weights(path)
    assert str(path) in str(caught.value)
    if words == "cannot be read":
        with pytest.raises(RunError, match=r"last\.safetensors"):
            read_weights_of_run(path)


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Python's memory stays below 100 MB, and the time below ten seconds on the busiest machine."""
    tracemalloc.start()
    start = time.process_time()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 100_000_000
        assert time.process_time() - start < 10
    finally:
        tracemalloc.stop()


def laughs(first: str, join: Callable[[str], str]) -> str:
    """Forty levels, each of which stands for the one before it ten times over."""
    lines = [f"a0: {first}"]
    lines += [f"a{level}: {join(f'a{level - 1}')}" for level in range(1, 40)]
    return "\n".join(lines)


BOMBS = {
    "aliases": (
        laughs("&a0 [x]", lambda old: f"&a{int(old[1:]) + 1} [{', '.join([f'*{old}'] * 10)}]"),
        "line 2: the alias",
    ),
    "merged aliases": (
        laughs("&a0 {k: v}", lambda old: f"&a{int(old[1:]) + 1} {{<<: [{', '.join([f'*{old}'] * 10)}]}}"),
        r"line 2: the alias \*a0",
    ),
    "a list in itself": ("a: &a [*a]", r"the alias \*a"),
    "interpolations": (laughs("x", lambda old: f'"{f"${{{old}}}" * 10}"'), "the interpolation"),
    "the environment": ("title: ${oc.env:HOME}", "the interpolation"),
    "tags": ("title: !!python/object/apply:os.mkdir [executed]", "the tag"),
    "a tag of YAML's own": ("classes: !!int x", "the tag"),
    "brackets": ("a: " + "[" * 400, "nested deeper than 32"),
    "dashes": ("- " * 20_000, "nested deeper than 32"),
    "length": ("title: " + "x" * (1 << 24), "longer than"),
    "many settings": ("\n".join(f"k{number}: 0" for number in range(12_000)), "longer than"),
    "a number of 5000 digits": ("seed: " + "9" * 5000, "a number of 5000 characters"),
    "a number of 5000 digits in hexadecimal": ("seed: 0x" + "f" * 5000, "a number of 5002 characters"),
    "a day that is none": ("seed: 2020-99-99", "."),
    "a number in place of all": ("3", "."),
    "bytes that are no UTF-8": ("title: \udcff", "utf-8"),
}
YAML_READERS: dict[str, tuple[str, Callable[[Path], object], type[UserError]]] = {
    "card": ("cub.yaml", lambda root: load_card(root, "cub"), ConfigError),
    "run": ("config.yaml", lambda root: read_run(root).settings(), RunError),
    "run to go on with": ("config.yaml", lambda root: RunFolder(root).read_config(), RunError),
}


@pytest.mark.parametrize("reader", YAML_READERS)
@pytest.mark.parametrize("fault", BOMBS)
def test_yaml_bombs(tmp_path: Path, fault: str, reader: str) -> None:
    text, words = BOMBS[fault]
    name, read, kind = YAML_READERS[reader]
    root = write_run(tmp_path / "run")
    (root / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with bounded(), pytest.raises(kind, match=words) as caught:
        read(root)
    assert str(root / name) in str(caught.value)


def test_a_bomb_of_zeros_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In archives of arrays, in PyTorch's files and in MATLAB's."""
    monkeypatch.setattr("fgvc.foreign.ALLOWANCE", 1 << 20)
    run = write_run(tmp_path / "run")
    zeros = np.zeros((1, 4_000_000))
    np.savez_compressed(run / "spectrum.npz", before=zeros)
    savemat(tmp_path / "a.mat", {"a": zeros}, do_compression=True)
    torch.save(nn.Linear(2, 3).state_dict(), tmp_path / "stored.pth")
    with zipfile.ZipFile(tmp_path / "stored.pth") as stored, zipfile.ZipFile(tmp_path / "w.pth", "w", 8) as packed:
        for member in stored.namelist():
            packed.writestr(member, stored.read(member))
        packed.writestr("archive/data/9", bytes(32_000_000))
    del zeros
    with bounded():
        with pytest.raises(RunError, match=r"spectrum\.npz: .*unpacks to 32000128 bytes, more than 20 times its size"):
            read_run(run).spectrum()
        with pytest.raises(WeightsError, match=r"w\.pth cannot be read \(unpacks to 320\d+ bytes, more than 20 times"):
            load_weights(tmp_path / "w.pth")
        with pytest.raises(DatasetError, match=r"a\.mat: .*unpacks to many times its size"):
            read_mat(tmp_path / "a.mat", "a")


@pytest.mark.parametrize("form", ["zip", "upper case", "twice", "bare", "bare with a zip behind it"])
def test_a_pickle_that_asks_for_memory_alone(tmp_path: Path, form: str) -> None:
    """torch itself makes a bytearray of any size from such a file."""
    program = b"\x80\x02cbuiltins\nbytearray\nJ" + struct.pack("<i", 2_000_000_000) + b"\x85R."
    path = tmp_path / "w.pth"
    members = [("data.pkl", program), ("version", b"3\n"), ("byteorder", b"little")]
    if form == "upper case":
        members[0] = ("data.PKL", program)
    if form == "twice":
        members.append(("Data.pkl", b"\x80\x02}."))
    if not form.startswith("bare"):
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members:
                archive.writestr(f"archive/{name}", content)
    else:
        behind = io.BytesIO()
        with zipfile.ZipFile(behind, "w") as archive:
            archive.writestr("a", b"")
        path.write_bytes(program + (behind.getvalue() if form != "bare" else b""))
    words = "two members have one name" if form == "twice" else r"w\.pth is refused: it asks for builtins\.bytearray"
    with bounded(), pytest.raises(WeightsError, match=words):
        load_weights(path)


def test_tensors_that_repeat_a_few_numbers_are_a_bomb(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"weight": torch.ones(1, 2).expand(3, 2), "bias": torch.ones(3)}, path)
    load_weights(path)
    torch.save({"weight": torch.ones(1, 2).expand(30_000_000, 2), "bias": torch.ones(3)}, path)
    with (
        bounded(),
        pytest.raises(WeightsError, match=r"refused: its tensors have 240000012 bytes, more than 20"),
    ):
        load_weights(path)


def test_a_container_that_holds_itself(tmp_path: Path) -> None:
    circle: dict[str, Any] = {"weight": torch.ones(3, 2)}
    circle["state_dict"] = circle
    torch.save(circle, tmp_path / "w.pth")
    with (
        bounded(),
        in_seconds(20),
        pytest.raises(WeightsError, match=r"does not fit Linear: 1 missing \(bias\)"),
    ):
        load_weights(tmp_path / "w.pth")


def test_an_array_that_announces_a_petabyte(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    header = b"\x93NUMPY\x01\0" + struct.pack("<H", 118)
    header += f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({1 << 47},), }}".encode().ljust(117) + b"\n"
    with zipfile.ZipFile(run / "spectrum.npz", "w") as archive:
        archive.writestr("before.npy", header)
    with bounded(), pytest.raises(RunError, match=r"spectrum\.npz: cannot be read"):
        read_run(run).spectrum()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_of_a_run_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    save_file({"bias": torch.tensor([0.0, value]), "seen": torch.tensor(3)}, tmp_path / "w")
    with pytest.raises(RunError, match=r"last\.safetensors holds NaN or infinity \(bias\)"):
        read_weights_of_run(tmp_path / "w")


def nested_mat(depth: int) -> bytes:
    """Cells in cells, as a MATLAB file."""

    def element(kind: int, data: bytes) -> bytes:
        return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)

    def head(kind: int, name: bytes) -> bytes:
        return element(6, struct.pack("<II", kind, 0)) + element(5, struct.pack("<ii", 1, 1)) + element(1, name)

    parts = [element(14, head(6, b"") + element(9, struct.pack("<d", 1.0)))]
    size = len(parts[0])
    for level in range(depth):
        start = head(1, b"a" if level == depth - 1 else b"")
        parts.append(struct.pack("<II", 14, len(start) + size) + start)
        size += len(parts[-1])
    packed = zlib.compress(b"".join(reversed(parts)))
    return b"MATLAB 5.0".ljust(124) + struct.pack("<HH", 0x0100, 0x4D49) + struct.pack("<II", 15, len(packed)) + packed


def test_cells_in_cells(tmp_path: Path) -> None:
    """SciPy's reader ends its process at some thousand of them."""
    path = tmp_path / "a.mat"
    path.write_bytes(nested_mat(3))
    assert read_mat(path, "a")["a"] == [[[[1.0]]]]
    path.write_bytes(nested_mat(50_000))
    with bounded(), pytest.raises(DatasetError, match=r"a\.mat: not a readable MATLAB file"):
        read_mat(path, "a")


@pytest.mark.parametrize("wnid", ["../../out", "/tmp/out", "..", "", "n01/x", "a.JPEG", "n" + "1" * 300])
def test_a_development_kit_moves_nothing_out(tmp_path: Path, wnid: str) -> None:
    write_imagenet_kit(tmp_path / "root", [1], [(1, wnid, 0)])
    (tmp_path / "root" / "val").mkdir()
    (tmp_path / "root" / "val" / "a.JPEG").touch()
    with pytest.raises(DatasetError, match=r"meta\.mat: "):
        sort_validation(tmp_path / "root")
    assert [path.name for path in tmp_path.rglob("*.JPEG")] == ["a.JPEG"]
    assert (tmp_path / "root" / "val" / "a.JPEG").is_file()


ELSEWHERE = {
    ("name", "must be a plain file name"): ["..", "a/b.tgz", "a\\b.tgz", "C:x.tgz", "a\nb.tgz", ""],
    ("into", "must be a folder below the root"): ["/x", "a/../../x", "..\\x", "C:\\x"],
    ("url", "must begin with http"): ["file:///etc/passwd", "http://[::1", "https:///x", "ftp://x/y"],
}


@pytest.mark.parametrize(("key", "words", "value"), [(*rule, value) for rule in ELSEWHERE for value in ELSEWHERE[rule]])
def test_a_card_that_leads_elsewhere(tmp_path: Path, key: str, words: str, value: str) -> None:
    card = yaml.safe_load((ROOT / "datasets" / "cub.yaml").read_text())
    card["archives"][0][key] = value
    (tmp_path / "cub.yaml").write_text(json.dumps(card))
    with pytest.raises(ConfigError, match=rf"archives\[0\]\.{key}: {words}"):
        load_card(tmp_path, "cub")


FORMULAS = [
    "=1+1",
    "+1",
    "-5",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "\n=1",
    " =1",
    "＝1",
    "'=1",
    "''-",
    "'",
    "'a",
    "a=b",
    '=X("y")',
]
NAMES = [*FORMULAS, "NA", "nan", "None", "007", "1e5", "true", "", "a,b", 'a"b', "zwei\nZeilen", "ünï"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("epoch," * 2000 + "epoch\n", "more than 1000 columns"),
        ("path,target,predicted,confidence\n" + "a,1,1,1\n" * 600_000, "more than 2097152 cells"),
    ],
    ids=["columns", "cells"],
)
def test_a_csv_of_too_many_cells_is_not_read(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "predictions.csv").write_text(content)
    with pytest.raises(RunError, match=words):
        read_predictions(tmp_path / "predictions.csv")


def test_predictions_of_inaturalist_are_read(tmp_path: Path) -> None:
    row = f"val/{'x' * 120}.jpg,1,1,0.5,{'y' * 75},{'y' * 75},1\n"
    file = tmp_path / "predictions.csv"
    file.write_text("path,target,predicted,confidence,target_class,predicted_class,rank\n" + row * 100_000)
    assert len(read_predictions(file)) == 100_000


def test_csv_loses_nothing(tmp_path: Path) -> None:
    table = pd.DataFrame({"=class": NAMES, "number": -np.arange(len(NAMES)) / 2})
    (tmp_path / "a.csv").write_bytes(to_csv(table).encode())
    read = read_csv(tmp_path / "a.csv", ("=class", "number"), names=("=class",))
    assert read_csv(tmp_path / "a.csv", ("=class", "number"), as_text=True)["=class"].tolist() == NAMES
    assert read["=class"].tolist() == NAMES and read["number"].tolist() == table["number"].tolist()


def test_a_run_on_classes_of_any_name(tmp_path: Path, here: Train) -> None:
    """From the images to the tables, in a folder with blanks in its name."""
    names = ["=1+1", "007", "NA", "zwei\nZeilen", "ünï, $\\frac{$", "\x1b]0;owned\x07\x9b2J", "\u202egnp\u2066.x"]
    root = tmp_path / "own images"
    for target, name in enumerate(names):
        for split, number in (("train", 0), ("train", 1), ("test", 2)):
            path = root / split / name / f"@{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), (40 * target, 90 * number, 0)).save(path)
    small = [setting for setting in SMALL if "dataset=" not in setting and "options" not in setting]
    place = ["dataset=folder", f"dataset.root={root}", "dataset.name=own", "run_dir=a run"]
    shown = [succeeded(here("train.py", *small, *place, "trainer.epochs=1", "method=gap", cwd=tmp_path))]
    for script, *arguments in (
        ("evaluate.py", "a run"),
        ("predict.py", "a run", root / "test", "--csv", "p.csv"),
        ("predict.py", "a run", root / "test" / names[-1] / "@2.png", "--top", "9", "--overlay", "drawn"),
        ("make_tables.py", "a run"),
    ):
        shown.append(succeeded(here(script, *arguments, cwd=tmp_path)))
    refused(done := run("predict.py", "a run", root / "\x1b[2J\u202e\r", cwd=tmp_path), "\\x1b[2J\\u202e\\r")
    text = "".join([*(done.stdout for done in shown), done.stderr])
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e-\u200f\u202a-\u202e\u2066-\u2069]", text)
    assert "zwei\\nZeilen" in text and "\nZeilen" not in text and "\\x1b]0;owned" in text
    for file in ("predictions.csv", "predictions-last.csv"):
        found = read_predictions(tmp_path / "a run" / file)
        assert sorted(found["target_class"]) == sorted(names)
        assert sorted(found["path"]) == sorted(f"test/{name}/@2.png" for name in names)
        assert "\n=1+1" in (tmp_path / "a run" / "per_class-last.csv").read_text()


def test_a_folder_deeper_than_pythons_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.new("RGB", (4, 4)).save(tmp_path / name / f"{number}.png")
    monkeypatch.chdir(tmp_path / "a")
    for _ in range(1100):  # step by step, since a path has 4096 characters at most
        Path("d").mkdir()
        os.chdir("d")
    bottom = os.open(".", os.O_RDONLY)
    os.chdir(tmp_path)
    try:
        assert len(image_files(tmp_path)) == 4
        assert create_dataset("folder", root=tmp_path).classes == ["a", "b"]
    finally:  # pytest cannot delete it
        os.fchdir(bottom)
        os.close(bottom)
        for _ in range(1100):
            os.chdir("..")
            Path("d").rmdir()
