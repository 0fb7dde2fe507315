"""Two classifiers on the same images."""

from dataclasses import dataclass

import pandas as pd
from scipy.stats import binomtest

from fgvc.errors import RunError


@dataclass(frozen=True)
class McNemar:
    """How two classifiers agree on the same images, and the probability of a difference as large by chance.

    Attributes:
        both: images that both get right.
        only_first: that only the first gets right.
        only_second: that only the second gets right.
        neither: that both get wrong.
        p_value: two-sided, exact: of the images on which they differ, each is the first's with probability 1/2.
    """

    both: int
    only_first: int
    only_second: int
    neither: int
    p_value: float

    @property
    def images(self) -> int:
        return self.both + self.only_first + self.only_second + self.neither


def mcnemar(first: pd.DataFrame, second: pd.DataFrame) -> McNemar:
    """Exact McNemar test of two frames of predictions, paired by path. [McNemar, Psychometrika 1947]

    It speaks of these two sets of weights on such images, not of other seeds of the same methods.

    Raises:
        RunError: no rows, a path twice, or the frames differ in their images or targets.
    """
    columns = ["path", "target", "predicted"]
    for frame in (first, second):
        absent = [column for column in columns if column not in frame]
        if absent or frame.empty or frame["path"].duplicated().any():
            problem = f"no column {', '.join(absent)}" if absent else "no rows" if frame.empty else "a path twice"
            raise RunError(f"predictions have {problem}; give those of a run")
    pairs = first[columns].merge(second[columns], on="path", suffixes=("_first", "_second"))
    if not len(first) == len(second) == len(pairs):
        raise RunError(
            f"predictions of {len(first)} and {len(second)} images have {len(pairs)} in common; "
            "give two evaluations of the same test split"
        )
    if (pairs["target_first"] != pairs["target_second"]).any():
        path = pairs.loc[pairs["target_first"] != pairs["target_second"], "path"].iloc[0]
        raise RunError(f"the predictions differ in the target of {path}; give two evaluations of the same test split")
    a = pairs["predicted_first"] == pairs["target_first"]
    b = pairs["predicted_second"] == pairs["target_second"]
    only_first, only_second = int((a & ~b).sum()), int((b & ~a).sum())
    differing = only_first + only_second
    p_value = float(binomtest(only_first, differing).pvalue) if differing else 1.0
    return McNemar(int((a & b).sum()), only_first, only_second, int((~a & ~b).sum()), p_value)
