"""Descriptors of image files as a table: in full, or reduced by PCA."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.decomposition import PCA

from fgvc.errors import ConfigError
from fgvc.inference.predict import Predictor, map_files
from fgvc.io import output_path, require_own, to_csv

ENDINGS = (".parquet", ".npz", ".csv")
"""Formats of `Embeddings.write`."""
_KIND = "embeddings"  # see `fgvc.io.output_path`


@dataclass(frozen=True)
class Embeddings:
    """Descriptors of image files.

    Attributes:
        paths: Paths of the N files that could be read.
        descriptors: Their descriptors (N, D) float32.
        errors: Reason for each file that is left out, by its path.
        note: What a reduction did; empty for none.
    """

    paths: list[Path]
    descriptors: np.ndarray
    errors: dict[Path, str]
    note: str = ""

    def reduced(self, size: int) -> "Embeddings":
        """Return the first `size` principal components (N, size) of these descriptors, by scikit-learn's PCA.

        The components are those of these very images: other images, or a part of them, have others.

        Raises ConfigError: `size` is below 1 or above min(N - 1, D).
        """
        (count, width), shown = self.descriptors.shape, f"{len(self.paths):,} images"
        require_components(size, count, width)
        pca = PCA(size, random_state=0)
        components = pca.fit_transform(self.descriptors).astype(np.float32)
        kept = 100 * float(pca.explained_variance_ratio_.sum())
        note = f"PCA fitted on these {shown}: {size:,} of {width:,} numbers, {kept:.1f} % of the variance"
        return replace(self, descriptors=components, note=note)

    def table(self) -> pd.DataFrame:
        """One row per image: path, d0, d1, ... float32."""
        columns = [f"d{number}" for number in range(self.descriptors.shape[1])]
        numbers = pd.DataFrame(self.descriptors, columns=columns)
        paths = pd.DataFrame({"path": [str(path) for path in self.paths]})
        return pd.concat([paths, numbers], axis=1)

    def write(self, file: Path) -> None:
        """Write the table as .parquet or .csv, or as .npz with the arrays `paths` (N,) and `descriptors` (N, D).

        Raises:
            ConfigError: another ending.
            FileExistsError: as `require_free`.
        """
        require_free(file)
        with output_path(file, _KIND) as temporary:
            if file.suffix == ".npz":
                np.savez(temporary, paths=np.array([str(path) for path in self.paths]), descriptors=self.descriptors)
            elif file.suffix == ".parquet":
                self.table().to_parquet(temporary, index=False)
            else:
                temporary.write_text(to_csv(self.table(), None), encoding="utf-8")


def require_components(size: int, count: int, width: int) -> None:
    """Raise ConfigError if `count` descriptors of `width` numbers do not have `size` principal components."""
    largest = min(count - 1, width)
    if not 1 <= size <= largest:
        fix = f"give a number from 1 to {largest}" if largest > 0 else "give two or more images"
        raise ConfigError(f"pca={size} does not fit {count:,} images with descriptors of {width:,} numbers; {fix}")


def require_free(file: Path) -> None:
    """Check the name of a file of embeddings before the work.

    Raises:
        ConfigError: it has an unknown ending.
        FileExistsError: something else lies there, see `fgvc.io.require_own`.
    """
    if file.suffix not in ENDINGS:
        raise ConfigError(f"{file}: unknown ending {file.suffix!r}; choose one of {', '.join(ENDINGS)}")
    require_own(file, _KIND)


def embed_files(predictor: Predictor, paths: Sequence[Path]) -> Embeddings:
    """Return the descriptors of image files; a file that cannot be read is left out, with the reason in `errors`."""
    found: dict[Path, np.ndarray] = {}
    errors: dict[Path, str] = {}
    for path, _, result in map_files(predictor, paths, lambda batch: list(predictor.descriptors(batch))):
        if isinstance(result, str):
            errors[path] = result
        else:
            found[path] = result.numpy()
    width = predictor.model.head.pooling.out_features
    descriptors = np.stack([*found.values()]) if found else np.empty((0, width), np.float32)
    return Embeddings([*found], descriptors, errors)
