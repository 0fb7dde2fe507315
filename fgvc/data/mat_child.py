"""A process of its own that reads a MATLAB file for `fgvc.data.mat`: a damaged file may end SciPy's process.

A script: it imports neither fgvc nor PyTorch. Arguments: bytes of memory that it may take, names of variables. It reads
the file from its standard input and answers in JSON: the variables and the names of all, or an error and its type.
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import loadmat, whosmat


def main() -> None:
    room, names = int(sys.argv[1]), sys.argv[2:]
    file: Any = sys.stdin.buffer
    _limit_memory(room)
    try:
        content = loadmat(file, variable_names=names)
        file.seek(0)
        known = names if all(name in content for name in names) else [name for name, *_ in whosmat(file)]
        variables = {name: _plain(content[name]) for name in names if name in content}
        answer = json.dumps({"variables": variables, "known": known})
    except Exception as error:  # SciPy raises many types
        answer = json.dumps({"error": str(error), "type": type(error).__name__})
    sys.stdout.write(answer)


def _limit_memory(room: int) -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _plain(value: Any) -> Any:
    """A struct array as a list by field, any other array as a list, in MATLAB's order (column by column)."""
    kind = value.dtype.kind if isinstance(value, np.ndarray) else "?"
    if kind == "V":
        return {name: [_plain(item) for item in value[name].ravel(order="F")] for name in value.dtype.names}
    if kind == "O":
        return [_plain(item) for item in value.ravel(order="F")]
    if kind in "biufU":
        return value.ravel(order="F").tolist()
    raise ValueError(f"a {type(value).__name__} of {value.dtype}")


if __name__ == "__main__":
    main()
