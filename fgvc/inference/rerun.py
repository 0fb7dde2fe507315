"""Repetition of a finished run from its folder."""

import copy
from pathlib import Path

from fgvc.errors import RunError
from fgvc.inference.restore import read_classes, require_classes
from fgvc.io import default_output
from fgvc.provenance import commit_label
from fgvc.runs.config import RunConfig
from fgvc.runs.folder import RunFolder
from fgvc.training.run import other_images, train_run
from fgvc.training.setup import open_split


def rerun(path: Path, *, run_dir: Path | None = None, root: str | None = None, cache: str | None = None) -> Path:
    """Repeat a run with its config.yaml and seed; its own folder is only read.

    An interrupted repetition resumes.

    Args:
        path: folder of the finished run.
        run_dir: folder of the repetition; None means `path` with "-rerun" added to its name.
        root: folder of the dataset; None means the one in the run's configuration.
        cache: folder of cached feature maps; None means the one in the run's configuration. In an empty folder they are
            computed again.

    Returns:
        The folder of the repetition.

    Raises:
        RunError: not a finished run, a configuration from another version that cannot be read, another dataset, other
            images than those that fgvc divided for the run, or `run_dir` holds a finished run.
        As `train_run`.
    """
    folder = RunFolder(path)
    config = _read_config(folder)
    if not folder.is_finished():
        status = folder.read_summary().get("status")
        advice = "repeat its runs" if status == "averaged" else f"finish it: fgvc train ... run_dir={path}"
        raise RunError(f"{path}: status {status}, so there is no result to compare with; {advice}")
    named = path if path.name not in ("", "..") else path.resolve()
    target = default_output(named.parent, f"{named.name}-rerun") if run_dir is None else run_dir
    _require_free(target, path)
    again = copy.deepcopy(config)
    again.run_dir, again.resume = str(target), "auto"
    again.dataset.root = config.dataset.root if root is None else root
    again.cache.dir = config.cache.dir if cache is None else cache
    require_classes(again, open_split(again, "test").classes, read_classes(folder))
    # a split of its own would be another one; where the dataset has a split, the comparison tells what changed
    if folder.split_file.is_file() and (others := other_images(folder, again)):
        raise RunError(f"{path} divided {others}, which would be divided otherwise; give its own images: --root")
    return train_run(again, rerun_of=path)


def _read_config(folder: RunFolder) -> RunConfig:
    try:
        return folder.read_config()
    except RunError as error:
        if not folder.config_file.is_file():
            raise
        summary = folder.read_summary()
        version = (summary.get("versions") or {}).get("fgvc", "an unknown version")
        source = commit_label(summary)
        raise RunError(
            f"{error}\nThe run was made by fgvc {version}" + (f", commit {source}" if source else "") + "; repeat it "
            "with that version, or compare its folder with another run: --compare OTHER"
        ) from error


def _require_free(target: Path, path: Path) -> None:
    """Raise RunError if a repetition in `target` would change the run in `path`, or `target` holds a finished run."""
    ours, theirs = target.resolve(), path.resolve()
    if ours == theirs or theirs in ours.parents:
        raise RunError(f"{target} is in the folder of the run itself, which is never changed; give another --run-dir")
    if RunFolder(target).is_finished():
        raise RunError(
            f"{target} holds a finished run; compare with it by --compare {target}, delete it, or give another "
            "--run-dir to train again"
        )
