"""Execute the notebooks of examples/ into build/notebooks, where the documentation takes them from.

python tools/execute_notebooks.py            # those older than their source
python tools/execute_notebooks.py --all

An example is a Python file in jupytext's percent format: it can be read, linted and compared like any other. It is
executed in an empty folder; an error in a cell, or an output that names a folder of this machine, ends the command.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

os.environ["PYTHONWARNINGS"] = "ignore:IProgress"  # tqdm's: widgets, which a page would not show anyway

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for path in (ROOT / "examples").glob("*.py") if "jupytext:" in path.read_text(encoding="utf-8"))
EXECUTED = ROOT / "build" / "notebooks"


def execute(source: Path) -> nbformat.NotebookNode:
    """The notebook of a Python file with its outputs.

    Raises:
        CellExecutionError: an error in a cell.
        ValueError: an output names a folder of this machine.
    """
    notebook = jupytext.read(source)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
        private = [path for path in (folder, str(ROOT), str(Path.home()), sys.prefix)]
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
        text = str(cell.get("outputs", ""))
        for path in private:
            if path in text:
                raise ValueError(f"{source.name}: an output names {path}; print what a reader can use")
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="also those that are newer than their source")
    every = parser.parse_args().all

    EXECUTED.mkdir(parents=True, exist_ok=True)
    for source in SOURCES:
        target = EXECUTED / f"{source.stem}.ipynb"
        if not every and target.is_file() and target.stat().st_mtime > source.stat().st_mtime:
            continue
        start = time.monotonic()
        try:
            notebook = execute(source)
        except (CellExecutionError, ValueError) as error:
            sys.exit(f"{source.relative_to(ROOT)}: {error}")
        nbformat.write(notebook, target)
        print(f"{target.relative_to(ROOT)}: {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
