"""What a process and its children hold, read from outside."""

from dataclasses import astuple, dataclass
from pathlib import Path

import psutil

MB = 2**20


@dataclass(frozen=True)
class Usage:
    """Of one process, or summed over several.

    Attributes:
        rss_mb: resident memory in MiB; pages that processes share, and of mapped files, count in each.
        anonymous_mb: memory in MiB that no file backs, shared pages counted once; NaN where the system does not say.
        open_files: file descriptors.
        threads: of them all.
        processes: how many they are.
    """

    rss_mb: float
    anonymous_mb: float
    open_files: int
    threads: int
    processes: int


def tree_usage(root: psutil.Process) -> Usage | None:
    """Sum over a process and its children of any depth; None where the process has ended."""
    try:
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return None
    found = [usage for usage in map(_usage, processes) if usage is not None]
    return Usage(*map(sum, zip(*map(astuple, found), strict=True))) if found else None


def _usage(process: psutil.Process) -> Usage | None:
    """Of one process; None where it ends meanwhile, as workers of a data loader do."""
    try:
        with process.oneshot():
            rss = process.memory_info().rss / MB
            return Usage(rss, _anonymous_mb(process.pid), process.num_fds(), process.num_threads(), 1)
    except (psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError, FileNotFoundError):
        return None


def _anonymous_mb(pid: int) -> float:
    """The share of a process in memory that no file backs. Raises FileNotFoundError, ProcessLookupError as it ends."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except FileNotFoundError:
        if Path(f"/proc/{pid}").exists() or not Path("/proc/self").exists():
            return float("nan")  # no Linux, or an old one
        raise
    except PermissionError:
        return float("nan")
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:")]
    return kilobytes[0] / 2**10 if kilobytes else float("nan")


def folder_mb(folder: Path) -> float:
    """Size of all files below a folder in MiB; files that vanish meanwhile do not count."""
    size = 0
    for path in folder.rglob("*"):
        try:
            status = path.lstat()
        except OSError:
            continue
        size += status.st_size if not path.is_dir() else 0
    return size / MB
