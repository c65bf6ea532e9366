"""``lightning-spectral completion``: what a shell needs to complete verbs, options, recipes and files."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout, suppress

from lightning_spectral.cli.parser import VerbParser
from lightning_spectral.text import CommandError, did_you_mean

SHELLS = ("bash", "zsh")
_EPILOG = """\
bash:  lightning-spectral completion bash > ~/.local/share/bash-completion/completions/lightning-spectral
zsh:   lightning-spectral completion zsh > ~/.lightning-spectral.zsh   (then `source` that file in ~/.zshrc)"""

_SCRIPT = """\
# completion of lightning-spectral, made by `lightning-spectral completion`
_lightning_spectral() {
    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} words=""
    COMPREPLY=()
    if [[ $COMP_CWORD -eq 1 ]]; then
        words="@VERBS@ --help --version"
    else
        case "${COMP_WORDS[1]}" in
@CASES@
        esac
        if [[ $word != -* ]]; then
            words=""
            case "${COMP_WORDS[1]} $before" in
                "pretrain --config"|"sweep sweep"|"plan plan") words="@RECIPES@" ;;
                "schema schema") words="@SCHEMAS@" ;;
                "completion completion") words="bash zsh" ;;
            esac
        fi
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
    if [[ $COMP_CWORD -gt 1 && $word != -* ]]; then COMPREPLY+=($(compgen -f -- "$word")); fi
}
complete -o filenames -F _lightning_spectral lightning-spectral
"""


def main(argv: list[str]) -> int:
    """Print the completion of one shell; 0 done, 2 bad input."""
    parser = VerbParser(
        "completion",
        description="Print a script that lets your shell complete lightning-spectral's words.",
        epilog=_EPILOG,
    )
    parser.add_argument("shell", metavar="SHELL", help=" or ".join(SHELLS))
    shell = parser.parse_args(argv).shell
    if shell not in SHELLS:
        raise CommandError(
            f"no completion for the shell `{shell}`; {did_you_mean(shell, SHELLS, otherwise='there are')}"
        )
    if shell == "zsh":
        print("autoload -Uz bashcompinit && bashcompinit")
    print(script(), end="")
    return 0


def script() -> str:
    """The script, for the verbs, options and recipes of this version."""
    from lightning_spectral.cli import VERBS
    from lightning_spectral.records.json_schema import RECORDS
    from lightning_spectral.training.document import names

    cases = "\n".join(f'            {verb}) words="{" ".join(options_of(verb))}" ;;' for verb in VERBS)
    replaced = {
        "@VERBS@": " ".join(VERBS),
        "@CASES@": cases,
        "@RECIPES@": " ".join(names()),
        "@SCHEMAS@": " ".join(("recipe", *RECORDS)),
    }
    made = _SCRIPT
    for mark, text in replaced.items():
        made = made.replace(mark, text)
    return made


def options_of(verb: str) -> list[str]:
    """Options that the verb's help names, in its order."""
    from lightning_spectral.cli import main as front

    printed = io.StringIO()
    with redirect_stdout(printed), suppress(SystemExit):
        front([verb, "--help"])
    return list(dict.fromkeys(re.findall(r"(?<![\w-])--[a-z][\w-]*(?![\w.-])", printed.getvalue())))
