"""Whether a long run grows: samples of its memory and open files, and a trend with an interval."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import theilslopes

from fgvc.errors import RunError
from fgvc.foreign import read_json
from fgvc.io import read_csv, write_json_atomic

SAMPLE_COLUMNS = (
    *("seconds", "epoch", "rss_mb", "anonymous_mb", "open_files", "threads", "processes"),
    *("cache_mb", "run_mb"),
)
"""Of the CSV file, a row a sample; `benchmarks/watch.py` says what each counts."""

_BLOCKS = 20
_FEWEST_BLOCKS = 5
_LONGEST_WARM_UP = 600.0  # seconds


@dataclass(frozen=True)
class SoakRecord:
    """How a soak was run and how it ended.

    Attributes:
        started: date and time.
        commit, machine: as of the benchmarks.
        command: of the run that was watched.
        minutes: that were asked for.
        exit_status: of the run; negative: the signal that ended it.
        stopped: whether the soak ended it, as its time was over.
    """

    started: str
    commit: str | None
    machine: dict[str, Any]
    command: list[str]
    minutes: float
    exit_status: int
    stopped: bool

    @property
    def failed(self) -> bool:
        """Whether the run ended otherwise than by itself with 0, or by the signal of a soak whose time was over."""
        return self.exit_status != 0 and not (self.stopped and self.exit_status in (143, -15))


def save_soak_record(path: Path, record: SoakRecord) -> None:
    write_json_atomic(path, asdict(record))


def load_soak_record(path: Path) -> SoakRecord:
    """Read what `save_soak_record` wrote. Raises RunError where it is missing or damaged."""
    try:
        return SoakRecord(**read_json(path))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{path}: no record of a finished soak ({error})") from error


@dataclass(frozen=True)
class Growth:
    """Trend of one column after the warm-up.

    Attributes:
        an_hour: slope per hour, the median of the slopes between all pairs of blocks (Theil and Sen).
        lower, upper: its 95 % interval.
        level: of the line at the start of the soak.
        noise: spread of the samples around the line, 1.4826 times their median absolute deviation.
        least, most: of the samples.
        hours, epochs: they span.
    """

    an_hour: float
    lower: float
    upper: float
    level: float
    noise: float
    least: float
    most: float
    hours: float
    epochs: int

    @property
    def an_epoch(self) -> float:
        """The slope per epoch; NaN where none ended after the warm-up."""
        return self.an_hour * self.hours / self.epochs if self.epochs else float("nan")

    @property
    def beyond_noise(self) -> bool:
        """Whether the interval lies above zero."""
        return self.lower > 0


def load_samples(path: Path) -> pd.DataFrame:
    """Read the samples of a soak.

    Raises:
        RunError: the file is missing or damaged, see `read_csv`.
    """
    numbers = tuple(name for name in SAMPLE_COLUMNS if name != "anonymous_mb")  # which not every system tells
    return read_csv(path, SAMPLE_COLUMNS, numbers=numbers)


def memory_column(samples: pd.DataFrame) -> str:
    """The measure of memory to judge by: of mapped files resident memory holds what the system likes to keep."""
    return "rss_mb" if samples["anonymous_mb"].isna().any() else "anonymous_mb"


def warm_up_end(samples: pd.DataFrame) -> float:
    """Seconds after which growth counts: a sixth of the samples' time, at most ten minutes, and one whole epoch."""
    seconds, trained = samples["seconds"], samples.loc[samples["epoch"] >= 1, "seconds"]
    if trained.empty:
        raise RunError("the run that was watched finished no epoch: there is nothing to judge; give more --minutes")
    return max(float(trained.iloc[0]), min(_LONGEST_WARM_UP, float(seconds.iloc[-1]) / 6))


def _after_warm_up(samples: pd.DataFrame) -> pd.DataFrame:
    steady: pd.DataFrame = samples[samples["seconds"] >= warm_up_end(samples)]
    return steady


def block_means(samples: pd.DataFrame, column: str) -> pd.DataFrame:
    """Means of a column, and of `seconds`, over 20 blocks of equal time after the warm-up; fewer below 40 samples.

    Raises:
        RunError: fewer than 10 samples after the warm-up, or no epoch.
    """
    steady = _after_warm_up(samples)
    blocks = min(_BLOCKS, len(steady) // 2)
    if blocks < _FEWEST_BLOCKS:
        raise RunError(f"{len(steady)} samples after the warm-up are too few for a trend; give more --minutes")
    block = pd.cut(steady["seconds"], blocks, labels=False)
    means: pd.DataFrame = steady[["seconds", column]].groupby(block.to_numpy()).mean()
    return means


def growth(samples: pd.DataFrame, column: str) -> Growth:
    """Fit a line to a column after the warm-up.

    The line goes through the means of blocks: samples follow the phases of an epoch and are far from independent, which
    would make an interval of theirs too narrow. Means, not medians: with workers coming and going memory has two
    levels, between which a median jumps.

    Raises:
        RunError: as `block_means`.
    """
    means = block_means(samples, column)
    slope, level, lower, upper = (float(part) for part in theilslopes(means[column], means["seconds"] / 3600, 0.95))
    steady = _after_warm_up(samples)
    hours, values = steady["seconds"].to_numpy() / 3600, steady[column].to_numpy()
    rest = values - level - slope * hours
    noise = 1.4826 * float(np.median(np.abs(rest - np.median(rest))))
    epochs = int(steady["epoch"].iloc[-1] - steady["epoch"].iloc[0])
    spread = (float(values.min()), float(values.max()), float(hours[-1] - hours[0]))
    return Growth(slope, lower, upper, level, noise, *spread, epochs)
