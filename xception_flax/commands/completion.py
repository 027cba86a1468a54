"""What bash and zsh need to complete commands: verbs, options, recipes and the keys of recipes."""

import contextlib
import io
import re
from collections.abc import Callable, Iterable, Mapping

from xception_flax.host.project import RECIPES
from xception_flax.recipes.groups import PARTS

SCRIPT = """\
# Completion of xception-flax for bash. For zsh, before it:
# autoload -Uz compinit bashcompinit && compinit && bashcompinit
_xception_flax() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} verb=${{COMP_WORDS[1]}}
    local words='' key='' begin=''
    COMPREPLY=()
    if [[ $word == --*=* ]]; then  # zsh
        key=${{word%%=*}} begin="${{word%%=*}}=" word=${{word#*=}}
    elif [[ $word == '=' ]]; then  # bash makes a word of each =
        key=$before word=''
    elif [[ $before == '=' ]]; then
        key=${{COMP_WORDS[COMP_CWORD-2]}}
    fi
    if ((COMP_CWORD == 1)); then
        words='{verbs}'
    elif [[ $key == --config || $before == --config || $verb == recipe && $word != -* && -z $key ]]; then
        words='{recipes}'
    elif [[ -n $key ]]; then
        case $key in
{values}
        esac
    elif [[ $word == --config.* ]]; then
        words='{keys}'
        compopt -o nospace 2>/dev/null  # not in zsh
    elif [[ $word == -* || $verb == prepare && $COMP_CWORD == 2 ]]; then
        case $verb in
{options}
        esac
    fi
    COMPREPLY=($(compgen -P "$begin" -W "$words" -- "$word"))
}}
complete -o default ${{ZSH_VERSION:+-o}} ${{ZSH_VERSION:+nospace}} -F _xception_flax xception-flax
"""


def script(verbs: Mapping[str, Callable[[list[str]], int]]) -> str:
    """Returns the script that a shell reads.

    Args:
      verbs: the function of each verb, which prints its help and exits where it is given `--help`.
    """
    keys = [key for name in PARTS for key in keys_of(name)]
    values = {f"--config.{name}.{part.selector}": part.table for name, part in PARTS.items() if part.selector}
    return SCRIPT.format(
        verbs=" ".join(verbs),
        recipes=" ".join(sorted(path.stem for path in RECIPES.glob("*.py"))),
        keys=" ".join(f"--config.{key}=" for key in keys),
        values=_cases(values),
        options=_cases({verb: options_of(main) for verb, main in verbs.items()}),
    )


def keys_of(group: str) -> list[str]:
    """Returns the full names of the keys of a group of recipes, of all entries of its table; '' is the loop."""
    part = PARTS[group]
    names = dict.fromkeys(key for choice in part.table or ("",) for key in part.keys(choice))
    return [f"{group}.{key}" if group else key for key in names]


def _cases(words: Mapping[str, Iterable[str]]) -> str:
    return "\n".join(f"            {case}) words='{' '.join(of_case)}' ;;" for case, of_case in words.items())


def options_of(main: Callable[[list[str]], int], *arguments: str) -> list[str]:
    """Returns the options that the help of a verb names, and its own verbs with theirs."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([*arguments, "--help"])
    usage, _, rest = text.getvalue().partition("\n\n")
    verbs = re.findall(r"^  ([a-z]+)  ", rest, re.MULTILINE) if usage.endswith(" COMMAND ...") else []
    options = re.findall(r"--[a-z][\w-]*", usage)
    return list(dict.fromkeys([*verbs, *options, *(option for verb in verbs for option in options_of(main, verb))]))
