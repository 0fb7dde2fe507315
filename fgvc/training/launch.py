"""From the command line to runs: arguments are checked, Hydra composes the configuration, mistakes become messages."""

import dataclasses
import difflib
import itertools
import logging
import os
import re
import sys
import tempfile
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from fgvc.errors import ConfigError, UserError
from fgvc.pooling import list_poolings
from fgvc.runs.config import RunConfig, to_run_config
from fgvc.runs.known_settings import first_values, is_known, known_settings, nearest_keys

_log = logging.getLogger(__name__)

AS_TYPED = (
    "name",
    "dataset.name",
    "dataset.root",
    "dataset.options.path",
    "dataset.options.file",
    "backbone.weights",
    "initial_weights",
    "run_dir",
    "resume",
    "cache.dir",
    "trainer.device",
)
"""Settings that hold a path or a name, and are taken as they are typed."""

_VALUES = ("true", "false", "nan", "inf", "null")
"""What Hydra's grammar reads as a value of its own, in letters of either case."""

USAGE = """\
usage: fgvc train dataset.root=FOLDER [KEY=VALUE ...]       a first table of your own images
       fgvc train experiment=NAME [KEY=VALUE ...]           one run
       fgvc train -m experiment=NAME KEY=VALUE,VALUE ...    one run for each combination of the values
       fgvc train --help                                    every setting
"""
_MOST_USED = """\
  fgvc train dataset.root=FOLDER optimizer.lr=3e-4 name=lr_3e-4       # another rate; name= keeps the first runs
  fgvc train dataset.root=FOLDER trainer.epochs=30 name=longer
  fgvc train dataset.root=FOLDER method=isqrt_cov,seb seed=0,1,2      # other heads; a run for each head and seed
  fgvc train dataset.root=FOLDER backbone=timm backbone.name=NAME     # any network of timm
  fgvc train dataset.root=FOLDER --cfg job                            # the settings that a run would have
  fgvc settings "learning rate"                                       # find a setting
"""
OPTIONS = {
    "--dry-run": "take two steps on random images and save nothing",
    "--quiet": "print warnings and the result only",
    "--debug": "show the traceback of an error",
}
"""Options that are ours, with their descriptions; all others are Hydra's."""
_HYDRA_FLAGS = ("-m", "--multirun", "--resolve", "--hydra-help", "--version", "-r", "--run")
_HYDRA_VALUES = (
    *("-c", "--cfg", "-p", "--package", "-cp", "--config-path", "-cn", "--config-name", "-cd", "--config-dir"),
    *("-i", "--info", "--experimental-rerun"),
)


def hydra_main(
    arguments: Sequence[str], config_dir: Path, task: Callable[[RunConfig], float], *, keep_going: bool = True
) -> None:
    """Compose `train.yaml` in `config_dir` with the overrides of the command line and run the task.

    With -m the task runs for each combination of the comma-separated values, one after the other. A failure does not
    stop the others unless `keep_going` is False; the first error is raised at the end.

    Args:
        arguments: arguments of the command line without our own `OPTIONS`, as `check_arguments` accepts them.
        config_dir: folder of the configurations.
        task: function to call with the configuration of each run; a search maximises what it returns.
        keep_going: whether a sweep goes on after a failure. With several processes it ends.

    Raises:
        ConfigError: a wrong value or type, or a key left unset.
    """
    register_choices()
    sweep = is_sweep(arguments)
    # of several processes one may fail alone, and must not start the next run while the others wait for it
    keep_going = keep_going and int(os.environ.get("WORLD_SIZE", "1")) == 1
    typed = list(sys.argv)
    sys.argv[1:] = [quoted(argument, sweep=sweep) for argument in arguments]
    # otherwise Hydra prints the error itself and exits with 1; our message and exit status need the exception
    os.environ["HYDRA_FULL_ERROR"] = "1"
    failures: list[Exception] = []

    def job(composed: DictConfig) -> float:
        if failures and not keep_going:
            return 0.0
        sys.argv[:] = typed  # which a run keeps as its command
        try:
            return task(to_run_config(composed))
        except Exception as error:  # kept, since Hydra prints a line of its own about whatever passes through it
            if keep_going and HydraConfig.get().mode == RunMode.MULTIRUN:
                reason = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                _log.error("failed: %s: %s", " ".join(HydraConfig.get().overrides.task), reason)
            failures.append(error)
            return 0.0

    try:
        with tempfile.TemporaryDirectory() as scratch:
            if sweep:  # Hydra writes its multirun.yaml before a run has looked at the data
                first = next(i for i, word in enumerate(sys.argv) if i and "=" in word and word[0] != "-")
                sys.argv.insert(first, f"hydra.sweep.dir={_quoted_path(scratch)}")
            hydra.main(version_base="1.3", config_path=str(config_dir.resolve()), config_name="train")(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error)) from error
    if failures and isinstance(failures[0], OmegaConfBaseException):
        raise ConfigError(_explain(failures[0])) from failures[0]
    if failures:
        raise failures[0]


def is_sweep(arguments: Sequence[str]) -> bool:
    """Return whether commas part the values of a sweep."""
    return bool({"-m", "--multirun"} & set(arguments))


def is_search(arguments: Sequence[str]) -> bool:
    """Return whether the arguments ask for a search."""
    return any(argument.startswith("search=") for argument in arguments)


def start_log(*, quiet: bool) -> None:
    """Show the log on stderr, with `quiet` only warnings; of several processes, the first one alone says more."""
    level = logging.WARNING if quiet or os.environ.get("RANK", "0") != "0" else logging.INFO
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    for chatty in ("accelerate", "hydra"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each request to a hub
    logging.getLogger("huggingface_hub").propagate = False  # it prints its own lines


def choices(config_dir: Path, arguments: Sequence[str] = ()) -> dict[str, list[str]]:
    """Return the names that each group of the command line takes, e.g. those of `experiment=NAME`.

    A folder that the arguments give as --config-dir adds its own.
    """
    own = [Path(after) for option, after in itertools.pairwise(arguments) if option in ("-cd", "--config-dir")]
    own += [Path(word.partition("=")[2]) for word in arguments if word.startswith(("-cd=", "--config-dir="))]
    files: dict[str, list[str]] = {}
    for file in sorted(file for folder in (config_dir, *own) for file in folder.glob("*/*.yaml")):
        if file.stem not in files.setdefault(file.parent.name, []) and not file.stem.startswith("_"):
            files[file.parent.name].append(file.stem)
    return files | {"method": list_poolings()}


def check_arguments(arguments: Sequence[str], groups: Mapping[str, Sequence[str]]) -> None:
    """Check options, keys and the names of groups, and name the nearest known ones.

    Args:
        arguments: arguments of the command line.
        groups: names by group, see `choices`.

    Raises:
        ConfigError: an unknown option, key or name, or an argument that is no KEY=VALUE.
    """
    previous = ""
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        option, _, value = argument.partition("=")
        if argument.startswith("-"):
            if option not in (*OPTIONS, *_HYDRA_FLAGS, *_HYDRA_VALUES):
                raise ConfigError(f"unknown option {option}; {_as_setting(option, value or following, groups)}")
        elif "=" not in argument and not argument.startswith("~"):
            if previous not in _HYDRA_VALUES:
                raise ConfigError(f"{argument!r} is no setting; {_as_setting(argument, following, groups)}")
        else:
            _check_setting(argument, groups)
        previous = argument


def _as_setting(word: str, value: str, groups: Mapping[str, Sequence[str]]) -> str:
    """Return advice to someone who wrote `word` and then a value as for another program."""
    if Path(word).exists():
        return f"did you mean dataset.root={word}?"
    near = nearest_keys(word, groups)
    if not near:
        return "settings are given as KEY=VALUE; fgvc settings lists them"
    return f"use {near[0]}={'VALUE' if '=' in value or value.startswith('-') else value or 'VALUE'}"


def _check_setting(argument: str, groups: Mapping[str, Sequence[str]]) -> None:
    found = re.match(r"(?:\+{1,2}|~)?([^=]*)(?:=(.*))?\Z", argument, re.DOTALL)
    assert found is not None  # whatever the argument is
    key, value = found.groups()
    if key in AS_TYPED and "${" in str(value) and os.path.lexists(str(value)):
        raise ConfigError(f"{key}={value}: ${{...}} stands for another setting, so no path may hold it; rename this")
    if key in groups:
        for name in (value or "").split(","):
            if re.fullmatch(r"[\w-]+", name) and name not in groups[key]:
                near = difflib.get_close_matches(name.lower(), groups[key])
                fix = f"nearest: {', '.join(near)}" if near else f"choose one of {', '.join(groups[key])}"
                if key == "backbone":
                    fix += f"; or any timm model: backbone=timm backbone.name={name}"
                elif key == "dataset" and Path(name).is_dir():
                    fix = f"a folder of your own images is dataset.root={name}"
                raise ConfigError(f"unknown {key}={name}; {fix}")
    elif not (is_known(key) or key.startswith("hydra") or "@" in key):
        near = nearest_keys(key, groups)
        part = key.partition(".")[0]
        fix = f"nearest: {', '.join(near)}; " if near else ""
        listed = f"fgvc settings {part}" if part in _PARTS else "fgvc settings"
        raise ConfigError(f"unknown setting {key}; {fix}{listed} lists those there are")


_PARTS = tuple(field.name for field in dataclasses.fields(RunConfig))


def help_text(config_dir: Path) -> str:
    """Return the help of the command: usage, options, groups with their names, and every setting."""
    options = "\n".join(f"  {name:10} {text}" for name, text in OPTIONS.items())
    named = "\n".join(
        textwrap.fill(
            f"{group}= {', '.join(names)}",
            100,
            initial_indent="  ",
            subsequent_indent="      ",
            break_on_hyphens=False,
        )
        for group, names in choices(config_dir).items()
    )
    first = first_values(config_dir)
    settings = textwrap.indent("\n".join(setting.text(first) for setting in known_settings().values()), "  ")
    return (
        f"{USAGE}\n"
        f"Examples (a run is not trained again with other settings; give it another name=):\n{_MOST_USED}\n"
        f"Options:\n{options}\n\n"
        f"Groups, each a set of settings with a name (files in configs/):\n{named}\n\n"
        "Settings with their defaults, and the value of a first run where it is another (groups and experiments set "
        f"others; --cfg job shows all):\n{settings}\n\nfgvc settings WORD finds a setting."
    )


def quoted(argument: str, *, sweep: bool) -> str:
    """Return an argument in Hydra's grammar: paths and names in quotes, since it knows no = or ö; options with ++.

    Commas part the values of a sweep. What is in quotes stays as it is.
    """
    if re.match(r"\w+\.options\.\w+=", argument):
        argument = f"++{argument}"  # Hydra would refuse one that the configuration does not have yet
    found = re.fullmatch(rf"(\+{{0,2}}(?:{'|'.join(map(re.escape, AS_TYPED))})=)(.*)", argument, re.DOTALL)
    if found is None or re.fullmatch("'.*'|\".*\"", found[2], re.DOTALL):
        return argument
    paths = found[2].split(",") if sweep else [found[2]]
    return found[1] + ",".join(map(_quoted_path, paths))


def _quoted_path(path: str) -> str:
    simple = re.fullmatch(r"([a-z./][\w./:-]*)?", path, re.ASCII | re.I)
    plain = simple and (path == "null" or path.lower() not in _VALUES)
    if plain or (path[:1] in "'\"" and path[-1:] == path[:1]):
        return path
    escaped = re.sub(r"(\\*)('|$)", lambda end: 2 * end[1] + ("\\'" if end[2] else ""), path)
    return f"'{escaped}'"


def register_choices() -> None:
    """Register with Hydra what is not in configs/: the schema, which refuses unknown keys, and `method=NAME`."""
    store = ConfigStore.instance()
    store.store(name="schema", node=RunConfig)
    for name in list_poolings():
        store.store(group="method", name=name, node={"name": name})


def _explain(error: Exception) -> str:
    """Return Hydra's message in fewer lines."""
    if isinstance(error, OverrideParseException):
        key, _, value = error.override.partition("=")
        return f"{error.override}: not in Hydra's grammar; put the value in quotes of its own: \"{key}='{value}'\""
    lines = [line for line in str(error).splitlines() if line.strip()]
    cause: Any = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if cause is not None and cause is not error:
        lines += [line for line in str(cause).splitlines() if line.strip() and line not in lines]
    named = next((line.split(": ")[1] for line in lines if line.strip().startswith("full_key: ")), None)
    facts = ("full_key: ", "reference_type=", "object_type=")  # of omegaconf, for those who know its types
    text = "\n  ".join(line for line in lines if not line.strip().startswith(facts))
    return text if named is None or named in text else f"{named}: {text}"
