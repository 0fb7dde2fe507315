"""A finished table: blocks to read, tidy frames to compute with, and where each of its numbers comes from."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from fgvc.io import file_digests, to_csv
from fgvc.presentation.render import Block, to_html, to_latex, to_markdown

FORMATS = ("md", "tex", "html", "csv")


@dataclass(frozen=True)
class Table:
    """A table by name.

    Attributes:
        title: Title of the whole.
        blocks: Blocks to read.
        frames: Tidy frames by the name of their CSV file, one row a cell or a row of cells; those made from runs have
            the columns seeds, runs (the paths, in CSV "; " between them) and commits.
        notes: Lines on what was left out, or is doubtful.
    """

    title: str
    blocks: list[Block]
    frames: Mapping[str, pd.DataFrame]
    notes: list[str] = field(default_factory=list)

    def texts(self, name: str) -> dict[str, str]:
        """Content by file name: NAME.md, NAME.tex, NAME.html, and a CSV for each frame.

        The notes stand under the first block.
        """
        blocks = [replace(block, notes=[*block.notes, *self.notes]) for block in self.blocks[:1]] + self.blocks[1:]
        texts = {
            f"{name}.md": to_markdown(self.title, blocks),
            f"{name}.tex": to_latex(blocks),
            f"{name}.html": to_html(self.title, blocks),
        }
        return texts | {f"{frame}.csv": to_csv(table) for frame, table in self.frames.items()}

    def provenance(self) -> list[dict[str, Any]]:
        """Every row of the frames with the runs behind it: path, sha256 of config.yaml (None without one)."""
        cells = []
        for name, frame in self.frames.items():
            for row in frame.to_dict("records"):
                runs = row.pop("runs", None)
                values = {str(key): _plain(value) for key, value in row.items() if not _missing(value)}
                paths = [] if _missing(runs) else runs
                cells.append({"table": name, **values, "runs": [_run(Path(path)) for path in paths]})
        return cells


def _run(path: Path) -> dict[str, str | None]:
    config = path / "config.yaml"
    digest = file_digests(config, ["sha256"])["sha256"] if config.is_file() else None
    return {"path": str(path), "config_sha256": digest}


def _missing(value: object) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and value != value)


def _plain(value: Any) -> Any:
    number = value.item() if hasattr(value, "item") else value
    return str(number) if isinstance(number, float) and math.isinf(number) else number  # JSON knows no infinity
