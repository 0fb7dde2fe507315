"""Every setting by its key, with type, default and description, read from the dataclasses of `fgvc.runs.config`."""

import dataclasses
import difflib
import functools
import inspect
import json
import re
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from omegaconf import MISSING

from fgvc.foreign import YAML_LOADER
from fgvc.runs.config import RunConfig, flatten

_WIDTH = 100
_OTHER_WORDS = {"model": "backbone", "network": "backbone", "head": "method", "pooling": "method"}
"""What other programs call a setting, and what it is called here."""


@dataclass(frozen=True)
class KnownSetting:
    """One setting of a run.

    Attributes:
        key: Key on the command line, e.g. "trainer.epochs".
        kind: Type in words of Python, e.g. "int" or "float | None".
        default: Default as on the command line, e.g. "null"; None if the setting must be given.
        description: What it is, in a sentence or two.
    """

    key: str
    kind: str
    default: str | None
    description: str

    def text(self, first: Mapping[str, Any]) -> str:
        """The setting in two lines or more: key and default, then the indented description.

        `first` has the settings of a first run by key, see `first_values`; one that differs is
        shown, too.
        """
        shown = f"{self.key}=..." if self.default is None else f"{self.key}={self.default}"
        value = as_given(first.get(self.key, self.default))
        if self.default is not None and self.key in first and value != self.default:
            shown += f"  (first run: {value})"
        return f"{shown}\n{textwrap.indent(textwrap.fill(self.description, _WIDTH - 4), '    ')}"


@functools.cache
def known_settings() -> Mapping[str, KnownSetting]:
    """Return all settings by key, in the order of the dataclasses."""
    return {setting.key: setting for setting in _settings(RunConfig)}


def first_values(config_dir: Path) -> dict[str, Any]:
    """Return what `experiment/first.yaml` and the groups in it set, by key: `fgvc train dataset.root=FOLDER`."""

    def read(file: str) -> dict[str, Any]:
        content: dict[str, Any] = yaml.load((config_dir / file).read_text(), YAML_LOADER)
        return content

    own = read("experiment/first.yaml")
    groups = [item for entry in own.pop("defaults") for item in entry.items()]  # such as "override /optimizer": adamw
    names = [(group.rpartition("/")[2], name) for group, name in groups]
    return flatten({group: read(f"{group}/{name}.yaml") for group, name in names}) | flatten(own)


def is_known(key: str) -> bool:
    """Return whether this is the key of a setting, of several (e.g. "dataset.transform"), or of an option by name."""
    return any(
        f"{known}.".startswith(f"{key}.") or (known.endswith("options") and key.startswith(f"{known}."))
        for known in known_settings()
    )


def find_settings(word: str) -> list[KnownSetting]:
    """Return the settings with `word` in their key or description; if there is none, those with the nearest keys."""
    plain = word.lower().lstrip("-").replace("-", "_")
    every = known_settings().values()
    # what is named so comes first
    by_key = sorted((s for s in every if plain in s.key), key=lambda s: s.key.rpartition(".")[2] != plain)
    by_text = [s for s in every if s not in by_key and plain.replace("_", " ") in s.description.lower()]
    return by_key + by_text or [known_settings()[key] for key in nearest_keys(word)]


def nearest_keys(word: str, more: Iterable[str] = ()) -> list[str]:
    """Return up to three keys of settings (and of `more` keys) that `word` may mean, the most probable first.

    A key counts whole and by its last part, so "epoch", "--epochs" and "train.epochs" all mean `trainer.epochs`.
    """
    plain = word.lower().lstrip("-").replace("-", "_")
    plain = _OTHER_WORDS.get(plain, plain)
    keys = [*more, *known_settings()]
    last = plain.rpartition(".")[2]
    same = [key for key in keys if key.rpartition(".")[2] == last]
    whole = difflib.get_close_matches(plain, keys, 3, 0.75)
    ends = {key.rpartition(".")[2]: key for key in reversed(keys)}
    parts = [ends[end] for end in difflib.get_close_matches(last, ends, 3, 0.75)]
    return list(dict.fromkeys([*(key for key in same if key in whole), *same, *whole, *parts]))[:3]


def _settings(schema: type, prefix: str = "") -> Iterable[KnownSetting]:
    described, hints = _attributes(schema), get_type_hints(schema)
    for field in dataclasses.fields(schema):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            yield from _settings(kind, f"{prefix}{field.name}.")
            continue
        name = getattr(kind, "__name__", str(kind)) if isinstance(kind, type) else str(kind).replace("typing.", "")
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        shown = None if default == MISSING else as_given(default)
        yield KnownSetting(f"{prefix}{field.name}", name, shown, described[field.name])


def as_given(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _attributes(schema: type) -> dict[str, str]:
    """Return the descriptions of the attributes in a docstring, by name."""
    _, _, section = (inspect.getdoc(schema) or "").partition("Attributes:\n")
    found = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", section, re.MULTILINE)
    texts = {name: " ".join(text.split()) for name, text in found}
    return {name: re.sub(r"\bNone\b", "null", text) for name, text in texts.items()}  # as on the command line
