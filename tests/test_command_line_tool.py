"""The command `fgvc`: every script is one of its commands, and what it reads is found from anywhere."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import ROOT, SMALL, Done, Train, refused
from damage import files_limited_to
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st
from run_folders import write_run, write_spectrum

from fgvc import __version__, provenance
from fgvc.cli import exit_on_user_error, main
from fgvc.data.cards import list_cards
from fgvc.errors import UserError
from fgvc.provenance import source_state, versions
from fgvc.resources import resource_folder
from fgvc.spectral import EigendecompositionError, matrix_sqrt
from fgvc.training.launch import quoted

SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))


def start(*arguments: str, cwd: Path, code: str | None = None, **environment: str) -> Done:
    """`python -m fgvc`, or a piece of Python, as a user starts it in a folder that is not the checkout."""
    command = [sys.executable, *(["-m", "fgvc"] if code is None else ["-c", code]), *arguments]
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80", **environment}
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
    refused(fgvc("zzz"), "unknown command 'zzz'; choose one of app, attribute, ", ", train")
    refused(fgvc("../scripts/train"), "unknown command")
    refused(fgvc("--debug", "train"), "unrecognized arguments: --debug")
    for empty in (["make_tables", ""], ["report", "nowhere", "--output", ""], ["report", "nowhere", "--output="]):
        refused(fgvc(*empty), "an argument is empty")


def test_variables_of_libraries_that_are_no_numbers_end_nothing(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    names = ("SOURCE_DATE_EPOCH", "TQDM_MININTERVAL", "TQDM_INITIAL")
    done = start("make_tables", "run", cwd=tmp_path, **dict.fromkeys(names, "abc"))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_features_that_are_not_finite_are_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], debug: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fgvc", *debug])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(EigendecompositionError if debug else SystemExit) as end:
        exit_on_user_error(lambda: matrix_sqrt(torch.full((1, 2, 2), torch.nan)))
    if not debug:
        refused(Done(end.value.code, *capsys.readouterr()), "1 of 1 matrices hold NaN or infinity")


def test_a_command_ends_as_its_script_does(fgvc: Train, here: Train, tmp_path: Path) -> None:
    for arguments, status in ((["nowhere"], 2), (["--table", "approximation_error"], 0)):
        done = fgvc("make_tables", *arguments)
        assert done == here("make_tables.py", *arguments, cwd=tmp_path) == fgvc("make-tables", *arguments)
        assert done.returncode == status
    with pytest.raises(UserError, match="nowhere"):
        fgvc("evaluate", "nowhere", "--debug")


def test_a_run_is_trained_from_any_folder(fgvc: Train, tmp_path: Path) -> None:
    done = fgvc("train", *SMALL, "trainer.epochs=1", "run_dir=run")
    assert done.returncode == 0 and done.stdout.startswith("run folder: run\n\nnext:\n  fgvc predict run "), done.stderr
    assert (tmp_path / "run" / "summary.json").is_file()
    refused(fgvc("train", "experiment=dmeo"), "dmeo", "demo")


@pytest.mark.parametrize("limit", ["--output .", f"--output {'x' * 300}", "--output /proc/x.html"])
def test_a_path_that_the_system_refuses_is_one_message(limit: str, fgvc: Train, tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    output = limit.split()[1]
    refused(fgvc("report", "run", "--output", output), f"error: {output}: ", "; give another path")


def test_a_limit_of_the_system_is_one_message(fgvc: Train, tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    with files_limited_to(10_000):
        done = fgvc("report", "run", "--output", "page.html")
    refused(done, "error: page.html: File too large; raise the limit")
    assert not list(tmp_path.glob(".page*"))


@pytest.mark.skipif(os.name == "nt", reason="no redirection of a shell")
@pytest.mark.parametrize(
    ("closed", "arguments", "status"),
    [("2>&-", "nowhere", 2), (">&-", "run --output tables", 0), ("<&- >&- 2>&-", "run --output tables", 0)],
)
def test_a_closed_stream_changes_no_exit_status(tmp_path: Path, closed: str, arguments: str, status: int) -> None:
    write_run(tmp_path / "run")
    command = f'exec "{sys.executable}" -m fgvc make_tables {arguments} {closed}'
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == status
    assert status or "note" not in (tmp_path / "tables" / "accuracy.md").read_text()


def test_a_terminal_without_our_letters_shows_them_escaped(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path / f"seed{seed}", seed=seed)
    done = start("make_tables", ".", "--table", "accuracy", cwd=tmp_path, PYTHONIOENCODING="ascii:strict")
    assert done.returncode == 0 and "91.00 \\xb1 0.00" in done.stdout, done.stderr


def test_figures_are_the_same_whatever_the_user_set_for_matplotlib(fgvc: Train, tmp_path: Path) -> None:
    write_spectrum(write_run(tmp_path / "run"))
    (tmp_path / "settings").write_text("text.usetex: True\naxes.facecolor: red\n")
    assert fgvc("plot_spectra", "run", "--output", "plain").returncode == 0
    mine = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "MATPLOTLIBRC": str(tmp_path / "settings")}
    done = start("plot_spectra", "run", "--output", "set", cwd=tmp_path, **mine)
    assert done.returncode == 0, done.stderr
    plain = {file.name: file.read_bytes() for file in (tmp_path / "plain").glob("*.p*")}
    assert plain and plain == {file.name: file.read_bytes() for file in (tmp_path / "set").glob("*.p*")}


@pytest.mark.parametrize("sweep", [[], ["-m"]])
def test_paths_are_taken_as_they_are(fgvc: Train, tmp_path: Path, sweep: list[str]) -> None:
    done = fgvc("train", *sweep, *SMALL, "trainer.epochs=1", "dataset.root=vögel =1 (2)", "run_dir=it's {x} #1")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "vögel =1 (2)").is_dir() and (tmp_path / "it's {x} #1" / "summary.json").is_file()
    done = fgvc("train", "dataset=synthetic", "backbone.name=vögel")
    refused(done, "put the value in quotes of its own: \"backbone.name='vögel'\"")


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1))
@example("NAN")
@example("Null")
def test_any_path_reaches_the_configuration(path: str) -> None:
    quoted_by_the_user = path[0] in "'\"" and path[0] == path[-1]
    if path != "null" and not quoted_by_the_user:
        override = OverridesParser.create().parse_override(quoted(f"dataset.root={path}", sweep=False))
        assert override.value() == path


def test_a_home_folder_is_found_behind_an_option(fgvc: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "page.html").write_text("mine")
    refused(fgvc("report", "--output=~/page.html", str(ROOT / "results")), str(tmp_path / "home" / "page.html"))


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


def test_asking_for_the_commit_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the index, whose lock would stay where the command is ended, and stop the user's git."""
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "fgvc" / "provenance.py"))
    (tmp_path / "file").write_text("a")
    names = ("-c", "user.name=t", "-c", "user.email=t@t")
    for command in (["init", "-q"], ["add", "file"], [*names, "commit", "-q", "-m", "one"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    os.utime(tmp_path / "file", (1, 1))  # git would note the new time
    index = (tmp_path / ".git" / "index").read_bytes()
    assert source_state()["dirty"] is False
    assert (tmp_path / ".git" / "index").read_bytes() == index


@pytest.mark.parametrize(
    ("command", "file"),
    [
        *(("attribute", "attribution.json"), ("audit_gradients", "gradients.csv"), ("study_precision", "errors.csv")),
        *(("study_attribution", "attribution.png"), ("study_descriptors", "pairs.csv")),
        *(("study_smoothness", "smoothness.csv"), ("study_truncation", "grid.csv")),
    ],
)
def test_a_file_in_the_way_is_named_before_the_work(fgvc: Train, tmp_path: Path, command: str, file: str) -> None:
    (tmp_path / file).write_text("of an earlier version")
    refused(fgvc(command, "run", "--output", "."), f"{file}: exists", "move or delete it")
