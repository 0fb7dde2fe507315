"""The command `fgvc`: every script is one of its commands, and what it reads is found from anywhere."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import ROOT, SMALL, Done, Train, refused

from fgvc import __version__
from fgvc.cli import main
from fgvc.data.cards import list_cards
from fgvc.errors import UserError
from fgvc.provenance import versions
from fgvc.resources import resource_folder

SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))


def start(*arguments: str, cwd: Path, code: str | None = None) -> Done:
    """`python -m fgvc`, or a piece of Python, as a user starts it in a folder that is not the checkout."""
    command = [sys.executable, *(["-m", "fgvc"] if code is None else ["-c", code]), *arguments]
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, encoding="utf-8", env=settings)
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def fgvc(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Train:
    """The command in this process, in an empty folder."""

    def call(*arguments: str) -> Done:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        monkeypatch.setattr(sys, "argv", ["/usr/bin/fgvc", *arguments])
        status = 0
        try:
            main()
        except SystemExit as error:
            status = int(error.code or 0)
        return Done(status, *capfd.readouterr())

    return call


def test_the_help_lists_every_script_with_what_it_does(fgvc: Train) -> None:
    done = fgvc("--help")
    assert done.returncode == 0
    assert fgvc() == done
    words = " ".join(done.stdout.split())
    assert len(SCRIPTS) > 10
    for script in SCRIPTS:
        docstring = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8")))
        assert docstring is not None, script
        assert f"{script.stem} {docstring.splitlines()[0]}" in words


def test_the_help_of_every_command_is_under_its_own_name(fgvc: Train) -> None:
    for script in SCRIPTS:
        done = fgvc(script.stem, "--help")
        assert done.returncode == 0, script
        assert f"fgvc {script.stem}" in done.stdout.splitlines()[0]
        assert "python scripts/" not in done.stdout  # which an installed package has not


def test_help_and_version_import_no_library(tmp_path: Path) -> None:
    code = (
        "import sys, fgvc.cli as tool\n"
        "try:\n    tool.main()\n"
        "except SystemExit as end:\n"
        "    print(*sorted({'torch', 'numpy', 'hydra', 'timm', 'pandas'} & set(sys.modules)), file=sys.stderr)\n"
        "    raise"
    )
    for argument, text in (("--help", "make_tables"), ("--version", f"fgvc {__version__}\n")):
        done = start(argument, cwd=tmp_path, code=code)
        assert (done.returncode, done.stderr) == (0, "\n") and text in done.stdout


def test_python_dash_m_is_the_same_command(tmp_path: Path) -> None:
    assert start("--version", cwd=tmp_path).stdout == f"fgvc {__version__}\n"
    refused(start("trian", cwd=tmp_path), "error: unknown command 'trian'; nearest: train\n")


def test_mistakes_before_a_command_begins(fgvc: Train) -> None:
    refused(fgvc("make_table"), "unknown command 'make_table'; nearest: make_tables")
    refused(fgvc("zzz"), "unknown command 'zzz'; choose one of attribute, audit_gradients, ", ", train")
    refused(fgvc("../scripts/train"), "unknown command")
    refused(fgvc("--debug", "train"), "unrecognized arguments: --debug")


def test_a_command_ends_as_its_script_does(fgvc: Train, here: Train, tmp_path: Path) -> None:
    for arguments, status in ((["nowhere"], 2), (["--table", "approximation_error"], 0)):
        done = fgvc("make_tables", *arguments)
        assert done == here("make_tables.py", *arguments, cwd=tmp_path) == fgvc("make-tables", *arguments)
        assert done.returncode == status
    with pytest.raises(UserError, match="nowhere"):
        fgvc("evaluate", "nowhere", "--debug")


def test_a_run_is_trained_from_any_folder(fgvc: Train, tmp_path: Path) -> None:
    done = fgvc("train", *SMALL, "trainer.epochs=1", "run_dir=run")
    assert (done.returncode, done.stdout) == (0, "run folder: run\n"), done.stderr
    assert (tmp_path / "run" / "summary.json").is_file()
    refused(fgvc("train", "experiment=dmeo"), "dmeo", "demo")


def test_cards_are_found_where_data_are_not(fgvc: Train, tmp_path: Path) -> None:
    refused(fgvc("prepare_data", "owls"), f"no card of dataset 'owls' in {ROOT / 'datasets'}", "cub")
    done = fgvc("prepare_data", "nabirds", "--root", "birds")
    refused(done, "then: fgvc prepare_data nabirds --root birds --from-archive nabirds.tar.gz")
    refused(fgvc("train", "experiment=cub_frozen"), "fgvc prepare_data cub", str(ROOT / "datasets" / "cub.yaml"))
    assert list(tmp_path.iterdir()) == []


def test_an_installed_package_reads_its_own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "fgvc"
    (package / "datasets").mkdir(parents=True)
    (package / "datasets" / "mine.yaml").touch()
    monkeypatch.setattr("fgvc.resources._PACKAGE", package)
    assert list_cards(resource_folder("datasets")) == ["mine"]
    with pytest.raises(UserError, match=r"configs and .*configs: no such folder; install fgvc again"):
        resource_folder("configs")


def test_the_recorded_version_is_that_of_the_code() -> None:
    assert versions()["fgvc"] == __version__
