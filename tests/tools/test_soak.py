"""The soak sees a leak and calls noise noise; it watches a run from outside, ends it and says how it ended."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soak
from command_line import ROOT
from growth import SAMPLE_COLUMNS, SoakRecord, growth, load_samples, save_soak_record

from fgvc.cli import exit_on_user_error
from fgvc.errors import RunError

BENCHMARKS = ROOT / "benchmarks"


Curve = Callable[[np.ndarray], np.ndarray]
Finished = Callable[..., Path]


def hour(memory: Curve, every: float = 5.0) -> pd.DataFrame:
    """Samples of an hour; `memory` takes hours. Workers come and go, epochs last 37 s."""
    seconds = np.arange(0, 3600, every)
    workers = seconds % 37 < 12
    samples = pd.DataFrame(dict.fromkeys(SAMPLE_COLUMNS, np.zeros(len(seconds))))
    noise = np.random.default_rng(0).normal(0, 4, len(seconds))
    values = {
        "seconds": seconds,
        "epoch": seconds // 37,
        "anonymous_mb": memory(seconds / 3600) + 150 * workers + noise,
    }
    return samples.assign(**values, rss_mb=900.0, open_files=11 + 10 * workers)


def test_a_leak_is_found_and_measured() -> None:
    found = growth(hour(lambda t: 400 + 30 * t), "anonymous_mb")
    assert found.beyond_noise
    assert found.lower < 30 < found.upper
    assert 20 < found.an_hour < 40
    assert found.hours == pytest.approx(50 / 60, abs=0.01)
    assert found.epochs == 81 and found.an_epoch == pytest.approx(found.an_hour * 37 / 3600, rel=0.02)


@pytest.mark.parametrize(
    "memory",
    [lambda t: 400 + 0 * t, lambda t: 400 - 20 * t, lambda t: 400 - 100 * np.exp(-30 * t)],
    ids=["level", "falling", "warming up"],
)
def test_what_does_not_grow_is_not_called_growth(memory: Curve) -> None:
    samples = hour(memory)
    assert not growth(samples, "anonymous_mb").beyond_noise
    assert not growth(samples, "open_files").beyond_noise
    constant = growth(samples, "rss_mb")
    assert (constant.an_hour, constant.noise, constant.level, constant.beyond_noise) == (0, 0, 900, False)


def test_too_little_to_judge_is_an_error() -> None:
    samples = hour(lambda t: t)
    with pytest.raises(RunError, match="too few for a trend"):
        growth(samples.head(11), "anonymous_mb")
    with pytest.raises(RunError, match="finished no epoch"):
        growth(samples.assign(epoch=0), "anonymous_mb")


def status(*arguments: object) -> int:
    try:
        exit_on_user_error(lambda: soak.main([str(argument) for argument in arguments]))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture
def finished(tmp_path: Path) -> Finished:
    def write(memory: Curve, exit_status: int = 143, stopped: bool = True) -> Path:
        hour(memory).to_csv(tmp_path / "soak.csv", index=False)
        machine = {"cpu": "C", "cores": 2, "system": "S"}
        record = SoakRecord("2026-01-01", None, machine, ["train.py", "x=1"], 60, exit_status, stopped)
        save_soak_record(tmp_path / "soak.json", record)
        return tmp_path

    return write


def test_the_report_of_saved_samples(finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    folder = finished(lambda t: 400 + 30 * t)
    assert status("--from", folder) == 0
    out, err = capsys.readouterr()
    assert "98 epochs" not in out and "97 epochs, 720 samples, told to end after 60 minutes, exit status 143" in out
    assert (
        re.search(r"anonymous_mb: \+\d.*, \+\d{3}\.\d\d KiB an epoch", out)
        and "open_files" in out
        and out.count("no growth beyond noise") == 1
    )
    assert err == "note: anonymous_mb grows\n"
    assert {"soak.png", "soak.pdf"} <= {path.name for path in folder.iterdir()}
    assert status("--from", folder, "--strict") == 1
    assert status("--from", finished(lambda t: 400 + 0 * t), "--strict") == 0


def test_without_anonymous_memory_the_resident_is_judged(
    finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished(lambda t: 400 + 30 * t)
    load_samples(folder / "soak.csv").assign(anonymous_mb=np.nan).to_csv(folder / "soak.csv", index=False)
    assert status("--from", folder, "--strict") == 0
    assert "rss_mb: +0.00 an hour" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("exit_status", "stopped", "expected"),
    [(0, False, 0), (143, True, 0), (-15, True, 0), (1, True, 1), (1, False, 1), (143, False, 1), (-9, True, 1)],
)
def test_a_run_that_fails_fails_the_soak(
    finished: Finished, exit_status: int, stopped: bool, expected: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status("--from", finished(lambda t: 400 + 0 * t, exit_status, stopped)) == expected
    assert f"exit status {exit_status}" in "".join(capsys.readouterr())


RUN = """
import signal, sys, time
from pathlib import Path
folder = Path(next(a for a in sys.argv if a.startswith("run_dir=")).partition("=")[2])
folder.mkdir()
held, files = [], []
if "polite" in sys.argv:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
for epoch in range(1, 1000):
    if "fails" in sys.argv and epoch == 5:
        sys.exit("broken")
    held.append(bytearray(2**21))
    files.append((folder / "unfinished").open("w"))
    files[-1].write(f"epoch,train_loss\\n{epoch},0.5\\n")
    files[-1].flush()
    (folder / "unfinished").rename(folder / "metrics.csv")  # in one act, as a run does it: it is read at any moment
    time.sleep(0.05)
"""


@pytest.fixture
def leaking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the training script that leaks 2 MiB and a file an epoch, 20 epochs a second."""
    monkeypatch.setattr(soak, "TRAIN", tmp_path / "leaking.py")
    (tmp_path / "leaking.py").write_text(RUN, encoding="utf-8")
    return tmp_path / "out"


@pytest.mark.parametrize(("how", "ended"), [("polite", 143), ("plain", -15)])
def test_a_run_is_watched_and_ended(leaking: Path, how: str, ended: int, capsys: pytest.CaptureFixture[str]) -> None:
    watched = ["--minutes", 3 / 60, "--interval", 0.05, "--strict", "--output", leaking]
    assert status(*watched, how) == 1
    out, err = capsys.readouterr()
    assert f"told to end after 0.05 minutes, exit status {ended}" in out
    assert err == "note: anonymous_mb grows\nnote: open_files grows\n" or "linux" not in sys.platform
    samples = load_samples(leaking / "soak.csv")
    assert samples["epoch"].iloc[-1] > 10 and samples["processes"].max() == 1
    gained = samples.iloc[-1] - samples[samples["epoch"] >= 1].iloc[0]
    assert gained["rss_mb"] == pytest.approx(2 * gained["epoch"], abs=8)
    assert gained["open_files"] == pytest.approx(gained["epoch"], abs=2)
    assert status(*watched) == 2
    assert "not an empty folder" in capsys.readouterr().err


def test_a_run_that_ends_in_an_error_is_reported(leaking: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status("--output", leaking, "--interval", 0.05, "fails") == 1
    assert f"the run ended by itself, exit status 1; see the end of {leaking / 'train.log'}" in capsys.readouterr().err
    assert (leaking / "train.log").read_text(encoding="utf-8") == "broken\n"


def test_settings_that_cannot_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for given in (["--minutes", 0], ["--interval", -1], ["run_dir=x"], ["cache.dir=x"]):
        assert status("--output", tmp_path / "new", *given) == 2
    assert status("--output", tmp_path) == 2
    assert status("--from", tmp_path) == 2
    assert capsys.readouterr().err.count("error: ") == 6


@pytest.mark.slow
def test_the_real_command_line(tmp_path: Path) -> None:
    small = "+dataset.options={classes: 3, train_per_class: 4, test_per_class: 3, size: 96}"
    watched = ["--minutes", 0.5, "--interval", 0.2, "--output", tmp_path / "out"]
    assert status(*watched, small, "trainer.workers=0", "backbone.frozen=true") == 0
    last = load_samples(tmp_path / "out" / "soak.csv").iloc[-1]
    assert last["epoch"] > 3 and last["cache_mb"] > 0 and last["run_mb"] > 0 and last["rss_mb"] > 100
