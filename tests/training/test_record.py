"""What summary.json says of a run: what it was made with, so that another machine can tell whether it is the same."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch
from command_line import Train, a_config, succeeded
from miniature import write_miniature
from run_folders import write_run

from fgvc import provenance
from fgvc.data import create_dataset, fingerprint
from fgvc.errors import RunError
from fgvc.pooling import create_pooling, list_poolings
from fgvc.provenance import commit_label, machine_facts, peak_memory_mb, source_state
from fgvc.runs.config import CacheConfig, DatasetConfig, MethodConfig, TrainerConfig
from fgvc.runs.summary import read_run
from fgvc.training.record import config_hash
from fgvc.training.seeds import set_deterministic

pytestmark = pytest.mark.usefixtures("uncalibrated")


@pytest.fixture(autouse=True)
def _free(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test sets for the whole process is taken back."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    set_deterministic(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_a_run_records_what_it_was_made_with(tmp_path: Path, train_here: Train) -> None:
    succeeded(train_here(tmp_path, "run_dir=run", "trainer.epochs=1", "trainer.deterministic=true"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {"python", "fgvc", "torch", "timm", "numpy", "pillow"} <= set(summary["versions"])
    assert (summary["commit"], summary["dirty"]) == tuple(source_state().values())
    assert summary["machine"] == machine_facts()
    assert summary["machine"]["processes"] == 1 and summary["machine"]["memory_gib"] > 0
    found = summary["dataset_fingerprint"]
    splits = ("train", "validation", "test")
    by_split = {f"{split}_{what}" for split in splits for what in ("list", "content")}
    assert set(found) == by_split | {"verified_content", "listed"}
    options = {"classes": 3, "train_per_class": 4, "test_per_class": 3, "size": 64}
    test = create_dataset("synthetic", root=tmp_path / "datasets" / "synthetic", split="test", **options)
    assert found["test_list"] == fingerprint(test, times=False)
    assert found["validation_list"] is None and found["verified_content"] is None
    assert len(summary["config_hash"]) == 64 and summary["peak_memory_mb"] > 0
    assert set(summary["seconds"]) == {"features", "train", "eval", "total"}
    # the next run of the process is free again
    assert torch.are_deterministic_algorithms_enabled()
    assert train_here(tmp_path, "run_dir=other", "trainer.epochs=0").returncode == 0
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_hash_of_the_settings_is_of_what_is_computed() -> None:
    config = a_config()
    same = [a_config(run_dir="elsewhere", resume="never"), a_config(cache=CacheConfig(dir="elsewhere"))]
    same.append(a_config(dataset=DatasetConfig(name="synthetic", root="elsewhere")))
    assert {config_hash(each) for each in same} == {config_hash(config)}
    others = [
        *(a_config(seed=1), a_config(trainer=TrainerConfig(label_smoothing=0.1))),
        a_config(trainer=TrainerConfig(deterministic=True)),
        a_config(method=MethodConfig(name="seb", options={"scale": 2.0})),
        a_config(dataset=DatasetConfig(name="synthetic", root="r", options={"seed": 1})),
    ]
    assert len({config_hash(each) for each in (config, *others)}) == 1 + len(others)


def test_a_copy_of_the_images_has_the_same_fingerprint_without_times(tmp_path: Path) -> None:
    root = write_miniature("cub", tmp_path / "here", classes=2, train_per_class=2, test_per_class=1)
    copy = tmp_path / "there"
    shutil.copytree(root, copy, copy_function=shutil.copyfile)
    here, there = (create_dataset("cub", root=folder) for folder in (root, copy))
    os.utime(there.paths[0], ns=(0, 1))
    assert fingerprint(here) != fingerprint(there)
    assert fingerprint(here, times=False) == fingerprint(there, times=False)
    there.paths[0].write_bytes(b"shorter")
    assert fingerprint(here, times=False) != fingerprint(there, times=False)


def test_the_commit_and_whether_files_differ_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t", *arguments], check=True
        )

    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "fgvc" / "provenance.py"))
    assert source_state() == {"commit": None, "dirty": None}  # installed
    git("init", "-q")
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    clean = source_state()
    assert len(clean["commit"]) == 40 and clean["dirty"] is False
    (tmp_path / "new").write_text("untracked files are not looked at")
    assert source_state() == clean
    (tmp_path / "file").write_text("b")
    assert source_state() == clean | {"dirty": True}
    assert commit_label(source_state()) == f"{clean['commit']}-dirty"


@pytest.mark.parametrize(
    ("recorded", "shown"),
    [
        ({"commit": "abc", "dirty": False}, "abc"),
        ({"commit": "abc", "dirty": True}, "abc-dirty"),
        ({"commit": "abc-dirty"}, "abc-dirty"),  # earlier versions
        ({"commit": None, "dirty": None}, None),
    ],
)
def test_tables_tell_a_run_with_changed_files(tmp_path: Path, recorded: dict[str, Any], shown: str | None) -> None:
    assert read_run(write_run(tmp_path / "run", **recorded)).commit == shown
    with pytest.raises(RunError, match="'dirty' should be bool"):
        read_run(write_run(tmp_path / "bad", dirty="yes"))


def test_peak_memory_without_linux_or_unix(monkeypatch: pytest.MonkeyPatch) -> None:
    def fresh(platform: str) -> ModuleType:
        monkeypatch.setattr(sys, "platform", platform)
        spec = importlib.util.spec_from_file_location("fresh_provenance", provenance.__file__)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def no_file(*_: object, **__: object) -> str:
        raise FileNotFoundError

    linux = peak_memory_mb()
    monkeypatch.setattr(Path, "read_text", no_file)
    assert fresh("linux").peak_memory_mb() == pytest.approx(linux, rel=0.5)
    monkeypatch.setitem(sys.modules, "resource", None)  # Windows has none: an import of it fails

    class Memory:
        peak_wset = 3 * 2**20

    monkeypatch.setattr(psutil.Process, "memory_info", lambda _: Memory)
    assert fresh("win32").peak_memory_mb() == 3


def test_deterministic_algorithms_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    set_deterministic(True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and not torch.backends.cudnn.benchmark
    with pytest.raises(RuntimeError, match="deterministic"):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))
    for name in list_poolings():  # on the CPU every layer has such an algorithm
        features = torch.rand(2, 60, 3, 3, requires_grad=True)
        create_pooling(name, channels=60)(features).sum().backward()
        assert features.grad is not None and features.grad.isfinite().all(), name
    set_deterministic(False)
    torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))
