"""`holdfast completion`: shell completion, made from the parser itself."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

from vmm.cli.command import Commands

_BASH = """\
_holdfast() {{
    local cur="${{COMP_WORDS[COMP_CWORD]}}" path="" word
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        case "${{path}} ${{word}}" in
{steps}
        esac
    done
    local words=""
    case "$path" in
{words}
    esac
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
    [ ${{#COMPREPLY[@]}} -gt 0 ] || COMPREPLY=($(compgen -f -- "$cur"))
}}
complete -o filenames -F _holdfast holdfast
"""
_ZSH_HEAD = "#compdef holdfast\nautoload -Uz bashcompinit && bashcompinit\n"


def register(commands: Commands, root: argparse.ArgumentParser) -> None:
    """Add the command; ``root`` is the finished parser it describes."""
    parser = commands.add_parser(
        "completion", help="print a completion script for a shell", description="Print a completion script."
    )
    parser.add_argument("shell", choices=("bash", "zsh"))
    parser.set_defaults(run=_printer(root))


def script(root: argparse.ArgumentParser, shell: str) -> str:
    """The completion script for "bash" or "zsh"."""
    nodes = list(_walk(root, ""))
    steps = "\n".join(f'            "{path}") path="{path}" ;;' for path, _ in nodes if path)
    words = "\n".join(f'        "{path}") words="{" ".join(names)}" ;;' for path, names in nodes)
    return (_ZSH_HEAD if shell == "zsh" else "") + _BASH.format(steps=steps, words=words)


def _printer(root: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    return lambda args: print(script(root, args.shell), end="")


def _walk(parser: argparse.ArgumentParser, path: str) -> Iterator[tuple[str, list[str]]]:
    """Every command's path (" vm list") and the words that may follow it."""
    words = []
    children: list[tuple[str, argparse.ArgumentParser]] = []
    for action in parser._actions:
        words += [option for option in action.option_strings if option.startswith("--")]
        if isinstance(action, argparse._SubParsersAction):
            children += action.choices.items()
        elif action.choices and not action.option_strings:
            words += [str(choice) for choice in action.choices]
    yield path, [*(name for name, _ in children), *words]
    for name, child in children:
        yield from _walk(child, f"{path} {name}")
