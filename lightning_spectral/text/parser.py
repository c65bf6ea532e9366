"""The parser of every verb: a mistake is one sentence with the option, the value seen and the remedy."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from lightning_spectral.text import CommandError, did_you_mean, one_line

_WANTED = {"int": "a whole number", "float": "a number", "Path": "a path"}


class VerbParser(argparse.ArgumentParser):
    """``argparse`` that raises :class:`CommandError` instead of printing a usage, and knows the options it has.

    Args:
        verb: ``fit``, ``report``, ...
        description: Of ``--help``.
        epilog: Of ``--help``, lines kept as they are.
        elsewhere: Options of other verbs and programs, with what to write here.
        more: Passed on; ``prog`` is what ``argparse`` gives to the parsers of sub-commands.
    """

    def __init__(
        self,
        verb: str = "",
        *,
        description: str = "",
        epilog: str | None = None,
        elsewhere: Mapping[str, str] | None = None,
        **more: Any,
    ) -> None:
        self._elsewhere = dict(elsewhere or {})
        more.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter if epilog else argparse.HelpFormatter)
        self._words: list[str] = []  # of the command line
        self._of_a_verb = "prog" in more  # the parser of a sub-command
        more |= {"allow_abbrev": False, "exit_on_error": False}
        super().__init__(more.pop("prog", f"lightning-spectral {verb}"), description=description, epilog=epilog, **more)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As ``argparse``'s.

        Raises:
            CommandError: If an option is unknown, or a value does not fit.
        """
        options, rest = self.parse_known_args(args, namespace)
        self.refuse_unknown(rest)
        return options

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As ``argparse``'s.

        Raises:
            CommandError: If a value does not fit.
        """
        self._words = [] if args is None else list(args)
        try:
            options, rest = super().parse_known_args(args, namespace)
        except argparse.ArgumentError as error:
            raise CommandError(self._sentence(error)) from error
        if self._of_a_verb:
            self.refuse_unknown(rest)
        return options, rest

    def error(self, message: str) -> NoReturn:
        """What ``argparse`` says of missing arguments.

        Raises:
            CommandError: Always.
        """
        found = re.search(r"arguments are required: (.+)", message)
        if not found:
            raise CommandError(f"{message}.")
        self._refuse_habits(self._words)
        name = found[1].split(", ")[0]
        given = [word.partition("=")[0] for word in self._words if word.startswith("--")]
        wrong = next((word for word in given if did_you_mean(word, [name]).endswith("?")), None)
        if wrong not in (None, *self._option_string_actions):
            raise CommandError(f"unknown option `{wrong}`; did you mean `{name}`?")
        raise CommandError(f"`{name}` is missing: {self._help(self._action(name.split('/')[-1]))}.")

    def refuse_unknown(self, words: Iterable[str], also: Iterable[str] = ()) -> None:
        """Words that are no option, and none of ``also`` (names without dashes).

        Raises:
            CommandError: With the nearest option that there is.
        """
        names = list(also)
        words = list(words)
        self._refuse_habits(words, names)
        for word in words:
            option = word.partition("=")[0]
            if not option.startswith("--"):
                if names:
                    continue  # the value of a recipe key
                raise CommandError(f"`{word}` is one word too many; {self.prog} --help shows what goes where.")
            if option[2:].partition(".")[0].removesuffix("+") not in names:
                known = [*self._option_string_actions, *names]
                raise CommandError(f"unknown option `{option}`; {nearest_option(option, known)}")

    def _refuse_habits(self, words: Iterable[str], also: Iterable[str] = ()) -> None:
        """Options that other verbs have, and ``--csv`` for ``--format csv``.

        Raises:
            CommandError: With what to write here.
        """
        style = self._option_string_actions.get("--format")
        styles = [str(choice) for choice in (style.choices or ())] if style is not None else []
        for word in words:
            option = word.partition("=")[0]
            if not option.startswith("--") or option in self._option_string_actions or option[2:] in also:
                continue
            if option in self._elsewhere:
                raise CommandError(f"unknown option `{word}`: {self._elsewhere[option]}")
            if option[2:] in styles:
                raise CommandError(f"unknown option `{word}`: write `--format {option[2:]}`.")

    @contextmanager
    def own_words(self, *kinds: type[Exception]) -> Iterator[None]:
        """Turns errors into sentences of this verb: what the code calls `last` is `--last` here.

        Args:
            kinds: Kinds of errors that are bad input; :class:`CommandError` always is.
        """
        try:
            yield
        except Exception as error:
            if not isinstance(error, (CommandError, *kinds)):
                raise
            raise CommandError(re.sub(r"`(\w+)`", self._as_option, one_line(error))) from error

    def _as_option(self, found: re.Match[str]) -> str:
        for option in (f"--{found[1]}", f"--{found[1].replace('_', '-')}"):
            if option in self._option_string_actions:
                return f"`{option}`"
        return found[0]

    def _sentence(self, error: argparse.ArgumentError) -> str:
        """An ``argparse`` error in our words."""
        if "are required" in error.message:  # Python 3.13 raises what earlier ones hand to `error`
            self.error(error.message)
        name = (error.argument_name or "").split("/")[-1]
        action = self._action(name)
        value = next(iter(re.findall(r"(?:value|choice): '(.*?)'", error.message)), None)
        if action is not None and action.choices is not None and value is not None:
            known = [str(choice) for choice in action.choices]
            hint = did_you_mean(value, known, otherwise="")
            hint = f"; {hint}" if hint.endswith("?") else "."
            return f"`{name}` must be {'one of ' if len(known) > 1 else ''}{', '.join(known)}, got {value}{hint}"
        kind = re.match(r"invalid (\w+) value", error.message)
        if kind and value is not None:
            return f"`{name}` must be {_WANTED.get(kind[1], kind[1])}, got {value}."
        if error.message.startswith("expected"):
            wanted = _WANTED.get(getattr(action.type, "__name__", ""), "") if action is not None else ""
            after = self._words[self._words.index(name) + 1 :][:1] if name in self._words else []
            if after and re.match(r"-\d", after[0]):
                return f"`{name}` has no value: `{after[0]}` reads as an option, write `{name}={after[0]}`."
            return f"`{name}` has no value: {self._help(action)}" + (f" ({wanted})." if wanted else ".")
        return f"`{name}` {error.message}."

    def _action(self, name: str) -> argparse.Action | None:
        for action in self._actions:
            if name in action.option_strings or name in (action.metavar, action.dest):
                return action
        return None

    def _help(self, action: argparse.Action | None) -> str:
        if action is None:
            return "give it"
        if isinstance(action, argparse._SubParsersAction):
            return "give one of " + ", ".join(action.choices)
        text = self._get_formatter()._expand_help(action) if action.help else ""
        choices = ", ".join(map(str, action.choices or ()))
        return text or (f"give one of {choices}" if choices else "give a value")


def nearest_option(wrong: str, known: Iterable[str]) -> str:
    """A suggestion, by what comes after the dashes: those that all options share make no two alike."""
    names = [name.removeprefix("--") for name in known if not re.fullmatch("-[a-z]", name)]
    close = did_you_mean(wrong.removeprefix("--"), names, prefix="--")
    return close if close.endswith("?") else "`--help` lists all."


def at_least(low: float, kind: Callable[[str], Any] = int, *, itself: bool = True) -> Callable[[str], Any]:
    """The type of an option whose value must not be smaller than ``low``, or (``itself``) not even that."""

    def read(text: str) -> Any:
        wanted = f"{_WANTED[kind.__name__]} {'>=' if itself else '>'} {low:g}"
        try:
            value = kind(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text}") from error
        if not (value >= low if itself else value > low):
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text}")
        return value

    read.__name__ = kind.__name__
    return read
