"""Kill a real run again and again at random moments, let it continue, and compare it with one that was left alone.

python benchmarks/kill_and_resume.py --output killed experiment=cub80_frozen dataset.root=PATH method=seb \
    trainer.epochs=6 trainer.save_steps=10
python benchmarks/kill_and_resume.py --output killed --processes 2 --signal TERM ...
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from machine import benchmark_facts, machine_line

from fgvc.cli import exit_on_user_error
from fgvc.errors import ConfigError, RunError
from fgvc.provenance import commit_label, source_state
from fgvc.reporting.comparison import comparison_markdown
from fgvc.runs.compare import compare_runs

TRAIN = Path(__file__).resolve().parents[1] / "scripts" / "train.py"
EARLY = 0.2  # share of the kills before training begins


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for fgvc train")
    parser.add_argument("--output", type=Path, required=True, help="new folder for the two runs and their messages")
    parser.add_argument("--kills", type=int, default=20, help="during training or its start (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT"), default="KILL", help="what is sent")
    parser.add_argument("--processes", type=int, default=1, help="that train together, on the CPU")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    given = parse_arguments(arguments)
    if given.output.exists():
        raise ConfigError(f"--output {given.output} exists; give a new folder")
    given.output.mkdir(parents=True)
    facts = benchmark_facts()
    print(
        f"{machine_line(facts)}\ncommit {commit_label(source_state()) or 'unknown'}\ntorch {facts['versions']['torch']}"
    )
    straight, killed = given.output / "straight", given.output / "killed"
    start = time.monotonic()
    if train(given, straight).wait() != 0:
        raise RunError(f"the run that is left alone failed; see {given.output / 'straight.log'}")
    seconds = time.monotonic() - start
    moments = kill_again_and_again(given, killed, seconds)
    if train(given, killed).wait() != 0:
        raise RunError(f"the run did not continue; see {given.output / 'killed.log'}")
    print(f"{len(moments)} times SIG{given.signal}, seed {given.seed}; the run alone took {seconds:.0f} s")
    print(*moments, sep="\n")
    comparison = compare_runs(straight, killed)
    print(comparison_markdown(comparison))
    if not comparison.identical:
        sys.exit(1)


def kill_again_and_again(given: argparse.Namespace, folder: Path, seconds: float) -> list[str]:
    """One line a kill: when, and what the run had saved by then. `seconds` is what a run takes that is left alone."""
    spent = json.loads((given.output / "straight" / "summary.json").read_text(encoding="utf-8"))["seconds"]
    training = spent["train"] + spent["eval"]
    starting = seconds - training  # interpreter, imports, data, and the end
    draw = random.Random(given.seed)
    moments: list[str] = []
    for _ in range(given.kills):
        run = train(given, folder)
        if draw.random() < EARLY:
            time.sleep(draw.uniform(0, starting))
            when = "as it started"
        else:
            wait_for_training(run, folder)
            after = draw.uniform(0, 1.5 * training / given.kills)
            time.sleep(after)
            when = f"{after:.1f} s into its training"
        if run.poll() is not None:
            raise RunError(f"the run ended after {len(moments)} kills; give more trainer.epochs")
        os.killpg(run.pid, getattr(signal, f"SIG{given.signal}"))
        moments.append(f"{when}: status {run.wait()}, {saved(folder)}")
    return moments


def wait_for_training(run: "subprocess.Popen[bytes]", folder: Path) -> None:
    """Until the run has written its first summary, or has ended."""
    summary = folder / "summary.json"
    before = summary.stat().st_mtime_ns if summary.exists() else 0
    while run.poll() is None and not (summary.exists() and summary.stat().st_mtime_ns != before):
        time.sleep(0.05)


def train(given: argparse.Namespace, folder: Path) -> "subprocess.Popen[bytes]":
    """A run in a group of processes of its own; its messages are added to FOLDER.log."""
    launch = [sys.executable]
    if given.processes > 1:
        launch += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(given.processes)]
    environment = {**os.environ, **({"ACCELERATE_USE_CPU": "true"} if given.processes > 1 else {})}
    with folder.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [*launch, str(TRAIN), f"run_dir={folder}", *given.overrides],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )


def saved(folder: Path) -> str:
    """Where the newest whole state is."""
    cards = sorted((folder / "checkpoints").glob("state-*.json"))
    if not cards:
        return "nothing saved yet"
    card = json.loads(cards[-1].read_text(encoding="utf-8"))
    return f"saved at step {card['step']}, {card['epoch']} epochs done"


if __name__ == "__main__":
    exit_on_user_error(main)
