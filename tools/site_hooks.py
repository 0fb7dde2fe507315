"""Hooks of the documentation site (mkdocs.yml): the pages of the repository as pages of the site, with the same links.

Every page is written for the repository, where a link leads to a file: `../results/README.md`, `../fgvc/cli.py`. The
site has such a file as a page, too: Markdown as it is, other text as a listing, a folder as a list of what is in it, a
notebook of examples/ as it was executed last (`make notebooks`). Which files become pages follows from the links; a
link to nothing is a warning, and so ends a strict build. The reference is made from what each package names in its
`__all__`. Formulas are written in LaTeX, in fences ```math and as $...$; the site has them as MathML, which browsers
typeset themselves.
"""

import ast
import logging
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
from latex2mathml.converter import convert as mathml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

log = logging.getLogger("mkdocs.hooks.site_hooks")

ROOT = Path(__file__).resolve().parents[1]
EXECUTED = ROOT / "build" / "notebooks"
FRONT_PAGE = "README.md"
ALWAYS = (
    FRONT_PAGE,
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "examples/drop_in_layer.py",
    "examples/style_transfer.py",
    "examples/analyse_a_run.py",
)
"""Pages outside docs/ that the navigation names, whether a page links to them or not."""
PACKAGES = (
    "fgvc",
    "fgvc.spectral",
    "fgvc.pooling",
    "fgvc.models",
    "fgvc.runs",
    "fgvc.data",
    "fgvc.training",
    "fgvc.inference",
    "fgvc.studies.spectra",
    "fgvc.studies.confusion",
    "fgvc.studies.smoothness",
    "fgvc.studies.attribution",
    "fgvc.presentation",
    "fgvc.reporting",
    "fgvc.reporting.report",
)

_VERBATIM = re.compile(r"(^(?P<fence>```+|~~~+).*?^(?P=fence)|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(\]\()([^)\s]+)(\))")
_FORMULA = re.compile(
    rf"^```math\n(?P<display>.*?)^```$|{_VERBATIM.pattern}|(?<![\\$\w])\$(?P<inline>[^\s$](?:[^$\n]*[^\s$])?)\$(?![$\w])",
    re.DOTALL | re.MULTILINE,
)
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".sbatch": "bash", ".sh": "bash"}


def page_of(path: str) -> str:
    """Page of the site for a path of the repository, both with forward slashes: "docs/faq.md" -> "faq.md"."""
    if path == FRONT_PAGE:
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path in ALWAYS and path.endswith(".py"):
        return path.removesuffix(".py") + ".md"
    if (ROOT / path).is_dir():
        return f"repository/{path}/index.md"
    return f"repository/{path}" if path.endswith(".md") else f"repository/{path}.md"


def links(markdown: str) -> Iterator[str]:
    """Targets of the links to files, without their anchors; links within verbatim text are none."""
    for part in _VERBATIM.split(markdown)[::3]:
        for match in _LINK.finditer(part):
            target = match[2].partition("#")[0]
            if target and "://" not in target and not target.startswith("mailto:"):
                yield target


def rewrite(markdown: str, resolve: Callable[[str], str]) -> str:
    """The page with every link to a file replaced by `resolve` of it."""

    def replace(match: re.Match[str]) -> str:
        target, hash_mark, anchor = match[2].partition("#")
        if not target or "://" in target or target.startswith("mailto:"):
            return match[0]
        return f"{match[1]}{resolve(target)}{hash_mark}{anchor}{match[3]}"

    parts = _VERBATIM.split(markdown)
    # the pattern has two groups, so that text, verbatim text and the fence's name take turns
    return "".join(
        _LINK.sub(replace, part) if number % 3 == 0 else part
        for number, part in enumerate(parts)
        if part is not None and number % 3 != 2
    )


def target_path(page: str, target: str) -> str:
    """Path in the repository that a link of a page of the repository leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), target))


def content_of(path: str) -> str:
    """Markdown of a file or folder of the repository."""
    file = ROOT / path
    if file.is_dir():
        return _folder(file, path)
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        return text
    fence = "`" * (max((len(run) for run in re.findall(r"`+", text)), default=2) + 3)
    language = _LANGUAGES.get(file.suffix, "text")
    return f"---\nsearch:\n  exclude: true\n---\n# {file.name}\n\n`{path}`\n\n{fence}{language}\n{text}\n{fence}\n"


def take_formulas(markdown: str) -> tuple[str, dict[str, str]]:
    """The page with a word in place of each formula, which Markdown leaves alone, and the MathML of each word."""
    formulas: dict[str, str] = {}

    def stand_in(match: re.Match[str]) -> str:
        if match["display"] is not None:
            html = f'<div class="formula">{mathml(match["display"], display="block")}</div>'
        elif match["inline"] is not None:
            html = mathml(match["inline"])
        else:
            return match[0]
        word = f"FORMULA{len(formulas)}END"
        formulas[word] = html
        return word

    return _FORMULA.sub(stand_in, markdown), formulas


def _folder(folder: Path, path: str) -> str:
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith((".", "_")) or entry.is_file())
    lines = [f"- [{entry.name}{'/' * entry.is_dir()}]({entry.name})" for entry in entries]
    return f"---\nsearch:\n  exclude: true\n---\n# {path}/\n\n" + "\n".join(lines) + "\n"


def _notebook(path: str, config: MkDocsConfig) -> list[File]:
    """Page and pictures of an executed notebook."""
    name = Path(path).stem
    executed = EXECUTED / f"{name}.ipynb"
    if not executed.is_file():
        raise PluginError(f"{executed.relative_to(ROOT)} is missing: execute {path} first, by `make notebooks`")
    exporter = MarkdownExporter()
    body, resources = exporter.from_notebook_node(
        nbformat.read(executed, as_version=4), resources={"output_files_dir": f"{name}_files", "unique_key": name}
    )
    pictures = [
        File.generated(config, f"examples/{output}", content=content)
        for output, content in resources["outputs"].items()
    ]
    return [File.generated(config, f"examples/{name}.md", content=body), *pictures]


def _reference(package: str) -> str:
    """Reference page of a package: what `__all__` of its __init__.py names, in that order."""
    tree = ast.parse((ROOT / package.replace(".", "/") / "__init__.py").read_text(encoding="utf-8"))
    origin, names = {}, []
    for statement in ast.walk(tree):
        if isinstance(statement, ast.ImportFrom):
            origin.update({alias.name: f"{statement.module}.{alias.name}" for alias in statement.names})
        elif isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
            names = ast.literal_eval(statement.value)
    # by where a name comes from: a module such as fgvc.spectral.covariance may hide a function of its own name
    entries = "\n\n".join(f"::: {origin[name]}" for name in names if not name.startswith("__"))
    return f"# {package}\n\n{ast.get_docstring(tree)}\n\n{entries}\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/ that are linked to, directly or through each other."""
    written = {f"docs/{file.src_uri}" for file in files.documentation_pages()}
    waiting = [*ALWAYS, *(target for page in sorted(written) for target in _targets(page))]
    while waiting:
        path = waiting.pop()
        if path in written or path.startswith("docs/") or not (ROOT / path).exists():
            continue
        written.add(path)
        if path in ALWAYS and path.endswith(".py"):
            for file in _notebook(path, config):
                files.append(file)
            waiting += _targets(path)
            continue
        inclusion = InclusionLevel.INCLUDED if path in ALWAYS else InclusionLevel.NOT_IN_NAV
        content = content_of(path)
        files.append(File.generated(config, page_of(path), content=content, inclusion=inclusion))
        waiting += [target_path(_base(path), target) for target in links(content)]
    for package in PACKAGES:
        files.append(File.generated(config, f"reference/{package}.md", content=_reference(package)))
    config.extra["repository_paths"] = {page_of(path): path for path in written}
    return files


def _base(path: str) -> str:
    """What the links of a page are relative to: a folder's listing lies within the folder."""
    return f"{path}/" if (ROOT / path).is_dir() else path


def _targets(page: str) -> list[str]:
    return [target_path(page, target) for target in links((ROOT / page).read_text(encoding="utf-8"))]


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Lead the links of a page of the repository to the pages of the site."""
    source = page.file.src_uri
    path = config.extra["repository_paths"].get(source)
    if path is None:
        return markdown
    if path == FRONT_PAGE:
        page.meta["hide"] = ["navigation"]
    if path == "docs/settings.md":
        page.meta["search"] = {"boost": 3}  # first for who looks for a setting

    def resolve(target: str) -> str:
        if path.endswith(".py") and "_files/" in target:  # a picture that the notebook made
            return target
        goal = target_path(_base(path), target)
        if not (ROOT / goal).exists() or goal.startswith(".."):
            log.warning(f"{path} links to {target}, but there is no {goal}")
            return target
        return posixpath.relpath(page_of(goal), posixpath.dirname(source) or ".")

    text, page.meta["formulas"] = take_formulas(rewrite(markdown, resolve))
    return text


def on_page_content(html: str, page: Page, **_: Any) -> str:
    """Put the formulas in their places."""
    for word, formula in page.meta.get("formulas", {}).items():
        html = html.replace(f"<p>{word}</p>", formula).replace(word, formula)
    return html
