"""Build sdist and wheel into dist/, look through them, and use the wheel in an empty environment, far from this folder.

python tools/check_package.py torch==2.14.1 torchvision==0.29.1    # what to install before the wheel
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
# folders of the checkout by their places in the wheel, and what of them belongs there
SOURCES = {
    "fgvc": ("fgvc", "*"),
    "configs": ("fgvc/configs", "*.yaml"),
    "datasets": ("fgvc/datasets", "*.yaml"),
    "results/paper": ("fgvc/results/paper", "*.csv"),
    "scripts": ("fgvc/scripts", "*.py"),
}
IN_SDIST = ("CHANGELOG.md", "CITATION.cff", "LICENSE", "Makefile", "README.md", "pyproject.toml", "docs/results.md")
FIGURES = PurePosixPath("docs/figures")  # made by our own code; no other picture belongs there
MAX_MB = {".whl": 1.5, ".gz": 12}
RUN = "results/demo/tf_efficientnet_lite0/seb/seed0"
TINY = "+dataset.options={classes:3,train_per_class:4,test_per_class:4,size:192} trainer.epochs=1 trainer.batch_size=4"
# each command's first word is a file of the environment; together they read configs, cards and published numbers
USES = (
    "fgvc --help",
    "python -m fgvc --version",
    "python typed_user.py",
    f"fgvc train -m experiment=demo method=gap,seb {TINY}",
    "fgvc make_tables results/demo --table all",
    f"fgvc predict {RUN} datasets/synthetic/images --json",
    f"fgvc export {RUN} --to safetensors",
    "fgvc report results/demo",
)
# started with Python in the environment: no file of the checkout may be opened or listed
GUARD = """import sys
def _refuse(event, arguments):
    if event in ("open", "os.listdir", "os.scandir") and str(arguments[0]).startswith({root!r}):
        sys.stderr.write(f"{{event}} of the checkout: {{arguments[0]}}\\n")
        sys.stderr.flush()
        import os
        os._exit(99)
sys.addaudithook(_refuse)
"""
IMPORT_ALL = """import fgvc, importlib, pkgutil
for module in pkgutil.walk_packages(fgvc.__path__, "fgvc."):
    importlib.import_module(module.name)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", nargs="*", metavar="REQUIREMENT", help="installed before the wheel")
    parser.add_argument("--python", default=sys.executable, help="makes the environment (default: the one that runs)")
    arguments = parser.parse_args()

    wheel, sdist = build()
    problems = [*wheel_problems(wheel), *sdist_problems(sdist)]
    if problems:
        sys.exit("\n".join(problems))
    with tempfile.TemporaryDirectory(prefix="fgvc-package-") as name:
        python = install(Path(name) / "env", wheel, arguments.first, arguments.python)
        use(python, Path(name) / "elsewhere")
    print("the package is whole")


def build() -> tuple[Path, Path]:
    """The paths of wheel and sdist; the wheel is made from the sdist."""
    shutil.rmtree(DIST, ignore_errors=True)
    carry_out(sys.executable, "-m", "build", "--outdir", str(DIST), str(ROOT), cwd=ROOT)
    (wheel,), (sdist,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    carry_out(sys.executable, "-m", "twine", "--no-color", "check", "--strict", str(wheel), str(sdist), cwd=ROOT)
    return wheel, sdist


def wheel_problems(wheel: Path) -> list[str]:
    """What is in the wheel and should not be, or the other way round."""
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = set()
    for folder, (place, pattern) in SOURCES.items():
        source = ROOT / folder
        for file in source.glob(pattern) if folder == "datasets" else source.rglob(pattern):  # not downloaded ones
            if file.is_file() and file.parent.name != "__pycache__":
                expected.add(f"{place}/{file.relative_to(source).as_posix()}")
    return [
        *(f"{wheel.name} lacks {name}" for name in sorted(expected - found)),
        *(f"{wheel.name} holds {name}" for name in sorted(found - expected)),
        *size_problems(wheel),
    ]


def sdist_problems(sdist: Path) -> list[str]:
    """What a wheel or a run of the tests would lack, and what is not of the source."""
    with tarfile.open(sdist) as archive:
        names = [PurePosixPath(name).relative_to(sdist.name.removesuffix(".tar.gz")) for name in archive.getnames()]
    tests = [path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")]
    lacking = {*IN_SDIST, *tests} - set(map(str, names))
    data = {".npy", ".npz", ".pt", ".pth", ".safetensors", ".jpg", ".parquet", ".pyc"}
    return [
        *(f"{sdist.name} lacks {name}" for name in sorted(lacking)),
        *(f"{sdist.name} holds {name}" for name in names if name.suffix in data and name.parent != FIGURES),
        *size_problems(sdist),
    ]


def size_problems(path: Path) -> list[str]:
    size = path.stat().st_size / 1e6
    print(f"{path.name}: {size:.2f} MB")
    limit = MAX_MB[path.suffix]
    return [f"{path.name} has {size:.1f} MB, more than {limit}: is something in it by mistake?"] if size > limit else []


def install(env: Path, wheel: Path, first: list[str], python: str) -> Path:
    """A new environment with the wheel and its extra [demo]; the path of its Python."""
    carry_out(python, "-m", "venv", str(env), cwd=env.parent)
    own = env / "bin" / "python"
    for requirements in (first, [f"{wheel}[demo]"]):
        if requirements:
            carry_out(str(own), "-m", "pip", "install", "--quiet", *requirements, cwd=env.parent)
    carry_out(str(own), "-m", "pip", "check", cwd=env.parent)
    return own


def use(python: Path, folder: Path) -> None:
    """Everything that is tried with the installed package, in an empty folder."""
    folder.mkdir()
    shutil.copy(ROOT / "tools" / "typed_user.py", folder)
    # of the checkout's environment; a file in it leads to the packages of the other one
    carry_out(sys.executable, "-m", "mypy", "--strict", "--python-executable", str(python), "typed_user.py", cwd=folder)
    (site,) = python.parents[1].glob("lib/python*/site-packages")
    (site / "sitecustomize.py").write_text(GUARD.format(root=str(ROOT)), encoding="utf-8")
    carry_out(str(python), "-c", IMPORT_ALL, cwd=folder)
    for command in USES:
        program, *arguments = command.split()
        carry_out(str(python.with_name(program)), *arguments, cwd=folder)


def carry_out(*command: str, cwd: Path) -> None:
    """Run a command outside of the checkout's environment; its output is shown where it fails, which ends all."""
    settings = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    began = time.monotonic()
    done = subprocess.run(command, cwd=cwd, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    shown = " ".join(command[:6]).replace("\n", " ")[:110]
    print(f"{time.monotonic() - began:6.1f} s  {shown}", flush=True)
    if done.returncode != 0:
        sys.exit(f"{done.stdout}\nexit status {done.returncode}: {' '.join(command)}")


if __name__ == "__main__":
    main()
