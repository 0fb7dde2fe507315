"""Pages with tables and figures made from committed files, and a check that they are current.

A table stands in a page between `<!-- table: NAME -->` and `<!-- end of table -->`. A figure is a PNG that carries the
checksum of the files it was drawn from.
"""

import hashlib
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from fgvc.errors import ConfigError, RunError, UserError
from fgvc.io import atomic_path, write_text_atomic
from fgvc.presentation.style import figure_style

T = TypeVar("T")

_TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(\n<!-- end of table -->)", re.DOTALL)
_END = "<!-- end of table -->"
_SOURCE = "Source"
_VERSION = "Matplotlib"
TOLERANCE = 1.0
"""Root mean square difference of two drawings, of 255 grey levels, up to which they count as the same."""


@dataclass(frozen=True)
class FromFiles(Generic[T]):
    """A table or figure made from committed files alone.

    Attributes:
        files: Paths below the root of the pages.
        make: Function of these paths, in that order.
    """

    files: tuple[str, ...]
    make: Callable[..., T]

    def __call__(self, root: Path) -> T:
        """Make it. Raises ConfigError where a file is missing, RunError where one is damaged, or as `make`."""
        self.checksum(root)  # all files are there, also those that `make` would do without
        try:
            return self.make(*(root / file for file in self.files))
        except UserError:
            raise
        except (KeyError, TypeError, ValueError) as error:  # a column that is not there, text in place of a number
            names = ", ".join(str(root / file) for file in self.files)
            reason = f"{type(error).__name__}: {error}"
            raise RunError(f"{names}: nothing can be made of it ({reason}); restore the kept file") from error

    def checksum(self, root: Path) -> str:
        """sha256 of the files' content. Raises ConfigError where one is missing."""
        digest = hashlib.sha256()
        for file in self.files:
            try:
                digest.update((root / file).read_bytes())
            except OSError as error:
                raise ConfigError(f"{root / file}: cannot be read ({error.strerror}); restore the kept file") from error
        return digest.hexdigest()


def table_names(page: Path) -> list[str]:
    """Names of the tables in a page.

    Raises:
        ConfigError: a table without its end, or an end without its table.
    """
    text = page.read_text(encoding="utf-8")
    names = [match[2] for match in _TABLE.finditer(text)]
    if not len(names) == text.count("<!-- table:") == text.count(_END):
        raise ConfigError(f"{page}: a '<!-- table: NAME -->' or '{_END}' without the other, each on a line of its own")
    return names


def page_text(page: Path, tables: Mapping[str, FromFiles[str]], root: Path) -> str:
    """The page with every table made again.

    Raises:
        ConfigError: a name that is not in `tables`, a kept file is missing, or as `table_names`.
        RunError: a kept file is damaged.
    """
    unknown = sorted(set(table_names(page)) - set(tables))
    if unknown:
        raise ConfigError(f"{page}: unknown table {', '.join(unknown)}; choose one of {', '.join(tables)}")
    text = page.read_text(encoding="utf-8")
    return _TABLE.sub(lambda found: f"{found[1]}\n{tables[found[2]](root).strip()}\n{found[3]}", text)


def stale_pages(pages: list[Path], tables: Mapping[str, FromFiles[str]], root: Path) -> list[Path]:
    """Pages that differ from `page_text`. Raises as it does."""
    return [page for page in pages if page.read_text(encoding="utf-8") != page_text(page, tables, root)]


def write_pages(pages: list[Path], tables: Mapping[str, FromFiles[str]], root: Path) -> list[Path]:
    """Rewrite the stale pages; returns them. Raises as `page_text`."""
    stale = stale_pages(pages, tables, root)
    for page in stale:
        write_text_atomic(page, page_text(page, tables, root))
    return stale


def draw_figure(path: Path, kept: FromFiles[Figure], root: Path) -> None:
    """Draw a figure to a PNG that says which files it shows. Raises ConfigError, RunError as the files' readers."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(_png(kept, root))


def figure_is_current(path: Path, kept: FromFiles[Figure], root: Path) -> bool:
    """Whether a PNG shows the files as they are, and looks as it would if it were drawn now.

    The looks are compared where the same version of matplotlib drew it; another one may set letters differently.
    """
    if not path.is_file():
        return False
    with Image.open(path) as image:
        found = dict(image.text)
        pixels = np.asarray(image.convert("L"), dtype=np.float64)
    if found.get(_SOURCE) != kept.checksum(root):
        return False
    if found.get(_VERSION) != mpl.__version__:
        return True
    with Image.open(io.BytesIO(_png(kept, root))) as image:
        expected = np.asarray(image.convert("L"), dtype=np.float64)
    return pixels.shape == expected.shape and float(np.sqrt(((pixels - expected) ** 2).mean())) <= TOLERANCE


def _png(kept: FromFiles[Figure], root: Path) -> bytes:
    metadata = {_SOURCE: kept.checksum(root), _VERSION: mpl.__version__}
    buffer = io.BytesIO()
    figure = kept(root)
    with figure_style():
        figure.savefig(buffer, format="png", metadata=metadata)
    return buffer.getvalue()
