import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import a_config
from omegaconf import OmegaConf
from run_folders import accuracy, write_config, write_run, write_spectrum

from fgvc.errors import RunError
from fgvc.runs import Method, config_notes, find_runs, group_runs, read_run, split_finished
from fgvc.runs.config import flatten
from fgvc.runs.folder import role


def edit_summary(path: Path, **changes: object) -> None:
    file = path / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_runs_are_found_at_any_depth_once_and_in_order(tmp_path: Path) -> None:
    deep = write_run(tmp_path / "a" / "b" / "seb", seed=1)
    write_run(tmp_path / "a" / "gap", "gap")
    runs = find_runs([deep, tmp_path, tmp_path / "a" / ".." / "a"])
    assert [(run.label, run.seed) for run in runs] == [("SEB", 1), ("GAP", 0)]
    assert runs[0].final is not None and runs[0].final.top1 == 91.0
    assert runs[0].best is not None and (runs[0].best_epoch, runs[0].selected_on) == (12, "test")


def test_folder_without_a_run_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "paper").mkdir()
    with pytest.raises(RunError, match=r"summary\.json"):
        find_runs([tmp_path])
    with pytest.raises(RunError, match="no such folder"):
        find_runs([tmp_path / "absent"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": "0"}, "'seed' should be int, is '0'"),
        ({"frozen": 1}, "'frozen' should be bool"),
        ({"epochs": True}, "'epochs' should be int"),
        ({"final": None}, "'final' or 'best' is missing"),
        ({"final": accuracy(102.0)}, r"final\.top1 is 102"),
        ({"final": accuracy(float("nan"))}, "not JSON compliant"),
        ({"best": accuracy(90.0)}, "'selected_on' should be str, is missing"),
    ],
)
def test_damaged_summary_names_file_and_value(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = write_run(tmp_path / "run")
    edit_summary(path, **changes)
    with pytest.raises(RunError, match=message) as error:
        read_run(path)
    assert str(path / "summary.json") in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"status": "finished"'])
def test_truncated_summary_is_a_run_error(tmp_path: Path, text: str) -> None:
    path = write_run(tmp_path / "run")
    (path / "summary.json").write_text(text)
    with pytest.raises(RunError, match=r"summary\.json"):
        read_run(path)


def test_damaged_pieces_are_run_errors(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    files = {"metrics.csv": run.metrics, "predictions.csv": run.predictions, "config.yaml": run.settings}
    for name, read in files.items():
        with pytest.raises(RunError, match=name):
            read()
    (run.path / "metrics.csv").write_text("epoch,lr\n1,0.1\n")
    with pytest.raises(RunError, match="no column train_loss, test_top1"):
        run.metrics()
    (run.path / "metrics.csv").write_text("epoch,train_loss,test_top1\n1,0,5,90\n2,0,4,91\n")
    with pytest.raises(RunError, match="row 1: 4 cells under 3 columns"):
        run.metrics()
    (run.path / "metrics.csv").write_text("epoch,train_loss,test_top1\n1,0.5,90\n")
    assert run.metrics()["test_top1"].tolist() == [90]


def test_spectrum_is_checked(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    with pytest.raises(RunError, match=r"spectrum\.npz"):
        run.spectrum()
    (run.path / "spectrum.npz").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(RunError, match=r"cannot be read \(not an \.npz archive, or cut off\)"):
        run.spectrum()
    good = np.array([[3.0, 1.0], [2.0, 1.0]])
    for arrays, message in [
        ({"after": good}, "no array 'before'"),
        ({"before": good[:, ::-1]}, "descending"),
        ({"before": good * np.nan}, "NaN"),
        ({"before": good[0]}, r"shape \(2,\)"),
        ({"before": good, "after": good[:1]}, "'after' has shape"),
        ({"before": np.array([[{}]], dtype=object)}, "cannot be read"),  # a pickle, never loaded
    ]:
        np.savez(run.path / "spectrum.npz", **arrays)
        with pytest.raises(RunError, match=message):
            run.spectrum()
    write_spectrum(run.path, images=3)
    spectrum = run.spectrum()
    assert spectrum.before.shape == (3, 64) and spectrum.after is not None


def test_unfinished_runs_are_noted_and_the_rest_kept(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", seed=1, status="failed", reason="NaN in the loss", final=None, best=None)
    finished, notes = split_finished(find_runs([tmp_path]))
    assert [run.path.name for run in finished] == ["a"]
    assert notes == [f"left out {tmp_path / 'b'}: status failed (NaN in the loss)"]
    with pytest.raises(RunError, match="no finished run"):
        split_finished(find_runs([tmp_path / "b"]))


@pytest.mark.parametrize(
    "change",
    [
        {"dataset": "cub"},
        {"backbone": "resnet50"},
        {"frozen": False},
        {"image_size": 448},
        {"reduction": 128},
        {"epochs": 30},
        {"test_images": 100},
        {"selected_on": "validation"},
    ],
)
def test_runs_of_different_settings_are_never_pooled(tmp_path: Path, change: dict[str, object]) -> None:
    write_run(tmp_path / "a", seed=0)
    write_run(tmp_path / "b", seed=1, **change)
    groups = group_runs(find_runs([tmp_path]))
    assert [len(runs) for group in groups.values() for runs in group.values()] == [1, 1]
    assert len(groups) == 2


def test_methods_differ_by_gradient_even_under_one_label(tmp_path: Path) -> None:
    write_run(tmp_path / "a", seed=0)
    write_run(tmp_path / "b", seed=1, gradient="ordinary", label="SEB")
    (group,) = group_runs(find_runs([tmp_path])).values()
    assert list(group) == [Method("seb", None, "SEB"), Method("seb", "ordinary", "SEB [gradient=ordinary]")]


def test_one_seed_twice_is_refused_naming_both_folders(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    with pytest.raises(RunError) as error:
        group_runs(find_runs([tmp_path]))
    assert str(first) in str(error.value) and str(second) in str(error.value)


def test_gap_joins_the_settings_it_matches_but_for_the_reduction(tmp_path: Path) -> None:
    write_run(tmp_path / "gap", "gap")
    write_run(tmp_path / "seb64")
    write_run(tmp_path / "seb128", reduction=128)
    write_run(tmp_path / "elsewhere", epochs=99)
    groups = group_runs(find_runs([tmp_path]))
    members = {(s.reduction, s.epochs): sorted(m.label for m in group) for s, group in groups.items()}
    assert members == {(64, 15): ["GAP", "SEB"], (128, 15): ["GAP", "SEB"], (64, 99): ["SEB"]}


def test_another_first_order_method_joins_as_gap_does(tmp_path: Path) -> None:
    write_run(tmp_path / "gap", "gap")
    write_run(tmp_path / "seb")
    edit_summary(write_run(tmp_path / "gem", "gap", label="GeM", second_order=False), method="gem")
    ((setting, group),) = group_runs(find_runs([tmp_path])).items()
    assert setting.reduction == 64 and sorted(method.label for method in group) == ["GAP", "GeM", "SEB"]


def test_a_setting_that_an_older_run_does_not_know_is_no_difference(tmp_path: Path) -> None:
    for seed, trainer in enumerate(({}, {"label_smoothing": 0.0}, {"label_smoothing": 0.1})):
        write_config(write_run(tmp_path / f"seed{seed}", seed=seed), trainer=trainer)
    assert config_notes(find_runs([tmp_path / "seed0", tmp_path / "seed1"])) == []
    (note,) = config_notes(find_runs([tmp_path / "seed0", tmp_path / "seed2"]))
    assert "trainer.label_smoothing differs between averaged runs (0.0, 0.1)" in note


def test_unreduced_second_order_runs_stay_a_setting_of_their_own(tmp_path: Path) -> None:
    write_run(tmp_path / "wide", reduction=None)
    write_run(tmp_path / "narrow", seed=1)
    assert sorted(str(setting.reduction) for setting in group_runs(find_runs([tmp_path]))) == ["64", "None"]


def test_averaged_runs_of_different_configuration_are_noted(tmp_path: Path) -> None:
    for seed, rate in enumerate((0.1, 0.1, 0.2)):
        path = write_run(tmp_path / f"seed{seed}", seed=seed)
        write_config(path, seed=seed, run_dir=str(path), trainer={"workers": seed}, optimizer={"lr": rate})
    (note,) = config_notes(find_runs([tmp_path]))
    assert "optimizer.lr differs" in note and "0.1, 0.2" in note and str(tmp_path / "seed2") in note
    assert config_notes(find_runs([tmp_path / "seed0", tmp_path / "seed1"])) == []


def all_settings() -> dict[str, Any]:
    """Every key of the configuration with its default."""
    container = OmegaConf.to_container(OmegaConf.structured(a_config()))
    assert isinstance(container, dict)
    return flatten({str(key): value for key, value in container.items()})


def test_a_table_notes_a_setting_exactly_where_it_changes_the_result(tmp_path: Path) -> None:
    first, second = (write_run(tmp_path / f"seed{seed}", seed=seed) for seed in (0, 1))
    noted = set()
    for key in all_settings():
        for path, value in ((first, 1), (second, 2)):
            write_config(path, **OmegaConf.to_container(OmegaConf.from_dotlist([f"{key}={value}"])))
        noted |= {key} if config_notes(find_runs([tmp_path])) else set()
    assert {key for key in all_settings() if key not in noted} == {
        *("name", "seed", "run_dir", "resume", "dataset.root", "method.eigh_device", "cache.dir", "cache.max_gb"),
        *("trainer.workers", "trainer.tracker", "trainer.probe_images", "trainer.save_minutes", "trainer.save_steps"),
        *("trainer.on_divergence", "trainer.divergence_factor", "trainer.divergence_window"),
    }


def test_what_a_continued_run_may_change_changes_no_result_but_for_steps_left_out() -> None:
    free = {key for key in all_settings() if role(key).may_change}
    assert {key for key in free if role(key).changes_result} == {"trainer.on_non_finite", "trainer.max_skips"}
    assert "seed" not in free and "trainer.batch_size" not in free and "trainer.save_minutes" in free
