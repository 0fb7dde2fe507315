"""Train for an hour by the real command line and watch from outside whether memory or open files grow.

python benchmarks/soak.py --output soak
python benchmarks/soak.py --output soak --minutes 60 backbone.frozen=true dataset.root=data cache.max_gb=1
python benchmarks/soak.py --from soak                # report and figure once more, from the samples
"""

import argparse
import csv
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import psutil
from growth import (
    SAMPLE_COLUMNS,
    Growth,
    SoakRecord,
    growth,
    load_samples,
    load_soak_record,
    memory_column,
    save_soak_record,
)
from machine import benchmark_facts, machine_line
from soak_plot import soak_figure
from watch import folder_mb, tree_usage

from fgvc.cli import end_with_notes, exit_on_user_error
from fgvc.errors import ConfigError
from fgvc.presentation.style import save_figure
from fgvc.provenance import commit_label, source_state

TRAIN = Path(__file__).resolve().parents[1] / "scripts" / "train.py"
# small, so that an epoch takes seconds; no probe, as the spectra of all epochs, which a run keeps, grow by design
DEFAULTS = (
    *("name=soak", "dataset=synthetic", "dataset.transform.size=96", "backbone.name=test_resnet"),
    "+dataset.options={classes: 12, train_per_class: 100, test_per_class: 40, size: 96}",
    *("backbone.weights=null", "method.reduction=32", "trainer.batch_size=16"),
    *("trainer.epochs=1000000", "trainer.probe_images=0"),
)
PATIENCE = 300.0  # seconds that a run has for saving its state


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for fgvc train, after its own")
    parser.add_argument("--minutes", type=float, default=60.0, help="after which the run is told to end (default 60)")
    parser.add_argument("--interval", type=float, default=2.0, help="seconds between samples (default 2)")
    parser.add_argument("--strict", action="store_true", help="exit with 1 where memory or open files grow")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--output", type=Path, help="new folder for samples, report, run, data and cache")
    what.add_argument(
        "--from", type=Path, dest="saved", metavar="FOLDER", help="report on a finished soak, run nothing"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    given = parse_arguments(arguments)
    folder = given.saved or given.output
    if not given.saved:
        check_settings(given)
        save_soak_record(folder / "soak.json", soak(given))
    record, samples = load_soak_record(folder / "soak.json"), load_samples(folder / "soak.csv")
    if record.failed:
        end_with_notes([f"the run {ending(record)}; see the end of {folder / 'train.log'}"], strict=True)
    epochs = int(samples["epoch"].iloc[-1])
    print(f"{machine_line(record.machine)}\ncommit {record.commit or 'unknown'}, started {record.started}")
    print(f"command: {' '.join(record.command)}\n{epochs} epochs, {len(samples)} samples, {ending(record)}")
    notes = []
    for column in (memory_column(samples), "open_files"):
        found = growth(samples, column)
        print(sentence(column, found))
        if found.beyond_noise:
            notes.append(f"{column} grows")
    sizes = samples[["cache_mb", "run_mb"]].iloc[-1]
    print(f"cache {sizes['cache_mb']:.1f} MiB, run folder {sizes['run_mb']:.1f} MiB at the end")
    print(*save_figure(soak_figure(samples, f"{epochs} epochs, {ending(record)}"), folder / "soak"), sep="\n")
    end_with_notes(notes, strict=given.strict)


def check_settings(given: argparse.Namespace) -> None:
    """Raise ConfigError for a number out of range or a folder in use."""
    if not (given.minutes > 0 and given.interval > 0):
        raise ConfigError(f"--minutes {given.minutes} --interval {given.interval}: both must be above 0")
    if given.output.exists() and (not given.output.is_dir() or any(given.output.iterdir())):
        raise ConfigError(f"--output {given.output}: exists and is not an empty folder, give a new one")
    taken = [override for override in given.overrides if override.startswith(("run_dir=", "cache.dir="))]
    if taken:
        raise ConfigError(f"{taken[0]}: run and cache are watched in the folder of --output; leave it out")


def soak(given: argparse.Namespace) -> SoakRecord:
    """Run and watch until the time is over or the run ends; the samples go to soak.csv as they come."""
    folder: Path = given.output
    folder.mkdir(parents=True, exist_ok=True)
    own = [f"run_dir={folder / 'run'}", f"cache.dir={folder / 'cache'}", f"dataset.root={folder / 'data'}"]
    command = [sys.executable, str(TRAIN), *DEFAULTS, *own, *given.overrides]
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    facts, start = benchmark_facts(), time.monotonic()
    with (folder / "soak.csv").open("w", encoding="utf-8", newline="") as file, started_run(command, folder) as run:
        rows = csv.DictWriter(file, SAMPLE_COLUMNS)
        rows.writeheader()
        process = psutil.Process(run.pid)
        while run.poll() is None and (seconds := time.monotonic() - start) < 60 * given.minutes:
            if (usage := tree_usage(process)) is not None:
                sizes = {"cache_mb": folder_mb(folder / "cache"), "run_mb": folder_mb(folder / "run")}
                numbers = {"seconds": seconds, **asdict(usage), **sizes}
                row = {name: round(number, 3) for name, number in numbers.items()}
                rows.writerow(row | {"epoch": last_epoch(folder / "run" / "metrics.csv")})
                file.flush()
            time.sleep(given.interval)
        stopped = run.poll() is None
    return SoakRecord(started, commit_label(source_state()), facts, command, given.minutes, run.returncode, stopped)


@contextmanager
def started_run(command: list[str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The run, told to end on exit where it has not; its messages go to train.log."""
    with (folder / "train.log").open("wb") as log:
        run = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield run
        finally:
            if run.poll() is None:
                run.send_signal(signal.SIGTERM)
            try:
                run.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                run.kill()
                run.wait()


def last_epoch(metrics: Path) -> int:
    """Number of the last finished epoch, 0 before the first."""
    try:
        last = metrics.read_text(encoding="utf-8").splitlines()[-1]
    except (OSError, IndexError):
        return 0
    return int(last.partition(",")[0])


def ending(record: SoakRecord) -> str:
    """How the run ended."""
    how = f"told to end after {record.minutes:g} minutes" if record.stopped else "ended by itself"
    return f"{how}, exit status {record.exit_status}"


def sentence(column: str, found: Growth) -> str:
    """The verdict on one column."""
    slope = f"{found.an_hour:+.2f} an hour, 95 % [{found.lower:+.2f}, {found.upper:+.2f}]"
    if column.endswith("_mb"):
        slope += f", {1024 * found.an_epoch:+.2f} KiB an epoch"
    verdict = f"grows by {found.an_hour:.2f} an hour" if found.beyond_noise else "no growth beyond noise"
    spread = f"{found.least:.1f} to {found.most:.1f}, noise {found.noise:.2f}"
    return f"{column}: {slope}; {spread}, over {60 * found.hours:.1f} minutes after the warm-up: {verdict}"


if __name__ == "__main__":
    exit_on_user_error(main)
