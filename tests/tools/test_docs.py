"""The pages hold no placeholder and no dead link, and name only commands, experiments and methods that exist."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import ROOT
from hydra import compose, initialize_config_dir

from fgvc import spectral
from fgvc.cli import find_commands
from fgvc.pooling import list_poolings, pooling_label, pooling_source
from fgvc.runs.config import to_run_config
from fgvc.spectral import GRADIENTS
from fgvc.training.first_run import is_first_run
from fgvc.training.launch import quoted, register_choices

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "results" / "README.md",
    ROOT / "results" / "cub80" / "README.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
METHODS = {*list_poolings(), "svd_lorentz"}
"""Choices of `method=`; the last is what docs/how_to/add_a_method.md adds."""
COMMANDS = {*find_commands(), "study_rank"}
"""Commands of `fgvc`; the last is what docs/how_to/add_a_study.md adds."""
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def shell_lines(page: Path) -> list[str]:
    """Of the commands in a page; one that goes on in the next line is one line."""
    blocks = [
        block for language, block in FENCE.findall(page.read_text(encoding="utf-8")) if language in ("", "sh", "bash")
    ]
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_names(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"@[A-Z0-9_]+@", text) == []
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
    named = re.findall(r"scripts/(\w+)\.py", text)
    for code in [*shell_lines(page), *re.findall(r"`([^`\n]+)`", text)]:
        named += re.findall(r"^(?:\S+ -m |.* --module )?fgvc ([a-z]\w*)", code)
    assert [command for command in named if command not in COMMANDS] == []
    text = re.sub(r"--config-dir .*", "", text)  # which has names of its own
    for group in ("experiment", "method", "backbone", "dataset"):
        choices = {path.stem for path in (ROOT / "configs" / group).glob("*.yaml")} if group != "method" else METHODS
        for names in re.findall(rf"(?<![\w.]){group}=([\w,]+)", text):
            for name in names.split(","):
                assert name in choices, f"{group}={name}"


TRAIN = re.compile(r"fgvc train (.*)|scripts/train\.py (.*)")


def overrides(command: str) -> tuple[str, ...]:
    """Of a command of the pages: of a sweep those of its first run, without what is no override."""
    command = re.sub(r"--config-dir .*|search=\w+", "", command)  # of a folder, and of a library, that may be missing
    found = TRAIN.search(command)
    words = shlex.split((found and (found[1] or found[2])) or "", comments=True)
    given = [re.split(r",(?![^\[]*\])", word)[0] for word in words if "=" in word and "..." not in word]
    first = ["experiment=first", "dataset=folder", "backbone=lite0", "method=mpn_cov"] if is_first_run(given) else []
    return tuple(quoted(override, sweep=False) for override in [*first, *given])


TRAININGS = {
    overrides(command): command
    for page in PAGES
    for command in shell_lines(page)
    if overrides(command)  # one that stands for any has none
}
assert len(TRAININGS) > 40


@pytest.fixture(scope="module")
def configs() -> Iterator[None]:
    register_choices()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        yield


@pytest.mark.usefixtures("configs")
@pytest.mark.parametrize("given", TRAININGS, ids=TRAININGS.values())
def test_every_training_command_composes(given: tuple[str, ...]) -> None:
    to_run_config(compose("train", overrides=["dataset.root=somewhere", *given]))


def test_every_page_is_in_the_navigation() -> None:
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert pages - set(re.findall(r"- (?:[\w ]+: )?([\w/]+\.md)$", config, re.MULTILINE)) == set()


@pytest.mark.usefixtures("scratch_registry")
@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")], ids=str)
def test_python_examples_run(page: Path) -> None:
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)):
        exec(compile(block, f"{page.name}, example {number + 1}", "exec"), {"__name__": "example"})


def test_the_tables_of_the_spectral_page_are_complete() -> None:
    text = (ROOT / "docs" / "spectral.md").read_text(encoding="utf-8")
    for name in list_poolings():
        assert f"| `{name}` | {pooling_label(name)} | {pooling_source(name)} | " in text, name
    for name in GRADIENTS:
        assert f'`"{name}"`' in text, name
    for name in spectral.__all__:
        assert name in text or name in ("EIGENVALUE_FLOOR", "GRADIENTS", "EigenvalueMap", "GradientRule"), name


def test_every_source_of_a_pooling_is_cited() -> None:
    references = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["references"]
    cited = {(", ".join(_names(reference)), str(reference["year"])) for reference in references}
    for source in {pooling_source(name) for name in list_poolings()} - {"ours"}:
        authors, venue = source.rsplit(", ", 1)
        assert (authors, venue.rsplit(" ", 1)[-1]) in cited, source


def _names(reference: dict[str, Any]) -> list[str]:
    return [author.get("family-names") or author["name"] for author in reference["authors"]]


def test_every_test_named_in_the_promises_exists() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    sources = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    everything = "\n".join(sources.values())
    named = re.findall(r"`(?:tests/)?(?:(test_\w+\.py)(?:::|`)?)?(test_\w+)?", text)
    missing = [
        f"{file}::{name}"
        for file, name in named
        if (file and file not in sources)
        or (name and f"def {name}(" not in (sources.get(file, "") if file else everything))
    ]
    assert len([name for _, name in named if name]) > 20
    assert not missing


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_the_batch_file_is_valid_and_wants_a_run_folder() -> None:
    script = ROOT / "docs" / "slurm.sbatch"
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    done = subprocess.run(["bash", str(script), "seed=0"], capture_output=True, text=True)
    assert done.returncode == 2 and "run_dir=PATH" in done.stderr
