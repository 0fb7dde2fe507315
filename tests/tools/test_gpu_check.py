"""The check of a GPU runs from end to end; here on the CPU and with small sizes."""

import json
from pathlib import Path

import gpu_check
import pytest

from fgvc.errors import ConfigError
from fgvc.pooling import list_poolings


@pytest.mark.parametrize("only", [["poolings"], pytest.param([*gpu_check.CHECKS], marks=pytest.mark.slow)])
def test_every_check_runs_and_finds_no_error(only: list[str], tmp_path: Path) -> None:
    gpu_check.main(["--output", str(tmp_path / "out"), "--device", "cpu", "--quick", "--only", *only])
    record = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    checks = record["checks"]
    assert list(checks) == only
    assert [row for rows in checks.values() for row in rows if "error" in row] == []
    assert {row["pooling"] for row in checks["poolings"]} == set(list_poolings())
    errors = [row["gradient_error"] for row in checks["poolings"] if "gradient_error" in row]
    assert len(errors) > len(list_poolings()) and max(errors) < 1e-6
    assert "runs" not in checks or checks["runs"][1]["identical"] is True
    page = (tmp_path / "out" / "gpu_check.md").read_text()
    assert page.count("\n## ") == len(checks) and " products |" in page and "nan" not in page
    with pytest.raises(ConfigError, match="exists; give a new folder"):
        gpu_check.main(["--output", str(tmp_path / "out"), "--device", "cpu", "--quick"])


def test_an_error_is_a_row_of_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "create_pooling", lambda *_, **__: 1 / 0)
    gpu_check.main(["--output", str(tmp_path / "out"), "--device", "cpu", "--quick", "--only", "poolings"])
    rows = json.loads((tmp_path / "out" / "gpu_check.json").read_text())["checks"]["poolings"]
    assert rows and all(row["error"] == "ZeroDivisionError: division by zero" for row in rows)
