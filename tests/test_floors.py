"""The plan of the house: imports lead to lower floors only, none leads in a circle, and runs/ needs no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import ROOT

import fgvc

PACKAGE = ROOT / "fgvc"
# the ground first; a module that is no folder stands by itself
GROUND = (("errors", "__init__"), ("foreign", "io", "resources", "provenance", "cli"))
ABOVE = ["spectral", "pooling", "runs", "presentation", "data", "models"]
ABOVE += ["training", "inference", "studies", "reporting"]
FLOORS = (*GROUND, *((name,) for name in ABOVE))
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py")) if path.stem != "__main__"}


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports when it is imported itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body:  # imports within functions and under TYPE_CHECKING come later or never
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fgvc":
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in MODULES else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "fgvc"}
    return found - {"fgvc"}


def floor(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_its_own_floor_and_those_below(module: str) -> None:
    assert floor(module) in LEVEL, f"{module} stands on no floor"
    upwards = {other for other in imported(MODULES[module]) if LEVEL[floor(other)] > LEVEL[floor(module)]}
    assert not upwards


def test_only_commands_import_the_command_line() -> None:
    """It chooses the backend of matplotlib, which in a notebook is the user's to choose."""
    assert not [module for module, path in MODULES.items() if "fgvc.cli" in imported(path)]


def test_nothing_imports_in_a_circle() -> None:
    edges = {module: imported(path) - {module} for module, path in MODULES.items()}
    # a package's __init__ re-exports its modules: who imports the package by name waits for all of them
    free: set[str] = set()
    while ready := {module for module in edges.keys() - free if edges[module] <= free}:
        free |= ready
    assert not edges.keys() - free


@pytest.mark.parametrize("modules", ["fgvc", "fgvc.runs, fgvc.runs.compare, fgvc.runs.statistics", "fgvc.reporting"])
def test_package_run_folders_and_tables_do_without_torch(modules: str) -> None:
    code = f"import sys, {modules}; assert 'load_run' in dir(fgvc); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    with pytest.raises(AttributeError, match="'lode_run'"):
        fgvc.lode_run  # type: ignore[attr-defined]  # noqa: B018
