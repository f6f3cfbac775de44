"""The verb `completion`: a script with which bash or zsh completes verbs, flags, their choices and recipes' names."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Literal, get_args, get_origin

from tyro.conf import Positional

from arriero.cli.main import VERBS
from arriero.common.errors import EXIT_OK
from arriero.common.ranges import bare_type, field_ranges, flag
from arriero.train.recipe import bundled_directory

_SCRIPT = """\
_arriero() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" verb="${{COMP_WORDS[1]}}" words=""
  case "$COMP_CWORD" in
    1) words="{verbs}" ;;
    *) case "$verb ${{COMP_WORDS[COMP_CWORD-1]}}" in
{choices}
      *) case "$verb $word" in
{flags}
        esac ;;
      esac ;;
  esac
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _arriero arriero
"""


@dataclass(frozen=True)
class CompletionArgs:
    """Print a script for the shell, such as: eval "$(arriero completion bash)"."""

    shell: Positional[Literal["bash", "zsh"]]
    """Which shell shall read it."""


def run(args: CompletionArgs) -> int:
    """Prints the script."""
    start = "autoload -U +X bashcompinit && bashcompinit\n" if args.shell == "zsh" else ""
    print(start + completion_script(), end="")
    return EXIT_OK


def completion_script() -> str:
    """The script for bash: after a flag its choices, else the verb's flags; a recipe's name, or a file."""
    recipes = " ".join(sorted(path.stem for path in bundled_directory().glob("*.toml")))
    choices, flags = [], []
    for name, verb in VERBS.items():
        kinds = verb_flags(verb.module, verb.arguments)
        takes_recipe = "--train.steps" in kinds
        for key, kind in kinds.items():
            if words := _choices(kind, takes_recipe):
                choices.append(f'      "{name} {key}") words="{words}" ;;')
        flags.append(f'        "{name} -"*) words="{" ".join([*kinds, "--help"])}" ;;')
        if takes_recipe:
            choices.append(f'      "{name} {"slurm" if name == "launch" else name}") words="{recipes}" ;;')
    choices += ['      "launch launch") words="slurm" ;;', '      "completion completion") words="bash zsh" ;;']
    return _SCRIPT.format(verbs=" ".join(VERBS), choices="\n".join(choices), flags="\n".join(flags))


def verb_flags(module: str, arguments: str) -> dict[str, object]:
    """Every flag of a verb with its type."""
    cls = getattr(importlib.import_module(module), arguments)
    found: dict[str, object] = {}
    for owner in getattr(cls, "OWNERS", (cls,)):
        for key, kind in field_ranges(owner).items():
            if Positional not in get_args(kind):
                found[flag(key)] = bare_type(kind)
    return found


def _choices(kind: object, takes_recipe: bool) -> str:
    if get_origin(kind) is Literal:
        return " ".join(map(str, get_args(kind)))
    return "true false" if kind is bool and takes_recipe else ""
