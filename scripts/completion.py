"""Print a script for bash that completes commands, settings and the names of groups with the Tab key.

eval "$(fgvc completion)"                                                  # in ~/.bashrc
autoload -U +X bashcompinit && bashcompinit && eval "$(fgvc completion)"   # in ~/.zshrc
"""

import argparse

from fgvc.cli import exit_on_user_error, find_commands
from fgvc.resources import resource_folder
from fgvc.runs.known_settings import known_settings
from fgvc.training.launch import OPTIONS, choices

_SCRIPT = """\
_fgvc() {{
    local typed="${{COMP_LINE:0:COMP_POINT}}" words
    local word="${{typed##* }}"
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        COMPREPLY=($(compgen -W "{commands}" -- "$word"))
    elif [[ "${{COMP_WORDS[1]}}" == train && "$word" == *=* ]]; then
        case "${{word%%=*}}" in
{groups}
            *) return ;;
        esac
        # what is before the last comma of a sweep stays; bash takes what follows the = for a word of its own
        local value="${{word#*=}}" before=""
        [[ "$value" == *,* ]] && before="${{value%,*}},"
        COMPREPLY=($(compgen -P "$before" -W "$words" -- "${{value##*,}}"))
    elif [[ "${{COMP_WORDS[1]}}" == train ]]; then
        COMPREPLY=($(compgen -W "{options} {keys}" -- "$word"))
        compopt -o nospace 2> /dev/null
    fi
}}
complete -o default -F _fgvc fgvc"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()

    groups = choices(resource_folder("configs"))
    print(
        _SCRIPT.format(
            commands=" ".join(find_commands()),
            options=" ".join(OPTIONS),
            keys=" ".join(f"{key}=" for key in (*groups, *known_settings())),
            groups="\n".join(f'            {group}) words="{" ".join(names)}" ;;' for group, names in groups.items()),
        )
    )


if __name__ == "__main__":
    exit_on_user_error(main)
