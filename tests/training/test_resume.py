"""A run that is killed or stopped at any moment continues to the weights of one that was not."""

import functools
import json
import multiprocessing
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from command_line import Train, a_config, refused, train
from forked_runs import MOMENTS, train_in_processes, train_until
from miniature import write_miniature
from safetensors.torch import load_file, save_file

from fgvc.errors import RunError
from fgvc.foreign import load_pytorch
from fgvc.models import create_backbone
from fgvc.runs.folder import RunFolder
from fgvc.training import run
from fgvc.training.states import StateStore

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked"),
    pytest.mark.usefixtures("uncalibrated"),
]

# five steps an epoch with a state after each; all that is random, across the switch of a hybrid run
EVERYTHING = [
    *("trainer.save_steps=1", "trainer.workers=1", "trainer.batch_size=2", "trainer.val_fraction=0.25"),
    *("trainer.label_smoothing=0.1", "trainer.cutmix=1.0", "trainer.mixup=0.4", "trainer.ema_decay=0.9"),
    *("dataset.transform.crop=random_resized", "dataset.transform.randaugment=rand-m9-mstd0.5-inc1"),
    *("trainer.sampler=class_balanced", "trainer.logit_adjustment=1"),
    *("method=mpn_cov", "hybrid.method=isqrt_cov", "hybrid.switch_epoch=1"),
]
FROZEN = ["trainer.save_steps=1", "backbone.frozen=true", "trainer.batch_size=3"]
OVERRIDES = {"everything": EVERYTHING, "frozen": FROZEN, "plain": []}

Straight = Callable[[str], tuple[Path, list[str]]]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """Of a kind: working folder of a run that was left alone, in `straight`, and its overrides."""

    @functools.cache
    def of_kind(kind: str) -> tuple[Path, list[str]]:
        cwd = tmp_path_factory.mktemp("straight")
        assert train_until(cwd, [*OVERRIDES[kind], "run_dir=straight"]) == 0, (cwd / "log").read_text()
        return cwd, OVERRIDES[kind]

    return of_kind


def assert_same_run(first: Path, second: Path) -> None:
    """Bit-identical weights and spectra, equal metrics and predictions, every epoch once."""
    for which in ("best", "last"):
        ours, theirs = (load_file(run / "checkpoints" / f"{which}.safetensors") for run in (first, second))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), which
    tables = [pd.read_csv(run / "metrics.csv").drop(columns="seconds") for run in (first, second)]
    pd.testing.assert_frame_equal(*tables)
    assert tables[0]["epoch"].tolist() == [1, 2]
    assert (first / "predictions.csv").read_bytes() == (second / "predictions.csv").read_bytes()
    for file in ("spectrum.npz", "spectrum_history.npz"):
        spectra = [np.load(run / file) for run in (first, second)]
        assert all(np.array_equal(spectra[0][key], spectra[1][key]) for key in spectra[1]), file
    summaries = [json.loads((run / "summary.json").read_text()) for run in (first, second)]
    for key in ("status", "final", "best", "epochs"):
        assert summaries[0][key] == summaries[1][key]


def killed_again_and_again(cwd: Path, overrides: list[str], kills: int, seed: int) -> list[tuple[str, int]]:
    """Kill one run at `kills` random moments, resuming it after each, then let it end; returns the moments."""
    draw = random.Random(seed)
    moments = []
    while len(moments) < kills:
        end = (draw.choice(list(MOMENTS)), draw.randint(1, 5))
        status = train_until(cwd, overrides, end, number=signal.SIGKILL)
        assert status in (0, -signal.SIGKILL), (cwd / "log").read_text()
        if status == 0:  # it had ended before that moment came
            break
        moments.append(end)
    assert train_until(cwd, overrides, number=signal.SIGKILL) == 0, (cwd / "log").read_text()
    return moments


@pytest.mark.parametrize("kind", ["everything", "frozen"])
def test_killed_at_random_moments(straight: Straight, kind: str) -> None:
    cwd, overrides = straight(kind)
    moments = killed_again_and_again(cwd, [*overrides, "run_dir=killed"], kills=4, seed=0)
    assert len(moments) >= 3
    assert_same_run(cwd / "killed", cwd / "straight")
    assert not [file for file in (cwd / "killed").rglob("*") if ".tmp" in file.name or file.name == ".lock"]


@pytest.mark.parametrize(
    ("kind", "number", "moment"),
    [
        ("everything", signal.SIGTERM, ("step", 2)),
        ("frozen", signal.SIGINT, ("evaluation", 1)),
        ("frozen", signal.SIGTERM, ("save", 1)),
    ],
)
def test_a_signal_stops_the_run_with_its_state_saved(
    straight: Straight, kind: str, number: signal.Signals, moment: tuple[str, int]
) -> None:
    cwd, overrides = straight(kind)
    shutil.rmtree(cwd / "stopped", ignore_errors=True)
    command = [*overrides, "trainer.save_steps=null", "run_dir=stopped"]
    assert train_until(cwd, command, moment, number=number) == 128 + number
    said = (cwd / "log").read_text()
    assert f"{number.name}: stopping after this step" in said and "Traceback" not in said, said
    assert f"{number.name}: stopped after " in said and "start the same command again" in said
    if moment == ("step", 2):
        assert "stopped after step 2 of" in said  # the step in which the signal came, not one more
    summary = json.loads((cwd / "stopped" / "summary.json").read_text())
    assert summary["status"] == "stopped" and number.name in summary["reason"] and summary["final"] is None

    assert train_until(cwd, command, number=number) == 0, (cwd / "log").read_text()
    assert "continuing stopped after" in (cwd / "log").read_text()
    assert_same_run(cwd / "stopped", cwd / "straight")


def test_a_run_killed_after_its_last_step_evaluates_the_epoch(tmp_path: Path) -> None:
    """`max_steps` ends it within the second of three epochs, and it is killed between that step and the evaluation."""
    limited = ["trainer.epochs=3", "trainer.max_steps=4", "trainer.save_steps=1"]
    assert train_until(tmp_path, [*limited, "run_dir=straight"]) == 0, (tmp_path / "log").read_text()
    killed = train_until(tmp_path, [*limited, "run_dir=killed"], ("evaluation", 2))
    assert killed == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert train_until(tmp_path, [*limited, "run_dir=killed"]) == 0, (tmp_path / "log").read_text()
    assert_same_run(tmp_path / "killed", tmp_path / "straight")


def test_stopped_before_the_first_epoch_there_is_no_table(tmp_path: Path) -> None:
    command = ["run_dir=run", "trainer.epochs=0", "trainer.eval_batch_size=2"]
    assert train_until(tmp_path, command, ("evaluation", 2), number=signal.SIGTERM) == 143
    assert (tmp_path / "run" / "checkpoints" / "state-000001.pt").is_file()
    assert not (tmp_path / "run" / "metrics.csv").exists()  # one without columns could not be read


def test_a_second_signal_ends_at_once_and_a_sweep_ends_with_the_first(tmp_path: Path) -> None:
    assert train_until(tmp_path, ["run_dir=run"], ("step", 2), ("save", 1), number=signal.SIGTERM) == 143
    said = (tmp_path / "log").read_text()
    assert "ended at once" in said and not list(tmp_path.rglob("state-*")), said
    sweep = ["seed=0,1", "name=sweep", "-m"]
    assert train_until(tmp_path, sweep, ("step", 2), number=signal.SIGTERM) == 143, (tmp_path / "log").read_text()
    assert len(list((tmp_path / "results").rglob("summary.json"))) == 1


def test_a_signal_to_the_whole_job_leaves_the_loader_its_workers(tmp_path: Path) -> None:
    """As Ctrl+C in a terminal and most batch systems send it."""

    def interrupt_all() -> None:
        workers = [worker.pid for worker in multiprocessing.active_children() if worker.pid is not None]
        assert workers
        for process in (*workers, os.getpid()):
            os.kill(process, signal.SIGINT)

    # more images than the workers have read ahead
    command = ["trainer.workers=1", "dataset.options.train_per_class=12", "trainer.batch_size=2", "run_dir=run"]
    assert train_in_processes(tmp_path, command, 1, at=("step", 2), happens=interrupt_all) == [130]
    assert "SIGINT: stopped after " in (tmp_path / "log").read_text()


def test_a_damaged_state_is_named_and_the_one_before_it_used(straight: Straight, train_here: Train) -> None:
    cwd, overrides = straight("everything")
    command = [*overrides, "run_dir=damaged"]
    assert train_until(cwd, command, ("step", 4), number=signal.SIGKILL) == -signal.SIGKILL
    states = sorted((cwd / "damaged" / "checkpoints").glob("state-*.pt"))
    assert len(states) == 2
    content = bytearray(states[1].read_bytes())
    content[len(content) // 2] ^= 1
    states[1].write_bytes(content)
    assert train_until(cwd, command, number=signal.SIGKILL) == 0
    said = (cwd / "log").read_text()
    assert f"{states[1].relative_to(cwd)} is damaged (sha256 is" in said and "continuing damaged after" in said, said
    assert_same_run(cwd / "damaged", cwd / "straight")

    (cwd / "damaged" / "summary.json").unlink()  # all states are damaged
    for state in (cwd / "damaged" / "checkpoints").glob("state-*.pt"):
        state.write_bytes(state.read_bytes()[:1000])
    refused(train_here(cwd, *command), "1000 bytes", "were written", "none is left", "delete")


def test_one_process_at_a_time_writes_a_folder(tmp_path: Path, train_here: Train) -> None:
    from fgvc.io import locked

    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run" / ".lock") as free:
        assert free
        refused(train_here(tmp_path, "run_dir=run"), "another process is training", "run_dir=")
    assert train_here(tmp_path, "run_dir=run", "trainer.epochs=0").returncode == 0


def test_a_run_that_another_command_finished_meanwhile_stays_finished(
    tmp_path: Path, train_here: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = run.prepare

    def slow(*arguments: Any) -> Any:
        """As where the features are computed, or waited for."""
        prepared = prepare(*arguments)
        monkeypatch.setattr(run, "prepare", prepare)
        assert train(tmp_path, "run_dir=run", "trainer.epochs=1").returncode == 0
        finished.extend(sorted((tmp_path / "run").rglob("*.*")))
        contents.extend(path.read_bytes() for path in finished)
        return prepared

    finished: list[Path] = []
    contents: list[bytes] = []
    monkeypatch.setattr(run, "prepare", slow)
    done = train_here(tmp_path, "run_dir=run", "trainer.epochs=1")
    assert done.returncode == 0 and "run is finished already" in done.stderr
    assert [path.read_bytes() for path in sorted((tmp_path / "run").rglob("*.*"))] == contents


def test_a_damaged_summary_is_rewritten_and_what_a_killed_run_left_deleted(
    straight: Straight, tmp_path: Path, train_here: Train
) -> None:
    shutil.copytree(straight("plain")[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "straight").rename(tmp_path / "run")
    weights = (tmp_path / "run" / "checkpoints" / "last.safetensors").read_bytes()
    (tmp_path / "run" / "summary.json").write_text('{"status": ')
    leftover = tmp_path / "run" / "failed_steps" / ".step-000001.0123abcd.tmp.pt"
    leftover.parent.mkdir()
    leftover.touch()
    mine = [tmp_path / "run" / ".notes.tmp.txt", tmp_path / "run" / ".vim.tmp"]  # hidden files of others
    mine[0].touch()
    mine[1].mkdir()
    done = train_here(tmp_path, "run_dir=run")
    assert done.returncode == 0 and "summary.json is missing or damaged" in done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "finished"
    assert (tmp_path / "run" / "checkpoints" / "last.safetensors").read_bytes() == weights
    assert not leftover.exists() and all(path.exists() for path in mine)


def test_a_hidden_file_in_a_folder_that_was_no_run_stays(tmp_path: Path, train_here: Train) -> None:
    theirs = tmp_path / "mine" / ".thesis.0badcafe.tmp.docx"
    theirs.parent.mkdir()
    theirs.touch()
    train_here(tmp_path, "run_dir=mine", "trainer.epochs=0")
    assert theirs.exists()


def test_states_of_another_number_of_processes_and_of_earlier_versions(tmp_path: Path, train_here: Train) -> None:
    assert train_until(tmp_path, ["run_dir=run", "trainer.save_steps=1"], ("step", 2), number=signal.SIGKILL) < 0
    store = StateStore(tmp_path / "run" / "checkpoints")
    state = store.read()
    store.write(state | {"generators": state["generators"] * 2}, epoch=0, step=1)
    done = train_here(tmp_path, "run_dir=run", "trainer.save_steps=1")
    assert done.returncode == 0 and "2 processes and there are now 1" in done.stderr
    old = tmp_path / "old"
    shutil.copytree(tmp_path / "run", old)
    for file in (old / "checkpoints").glob("state-*"):
        file.unlink()
    (old / "summary.json").unlink()
    (old / "checkpoints" / "state.pt").write_bytes(b"")
    (old / "config.yaml").write_text((old / "config.yaml").read_text().replace("run_dir: run", "run_dir: old"))
    refused(train_here(tmp_path, "run_dir=old", "trainer.save_steps=1"), "state.pt", "earlier version")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Working folder of a run on frozen features that was killed in its second epoch, its weights and its images."""
    cwd = tmp_path_factory.mktemp("stopped")
    model = create_backbone("test_resnet").model
    for name, scale in (("first", 1.0), ("second", 1.5)):
        save_file({key: scale * value for key, value in model.state_dict().items()}, cwd / f"{name}.safetensors")
    write_miniature("cub", cwd / "birds")
    shutil.copytree(cwd / "birds", cwd / "moved", copy_function=shutil.copyfile)
    shutil.copy(cwd / "first.safetensors", cwd / "weights.safetensors")
    assert train_until(cwd, ["run_dir=stopped"], ("evaluation", 2), base=STOPPED) < 0, (cwd / "log").read_text()
    assert train_until(cwd, ["run_dir=straight"], base=STOPPED) == 0, (cwd / "log").read_text()
    return cwd


STOPPED = [
    *("dataset=cub", "dataset.root=birds", "dataset.transform.size=64", "method=seb", "method.reduction=8"),
    *("backbone.name=test_resnet", "backbone.weights=weights.safetensors", "backbone.frozen=true"),
    *("trainer.epochs=2", "trainer.batch_size=4", "trainer.workers=0"),
]


def replace_weights(cwd: Path) -> None:
    shutil.copy(cwd / "second.safetensors", cwd / "weights.safetensors")


def add_an_image(cwd: Path) -> None:
    for file, line in (("images", "added.jpg"), ("image_class_labels", "1"), ("train_test_split", "1")):
        with (cwd / "birds" / f"{file}.txt").open("a") as table:
            table.write(f"99 {line}\n")
    shutil.copy(next((cwd / "birds" / "images").rglob("*.jpg")), cwd / "birds" / "images" / "added.jpg")


def rename_a_test_image(cwd: Path) -> None:
    splits = (cwd / "birds" / "train_test_split.txt").read_text().split()
    number = splits[splits[1::2].index("0") * 2]
    lines = (cwd / "birds" / "images.txt").read_text().splitlines()
    (old,) = (line.split()[1] for line in lines if line.split()[0] == number)
    (cwd / "birds" / "images" / old).rename(cwd / "birds" / "images" / "renamed.jpg")
    text = (cwd / "birds" / "images.txt").read_text()
    (cwd / "birds" / "images.txt").write_text(text.replace(old, "renamed.jpg"))


def replace_training_images(cwd: Path) -> None:
    """By others of the same name, size and time."""
    splits = (cwd / "birds" / "train_test_split.txt").read_text().split()
    trained = {number for number, split in zip(splits[::2], splits[1::2], strict=True) if split == "1"}
    for line in (cwd / "birds" / "images.txt").read_text().splitlines():
        number, _, name = line.partition(" ")
        if number in trained:
            file = cwd / "birds" / "images" / name
            before, content = file.stat(), file.read_bytes()
            file.write_bytes(content[:-3] + b"\0" + content[-2:])  # the picture changes little, the file does
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def rename_a_class(cwd: Path) -> None:
    file = cwd / "birds" / "classes.txt"
    file.write_text(file.read_text().replace("Le Conte's Sparrow", "Nelson's Sparrow"))


@pytest.mark.parametrize(
    ("change", "named", "not_named"),
    [
        (replace_weights, "weights of the backbone than", "images"),
        (replace_training_images, "training images than", "test images"),
        (add_an_image, "training images than", "test images"),
        (rename_a_test_image, "test images than", "training images"),
        (rename_a_class, "classes, training images", "weights of"),
    ],
)
def test_a_run_is_not_continued_on_other_weights_images_or_classes(
    stopped: Path, tmp_path: Path, here: Train, change: Callable[[Path], None], named: str, not_named: str
) -> None:
    cwd = tmp_path / "copy"
    shutil.copytree(stopped, cwd)
    (cwd / "stopped" / "summary.json").unlink()  # the states know it too
    change(cwd)
    done = here("train.py", *STOPPED, "run_dir=stopped", cwd=cwd)
    refused(done, "stopped began with other", named, "restore them", "run_dir=")
    assert not_named not in done.stderr
    refused(here("train.py", *STOPPED, "run_dir=elsewhere", "resume=stopped", cwd=cwd), named)
    assert len(list((cwd / "results" / "cache").glob("*.npy"))) == 2  # nothing was computed for it


def test_a_finished_run_is_not_taken_for_one_of_other_weights(stopped: Path, tmp_path: Path, here: Train) -> None:
    cwd = tmp_path / "copy"
    shutil.copytree(stopped, cwd)
    assert "finished already" in here("train.py", *STOPPED, "run_dir=straight", cwd=cwd).stderr
    replace_weights(cwd)
    refused(
        here("train.py", *STOPPED, "run_dir=straight", cwd=cwd), "straight is finished, on other weights", "run_dir="
    )
    done = here("train.py", *STOPPED, "backbone.weights=null", "run_dir=straight", cwd=cwd)
    refused(done, "backbone.weights given was True, now False")
    started = ["run_dir=straight", "initial_weights=first.safetensors"]
    refused(here("train.py", *STOPPED, *started, cwd=cwd), "initial_weights given was False, now True")
    (cwd / "weights.safetensors").unlink()
    assert "finished already" in here("train.py", *STOPPED, "run_dir=straight", cwd=cwd).stderr


def test_a_run_names_the_code_of_its_earlier_sessions(stopped: Path, tmp_path: Path, here: Train) -> None:
    shutil.copytree(stopped, tmp_path / "copy")
    file = tmp_path / "copy" / "stopped" / "summary.json"
    summary = json.loads(file.read_text())
    file.write_text(json.dumps(summary | {"commit": "0" * 40}))
    done = here("train.py", *STOPPED, "run_dir=stopped", cwd=tmp_path / "copy")
    assert done.returncode == 0, done.stderr
    after = json.loads(file.read_text())
    (earlier,) = after["earlier_sessions"]
    assert earlier["commit"] == "0" * 40 and after["commit"] != earlier["commit"]
    assert earlier["versions"] == after["versions"]


def test_a_dataset_that_moved_is_the_same(stopped: Path, tmp_path: Path, here: Train) -> None:
    shutil.copytree(stopped, tmp_path / "copy")
    (tmp_path / "copy" / "birds").rename(tmp_path / "copy" / "gone")
    done = here("train.py", *STOPPED, "run_dir=stopped", "dataset.root=moved", cwd=tmp_path / "copy")
    assert done.returncode == 0 and "continuing stopped" in done.stderr, done.stderr
    assert_same_run(tmp_path / "copy" / "stopped", tmp_path / "copy" / "straight")


def test_a_run_of_a_version_that_read_no_content_is_compared_as_before(
    stopped: Path, tmp_path: Path, here: Train
) -> None:
    cwd = tmp_path / "copy"
    shutil.copytree(stopped, cwd)
    for card in (cwd / "stopped" / "checkpoints").glob("*.json"):
        content = json.loads(card.read_text())
        content["digests"] = {name: d for name, d in content["digests"].items() if not name.endswith("_content")}
        card.write_text(json.dumps(content))
    assert not any("_content" in file.read_text() for file in (cwd / "stopped" / "checkpoints").glob("*.json"))
    refused(here("train.py", *STOPPED, "run_dir=stopped", "backbone.weights=second.safetensors", cwd=cwd), "stopped")
    done = here("train.py", *STOPPED, "run_dir=stopped", cwd=cwd)
    assert done.returncode == 0 and "continuing stopped" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("before", "now", "named"),
    [
        ({"weights": "a"}, {"weights": "b"}, r"other weights of the backbone than .* \(initial_weights=w\.pth\)"),
        (
            {"initial_weights": "a"},
            {"initial_weights": "b"},
            r"other initial weights than .* \(initial_weights=w\.pth\)",
        ),
        ({"classes": "a"}, {"classes": "b", "initial_weights": "b"}, r"other classes than .* \(dataset\.root=r\)"),
    ],
)
def test_what_changed_is_named_with_its_setting(
    tmp_path: Path, before: dict[str, str], now: dict[str, str], named: str
) -> None:
    states = a_store(tmp_path, states=0)
    states.write({}, epoch=1, step=1, digests=before)
    with pytest.raises(RunError, match=named):
        run.require_same_digests(a_config(initial_weights="w.pth"), (RunFolder(tmp_path), states), now)


def a_store(tmp_path: Path, states: int) -> StateStore:
    store = StateStore(tmp_path)
    for number in range(1, states + 1):
        store.write({"number": number, "weights": torch.full((100,), float(number))}, epoch=number)
    return store


def test_a_damaged_state_does_not_take_the_place_of_a_whole_one(tmp_path: Path) -> None:
    a_store(tmp_path, 2)
    (tmp_path / "state-000002.pt").write_bytes(b"?")
    store = StateStore(tmp_path)
    assert store.read()["number"] == 1
    store.write({"number": 3}, epoch=3)
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == ["state-000001.pt", "state-000003.pt"]


def test_states_may_be_replaced_while_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a run that is still training, which another one continues by resume=PATH."""
    store, written = a_store(tmp_path, 2), []

    def slow(path: Path) -> object:
        if not written:
            written.append(a_store(tmp_path, 2))
        return load_pytorch(path)

    monkeypatch.setattr("fgvc.training.states.load_pytorch", slow)
    assert store.read()["number"] == 2
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == ["state-000003.pt", "state-000004.pt"]


def test_states_are_ordered_by_their_number_and_cards_without_one_deleted(tmp_path: Path) -> None:
    store = a_store(tmp_path, 1)
    for file in list(tmp_path.iterdir()):
        file.rename(tmp_path / f"state-999999{file.suffix}")
    (tmp_path / "state-000007.json").write_text("{}")
    store.write({"number": 2}, epoch=2)
    assert store.read()["number"] == 2 and not (tmp_path / "state-000007.json").exists()


def test_another_folder_that_continues_a_run_gets_its_best_weights(straight: Straight, train_here: Train) -> None:
    """The best epoch is the first; the run was killed in the second."""
    cwd, _ = straight("plain")
    assert json.loads((cwd / "straight" / "summary.json").read_text())["best"]["epoch"] == 1
    assert train_until(cwd, ["run_dir=killed", "trainer.save_steps=1"], ("step", 5)) < 0
    assert train_here(cwd, "run_dir=other", "resume=killed").returncode == 0
    assert_same_run(cwd / "other", cwd / "straight")


def test_states_of_another_run_are_neither_continued_nor_deleted(tmp_path: Path, train_here: Train) -> None:
    """Somebody has deleted the configuration."""
    assert train_until(tmp_path, ["run_dir=run", "trainer.save_steps=1"], ("step", 2)) < 0
    (tmp_path / "run" / "config.yaml").unlink()
    before = sorted((tmp_path / "run").rglob("*"))
    refused(
        train_here(tmp_path, "run_dir=run", "optimizer.lr=0.01"), "run/summary.json exists", "give another run_dir="
    )
    assert sorted((tmp_path / "run").rglob("*")) == before


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *(("state-000002.pt", content) for content in (b"", b"\x80\x04N.")),  # the second is a pickle
        *(("state-000002.json", content) for content in (b"", b"[]", b'{"bytes": 1}', b"\xff\xfe")),
    ],
)
def test_a_damaged_state_or_card(tmp_path: Path, file: str, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    store = a_store(tmp_path, 2)
    (tmp_path / file).write_bytes(content)
    assert store.read()["number"] == 1
    assert "state-000002.pt is damaged" in caplog.text
    (tmp_path / file).unlink()  # what a killed process leaves that had written one of the two
    assert store.read()["number"] == 1


def test_no_state_is_left(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no state"):
        StateStore(tmp_path).read()


@pytest.mark.parametrize(
    ("settings", "saved"),
    [
        (["trainer.save_minutes=0", "trainer.epochs=1"], 3 + 1),  # after each of three steps, and after the epoch
        (["trainer.save_minutes=null", "trainer.save_steps=2"], 3 + 2),
        (["trainer.save_minutes=60", "trainer.epochs=1"], 1),
    ],
)
def test_states_are_saved_within_an_epoch(tmp_path: Path, train_here: Train, settings: list[str], saved: int) -> None:
    assert train_here(tmp_path, "run_dir=run", "method=gap", *settings).returncode == 0
    (newest,) = (tmp_path / "run" / "checkpoints").glob("state-*.pt")
    assert newest.name == f"state-{saved:06d}.pt"
