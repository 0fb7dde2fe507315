"""The spectra of a few test images, kept after every epoch."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from command_line import Train, refused
from safetensors.torch import load_file, save_file

from fgvc.errors import RunError
from fgvc.models import create_model
from fgvc.runs.spectra import Spectrum, SpectrumHistory, condition_number, effective_rank, nonzero_condition_number
from fgvc.training.loop import Trainer
from fgvc.training.probe import spectrum_measures

pytestmark = pytest.mark.usefixtures("uncalibrated")

BEFORE = np.array([[4.0, 1.0, 1e-17], [8.0, 2.0, 1.0], [0.0, 0.0, 0.0]])
SPECTRUM = Spectrum(BEFORE, None, targets=np.array([0, 1, 1]), indices=np.array([0, 2, 4]))


def test_measures_are_medians_over_images() -> None:
    medians = spectrum_measures(SPECTRUM)
    assert medians["nonzero_condition_number"] == 4.0  # of 4 and 8; the zero matrix has none
    assert medians["condition_number"] == pytest.approx(4e17)  # of 8, 4e17 and infinity: noise counts here
    # effective ranks: two of 0.8 and 0.2, three of 8, 2 and 1 in 11, 0 of the zero matrix
    assert medians["effective_rank"] == pytest.approx(np.exp(-(0.8 * np.log(0.8) + 0.2 * np.log(0.2))))


def test_a_history_is_read_up_to_an_epoch(tmp_path: Path) -> None:
    SpectrumHistory([0, 1, 2], [SPECTRUM] * 3).write(tmp_path / "history.npz")
    again = SpectrumHistory.read(tmp_path / "history.npz", 1)
    assert again.epochs == [0, 1] and again.before.shape == (2, 3, 3) and again.after is None
    for kept in again.spectra:
        for name in ("before", "targets", "indices"):
            assert np.array_equal(getattr(kept, name), getattr(SPECTRUM, name)), name
    with pytest.raises(RunError, match=r"none.npz: no such file"):
        SpectrumHistory.read(tmp_path / "none.npz", 1)
    (tmp_path / "history.npz").write_bytes(b"PK")
    with pytest.raises(RunError, match=r"history.npz: cannot be read"):
        SpectrumHistory.read(tmp_path / "history.npz", 1)


def test_a_run_keeps_the_spectra_of_each_epoch_and_is_not_disturbed(tmp_path: Path, train_here: Train) -> None:
    for name, images in (("probed", 5), ("plain", 0)):
        assert train_here(tmp_path, f"run_dir={name}", f"trainer.probe_images={images}").returncode == 0
    history, spectrum = (np.load(tmp_path / "probed" / f"spectrum{part}.npz") for part in ("_history", ""))
    assert history["epochs"].tolist() == [0, 1, 2]
    assert history["before"].shape == history["after"].shape == (3, 5, 8)
    assert history["indices"].tolist() == [0, 2, 4, 6, 8] and history["targets"].tolist() == [0, 0, 1, 2, 2]
    assert spectrum["targets"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    np.testing.assert_allclose(history["before"][2], spectrum["before"][::2], rtol=1e-5, atol=1e-7)
    assert not np.allclose(history["before"][0], history["before"][2], rtol=1e-2)
    metrics = pd.read_csv(tmp_path / "probed" / "metrics.csv")
    for measure in (condition_number, nonzero_condition_number, effective_rank):
        expected = [np.quantile(measure(before), 0.5, method="inverted_cdf") for before in history["before"][1:]]
        np.testing.assert_allclose(metrics[measure.__name__], expected)

    assert not (tmp_path / "plain" / "spectrum_history.npz").exists()
    assert "nonzero_condition_number" not in pd.read_csv(tmp_path / "plain" / "metrics.csv")
    probed, plain = (load_file(tmp_path / name / "checkpoints" / "last.safetensors") for name in ("probed", "plain"))
    assert all(probed[name].equal(plain[name]) for name in plain)
    refused(train_here(tmp_path, "trainer.probe_images=-1"), "trainer.probe_images", "-1")


def test_a_continued_run_keeps_its_images(tmp_path: Path, train_here: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as stopped:
        save = Trainer._save

        def stop(self: Trainer) -> None:
            save(self)
            raise KeyboardInterrupt

        stopped.setattr(Trainer, "_save", stop)
        assert train_here(tmp_path, "run_dir=run", "trainer.probe_images=5").returncode == 130
    assert train_here(tmp_path, "run_dir=run", "trainer.probe_images=4").returncode == 0
    history = np.load(tmp_path / "run" / "spectrum_history.npz")
    assert history["epochs"].tolist() == [0, 1, 2] and history["before"].shape == (3, 5, 8)
    assert history["indices"].tolist() == [0, 2, 4, 6, 8]


def test_spectra_are_of_the_evaluated_average_and_of_the_stage_of_the_epoch(tmp_path: Path, train_here: Train) -> None:
    hybrid = ["method=mpn_cov", "hybrid.method=isqrt_cov", "hybrid.switch_epoch=1"]
    assert train_here(tmp_path, "run_dir=run", "trainer.ema_decay=0.9", *hybrid).returncode == 0
    history, spectrum = (np.load(tmp_path / "run" / f"spectrum{part}.npz") for part in ("_history", ""))
    # spectrum.npz is of what the run saved, the average; the weights themselves are elsewhere by now
    np.testing.assert_allclose(history["before"][2], spectrum["before"], rtol=1e-5, atol=1e-7)
    # 2 x 2 locations: three eigenvalues are not zero
    roots, after = history["before"][..., :3] ** 0.5, history["after"][..., :3]
    np.testing.assert_allclose(after[2], roots[2], rtol=1e-5)
    assert not any(np.allclose(after[stage], roots[stage], rtol=1e-3) for stage in (0, 1))  # iterations come close only


def test_features_that_are_not_finite_end_a_run_as_a_loss_would(tmp_path: Path, train_here: Train) -> None:
    model = create_model("test_resnet", method="gap", num_classes=3, pretrained=False)
    weights = {name: torch.full_like(value, torch.nan) for name, value in model.backbone.named_parameters()}
    file = tmp_path / "nan.safetensors"
    save_file(model.state_dict() | {f"backbone.{name}": value for name, value in weights.items()}, file)
    done = train_here(tmp_path, "method=gap", f"initial_weights={file}")
    assert done.returncode == 1 and "error: on the probe's images" in done.stderr
