"""List the settings of a run with their defaults (and those of a first run), or those that a word finds.

fgvc settings
fgvc settings epochs
fgvc settings "learning rate"
"""

import argparse

from fgvc.cli import exit_on_user_error
from fgvc.errors import ConfigError
from fgvc.resources import resource_folder
from fgvc.runs.known_settings import find_settings, first_values, known_settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("word", nargs="?", help="part of a key or of a description")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()

    every = list(known_settings().values())
    found = every if arguments.word is None else find_settings(arguments.word)
    if not found:
        raise ConfigError(f"no setting has {arguments.word!r} in its key or description; fgvc settings lists all")
    first = first_values(resource_folder("configs"))
    print("\n".join(setting.text(first) for setting in found))
    print(
        f"\n{len(found)} of {len(every)} settings; give one as KEY=VALUE to fgvc train. A first run is fgvc train "
        "dataset.root=FOLDER."
    )


if __name__ == "__main__":
    exit_on_user_error(main)
