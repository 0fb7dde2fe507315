"""The page of all settings, docs/settings.md, made from the dataclasses of `fgvc.runs.config`."""

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import get_type_hints

from fgvc.runs.config import RunConfig
from fgvc.runs.known_settings import KnownSetting, known_settings

_HEAD = """\
# Every setting

A setting is given as `KEY=VALUE` on the command line: `fgvc train dataset.root=FOLDER optimizer.lr=1e-3`. A group or an
experiment may set other values than the defaults below. Add `--cfg job` to a command to see the values that it uses.
`fgvc settings WORD` searches this list in the terminal, e.g. `fgvc settings "learning rate"`. `null` stands for none.

(This page is made by `make tables`; the descriptions are in `fgvc/runs/config.py`.)

## Groups

A group sets several settings by one name, e.g. `optimizer=adamw`. The names are those of the files in `configs/`, for
`method=` those of the registered poolings.

| Group | Names |
| :-- | :-- |"""


def settings_page(groups: Mapping[str, Sequence[str]]) -> str:
    """Return the page in Markdown: the names of each group, then every setting, a section for each part of a run."""
    page = [_HEAD, *(f"| `{group}` | {_listing(names)} |" for group, names in groups.items()), ""]
    for part, summary in _parts(RunConfig):
        inside = [setting for setting in known_settings().values() if setting.key.rpartition(".")[0] == part]
        page.append(f"## {part or 'run'}\n\n{summary}\n\n" + "\n".join(map(_section, inside)))
    return "\n".join(page)


def _listing(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names if not name.startswith("_"))  # those are parts of others


def _section(setting: KnownSetting) -> str:
    default = "no default" if setting.default is None else f"default `{setting.default}`"
    description = re.sub(r"docs/(\w+\.md)", r"[\1](\1)", setting.description)
    return f"### `{setting.key}`\n\n`{setting.kind}`, {default}\n\n{description}\n"


def _parts(schema: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Of a dataclass and those within it: the key up to the last dot, and what the part is."""
    yield prefix, (inspect.getdoc(schema) or "").partition("\n")[0]
    for name, kind in get_type_hints(schema).items():
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            yield from _parts(kind, f"{prefix}.{name}".lstrip("."))
