from pathlib import Path

import numpy as np
import pytest
from run_folders import write_run, write_spectrum

from fgvc.errors import RunError
from fgvc.runs import find_runs
from fgvc.runs.spectra import (
    condition_number,
    effective_rank,
    eigenvalue_curve,
    nonzero_condition_number,
    numerical_rank,
    participation_ratio,
)
from fgvc.studies.spectra.measure import MethodSpectrum, pool_spectra, summarise

EQUAL = np.full((1, 4), 2.0)
SINGLE = np.array([[5.0, 0.0, 0.0, 0.0]])
ZERO = np.zeros((1, 4))
NOISY = np.array([[8.0, 2.0, 1e-17, -1e-17]])
ALL = np.concatenate([EQUAL, SINGLE, ZERO, NOISY])


def test_condition_numbers_with_and_without_the_null_space() -> None:
    np.testing.assert_array_equal(condition_number(ALL), [1, np.inf, np.inf, np.inf])
    np.testing.assert_array_equal(nonzero_condition_number(ALL), [1, 1, np.nan, 4])
    np.testing.assert_array_equal(numerical_rank(ALL), [4, 1, 0, 2])


def test_a_resolved_condition_number_of_1e13_is_not_taken_for_noise() -> None:
    eigenvalues = np.geomspace(1, 1e-13, 64)[None]
    assert numerical_rank(eigenvalues)[0] == 64
    assert nonzero_condition_number(eigenvalues)[0] == pytest.approx(1e13)


def test_effective_rank_of_known_spectra() -> None:
    entropy = -(0.8 * np.log(0.8) + 0.2 * np.log(0.2))
    np.testing.assert_allclose(effective_rank(ALL), [4, 1, 0, np.exp(entropy)])
    np.testing.assert_allclose(effective_rank(1e5 * ALL), effective_rank(ALL))


def test_participation_ratio_of_known_spectra() -> None:
    np.testing.assert_allclose(participation_ratio(ALL), [4, 1, 0, 100 / 68])


def test_curve_is_made_of_order_statistics_and_survives_zeros() -> None:
    eigenvalues = np.array([[16.0, 0.0], [8.0, 1e-3], [4.0, 1e-2], [2.0, 1e-1]])
    curve = eigenvalue_curve(eigenvalues)
    np.testing.assert_array_equal(curve.median, [4.0, 1e-3])
    np.testing.assert_array_equal(curve.lower, [2.0, 0.0])
    np.testing.assert_array_equal(curve.upper, [8.0, 1e-2])


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
    assert (summary.images, summary.channels, summary.rank) == (11, 64, 48)
    assert summary.condition_number > 1e12 > summary.nonzero_condition_number
    assert summary.effective_rank_after is not None and summary.effective_rank_after > summary.effective_rank_before


def test_summary_of_zero_covariances_has_no_condition() -> None:
    summary = summarise(MethodSpectrum("GAP", (0,), np.zeros((3, 4)), None))
    assert np.isnan(summary.nonzero_condition_number) and summary.effective_rank_before == 0


def test_spectra_of_different_width_are_not_pooled(tmp_path: Path) -> None:
    for seed, channels in ((0, 64), (1, 32)):
        write_spectrum(write_run(tmp_path / f"seb{seed}", seed=seed), channels=channels)
    with pytest.raises(RunError, match="differ in width"):
        pool_spectra(find_runs([tmp_path]))
