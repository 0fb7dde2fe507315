import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import a_config
from omegaconf import OmegaConf
from run_folders import accuracy, change_summary, find_runs, write_config, write_run, write_spectrum

from fgvc.errors import RunError
from fgvc.runs import Method, group_runs, read_run, split_finished
from fgvc.runs import spectra as measures
from fgvc.runs.config import flatten
from fgvc.runs.folder import role
from fgvc.runs.summary import readable_runs
from fgvc.studies.spectra.measure import MethodSpectrum, pool_spectra, summarise


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
        ({"epochs": 1 << 62}, "'epochs' is 4611686018427387904, which no run has"),
        ({"train_images": -1}, "'train_images' is -1, which no run has"),
        ({"classes": ["ant", "bee", "ant"]}, "two classes have one name"),
        ({"final": None}, "'final' or 'best' is missing"),
        ({"final": accuracy(102.0)}, r"final\.top1 is 102"),
        ({"final": accuracy(float("nan"))}, "not JSON compliant"),
        ({"best": accuracy(90.0)}, "'selected_on' should be str, is missing"),
    ],
)
def test_damaged_summary_names_file_and_value(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = change_summary(write_run(tmp_path / "run"), **changes)
    with pytest.raises(RunError, match=message) as error:
        read_run(path)
    assert str(path / "summary.json") in str(error.value)


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
        ({"before": good * 1e300}, r"numbers beyond 1e\+30: the training diverged"),
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


def test_the_trials_of_a_search_are_left_out_beside_other_runs(tmp_path: Path) -> None:
    for trial in range(2):
        write_run(tmp_path / "birds" / "search" / f"trial{trial}", "seb")
    assert len(readable_runs([tmp_path])[0]) == 2
    write_run(tmp_path / "birds" / "lite0" / "seb" / "seed0", "seb")
    write_run(tmp_path / "search" / "lite0" / "seb" / "seed0", "seb")  # an experiment of that name
    runs, (note,) = readable_runs([tmp_path])
    assert len(runs) == 2 and "the trials of the search in" in note
    assert len(readable_runs([tmp_path / "birds" / "search"])[0]) == 2


def test_a_rerun_is_left_out_only_beside_the_run_that_it_repeats(tmp_path: Path) -> None:
    """The folder in `rerun_of` may have moved, so settings and images tell which run that is."""
    digests = {"dataset_fingerprint": {"train_list": "a"}}
    write_config(write_run(tmp_path / "a-rerun", rerun_of="/elsewhere/a", **digests), optimizer={"lr": 0.1})
    for name, lr, known in (("b", 5, digests), ("c", 0.1, {"dataset_fingerprint": {"train_list": "c"}})):
        write_config(write_run(tmp_path / name, **known), optimizer={"lr": lr})
        finished, notes = split_finished(find_runs([tmp_path]))
        assert "a-rerun" in [run.path.name for run in finished] and not notes, name
    # a newer version writes settings that an older one did not know
    write_config(write_run(tmp_path / "moved"), optimizer={"lr": 0.1}, cache={"dir": "x"}, trainer={"clip_norm": 5.0})
    _, notes = split_finished(find_runs([tmp_path]))
    assert notes == [f"left out {tmp_path / 'a-rerun'}: a rerun of /elsewhere/a, not a second run"]


CHANGES = {"dataset": "cub", "backbone": "resnet50", "frozen": False, "image_size": 448, "reduction": 128}
CHANGES |= {"epochs": 30, "test_images": 100, "selected_on": "validation"}


@pytest.mark.parametrize("setting", CHANGES)
def test_runs_of_different_settings_are_never_pooled(tmp_path: Path, setting: str) -> None:
    write_run(tmp_path / "a", seed=0)
    write_run(tmp_path / "b", seed=1, **{setting: CHANGES[setting]})
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


def test_gap_stays_where_a_covariance_has_no_reduction_either(tmp_path: Path) -> None:
    write_run(tmp_path / "gap", "gap")
    write_run(tmp_path / "seb64")
    write_run(tmp_path / "seb", reduction=None)
    groups = group_runs(find_runs([tmp_path]))
    members = {setting.reduction: sorted(method.label for method in group) for setting, group in groups.items()}
    assert members == {64: ["GAP", "SEB"], None: ["GAP", "SEB"]}


def test_another_first_order_method_joins_as_gap_does(tmp_path: Path) -> None:
    write_run(tmp_path / "gap", "gap")
    write_run(tmp_path / "seb")
    change_summary(write_run(tmp_path / "gem", "gap", label="GeM", reduced=False), method="gem")
    ((setting, group),) = group_runs(find_runs([tmp_path])).items()
    assert setting.reduction == 64 and sorted(method.label for method in group) == ["GAP", "GeM", "SEB"]


def rows(tmp_path: Path, *names: str) -> dict[str, list[int]]:
    """The rows of the one setting of these run folders: the seeds by label."""
    (group,) = group_runs(find_runs([tmp_path / name for name in names])).values()
    assert all(run.label == method.label for method, runs in group.items() for run in runs)
    return {method.label: [run.seed for run in runs] for method, runs in group.items()}


def test_a_setting_that_an_older_run_does_not_know_is_no_difference(tmp_path: Path) -> None:
    for seed, trainer in enumerate(({}, {"label_smoothing": 0.0}, {"label_smoothing": 0.1})):
        write_config(write_run(tmp_path / f"seed{seed}", seed=seed), trainer=trainer)
    assert rows(tmp_path, "seed0", "seed1") == {"SEB": [0, 1]}
    named = {"SEB [trainer.label_smoothing=0.0]": [0], "SEB [trainer.label_smoothing=0.1]": [2]}
    assert rows(tmp_path, "seed0", "seed2") == named


def test_unreduced_second_order_runs_stay_a_setting_of_their_own(tmp_path: Path) -> None:
    write_run(tmp_path / "wide", reduction=None)
    write_run(tmp_path / "narrow", seed=1)
    assert sorted(str(setting.reduction) for setting in group_runs(find_runs([tmp_path]))) == ["64", "None"]


def test_runs_of_different_configuration_are_rows_named_by_what_differs(tmp_path: Path) -> None:
    for number, (seed, rate) in enumerate(((0, 0.1), (1, 0.1), (0, 0.2))):
        path = write_run(tmp_path / f"run{number}", seed=seed)
        write_config(path, seed=seed, run_dir=str(path), trainer={"workers": number}, optimizer={"lr": rate})
    assert rows(tmp_path, "run0", "run1") == {"SEB": [0, 1]}
    both = {"SEB [optimizer.lr=0.1]": [0, 1], "SEB [optimizer.lr=0.2]": [0]}
    assert rows(tmp_path, "run0", "run1", "run2") == both
    write_run(tmp_path / "run3", seed=1)  # without a configuration
    assert rows(tmp_path, "run0", "run1", "run2", "run3") == both | {"SEB [settings unknown]": [1]}


def test_a_label_has_one_bracket(tmp_path: Path) -> None:
    """Two in a row are a link in Markdown."""
    for number, rate in enumerate((0.1, 0.2)):
        path = write_run(tmp_path / f"run{number}", "mpn_cov", label="MPN-COV [alpha=0.25]")
        write_config(path, optimizer={"lr": rate})
    both = {"MPN-COV [alpha=0.25, optimizer.lr=0.1]": [0], "MPN-COV [alpha=0.25, optimizer.lr=0.2]": [0]}
    assert rows(tmp_path, "run0", "run1") == both


def test_weights_are_told_apart_by_their_values_not_by_where_their_file_lies(tmp_path: Path) -> None:
    for seed, digest in enumerate(("a" * 64, "a" * 64, "b" * 64)):
        path = write_run(tmp_path / f"seed{seed}", seed=seed, weights_digest=digest)
        write_config(path, backbone={"weights": f"/disk{seed}/weights.pth"})
    assert rows(tmp_path, "seed0", "seed1") == {"SEB": [0, 1]}
    named = {"SEB [backbone.weights=aaaaaaaaaaaa]": [0], "SEB [backbone.weights=bbbbbbbbbbbb]": [2]}
    assert rows(tmp_path, "seed0", "seed2") == named
    for given in ({"initial_weights": "/disk/model.pth"}, {"backbone": {"pretrained": True}}):
        for seed in range(3):
            write_config(tmp_path / f"seed{seed}", **given)
        assert rows(tmp_path, "seed0", "seed1") == {"SEB": [0, 1]}
        assert rows(tmp_path, "seed0", "seed2") == named


def test_runs_on_other_test_images_are_no_repetitions(tmp_path: Path) -> None:
    for seed, digest in enumerate(("a" * 64, "a" * 64, "b" * 64, None)):
        path = write_run(tmp_path / f"seed{seed}", seed=seed, dataset_fingerprint={"test_list": digest})
        write_config(path, dataset={"root": f"/disk{seed}/birds"})
    assert rows(tmp_path, "seed0", "seed1") == {"SEB": [0, 1]}
    named = {"SEB [test images=aaaaaaaaaaaa]": [0], "SEB [test images=bbbbbbbbbbbb]": [2]}
    assert rows(tmp_path, "seed0", "seed2") == named
    assert rows(tmp_path, "seed0", "seed3") == {"SEB": [0, 3]}  # of an earlier version, which does not say


def test_runs_on_other_training_images_are_no_repetitions(tmp_path: Path) -> None:
    def written(seed: int, **images: str) -> None:
        shutil.rmtree(tmp_path / f"seed{seed}", ignore_errors=True)
        write_config(write_run(tmp_path / f"seed{seed}", seed=seed, dataset_fingerprint=images), seed=seed)

    written(0, train_list="a" * 64, train_content="c" * 64, test_list="t" * 64)
    written(1, train_list="a" * 64, test_list="t" * 64)  # of an earlier version
    written(2, train_list="b" * 64, train_content="d" * 64, test_list="t" * 64)
    assert rows(tmp_path, "seed0", "seed1") == {"SEB": [0, 1]}
    named = {"SEB [training images=aaaaaaaaaaaa]": [0, 1], "SEB [training images=bbbbbbbbbbbb]": [2]}
    assert rows(tmp_path, "seed0", "seed1", "seed2") == named
    written(2, train_list="a" * 64, train_content="d" * 64, test_list="t" * 64)  # names and sizes are those of others
    named = {"SEB [training images=cccccccccccc]": [0], "SEB [training images=dddddddddddd]": [2]}
    assert rows(tmp_path, "seed0", "seed2") == named
    for seed, kept in enumerate("ab"):  # the seed chose what was held out
        written(seed, train_list=kept * 64, train_content="c" * 64, validation_list="v" * 64)
    assert rows(tmp_path, "seed0", "seed1") == {"SEB": [0, 1]}
    for seed, kept in enumerate("ab"):
        written(seed, train_list=kept * 64, validation_list="v" * 64)
    assert rows(tmp_path, "seed0", "seed1") == {"SEB": [0, 1]}


def test_initial_weights_are_told_apart_by_their_file(tmp_path: Path) -> None:
    for seed, digest in enumerate(("a" * 64, "a" * 64, "b" * 64)):
        path = write_run(tmp_path / f"seed{seed}", seed=seed, initial_weights_digest=digest)
        write_config(path, initial_weights=f"/disk{seed % 2}/model.pth")
    assert rows(tmp_path, "seed0", "seed1") == {"SEB": [0, 1]}
    named = {"SEB [initial_weights=aaaaaaaaaaaa]": [0], "SEB [initial_weights=bbbbbbbbbbbb]": [2]}
    assert rows(tmp_path, "seed0", "seed2") == named


def test_the_reduction_of_a_configuration_is_nothing_to_gap(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_config(write_run(tmp_path / f"seed{seed}", "gap", seed=seed), method={"reduction": 64 + seed})
    assert rows(tmp_path, "seed0", "seed1") == {"GAP": [0, 1]}


def all_settings() -> dict[str, Any]:
    """Every key of the configuration with its default."""
    container = OmegaConf.to_container(OmegaConf.structured(a_config()))
    assert isinstance(container, dict)
    return flatten({str(key): value for key, value in container.items()})


def test_runs_are_told_apart_by_a_setting_exactly_where_it_changes_the_result(tmp_path: Path) -> None:
    first, second = (write_run(tmp_path / f"seed{seed}", seed=seed) for seed in (0, 1))
    parted = set()
    for key in all_settings():
        for path, value in ((first, 1), (second, 2)):
            write_config(path, **OmegaConf.to_container(OmegaConf.from_dotlist([f"{key}={value}"])))
        parted |= {key} if len(rows(tmp_path, "seed0", "seed1")) > 1 else set()
    assert {key for key in all_settings() if key not in parted} == {
        "method.reduction",  # the summary has it
        *("name", "seed", "run_dir", "resume", "dataset.root", "method.eigh_device", "cache.dir", "cache.max_gb"),
        *("trainer.workers", "trainer.tracker", "trainer.device", "trainer.probe_images"),
        *("trainer.save_minutes", "trainer.save_steps"),
        *("trainer.on_divergence", "trainer.divergence_factor", "trainer.divergence_window"),
    }


def test_what_a_continued_run_may_change_changes_no_result_but_for_steps_left_out() -> None:
    free = {key for key in all_settings() if role(key).may_change}
    files = {"backbone.weights", "initial_weights"}  # digests of their content are compared
    assert {key for key in free if role(key).changes_result} == {"trainer.on_non_finite", "trainer.max_skips"} | files
    assert "seed" not in free and "trainer.batch_size" not in free and "trainer.save_minutes" in free


EQUAL = np.full((1, 4), 2.0)
SINGLE = np.array([[5.0, 0.0, 0.0, 0.0]])
ZERO = np.zeros((1, 4))
NOISY = np.array([[8.0, 2.0, 1e-17, -1e-17]])
ALL = np.concatenate([EQUAL, SINGLE, ZERO, NOISY])


def test_condition_numbers_with_and_without_the_null_space() -> None:
    np.testing.assert_array_equal(measures.condition_number(ALL), [1, np.inf, np.inf, np.inf])
    np.testing.assert_array_equal(measures.nonzero_condition_number(ALL), [1, 1, np.nan, 4])
    np.testing.assert_array_equal(measures.numerical_rank(ALL), [4, 1, 0, 2])


def test_a_resolved_condition_number_of_1e13_is_not_taken_for_noise() -> None:
    eigenvalues = np.geomspace(1, 1e-13, 64)[None]
    assert measures.numerical_rank(eigenvalues)[0] == 64
    assert measures.nonzero_condition_number(eigenvalues)[0] == pytest.approx(1e13)


def test_effective_rank_of_known_spectra() -> None:
    entropy = -(0.8 * np.log(0.8) + 0.2 * np.log(0.2))
    np.testing.assert_allclose(measures.effective_rank(ALL), [4, 1, 0, np.exp(entropy)])
    np.testing.assert_allclose(measures.effective_rank(1e5 * ALL), measures.effective_rank(ALL))


def test_shares_of_matrices_that_have_none() -> None:
    negative = np.array([[-2.0, -5.0, -9.0], [3.0, 1.0, -1e-12]])  # a logarithm, and rounding
    for found in (measures.effective_rank, measures.participation_ratio, partial(measures.smallest_share, k=1)):
        assert np.isnan(found(negative)).tolist() == [True, False]
    # the inverse of diag(2, 1, 0) + 1e-3: what was null is the largest, so no share is that of the smallest of two
    inverse, root = np.array([[1000.0, 1.0, 0.5]]), np.array([[np.sqrt(2), 1.0, 1e-8]])
    assert np.isnan(measures.smallest_share(inverse, 1, np.array([2])))
    assert measures.smallest_share(root, 1, np.array([2]))[0] == pytest.approx(1 / (1 + np.sqrt(2)))


def test_participation_ratio_of_known_spectra() -> None:
    np.testing.assert_allclose(measures.participation_ratio(ALL), [4, 1, 0, 100 / 68])


def test_curve_is_made_of_order_statistics_and_survives_zeros() -> None:
    eigenvalues = np.array([[16.0, 0.0], [8.0, 1e-3], [4.0, 1e-2], [2.0, 1e-1]])
    lower, median, upper = measures.eigenvalue_curve(eigenvalues)
    np.testing.assert_array_equal(median, [4.0, 1e-3])
    np.testing.assert_array_equal(lower, [2.0, 0.0])
    np.testing.assert_array_equal(upper, [8.0, 1e-2])


def test_seeds_of_a_method_are_pooled_and_methods_kept_apart(tmp_path: Path) -> None:
    for seed in (3, 1):
        write_spectrum(write_run(tmp_path / f"seb{seed}", seed=seed), images=10, seed=seed)
    write_spectrum(write_run(tmp_path / "gap", "gap"), images=7, channels=320)
    spectra = {spectrum.label: spectrum for spectrum in pool_spectra(find_runs([tmp_path]))}
    assert spectra["SEB"].seeds == (1, 3) and spectra["SEB"].before.shape == (20, 64)
    assert spectra["GAP"].after is None and spectra["GAP"].before.shape == (7, 320)
    np.testing.assert_array_equal(spectra["SEB"].before[10:], find_runs([tmp_path / "seb3"])[0].spectrum().before)


def test_summary_of_rank_deficient_covariances(tmp_path: Path) -> None:
    write_spectrum(write_run(tmp_path / "seb"), images=11, locations=49)
    (spectrum,) = pool_spectra(find_runs([tmp_path]))
    summary = summarise(spectrum)
    assert [summary[name] for name in ("images", "channels", "rank")] == [11, 64, 48]
    assert summary["condition_number"] > 1e12 > summary["nonzero_condition_number"]
    assert summary["effective_rank_after"] > summary["effective_rank_before"]


def test_summary_of_zero_covariances_has_no_condition() -> None:
    summary = summarise(MethodSpectrum("GAP", (0,), np.zeros((3, 4)), None))
    assert np.isnan(summary["nonzero_condition_number"]) and summary["effective_rank_before"] == 0


def test_spectra_of_different_width_are_not_pooled(tmp_path: Path) -> None:
    for seed, channels in ((0, 64), (1, 32)):
        write_spectrum(write_run(tmp_path / f"seb{seed}", seed=seed), channels=channels)
    with pytest.raises(RunError, match="differ in width"):
        pool_spectra(find_runs([tmp_path]))
